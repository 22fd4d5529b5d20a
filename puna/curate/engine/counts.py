"""What happened to documents at each step, in numbers that can be added up."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from puna.curate.document import Outcome


@dataclass
class StepCount:
    """One step's line in the ledger."""

    step: str
    """Its kind, with a number behind it where the same kind occurs again."""
    documents_in: int = 0
    documents_out: int = 0
    bytes_in: int = 0
    """Of text; for the step `read`, of files, as far as their sizes are known."""
    bytes_out: int = 0
    """Of text."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why documents were rejected; the sum is `documents_in - documents_out`."""
    counts: Counter[str] = field(default_factory=Counter)
    """What else the step counted."""
    seconds: float = 0.0
    """Of workers' time, summed over workers."""

    def add(self, other: "StepCount") -> None:
        """Add what another worker saw of the same step."""
        self.documents_in += other.documents_in
        self.documents_out += other.documents_out
        self.bytes_in += other.bytes_in
        self.bytes_out += other.bytes_out
        self.reasons.update(other.reasons)
        self.counts.update(other.counts)
        self.seconds += other.seconds

    def plain(self) -> dict[str, Any]:
        """As JSON; the most frequent reason first."""
        return asdict(self) | {
            "reasons": dict(self.reasons.most_common()),
            "counts": dict(self.counts.most_common()),
            "seconds": round(self.seconds, 3),
        }

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "StepCount":
        """The inverse of `plain`."""
        return cls(**values | {"reasons": Counter(values["reasons"]), "counts": Counter(values["counts"])})


def count_outcome(step: str, documents: pa.Table, outcome: Outcome, seconds: float) -> StepCount:
    """What a step did to a table."""
    reasons = pc.value_counts(outcome.rejected["reason"]).to_pylist() if outcome.rejected.num_rows else []
    return StepCount(
        step,
        documents.num_rows,
        outcome.kept.num_rows,
        text_bytes(documents),
        text_bytes(outcome.kept),
        Counter({row["values"]: row["counts"] for row in reasons}),
        Counter(outcome.counts),
        seconds,
    )


def text_bytes(documents: pa.Table) -> int:
    """UTF-8 bytes of the texts of a table."""
    return int(pc.sum(pc.binary_length(documents["text"])).as_py() or 0)


def total(counts: Iterable[StepCount]) -> list[StepCount]:
    """Lines of the same step added up, in order of first appearance."""
    steps: dict[str, StepCount] = {}
    for count in counts:
        steps.setdefault(count.step, StepCount(count.step)).add(count)
    return list(steps.values())
