"""`puna align`: teach a model what people prefer, without a reward model."""

import math

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from puna.align.config import AlignConfig
from puna.align.learn import learn, open_both
from puna.align.losses import DPO
from puna.align.preference import PreferenceWatch, preference_loss, token_logprobs
from puna.align.rows import check_row_length, open_tokenizer
from puna.batches.preference_rows import PreferenceRows
from puna.config import to_plain
from puna.model.transformer import Transformer
from puna.parallel.mesh import joined_processes
from puna.peft.tuning import adapt, save_tuned
from puna.runtime.devices import open_device
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, read_json, write_json
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import progress
from puna.weights.load import load_model

__all__ = ["AlignConfig", "main"]

_LN2_TOLERANCE = 0.01
"""How far the first loss of DPO may be from ln 2: bfloat16 products of rows packed otherwise differ by less."""


def main(config: AlignConfig) -> None:
    """Check the preferences, ask the reference model, train, and write the model or adapter directory."""
    with joined_processes(config.train.device):
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise InputError("Alignment works on one process; start the command without torchrun.")
        _align(config)


def _align(config: AlignConfig) -> None:
    train = config.train
    tokenizer = open_tokenizer(config.model, config.chat_template)
    model = load_model(config.model, dtype=torch.float32)
    check_row_length(train.row_length, model)
    rows, held_out = open_both(config, tokenizer, judged=config.loss.judged, formatting=config.formatting)
    if config.loss.needs_reference:
        _ask_reference(config, model, [each for each in (rows, held_out) if each is not None])
        if isinstance(config.loss, DPO) and config.reference is None:
            _check_first_loss(config, model, rows)
    training = adapt(model, config.peft, train.steps, train.seed)
    loss = preference_loss(config.loss, config.nll_weight)
    watch = None if held_out is None else PreferenceWatch(config.loss, held_out, train.validation_rows)

    paths = [config.model, config.preferences, config.held_out_preferences, config.reference]
    inputs = {str(path): content_hash(path) for path in paths if path is not None}
    facts = learn(model, rows, loss, config, inputs, training, held_out, watch)
    save_tuned(
        model,
        config.peft,
        config.output,
        base_model=config.model,
        tokenizer=tokenizer,
        dtype=config.dtype,
        manifest=Manifest("align", to_plain(config), inputs, facts),
    )


def _ask_reference(config: AlignConfig, model: Transformer, asked: list[PreferenceRows]) -> None:
    """Give rows the reference model's log-probabilities, from the file beside their tokens if it has them."""
    directory = config.reference or config.model
    settings = {"model": content_hash(directory), "precision": config.train.precision}
    reference: Transformer | None = None
    for rows in asked:
        values = rows.shards.directory.with_name(f"{rows.shards.directory.name}-reference.npy")
        made_of = settings | {"tokens": content_hash(rows.shards.directory)}
        facts = values.with_suffix(".json")
        if values.exists() and facts.exists() and read_json(facts) == made_of:
            rows.reference = np.load(values, mmap_mode="r")
            continue
        if reference is None:
            reference = model if config.reference is None else load_model(config.reference, dtype=torch.float32)
            reference.to(open_device(config.train.device, config.train.num_threads)).eval()
            reference.compute_dtype = None if config.train.precision == "fp32" else torch.bfloat16
        rows.reference = reference_logprobs(reference, rows)
        facts.unlink(missing_ok=True)
        with atomic_path(values) as path, path.open("wb") as file:
            np.save(file, rows.reference)
        write_json(facts, made_of)


@torch.no_grad()
def reference_logprobs(model: Transformer, rows: PreferenceRows) -> NDArray[np.float32]:
    """The log-probability of every token's label, document after document; 0 where there is no label."""
    device = model.embedding.weight.device
    lengths = rows.shards.lengths()
    starts = np.concatenate(([0], np.cumsum(lengths)))
    found = np.zeros(starts[-1], dtype=np.float32)
    with progress("Asking the reference model", total=rows.rows_per_epoch) as advance:
        for batch, documents in rows.in_order():
            logprobs_T = token_logprobs(model, batch.to(device))[0].cpu().numpy()
            at = 0
            for document in documents:
                length = int(lengths[document])
                found[starts[document] : starts[document] + length] = logprobs_T[at : at + length]
                at += length
            advance()
    return found


@torch.no_grad()
def _check_first_loss(config: AlignConfig, model: Transformer, rows: PreferenceRows) -> None:
    """DPO's loss at the reference itself is ln 2, if tokens, masks and packing are the same on both sides."""
    batch = rows.batch(range(min(4, rows.rows_per_epoch))).to(model.embedding.weight.device)
    part = preference_loss(config.loss)(model, batch)
    first = part.total.item() / part.count
    assert abs(first - math.log(2)) < _LN2_TOLERANCE, f"the first loss is {first}, not ln 2"
