"""Runs trainings that meet faults, on forked processes that start again when one of them dies.

What torchrun does, without the seconds that each of its restarts takes to import torch: when a process ends badly, the
others are killed and all begin again. The test process sends jobs as pickles and gets outcomes, see the fixture
`survive` in conftest.py.
"""

import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from puna.batches.packing import PackedRows
from puna.batches.shards import TokenShards
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.parallel.config import ParallelConfig
from puna.parallel.mesh import joined_processes
from puna.train.config import OptimizerConfig, ScheduleConfig, TrainConfig
from puna.train.inject import Fault, Saboteur
from puna.train.loop import fit
from puna.train.loss import causal_lm_loss

MODEL = LlamaConfig(
    vocab_size=64, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48, context_length=32
)
TRAIN = TrainConfig(
    steps=24,
    batch_rows=8,
    micro_batch_rows=8,
    row_length=16,
    log_every=2,
    checkpoint_every=4,
    device="cpu",
    num_threads=1,
    tensorboard=False,
    optimizer=OptimizerConfig(learning_rate=3e-3),
    schedule=ScheduleConfig(warmup_steps=5),
)
RUN = {"model": "tiny", "train": {"steps": 24}}


@dataclass(frozen=True)
class Job:
    """One training."""

    tokens: Path
    """Folder of token shards."""
    output: Path
    ranks: int = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = TRAIN
    faults: tuple[Fault, ...] = ()
    max_restarts: int = 0

    def on(self, ranks: int, **degrees: int) -> "Job":
        """The same training on several processes."""
        return replace(self, ranks=ranks, parallel=ParallelConfig(**degrees))


@dataclass(frozen=True)
class Outcome:
    """What became of it."""

    weights: dict[str, torch.Tensor] | None = field(repr=False)
    """In the end, if it came to that."""
    share: float
    """`TrainResult.effective_training_share`."""
    restarts: int
    error: str
    """The InputError that ended it, if one did; anything else is a reason to start again, as with torchrun."""
    said: str
    """All that was printed."""
    seconds: float


def train(job: Job) -> tuple[dict[str, torch.Tensor], float]:
    """On one rank."""
    with joined_processes("cpu"):
        model = Transformer(MODEL)
        initialize(model, 0)
        rows = PackedRows(TokenShards(job.tokens), job.train.row_length, 0, "cut")
        saboteur = Saboteur(job.faults, job.output / "marks", model, job.train.batch_rows)
        config = replace(job.train, parallel=job.parallel)
        result = fit(model, saboteur.rows(rows), saboteur.loss(causal_lm_loss), config, job.output, RUN)
        weights = {}
        if not dist.is_initialized() or dist.get_rank() == 0:
            weights = {name: value.detach().clone() for name, value in model.named_parameters()}
        return weights, result.effective_training_share


def _fork(work: Callable[[], Any], answer: Path, said: Path, environment: dict[str, str]) -> int:
    if process := os.fork():
        return process
    output = os.open(said, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 2)
    os.environ.update(environment)
    try:
        value: Any = work()
        status = 0
    except Exception as error:
        value = f"{type(error).__name__}: {error}"
        traceback.print_exc()
        status = 1
    answer.write_bytes(pickle.dumps(value))
    sys.stderr.flush()
    os._exit(status)


def _run_once(job: Job, restarts: int, answers: list[Path], said: Path, place: dict[str, str], deadline: float) -> bool:
    """Start every rank, and kill all when one ends badly; whether one did."""
    ranks = {}
    for rank, answer in enumerate(answers):
        environment = {"TORCHELASTIC_RESTART_COUNT": str(restarts)}
        if job.ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.ranks)}
            environment |= {"LOCAL_WORLD_SIZE": str(job.ranks)} | place
        ranks[_fork(lambda: train(job), answer, said, environment)] = answer
    failed = False
    while ranks:
        ended = {process: os.waitpid(process, os.WNOHANG) for process in ranks}
        for process, (found, status) in ended.items():
            if found:
                del ranks[process]
                failed = failed or status != 0
        if failed or time.monotonic() > deadline:
            for process in ranks:
                os.kill(process, 9)
                os.waitpid(process, 0)
            break
        time.sleep(0.01)
    return failed


def survive(job: Job, timeout_seconds: float = 800) -> Outcome:
    """Run a job; begin again, at most `max_restarts` times, when a process was killed or ended itself."""
    from meeting import meeting_place  # beside the folder, which the server has on its path

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        for restarts in range(job.max_restarts + 1):
            answers = [Path(folder) / f"answer-{restarts}-{rank}" for rank in range(job.ranks)]
            with meeting_place() as place:
                failed = _run_once(job, restarts, answers, said, place, started + timeout_seconds)
            values = [pickle.loads(answer.read_bytes()) for answer in answers if answer.exists()]
            errors = [value for value in values if isinstance(value, str) and value.startswith("InputError")]
            if errors or not failed:
                break
        done = answers[0].exists() and not errors and not failed
        weights, share = pickle.loads(answers[0].read_bytes()) if done else (None, 0.0)
        return Outcome(
            weights, share, restarts, errors[0] if errors else "", said.read_text(), time.monotonic() - started
        )


def serve() -> None:
    """Answer jobs until there are no more."""
    torch.set_num_threads(1)
    outcomes = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(survive(job), outcomes)
        outcomes.flush()
