"""One plain training loop, and the set-up around it that every stage shares."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from puna.batches.mixture import MixedRows
from puna.batches.packing import PackedRows
from puna.model.accounting import training_flops_per_token
from puna.model.transformer import Transformer
from puna.runtime.devices import open_device, peak_flops
from puna.runtime.progress import duration, progress, say
from puna.train.checkpoint import restore, save_checkpoint
from puna.train.config import TrainConfig
from puna.train.loss import Loss
from puna.train.metrics import MetricsWriter, read_metrics
from puna.train.optimizer import build_optimizers
from puna.train.state import TrainState
from puna.train.step import train_step

_FREE_TO_CHANGE = {
    "micro_batch_rows",
    "device",
    "num_threads",
    "compile",
    "log_every",
    "validate_every",
    "validation_rows",
    "checkpoint_every",
    "keep_checkpoints",
    "tensorboard",
    "wandb_project",
}
"""Settings that a resumed run may change, because they do not move the loss (beyond rounding)."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run measured, over all its parts where it was interrupted."""

    steps: int
    """Optimiser steps."""
    train_loss: float
    """Mean over the last logged interval, in nats per target."""
    validation_loss: float | None
    """On the held-out rows at the end, in nats per target."""
    tokens_per_second: float
    """Median over the logged intervals."""
    model_flops_utilisation: float
    """Share of the device's peak (`puna.runtime.devices.peak_flops`), same median."""
    seconds: float
    """Wall time of the last part of the run."""

    def __str__(self) -> str:
        held_out = "" if self.validation_loss is None else f", held-out loss {self.validation_loss:.3f}"
        return (
            f"{self.steps:,} steps in {duration(self.seconds)}: loss {self.train_loss:.3f}{held_out} nats per token, "
            f"{self.tokens_per_second:,.0f} tokens/s, {self.model_flops_utilisation:.0%} of peak FLOP/s"
        )


def fit(
    model: Transformer,
    rows: PackedRows | MixedRows,
    loss: Loss,
    config: TrainConfig,
    output: Path,
    run: dict[str, Any],
    held_out: PackedRows | None = None,
) -> TrainResult:
    """Train `model` in place until `config.steps`, going on from the newest checkpoint in `output` if there is one.

    Args:
        model: float32 parameters, on any device; it is moved.
        rows: the training data.
        loss: what to minimise.
        config: the run.
        output: gets checkpoints/, metrics.jsonl and tensorboard/.
        run: plain values that define the data and model, so that a checkpoint of something else is refused.
        held_out: rows to measure the loss on, one epoch of them.

    Raises:
        InputError: a checkpoint of another run, or divergence.
    """
    started = time.monotonic()
    device = open_device(config.device, config.num_threads)
    prepare(model, config, device)
    state = TrainState(model, build_optimizers(model, config.optimizer))
    defining = run | {"train": {k: v for k, v in run["train"].items() if k not in _FREE_TO_CHANGE}}
    checkpoints = output / "checkpoints"
    if restore(state, checkpoints, defining):
        say(f"Going on from step {state.step:,} of {config.steps:,}.")

    flops_per_token = training_flops_per_token(model.config, mean_context=(config.row_length + 1) / 2)
    peak = peak_flops(device, model.compute_dtype or torch.float32)
    losses: list[float] = []
    note = ""
    with (
        MetricsWriter(
            output, step=state.step, tensorboard=config.tensorboard, wandb_project=config.wandb_project, config=run
        ) as metrics,
        progress("Training", total=config.steps - state.step) as advance,
    ):
        clock, clock_step = time.monotonic(), state.step
        while state.step < config.steps:
            first = state.step * config.batch_rows
            batch = rows.batch(range(first, first + config.batch_rows))
            micro_batches = [part.to(device) for part in batch.split(config.micro_batch_rows)]
            result = train_step(state, micro_batches, loss, config)
            losses.append(result.loss)
            last = state.step == config.steps
            point = {}
            if last or state.step % config.log_every == 0:
                tokens = (state.step - clock_step) * config.batch_rows * config.row_length
                speed = tokens / (time.monotonic() - clock)
                point = {
                    "train/loss": sum(losses) / len(losses),
                    "train/grad_norm": result.grad_norm,
                    "train/learning_rate": result.learning_rate,
                    "speed/tokens_per_second": speed,
                    "speed/model_flops_utilisation": speed * flops_per_token / peak,
                }
                losses.clear()
                note = (
                    f"loss {point['train/loss']:.3f}, {speed:,.0f} tokens/s, MFU {speed * flops_per_token / peak:.0%}"
                )
            if held_out is not None and (last or _due(state.step, config.validate_every)):
                point["validation/loss"] = mean_loss(model, held_out, loss, config, device)
            if point:
                metrics.write(state.step, point)
            if last or _due(state.step, config.checkpoint_every):
                save_checkpoint(state, checkpoints, defining, config.keep_checkpoints)
            if point:
                clock, clock_step = time.monotonic(), state.step
            advance(1, note)
    result_of_run = _summarise(read_metrics(output / "metrics.jsonl"), time.monotonic() - started)
    say(str(result_of_run))
    return result_of_run


def prepare(model: Transformer, config: TrainConfig, device: torch.device) -> None:
    """Apply what training changes about a model from outside, in this order: device, precision, compilation."""
    model.to(device)
    model.train()
    model.compute_dtype = torch.bfloat16 if config.precision == "bf16" else None
    if config.compile:
        for layer in model.layers:
            layer.compile()


@torch.no_grad()
def mean_loss(model: Transformer, rows: PackedRows, loss: Loss, config: TrainConfig, device: torch.device) -> float:
    """Loss per unit over the first epoch of `rows`, at most `config.validation_rows` of them."""
    model.eval()
    total, count = 0.0, 0
    limit = min(rows.rows_per_epoch, config.validation_rows)
    for start in range(0, limit, config.micro_batch_rows):
        batch = rows.batch(range(start, min(limit, start + config.micro_batch_rows)))
        part = loss(model, batch.to(device))
        total += part.total.item()
        count += part.count
    model.train()
    return total / max(1, count)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _summarise(points: list[dict[str, Any]], seconds: float) -> TrainResult:
    logged = [point for point in points if "train/loss" in point]
    validated = [point["validation/loss"] for point in points if "validation/loss" in point]
    return TrainResult(
        steps=logged[-1]["step"],
        train_loss=logged[-1]["train/loss"],
        validation_loss=validated[-1] if validated else None,
        tokens_per_second=statistics.median(point["speed/tokens_per_second"] for point in logged),
        model_flops_utilisation=statistics.median(point["speed/model_flops_utilisation"] for point in logged),
        seconds=seconds,
    )
