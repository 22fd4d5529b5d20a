"""One plain training loop, and the set-up around it that every stage shares."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from puna.batches.packing import EpochRows, Rows, TokenBatch
from puna.kernels.layers import use_native_layers
from puna.model.accounting import training_flops_per_token
from puna.model.transformer import Transformer
from puna.parallel.apply import Layout, StepShape, parallelize
from puna.parallel.gather import gather_parameters
from puna.parallel.mesh import Mesh, build_mesh, is_first_process, threads_of_each_process, wait_for_all
from puna.runtime.devices import open_device, peak_flops
from puna.runtime.errors import InputError
from puna.runtime.progress import duration, progress, say
from puna.train.anomaly import VERDICTS
from puna.train.checkpoint import Checkpoints
from puna.train.config import TrainConfig
from puna.train.corruption import compare_copies, compute_twice
from puna.train.ledger import Goodput, Ledger, read_goodput
from puna.train.loss import Loss
from puna.train.metrics import MetricsWriter, read_metrics
from puna.train.optimizer import build_optimizers
from puna.train.quarantine import BadBatch, Quarantine, next_good
from puna.train.ranks import gather
from puna.train.recovery import Recovery, Trouble
from puna.train.state import TrainState
from puna.train.step import StepResult, own_sum_of_losses, sum_of_losses, train_step
from puna.train.straggler import slow_rank, timed_step
from puna.train.watchdog import Watchdog

FREE_TO_CHANGE = {
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
    "parallel",
    "faults",
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
    effective_training_share: float
    """Share of the run's whole wall time that went into steps that count; ledger.jsonl says where the rest went."""

    def __str__(self) -> str:
        held_out = "" if self.validation_loss is None else f", held-out loss {self.validation_loss:.3f}"
        return (
            f"{self.steps:,} steps in {duration(self.seconds)}: loss {self.train_loss:.3f}{held_out}, "
            f"{self.tokens_per_second:,.0f} tokens/s, {self.model_flops_utilisation:.0%} of peak FLOP/s"
        )


