"""What is handed to workers, and what comes back. All of it can be pickled, and none of it is large."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puna.curate.engine.counts import StepCount
from puna.curate.step import GlobalStep, Reader, Step

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Stamp = tuple[str, int, int]
"""A file's path, size in bytes, and time of its last change in nanoseconds."""

DOCUMENTS_A_CHUNK = 2**32
"""Documents of chunk c are numbered from c times this; a chunk has fewer."""


def is_global(step: Step | GlobalStep) -> "TypeIs[GlobalStep]":
    """Whether a step looks at all documents at once."""
    return hasattr(step, "decide")


@dataclass(frozen=True)
class HeldOut:
    """Which documents are kept from training."""

    share: float
    """Of documents."""
    seed: int
    """Of the choice."""


@dataclass(frozen=True)
class Pass:
    """What is done to a part between two points at which all documents have to be there."""

    steps: tuple[tuple[str, Step], ...] = ()
    """Local steps, each with its line in the ledger."""
    apply: tuple[str, GlobalStep] | None = None
    """The global step whose decision is carried out first."""
    keys: tuple[str, GlobalStep] | None = None
    """The global step that is given keys of what is left at the end; None in the last pass."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive units of a source that one worker reads, one after the other."""

    number: int
    """Over all sources."""
    units: tuple[str, ...]
    """As the reader names them."""
    files: tuple[Stamp, ...]
    """What they are read from, as far as that is known."""
    bytes: int
    """Of the files; a file that is in several units counts in each."""


@dataclass(frozen=True)
class Part:
    """What a pass made of some tens of megabytes of documents: the names of files, and counts."""

    chunk: int
    """Where it was read."""
    number: int
    """Within the chunk."""
    offset: int
    """Documents of the chunk that were read before its own."""
    fingerprint: str
    """Of everything that it was made from."""
    documents: int = 0
    """What is left, held-out ones included."""
    files: dict[str, str] = field(default_factory=dict)
    """"documents", "held_out", "rejected", "keys" -> file, where there is any such row."""
    counts: tuple[StepCount, ...] = ()
    """What each step of the pass did."""
    input_hash: str = ""
    """SHA-256 of the texts as read; of the first pass only."""
    extremes: tuple[int, int] = (2**63, -1)
    """Smallest and largest hash of the ids, by which documents are held out; of the last pass only."""

    @property
    def first(self) -> int:
        """Number of its first document; row r of its file is document first + r, in every pass."""
        return self.chunk * DOCUMENTS_A_CHUNK + self.offset

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return vars(self) | {"counts": [count.plain() for count in self.counts]}

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "Part":
        """The inverse of `plain`."""
        counts = tuple(StepCount.from_plain(count) for count in values["counts"])
        return cls(**values | {"counts": counts, "extremes": tuple(values["extremes"])})


@dataclass(frozen=True)
class Task:
    """One worker's job: a chunk to read, or a part to go on with."""

    work: Path
    """Folder for what it makes, on a disk that all workers see."""
    fingerprint: str
    """Of everything that its result depends on; files are named after it."""
    source: str
    """Name of the source."""
    does: Pass
    """The steps."""
    reader: Reader | None
    """In the first pass."""
    chunk: Chunk | None
    """In the first pass."""
    part: Part | None
    """In later passes."""
    decisions: Path | None
    """For `does.apply`; None where there was no key to decide by."""
    held_out: HeldOut | None
    """In the last pass."""
    batch_bytes: int
    """A part holds about so many characters of text."""
    keep_rejected: bool
    """Write the texts of rejected documents too."""
    unit_timeout_seconds: float
    """Longest time without progress."""

    @property
    def note(self) -> Path:
        """Where the worker says what it is about."""
        return self.work / f"{self.fingerprint}.doing"

    @property
    def blame(self) -> Path:
        """What earlier attempts died of."""
        return self.work / f"{self.fingerprint}.blame.json"

    @property
    def ledger(self) -> Path:
        """Written when the task is done."""
        return self.work / f"{self.fingerprint}.json"


def passes(own: Sequence[Step | GlobalStep], common: Sequence[Step | GlobalStep]) -> list[Pass]:
    """The steps of one source, cut where a global step needs to see everything."""
    labels: dict[str, int] = {}
    row = [Pass()]
    for step in (*own, *common):
        labels[step.kind] = labels.get(step.kind, 0) + 1
        label = step.kind if labels[step.kind] == 1 else f"{step.kind} ({labels[step.kind]})"
        if is_global(step):
            row[-1] = replace(row[-1], keys=(label, step))
            row.append(Pass(apply=(label, step)))
        else:
            row[-1] = replace(row[-1], steps=(*row[-1].steps, (label, step)))
    return row
