"""Training of a head on a task's examples, or of several at once, and what is written in the end."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from puna.batches.packing import TokenBatch
from puna.config import to_plain
from puna.finetune.config import FinetuneConfig
from puna.finetune.learn import learn
from puna.finetune.regularize.agreement import Seen
from puna.finetune.regularize.safeguards import Safeguards
from puna.finetune.selection import LOSS, Judge, check_selection
from puna.finetune.tasks.head import open_tasks, predict
from puna.finetune.tasks.several import OpenSeveral
from puna.finetune.tasks.task import ExampleBatch, ExampleRows
from puna.model.transformer import Transformer
from puna.peft.apply import merge, why_not_merged
from puna.peft.heads import Attention, HeadSpec, add_head, head_logits, load_trunk, save_head_adapter, save_head_model
from puna.peft.tuning import adapt, has_adapters
from puna.runtime.errors import InputError
from puna.runtime.files import write_text
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.load import load_tokenizer
from puna.train.checks import check_row_length
from puna.train.loss import LossSum


def tune_task(config: FinetuneConfig, judge: Judge | None = None) -> None:
    """Read the data, put the head on, train, and write a model directory that `transformers` loads; several for
    several tasks."""
    tokenizer = load_tokenizer(config.model)
    if tokenizer.bos_id is None:
        raise InputError(f"The tokenizer in {config.model} has no BOS token, with which every example begins.")
    model = load_trunk(config.model, dtype=torch.float32)
    check_row_length(config.train, model)
    opened = open_tasks(config, tokenizer)
    spec, train = opened.head, config.train
    check_selection(config.selection, bool(opened.held_out), [LOSS, *opened.metrics, *config.earlier_metrics])
    say(
        f"{len(opened.train):,} examples to learn from, {len(opened.held_out):,} held out; {len(spec.labels)} outputs; "
        f"{train.steps * train.batch_rows / len(opened.train):.2f} passes"
    )
    safeguards = Safeguards(config, model, tokenizer, adapt(model, config.peft, config.train.steps, config.train.seed))
    add_head(model, spec, train.seed)

    def loss(model: Transformer, batch: TokenBatch) -> LossSum:
        assert isinstance(batch, ExampleBatch)
        logits_BTC = head_logits(model, batch, spec.module, opened.attention)
        return LossSum(opened.loss(logits_BTC, batch), batch.num_targets)

    def divergence(seen: Seen, batch: TokenBatch) -> Tensor:
        assert isinstance(batch, ExampleBatch)
        return opened.divergence(seen.result.float(), batch)

    def measure(model: Transformer, step: int) -> dict[str, float]:
        logits = predict(model, opened.held_out, spec.module, opened.attention, tokenizer.pad_id)
        return opened.measure(logits)[0]

    paths = [config.model, *(path for data in config.task_data for path in (data.train, data.held_out) if path)]
    inputs = {str(path): content_hash(path) for path in paths} | safeguards.inputs
    rows = opened.rows(tokenizer.pad_id, train.seed)
    held_out = ExampleRows(opened.held_out, tokenizer.pad_id, 0) if opened.held_out else None
    training_rows, safeguarded = safeguards.around_task(rows, loss, divergence, opened.units_per_row)
    facts = learn(
        model,
        training_rows,
        safeguarded,
        config,
        safeguards,
        inputs,
        held_out=held_out,
        measure=measure,
        judge=judge,
    )
    if opened.held_out:
        logits = predict(model, opened.held_out, spec.module, opened.attention, tokenizer.pad_id)
        metrics, report = opened.measure(logits)
        facts |= metrics
        write_text(config.output / "report.txt", report)
        say(report)
    facts |= safeguards.results()
    manifest = Manifest("finetune", to_plain(config), inputs, facts)
    written = config.output / ("adapter" if why_not_merged(model) else "model")
    if written.name == "model":
        merge(model)
    if isinstance(opened, OpenSeveral):
        for each in config.tasks:
            # As the manifest of that task alone would have it, by which its texts are read.
            alone = {"task": to_plain(each.task), "data": to_plain(each.data)}
            own = replace(manifest, config=manifest.config | alone)
            with opened.only(model, each.name) as own_spec:
                _write(model, config, own_spec, opened.attention, tokenizer, written / each.name, own)
    else:
        _write(model, config, spec, opened.attention, tokenizer, written, manifest)
    say(f"Wrote {written}")
    safeguards.save_fisher(rows, loss, written)


def _write(
    model: Transformer,
    config: FinetuneConfig,
    spec: HeadSpec,
    attention: Attention,
    tokenizer: Tokenizer,
    directory: Path,
    manifest: Manifest,
) -> None:
    """A model directory, or an adapter directory where there are still adapters."""
    if has_adapters(model):
        assert config.peft is not None
        save_head_adapter(model, config.peft, spec, attention, tokenizer, directory, config.model, manifest)
    else:
        save_head_model(model, spec, attention, tokenizer, directory, getattr(torch, config.dtype), manifest)