class Watch(Protocol):
    """Looks on at validations: measures more, keeps what is best, ends the training."""

    def measure(
        self, state: TrainState, point: Mapping[str, float], earlier: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        """What there is to measure beside `point`, which a validation measured, and `earlier` ones, oldest first."""
        ...

    def ends(self, points: Sequence[Mapping[str, float]]) -> bool:
        """Whether training is over after these points of curves, the oldest first; decided by them alone, so that an
        interrupted run ends where another would."""
        ...


def fit(
    model: Transformer,
    rows: Rows,
    loss: Loss,
    config: TrainConfig,
    output: Path,
    run: dict[str, Any],
    held_out: EpochRows | None = None,
    watch: Watch | None = None,
    *,
    rates: Mapping[str, float] | None = None,
    after_update: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train `model` in place until `config.steps`, going on from the newest checkpoint in `output` if there is one.

    Where torchrun started several processes, each of them has to call, with the same arguments. In the end the first
    one has the whole model, to be written; `puna.parallel.gather` says more.

    Args:
        model: float32 parameters, on any device; it is moved.
        rows: the training data.
        loss: what to minimise.
        config: the run.
        output: gets checkpoints/, metrics.jsonl, ledger.jsonl and tensorboard/; quarantine/ where batches had to be
            left out, and stacks/ where training stood still.
        run: plain values that define the data and model, so that a checkpoint of something else is refused.
        held_out: rows to measure the loss on, one epoch of them.
        watch: called after each validation.
        rates: name of a parameter -> factor of its learning rate, where it is not 1.
        after_update: called with the step's number after each update, when the gradients are still there.

    Raises:
        InputError: a layout that does not fit, a checkpoint of another run, divergence, or a broken machine.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        ledger = stack.enter_context(Ledger(output, writes=is_first_process()))
        watchdog = stack.enter_context(Watchdog(config.faults.hang_timeout_seconds, output / "stacks"))
        device = open_device(config.device, config.num_threads or threads_of_each_process())
        mesh = build_mesh(config.parallel, device)
        layout = prepare(model, config, device, mesh)
        optimizers = build_optimizers(model, config.optimizer, rates)
        state = TrainState(model, optimizers, layout=layout, after_update=after_update)
        defining = run | {"train": {k: v for k, v in run["train"].items() if k not in FREE_TO_CHANGE}}
        checkpoints = stack.enter_context(Checkpoints(output / "checkpoints", defining, config.keep_checkpoints))
        quarantine = Quarantine(output / "quarantine", writes=is_first_process())
        recovery = Recovery(state, checkpoints, quarantine, ledger, config.faults.max_rollbacks)
        if checkpoints.restore(state):
            say(f"Going on from step {state.step:,} of {config.steps:,}.")
        ledger.went_back(state.step)
        job = _Job(
            state=state,
            rows=rows,
            loss=loss,
            config=config,
            device=device,
            held_out=held_out,
            watch=watch,
            output=output,
            run=run,
            checkpoints=checkpoints,
            quarantine=quarantine,
            ledger=ledger,
            watchdog=watchdog,
            flops_per_token=training_flops_per_token(model.config, mean_context=(config.row_length + 1) / 2),
            peak_flops=peak_flops(device, model.compute_dtype or torch.float32) * mesh.num_processes,
        )
        while trouble := _train(job):
            recovery.recover(trouble, rows, config.batch_rows)
        with ledger.during("checkpoint"):
            failure = checkpoints.finish()
        if failure:
            raise InputError(
                f"The last checkpoint could not be written to {checkpoints.directory} ({failure}). Make room; the same "
                "command goes on from the one before."
            )
    wait_for_all()
    gather_parameters(model)
    goodput = read_goodput(output)
    result = _summarise(read_metrics(output / "metrics.jsonl"), goodput, time.monotonic() - started)
    say(str(result))
    say(str(goodput))
    return result


@dataclass(frozen=True)
class _Job:
    """All that the loop needs."""

    state: TrainState
    rows: Rows
    loss: Loss
    config: TrainConfig
    device: torch.device
    held_out: EpochRows | None
    watch: Watch | None
    output: Path
    run: dict[str, Any]
    checkpoints: Checkpoints
    quarantine: Quarantine
    ledger: Ledger
    watchdog: Watchdog
    flops_per_token: float
    peak_flops: float


def _train(job: _Job) -> Trouble | None:
    """Train until the last step, or until something is wrong.

    What steps measured is read where the curves, a validation or a checkpoint need it, and at no other time: the
    host runs ahead of the device between.
    """
    state, config, ledger = job.state, job.config, job.ledger
    several = state.layout.mesh.num_processes > 1
    unread: list[tuple[int, StepResult]] = []
    losses: list[float] = []
    note = ""
    points = _points_until(state.step, job.output)
    ended = job.watch is not None and job.watch.ends(points)
    with ExitStack() as stack:
        metrics = None
        if is_first_process():
            metrics = stack.enter_context(
                MetricsWriter(
                    job.output,
                    step=state.step,
                    tensorboard=config.tensorboard,
                    wandb_project=config.wandb_project,
                    config=job.run,
                )
            )
        advance = stack.enter_context(progress("Training", total=config.steps - state.step))
        clock, tokens = time.monotonic(), 0
        processes = state.layout.mesh.size("rows") * state.layout.mesh.size("context")
        while state.step < config.steps and not ended:
            check = _due(state.step + 1, config.faults.check_every)
            with timed_step() if check and several else nullcontext() as step_time:
                number = next_good(state.batch, job.quarantine.batches)
                micro_batches = _read(job, number)
                job.watchdog.beat(f"computing step {state.step + 1}")
                unread.append((number, train_step(state, micro_batches, job.loss, config)))
            tokens += sum(part.ids_BT.numel() for part in micro_batches) * processes
            state.batch = number + 1
            ledger.advance(state.step)
            if step_time is not None and (line := slow_rank(gather(step_time.own, dist.group.WORLD))):
                say(line)

            last = state.step == config.steps
            validate = job.held_out is not None and (last or _due(state.step, config.validate_every))
            log = last or _due(state.step, config.log_every) or (validate and job.watch is not None)
            save = last or _due(state.step, config.checkpoint_every)
            if not (log or validate or save or check):
                advance(1, note)
                continue

            job.watchdog.beat(f"reading what the steps up to {state.step} measured")
            measured = torch.stack([result.measured for _, result in unread]).tolist()
            if trouble := _judgement(measured, [number for number, _ in unread], state.step):
                return trouble
            if check or save:
                job.watchdog.beat(f"looking for corruption after step {state.step}")
                with ledger.during("checks"):
                    if corruption := _corruption(state, micro_batches if check else [], job.loss):
                        return Trouble(corruption=corruption)
            learning_rate = unread[-1][1].learning_rate
            unread.clear()
            losses += [loss for loss, *_ in measured]
            point = {}
            if log:
                speed = tokens / (time.monotonic() - clock)
                utilisation = speed * job.flops_per_token / job.peak_flops
                point = {
                    "train/loss": sum(losses) / len(losses),
                    "train/grad_norm": measured[-1][1],
                    "train/learning_rate": learning_rate,
                    "speed/tokens_per_second": speed,
                    "speed/model_flops_utilisation": utilisation,
                }
                losses.clear()
                note = f"loss {point['train/loss']:.3f}, {speed:,.0f} tokens/s, MFU {utilisation:.0%}"
            if validate and job.held_out is not None:
                job.watchdog.beat("measuring on held-out rows")
                with ledger.during("validation"):
                    point["validation/loss"] = mean_loss(state, job.held_out, job.loss, config, job.device)
                    if job.watch is not None:
                        point |= job.watch.measure(state, point, points)
                        points.append({"step": state.step, **point})
                        ended = job.watch.ends(points)
            if point and metrics is not None:
                metrics.write(state.step, point)
            if save or ended:
                job.watchdog.beat(f"writing the checkpoint of step {state.step}")
                with ledger.during("checkpoint"):
                    job.checkpoints.save(state)
                ledger.flush(state.step)
            if point:
                clock, tokens = time.monotonic(), 0
            advance(1, note)
    return None


def _read(job: _Job, number: int) -> list[TokenBatch]:
    """This process's micro-batches of a batch."""
    job.watchdog.beat(f"reading batch {number}")
    with job.ledger.during("data"):
        layout = job.state.layout
        own = layout.own_rows(number * job.config.batch_rows, job.config.batch_rows)
        batch = layout.own_positions(job.rows.batch(own))
        return [part.to(job.device) for part in batch.split(job.config.micro_batch_rows)]


def _judgement(measured: list[list[float]], batches: list[int], step: int) -> Trouble | None:
    """The bad ones of the last steps, of which `step` was the last."""
    first = step - len(measured) + 1
    bad = tuple(
        BadBatch(batch, first + place, VERDICTS[int(verdict)], f"{loss:.4g}", f"{grad_norm:.4g}")
        for place, (batch, (loss, grad_norm, _, verdict)) in enumerate(zip(batches, measured, strict=True))
        if verdict
    )
    return Trouble(bad=bad) if bad else None


def _corruption(state: TrainState, micro_batches: list[TokenBatch], loss: Loss) -> str:
    """Values that changed by themselves, in words; with micro-batches, by computing the first of them twice too."""
    parameters = dict(state.model.named_parameters())
    found = [str(difference) for difference in compare_copies(parameters)]
    if micro_batches:
        # The passes of a pipeline are for all micro-batches together.
        chosen = micro_batches if state.layout.pipeline is not None else micro_batches[:1]
        found += compute_twice(lambda: own_sum_of_losses(state, chosen, loss), parameters.values())
    return "; ".join(found)


def prepare(model: Transformer, config: TrainConfig, device: torch.device, mesh: Mesh | None = None) -> Layout:
    """Apply what training changes about a model from outside: precision, then what `parallelize` does."""
    model.train()
    model.compute_dtype = None if config.precision == "fp32" else torch.bfloat16
    if not config.compile:
        use_native_layers(model)  # a compiler fuses the same parts, and cannot see into these
    return parallelize(
        model,
        config.parallel,
        mesh or Mesh(),
        StepShape(batch_rows=config.batch_rows, micro_batch_rows=config.micro_batch_rows, row_length=config.row_length),
        device=device,
        dtype=model.compute_dtype or torch.float32,
        float8=config.precision == "fp8",
        compile=config.compile,
    )


@torch.no_grad()
def mean_loss(state: TrainState, rows: EpochRows, loss: Loss, config: TrainConfig, device: torch.device) -> float:
    """Loss per unit over the first epoch of `rows`, at most `config.validation_rows` of them."""
    state.model.eval()
    total, count = 0.0, 0
    limit = min(rows.rows_per_epoch, config.validation_rows)
    for start in range(0, limit, config.batch_rows):
        own = state.layout.own_rows(start, config.batch_rows)
        batch = state.layout.own_positions(_rows_below(limit, rows, own, fill=state.layout.mesh.num_processes > 1))
        part_total, part_count = sum_of_losses(
            state, [part.to(device) for part in batch.split(config.micro_batch_rows)], loss
        )
        total += part_total.item()
        count += int(part_count.item())
    state.model.train()
    return total / max(1, count)


def _rows_below(limit: int, rows: EpochRows, own: range, *, fill: bool) -> TokenBatch:
    """Rows by number, those from `limit` on left out; or, where processes have to keep step, without targets."""
    if not fill:
        return rows.batch(range(own.start, min(limit, own.stop)))
    return rows.batch(own).without_targets(torch.tensor([row >= limit for row in own]))


def _points_until(step: int, output: Path) -> list[dict[str, Any]]:
    """What an interrupted run has measured up to a step."""
    path = output / "metrics.jsonl"
    return [point for point in read_metrics(path) if point["step"] <= step] if step and path.exists() else []


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _summarise(points: list[dict[str, Any]], goodput: Goodput, seconds: float) -> TrainResult:
    logged = [point for point in points if "train/loss" in point]
    validated = [point["validation/loss"] for point in points if "validation/loss" in point]
    return TrainResult(
        steps=points[-1]["step"],
        train_loss=logged[-1]["train/loss"],
        validation_loss=validated[-1] if validated else None,
        tokens_per_second=statistics.median(point["speed/tokens_per_second"] for point in logged),
        model_flops_utilisation=statistics.median(point["speed/model_flops_utilisation"] for point in logged),
        seconds=seconds,
        effective_training_share=goodput.effective_share,
    )
