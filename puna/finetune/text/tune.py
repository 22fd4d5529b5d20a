"""Training on a task whose answer is a text: examples packed side by side, only the targets as targets, and answers
generated greedily to measure on."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from puna.batches.packing import PackedRows
from puna.batches.shards import ShardWriter, TokenShards
from puna.config import to_plain
from puna.finetune.answers import answer
from puna.finetune.config import FinetuneConfig
from puna.finetune.learn import learn
from puna.finetune.regularize.agreement import token_divergence
from puna.finetune.regularize.safeguards import Safeguards
from puna.finetune.selection import LOSS, Judge, check_selection
from puna.finetune.text.task import PERPLEXITY, TextExample, TextTask
from puna.model.transformer import Transformer
from puna.peft.tuning import adapt, save_tuned
from puna.runtime.files import atomic_path, write_jsonl, write_text
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.load import load_tokenizer
from puna.train.checks import check_row_length
from puna.train.loss import causal_lm_loss
from puna.weights.load import load_model

_ROWS_AT_ONCE = 32
_SHOWN = 10


def tune_text(config: FinetuneConfig, task: TextTask, judge: Judge | None = None) -> None:
    """Read the data, train, and write the model or adapter directory, report.txt and answers.jsonl."""
    assert config.data is not None
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, dtype=torch.float32)
    check_row_length(config.train, model)
    train = config.train
    opened = task.open(config.data, tokenizer, train.row_length)
    check_selection(config.selection, bool(opened.held_out), [LOSS, *task.metrics, *config.earlier_metrics])
    rows = _pack(opened.train, tokenizer, config, "train")
    held_out = _pack(opened.held_out, tokenizer, config, "held_out") if opened.held_out else None
    say(
        f"{len(opened.train):,} examples to learn from in {rows.rows_per_epoch:,} rows, {len(opened.held_out):,} held "
        f"out; {rows.shards.num_targets:,} of {rows.shards.num_tokens:,} tokens supervised; "
        f"{train.steps * train.batch_rows / rows.rows_per_epoch:.2f} passes"
    )
    training = adapt(model, config.peft, config.train.steps, config.train.seed)

    def measure(model: Transformer, step: int) -> dict[str, float]:
        if held_out is None:
            return {}
        asked = opened.held_out[: task.validation_examples]
        answers = _answers(model, tokenizer, asked, task.target_tokens, train.row_length)
        return {PERPLEXITY: perplexity(model, held_out), **task.scores(asked, answers)}

    safeguards = Safeguards(config, model, tokenizer, training)
    plain_loss = partial(causal_lm_loss, z_loss=train.z_loss)
    training_rows, loss = safeguards.around_tokens(rows, plain_loss, token_divergence)
    inputs = {str(path): content_hash(path) for path in (config.model, *opened.files)} | safeguards.inputs
    facts = learn(
        model,
        training_rows,
        loss,
        config,
        safeguards,
        inputs,
        held_out=held_out,
        measure=measure,
        judge=judge,
    )
    if held_out is not None:
        answers = _answers(model, tokenizer, opened.held_out, task.target_tokens, train.row_length)
        metrics = {PERPLEXITY: perplexity(model, held_out), **task.scores(opened.held_out, answers)}
        facts |= metrics
        _write_report(config.output, metrics, opened.held_out, answers)
    facts |= safeguards.results()
    manifest = Manifest("finetune", to_plain(config), inputs, facts)
    written = save_tuned(
        model,
        config.peft,
        config.output,
        base_model=config.model,
        tokenizer=tokenizer,
        dtype=config.dtype,
        manifest=manifest,
    )
    safeguards.save_fisher(rows, plain_loss, written)


def _pack(examples: Sequence[TextExample], tokenizer: Tokenizer, config: FinetuneConfig, name: str) -> PackedRows:
    destination = config.output / "tokens" / name
    with atomic_path(destination) as folder:
        folder.mkdir()
        with ShardWriter(folder, tokenizer.vocab_size) as writer:
            for number, example in enumerate(examples):
                writer.add(
                    example.prompt_ids + example.target_ids,
                    str(number),
                    len((example.prompt + example.target).encode()),
                    [0] * len(example.prompt_ids) + [1] * len(example.target_ids),
                )
        Manifest("finetune", {}, {}, writer.results(tokenizer.hash)).write(folder)
    shards = TokenShards(destination, tokenizer.hash)
    return PackedRows(shards, config.train.row_length, config.train.seed, "whole", tokenizer.pad_id)


def _answers(
    model: Transformer, tokenizer: Tokenizer, examples: Sequence[TextExample], max_tokens: int, max_context: int
) -> list[str]:
    """What the model makes of each prompt, without white space around."""
    prompts = [example.prompt_ids for example in examples]
    return [each.text.strip() for each in answer(model, tokenizer, prompts, max_tokens, max_context)]


@torch.no_grad()
def perplexity(model: Transformer, rows: PackedRows) -> float:
    """e to the mean negative log-likelihood of the supervised tokens of all rows."""
    device = model.embedding.weight.device
    total, count = 0.0, 0
    for start in range(0, rows.rows_per_epoch, _ROWS_AT_ONCE):
        chosen = range(start, min(start + _ROWS_AT_ONCE, rows.rows_per_epoch))
        part = causal_lm_loss(model, rows.batch(chosen).to(device))
        total += part.total.item()
        count += part.count
    return math.exp(total / count)


def _write_report(
    output: Path, metrics: Mapping[str, float], examples: Sequence[TextExample], answers: Sequence[str]
) -> None:
    pairs = list(zip(examples, answers, strict=True))
    lines = [f"{name.removeprefix('validation/')} {value:.4f}" for name, value in metrics.items()]
    lines.append(f"on {len(pairs):,} held-out examples, of which the first:")
    for example, text in pairs[:_SHOWN]:
        lines += ["", f"prompt     {example.prompt!r}", f"reference  {example.target!r}", f"answer     {text!r}"]
    report = "\n".join(lines)
    write_text(output / "report.txt", report + "\n")
    say(report)
    write_jsonl(
        output / "answers.jsonl",
        ({"prompt": e.prompt, "reference": e.target, "answer": text} for e, text in pairs),
    )
