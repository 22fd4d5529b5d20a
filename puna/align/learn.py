"""The training on preferences, the same for reward models and for what is aligned without one."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from puna.align.rows import open_rows
from puna.align.watch import HeldOutWatch
from puna.batches.preference_rows import PreferenceRows
from puna.config import to_plain
from puna.model.transformer import Transformer
from puna.peft.method import Training
from puna.runtime.files import write_text
from puna.runtime.progress import say
from puna.tokenizer.base import Tokenizer
from puna.train.config import TrainConfig
from puna.train.loop import fit
from puna.train.loss import Loss, with_penalty


class PreferenceConfig(Protocol):
    """The settings that both have."""

    @property
    def output(self) -> Path: ...
    @property
    def preferences(self) -> Path: ...
    @property
    def held_out_preferences(self) -> Path | None: ...
    @property
    def leave_out(self) -> bool: ...
    @property
    def train(self) -> TrainConfig: ...


def open_both(
    config: PreferenceConfig, tokenizer: Tokenizer, *, judged: bool, formatting: bool
) -> tuple[PreferenceRows, PreferenceRows | None]:
    """Rows to learn from, and those held out; see `open_rows`."""
    train = config.train
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "row_length": train.row_length,
        "judged": judged,
        "formatting": formatting,
        "leave_out": config.leave_out,
    }
    rows = open_rows(config.preferences, config.output / "tokens" / "train", seed=train.seed, **options)
    held_out = None
    if config.held_out_preferences is not None:
        held_out = open_rows(config.held_out_preferences, config.output / "tokens" / "held_out", seed=0, **options)
    say(
        f"{rows.num_groups:,} prompts in {rows.rows_per_epoch:,} rows; "
        f"{train.steps * train.batch_rows / rows.rows_per_epoch:.2f} passes"
    )
    return rows, held_out


def learn(
    model: Transformer,
    rows: PreferenceRows,
    loss: Loss,
    config: PreferenceConfig,
    inputs: Mapping[str, str],
    training: Training,
    held_out: PreferenceRows | None,
    watch: HeldOutWatch | None,
) -> dict[str, Any]:
    """Train `model` in place, and leave it for inference; writes report.txt where there is a watch.

    Args:
        inputs: content hashes of what the training follows from.
        training: what the method of `peft` asks for.

    Returns:
        What was measured, for the manifest.
    """
    if training.penalty is not None:
        loss = with_penalty(loss, training.penalty)
    run = to_plain(config) | {"inputs": dict(inputs)}
    extra: dict[str, Any] = {"rates": training.rates, "after_update": training.after_update}
    result = fit(model, rows, loss, config.train, config.output, run, held_out, watch, **extra)
    model.compute_dtype = None
    model.eval()
    facts: dict[str, Any] = asdict(result)
    if watch is not None:
        measured, report = watch.of(model)
        facts |= measured
        write_text(config.output / "report.txt", report + "\n")
        say(report)
    return facts
