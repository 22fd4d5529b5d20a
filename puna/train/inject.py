"""Faults on purpose, for tests and drills.

The training knows nothing of this: whoever starts a run hands it a `Saboteur`'s rows and loss in place of the real
ones. A fault that has struck leaves a mark in a folder, so that it does not strike again when the run has restarted and
comes to the same batch once more. Two faults are no matter of rows or loss: `full_disk` and `damage`.
"""

import os
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from puna.batches.packing import Rows, TokenBatch
from puna.batches.shards import TokenShards
from puna.model.transformer import Transformer
from puna.train.loss import Loss, LossSum
from puna.train.quarantine import Traceable

_MUCH = 1000.0


@dataclass(frozen=True)
class Fault:
    """What happens to one rank at one batch."""

    kind: Literal["kill", "hang", "slow", "bit-flip", "nan", "spike", "miscalculate"]
    """`kill`: the process is gone at once. `hang`: it does nothing any more. `slow`: it takes `seconds` longer.
    `bit-flip`: a bit of a weight turns. `nan`, `spike`: the loss is not a number, or a thousand times too high.
    `miscalculate`: the loss is a little off."""
    batch: int
    """When this batch is read or computed, counted from 0."""
    rank: int = 0
    """Whom it happens to."""
    times: int = 1
    """How often; bad data is bad each time."""
    seconds: float = 0.0
    """Of `slow`."""


class Saboteur:
    """Lets faults happen.

    Args:
        faults: which.
        marks: folder that remembers what has happened.
        model: whose weights suffer.
        batch_rows: rows in a step; tells the number of the batch from the rows that are asked for.
    """

    def __init__(self, faults: Sequence[Fault], marks: Path, model: Transformer, batch_rows: int) -> None:
        self.faults, self.marks, self.model, self.batch_rows = list(faults), marks, model, batch_rows
        self._rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
        self._batch = -1
        marks.mkdir(parents=True, exist_ok=True)

    def rows(self, rows: Rows) -> Rows:
        """The same rows; a fault strikes when its batch is read."""
        return _SabotagedRows(rows, self)

    def loss(self, loss: Loss) -> Loss:
        """The same loss; a fault strikes when its batch is computed."""

        def sabotaged(model: Transformer, batch: TokenBatch) -> LossSum:
            part = loss(model, batch)
            factors = {"nan": float("nan"), "spike": _MUCH, "miscalculate": 1 + 1e-6}
            for kind, factor in factors.items():
                for _ in self._due(kind):
                    part = replace(part, total=part.total * factor)
            return part

        return sabotaged

    def before(self, batch: int) -> None:
        """Strike as a batch is read."""
        self._batch = batch
        for fault in self._due("slow"):
            time.sleep(fault.seconds)
        for _ in self._due("bit-flip"):
            flip_bit(next(self.model.parameters()))
        for _ in self._due("hang"):
            time.sleep(1e9)
        for _ in self._due("kill"):
            os.kill(os.getpid(), signal.SIGKILL)

    def _due(self, kind: str) -> Iterator[Fault]:
        for number, fault in enumerate(self.faults):
            if (fault.kind, fault.batch, fault.rank) == (kind, self._batch, self._rank):
                before = len(list(self.marks.glob(f"{number}-*")))
                if before < fault.times:
                    (self.marks / f"{number}-{before}").touch()
                    yield fault


class _SabotagedRows:
    def __init__(self, rows: Rows, saboteur: Saboteur) -> None:
        self.inner, self.saboteur = rows, saboteur

    def origins(self, row: int) -> list[tuple[TokenShards, int]]:
        return self.inner.origins(row) if isinstance(self.inner, Traceable) else []

    def batch(self, rows: Sequence[int]) -> TokenBatch:
        self.saboteur.before(rows[0] // self.saboteur.batch_rows)
        return self.inner.batch(rows)


@torch.no_grad()
def flip_bit(parameter: torch.Tensor) -> None:
    """Turn a bit of the mantissa of this rank's first number of a parameter.

    One in the middle: the lowest may be rounded away by the next update, before anyone has looked.
    """
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    local.view(torch.int32).view(-1)[0] ^= 1 << 10


@contextmanager
def full_disk(room_bytes: int) -> Iterator[None]:
    """No file of this process can grow beyond `room_bytes` while the block runs, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room_bytes, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def damage(path: Path) -> None:
    """Turn one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
