"""Runs training cases on forked processes: imports torch once, then forks as many ranks as a case wants.

The test process talks to it through pickles on stdin and stdout, see the fixture `on_ranks` in conftest.py.
"""

import os
import pickle
import select
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from puna.batches.packing import IGNORE, PADDING, TokenBatch
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.parallel.config import ParallelConfig
from puna.parallel.gather import gather_parameters
from puna.parallel.mesh import build_mesh, is_first_process, joined_processes
from puna.pretrain.main import PretrainConfig
from puna.pretrain.main import main as pretrain
from puna.train.config import OptimizerConfig, ScheduleConfig, TrainConfig
from puna.train.loop import fit, mean_loss, prepare
from puna.train.loss import causal_lm_loss
from puna.train.metrics import read_metrics
from puna.train.optimizer import build_optimizers
from puna.train.state import TrainState
from puna.train.step import train_step

MODEL = LlamaConfig(
    vocab_size=64,
    dim=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    hidden_dim=48,
    context_length=64,
)
TRAIN = TrainConfig(
    steps=3,
    batch_rows=8,
    micro_batch_rows=2,
    row_length=16,
    device="cpu",
    num_threads=1,
    log_every=1,
    tensorboard=False,
    validation_rows=11,
    optimizer=OptimizerConfig(learning_rate=1e-2, epsilon=1e-3),
    schedule=ScheduleConfig("constant", 0),
)
"""AdamW with a large epsilon: with the usual one its first steps are the signs of the gradients, whatever their size,
and those of entries near zero are chance."""


@dataclass(frozen=True)
class Case:
    """One training: of a model, from synthetic rows."""

    model: LlamaConfig = MODEL
    train: TrainConfig = TRAIN
    document_length: int = 9
    """Mean length of a document; rows hold several, and end in padding."""
    output: Path | None = None
    """Train with `puna.train.loop.fit` into this folder, and not step by step."""
    pretrain: PretrainConfig | None = None
    """Do this instead with the layout of `train`, into a folder of its output that is named after `ranks`."""

    def on(self, **degrees: Any) -> "Case":
        """The same training on several processes."""
        return replace(self, train=replace(self.train, parallel=ParallelConfig(**degrees)))

    @property
    def ranks(self) -> int:
        p = self.train.parallel
        return max(1, p.data) * p.shard * p.tensor * p.context * p.pipeline


@dataclass(frozen=True)
class Outcome:
    """What a training came to."""

    losses: list[float]
    grad_norms: list[float]
    units: list[int]
    held_out: float
    weights: dict[str, torch.Tensor] = field(repr=False)


