"""Runs a global step as the engine does: keys of every batch, one decision, every batch again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from puna.curate.document import Document, table_of
from puna.curate.step import GlobalStep


@dataclass(frozen=True)
class Result:
    """What became of all documents together."""

    kept: pa.Table
    rejected: pa.Table
    decisions: pa.Table
    counts: dict[str, int]

    @property
    def texts(self) -> list[str]:
        return self.kept["text"].to_pylist()

    @property
    def ids(self) -> list[str]:
        return self.kept["id"].to_pylist()

    @property
    def reasons(self) -> dict[str, str]:
        return dict(zip(self.rejected["id"].to_pylist(), self.rejected["reason"].to_pylist(), strict=True))


@pytest.fixture
def documents() -> Callable[..., pa.Table]:
    """Documents d0, d1, ... of some texts, with columns of metadata."""

    def make(texts: Sequence[str], **columns: Sequence[object]) -> pa.Table:
        rows = [
            Document(text, f"d{number}", {name: values[number] for name, values in columns.items() if values[number]})
            for number, text in enumerate(texts)
        ]
        return table_of(rows, "test")

    return make


@pytest.fixture
def run_global(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    def run(step: GlobalStep, table: pa.Table, batch_rows: int = 1000, memory_bytes: int = 2**28) -> Result:
        work: Path = tmp_path_factory.mktemp("work")
        firsts = range(0, len(table), batch_rows)
        files = []
        for first in firsts:
            files.append(work / f"keys-{first:05}.parquet")
            pq.write_table(step.keys(table.slice(first, batch_rows), first), files[-1])
        step.decide(files, work, memory_bytes)
        decisions = pq.read_table(work / "decisions.parquet")
        assert {file.name for file in work.iterdir()} == {file.name for file in files} | {"decisions.parquet"}
        numbers = decisions["document"]
        assert numbers.to_pylist() == sorted(numbers.to_pylist())
        outcomes = []
        for first in firsts:
            batch = table.slice(first, batch_rows)
            inside = pc.and_(pc.greater_equal(numbers, first), pc.less(numbers, first + batch_rows))
            outcomes.append(step.apply(batch, first, decisions.filter(inside)))
            assert len(outcomes[-1].kept) + len(outcomes[-1].rejected) == len(batch)
        counts: dict[str, int] = {}
        for outcome in outcomes:
            for name, count in outcome.counts.items():
                counts[name] = counts.get(name, 0) + count
        kept = pa.concat_tables([outcome.kept for outcome in outcomes])
        return Result(kept, pa.concat_tables([outcome.rejected for outcome in outcomes]), decisions, counts)

    return run
