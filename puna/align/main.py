"""`puna align`: teach a model what people prefer, without a reward model."""

import math
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from puna.align.config import AlignConfig
from puna.align.learn import PreferenceData, check_processes, learn, open_data, preference_paths
from puna.align.losses import DPO
from puna.align.preference import PreferenceWatch, preference_loss, token_logprobs
from puna.batches.preference_rows import PreferenceRows
from puna.config import to_plain
from puna.model.transformer import Transformer
from puna.parallel.mesh import is_first_process, joined_processes
from puna.peft.tuning import adapt, save_tuned
from puna.runtime.devices import open_device
from puna.runtime.files import atomic_path, read_json, write_json
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import progress
from puna.train.checks import check_row_length, open_chat_tokenizer
from puna.weights.load import load_model

__all__ = ["AlignConfig", "main"]

_LN2_TOLERANCE = 0.01
"""How far the first loss of DPO may be from ln 2: bfloat16 products of rows packed otherwise differ by less."""


def main(config: AlignConfig) -> None:
    """Check the preferences, ask the reference model, train, and write the model or adapter directory."""
    with joined_processes(config.train.device):
        check_processes(config)
        _align(config)


def _align(config: AlignConfig) -> None:
    train = config.train
    tokenizer = open_chat_tokenizer(config.model, config.chat_template)
    model = load_model(config.model, dtype=torch.float32)
    check_row_length(train, model)
    data = open_data(config, model, tokenizer, judged=config.loss.judged, formatting=config.formatting)
    if config.loss.needs_reference:
        _ask_reference(config, model, data.all_rows)
        if isinstance(config.loss, DPO) and config.reference is None:
            _check_first_loss(config, model, data)
    training = adapt(model, config.peft, train.steps, train.seed)
    loss = preference_loss(config.loss, config.nll_weight)
    watch = None if data.held_out is None else PreferenceWatch(config.loss, data.held_out, train.validation_rows)

    paths = [config.model, *preference_paths(config), *([] if config.reference is None else [config.reference])]
    inputs = {str(path): content_hash(path) for path in paths}
    facts = learn(model, data, loss, config, inputs, training, watch)
    if is_first_process():
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
        if is_first_process():
            facts.unlink(missing_ok=True)
            with atomic_path(values) as path, path.open("wb") as file:
                np.save(file, rows.reference)
            write_json(facts, made_of)


@torch.no_grad()
def reference_logprobs(model: Transformer, rows: PreferenceRows) -> NDArray[np.float32]:
    """The log-probability of every token's label, document after document; 0 where there is no label.

    Several processes share the rows, and all get the whole.
    """
    device = model.embedding.weight.device
    found = np.zeros(int(rows.shards.lengths().sum()), dtype=np.float32)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = islice(rows.in_order(), rank, None, size)
    with progress("Asking the reference model", total=len(range(rank, rows.rows_per_epoch, size))) as advance:
        for batch, places in own:
            found[places] = token_logprobs(model, batch.to(device))[0, : len(places)].cpu().numpy()
            advance()
    if dist.is_initialized():
        dist.all_reduce(torch.from_numpy(found))  # each token's is 0 on all processes but one
    return found


@torch.no_grad()
def _check_first_loss(config: AlignConfig, model: Transformer, data: PreferenceData) -> None:
    """DPO's loss at the reference itself is ln 2, if tokens, masks and packing are the same on both sides."""
    batch = data.rows.batch(range(4)).to(model.embedding.weight.device)
    part = preference_loss(config.loss)(model, batch)
    first = part.total.item() / part.count
    assert abs(first - math.log(2)) < _LN2_TOLERANCE, f"the first loss is {first}, not ln 2"