@dataclass(frozen=True)
class SyntheticRows:
    """Rows of packed documents; row i is a function of i alone, with as many targets as chance has it."""

    vocab_size: int
    row_length: int
    document_length: int
    rows_per_epoch: int = 13

    def batch(self, rows: Sequence[int]) -> TokenBatch:
        parts = [self._row(row) for row in rows]
        return TokenBatch(*(torch.stack(column) for column in zip(*parts, strict=True)))

    def _row(self, row: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(row)
        ids = torch.randint(self.vocab_size, (self.row_length,), generator=generator)
        labels, documents = torch.full_like(ids, IGNORE), torch.full_like(ids, PADDING)
        positions = torch.zeros_like(ids)
        end = self.row_length - int(torch.randint(self.row_length // 2, (), generator=generator))
        at, number = 0, 0
        while at < end:
            length = 1 + int(torch.randint(2 * self.document_length, (), generator=generator))
            stop = min(end, at + length)
            # A sequence that a model can learn: each token is the one before plus a step of the document's.
            ids[at:stop] = (ids[at] + torch.arange(stop - at) * (1 + row % 3)) % self.vocab_size
            labels[at : stop - 1] = ids[at + 1 : stop]
            positions[at:stop], documents[at:stop] = torch.arange(stop - at), number
            at, number = stop, number + 1
        return ids, labels, positions, documents


def run(case: Case) -> Outcome | None:
    """Train as `puna.train.loop.fit` does; the outcome comes from the first rank."""
    with joined_processes("cpu"):
        if case.pretrain is not None:
            train = replace(case.pretrain.train, parallel=case.train.parallel)
            return _pretrain(replace(case.pretrain, train=train, output=case.pretrain.output / str(case.ranks)))
        model = Transformer(case.model)
        initialize(model, 0)
        loss = partial(causal_lm_loss, z_loss=case.train.z_loss)
        rows = SyntheticRows(case.model.vocab_size, case.train.row_length, case.document_length)
        if case.output is not None:
            defining = {"model": asdict(case.model), "train": asdict(case.train)}
            fit(model, rows, loss, case.train, case.output, defining, rows)
            weights = {name: value.detach().clone() for name, value in model.named_parameters()}
            return _measured(case.output, weights) if is_first_process() else None
        mesh = build_mesh(case.train.parallel, torch.device("cpu"))
        layout = prepare(model, case.train, torch.device("cpu"), mesh)
        state = TrainState(model, build_optimizers(model, case.train.optimizer), layout=layout)
        results = []
        for step in range(case.train.steps):
            own = layout.own_rows(step * case.train.batch_rows, case.train.batch_rows)
            batch = layout.own_positions(rows.batch(own))
            results.append(train_step(state, batch.split(case.train.micro_batch_rows), loss, case.train))
        held_out = mean_loss(state, rows, loss, case.train, torch.device("cpu"))
        gather_parameters(model)
        if not is_first_process():
            return None
        return Outcome(
            [result.loss for result in results],
            [result.grad_norm for result in results],
            [result.num_units for result in results],
            held_out,
            {name: value.detach().clone() for name, value in model.named_parameters()},
        )


def _pretrain(config: PretrainConfig) -> Outcome | None:
    pretrain(config)
    if not is_first_process():
        return None
    files = (config.output / "model").glob("*.safetensors")
    return _measured(config.output, {name: value for file in files for name, value in load_file(file).items()})


def _measured(output: Path, weights: dict[str, torch.Tensor]) -> Outcome:
    points = read_metrics(output / "metrics.jsonl")
    return Outcome(
        [point["train/loss"] for point in points],
        [point["train/grad_norm"] for point in points],
        [],
        points[-1]["validation/loss"],
        weights,
    )


def _fork(case: Case, rank: int, ranks: int, place: dict[str, str]) -> tuple[int, int]:
    """Start a rank; return its process and the pipe that its answer comes through."""
    reader, writer = os.pipe()
    if process := os.fork():
        os.close(writer)
        return process, reader
    os.close(reader)
    if ranks > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(ranks),
            LOCAL_WORLD_SIZE=str(ranks),
            **place,
        )
    try:
        answer: Any = run(case)
    except BaseException as error:
        answer = (type(error).__name__, str(error), traceback.format_exc())
    with os.fdopen(writer, "wb") as pipe:
        pickle.dump(answer, pipe)
    os._exit(0)


def _collect(case: Case, timeout_seconds: float) -> Any:
    from meeting import meeting_place  # beside the folder, which the server has on its path

    with meeting_place() as place:
        return _run(case, timeout_seconds, place)


def _run(case: Case, timeout_seconds: float, place: dict[str, str]) -> Any:
    children = [_fork(case, rank, case.ranks, place) for rank in range(case.ranks)]
    deadline = time.monotonic() + timeout_seconds
    answers = dict.fromkeys(range(case.ranks), b"")
    open_pipes = {reader: rank for rank, (_, reader) in enumerate(children)}
    failed = None
    while open_pipes and time.monotonic() < deadline and failed is None:
        for reader in select.select(list(open_pipes), [], [], 0.2)[0]:
            part = os.read(reader, 1 << 20)
            rank = open_pipes[reader]
            answers[rank] += part
            if not part:
                del open_pipes[reader]
                answer = pickle.loads(answers[rank]) if answers[rank] else ("Died", f"rank {rank} died", "")
                if isinstance(answer, tuple):
                    failed = answer
                elif rank == 0:
                    first = answer
    for process, reader in children:
        if open_pipes:
            os.kill(process, 9)
        os.waitpid(process, 0)
        os.close(reader)
    if failed is not None:
        return failed
    return (
        ("Hung", f"no answer after {timeout_seconds} s from ranks {sorted(open_pipes.values())}", "")
        if open_pipes
        else first
    )


def alone(case: Case) -> Case:
    """The same training on one process."""
    return replace(case, train=replace(case.train, parallel=ParallelConfig()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    # The test process knows this module by that name.
    sys.modules["parallel_workers"] = sys.modules["__main__"]
    for kind in (Case, Outcome):
        kind.__module__ = "parallel_workers"
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            case = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        pickle.dump(_collect(case, timeout_seconds=240), answers)
        answers.flush()
