"""Readers and steps that misbehave on request; on `sys.path` of the tests and of the processes that they start."""

import ctypes
import errno
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from puna.curate.document import Document, Outcome, Rejected, split


@dataclass(frozen=True)
class Lines:
    """A document a line. KILL, HANG, RAISE and BAD as a line do what they say."""

    kind: Literal["lines"] = "lines"
    """This reader's name."""
    path: Path = field(kw_only=True)
    """Folder of text files."""
    seconds_a_line: float = 0.0
    """How slow to be."""

    def units(self) -> Sequence[str]:
        return sorted(str(path) for path in self.path.glob("*.txt"))

    def read(self, unit: str) -> Iterator[Document | Rejected]:
        for number, line in enumerate(Path(unit).read_text(encoding="utf-8").splitlines()):
            name = f"{Path(unit).stem}:{number}"
            time.sleep(self.seconds_a_line)
            misbehave(line if line in ("KILL", "HANG", "RAISE") else "")
            yield Rejected(name, "bad line") if line == "BAD" else Document(line, name, {"length": len(line)})


def misbehave(text: str) -> None:
    if "KILL" in text:
        os.kill(os.getpid(), signal.SIGKILL)
    if "HANG" in text:
        ctypes.PyDLL(None).sleep(10_000)  # in C, never letting go of the interpreter
    if "FULL" in text:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/file")
    if "RAISE" in text:
        raise RuntimeError("as asked")


@dataclass(frozen=True)
class Shout:
    """Upper case; misbehaves on texts that ask for it."""

    kind: Literal["shout"] = "shout"
    """This step's name."""

    def __call__(self, documents: pa.Table) -> Outcome:
        for text in documents["text"].to_pylist():
            misbehave(text if "step" in text else "")
        texts = pc.utf8_upper(documents["text"])
        at = documents.column_names.index("text")
        kept = documents.set_column(at, documents.schema.field("text"), texts)
        return split(kept, pa.nulls(len(kept), pa.string()), {"letters": int(pc.sum(pc.utf8_length(texts)).as_py())})


@dataclass(frozen=True)
class MinLength:
    """Rejects short texts."""

    kind: Literal["min_length"] = "min_length"
    """This step's name."""
    characters: int = 3
    """Fewest."""

    def __post_init__(self) -> None:
        if self.characters < 0:
            raise ValueError("characters is negative.")

    def __call__(self, documents: pa.Table) -> Outcome:
        short = pc.less(pc.utf8_length(documents["text"]), self.characters)
        return split(documents, pc.if_else(short, "too short", pa.scalar(None, pa.string())))


@dataclass(frozen=True)
class Loses:
    """Breaks the contract: drops documents without a word."""

    kind: Literal["loses"] = "loses"
    """This step's name."""

    def __call__(self, documents: pa.Table) -> Outcome:
        return split(documents.slice(0, 1), pa.nulls(1, pa.string()))


@dataclass(frozen=True)
class OnePerWord:
    """Keeps the first document of those with the same first word."""

    kind: Literal["one_per_word"] = "one_per_word"
    """This step's name."""

    def keys(self, documents: pa.Table, first: int) -> pa.Table:
        for text in documents["text"].to_pylist():
            misbehave(text if "KEYS" in text else "")
        words = pc.utf8_lower(pc.list_element(pc.utf8_split_whitespace(documents["text"], max_splits=1), 0))
        return pa.table({"document": pa.array(range(first, first + len(documents)), pa.int64()), "word": words})

    def decide(self, keys: Sequence[Path], work: Path, memory_bytes: int) -> None:
        seen: dict[str, int] = {}
        (work / "spill").mkdir()
        rows = []
        for path in keys:
            for row in pq.read_table(path).to_pylist():
                first = seen.setdefault(row["word"], row["document"])
                rows.append({"document": row["document"], "cluster": first, "keep": first == row["document"]})
        schema = pa.schema({"document": pa.int64(), "cluster": pa.int64(), "keep": pa.bool_()})
        pq.write_table(
            pa.Table.from_pylist(sorted(rows, key=lambda row: row["document"]), schema=schema),
            work / "decisions.parquet",
        )

    def apply(self, documents: pa.Table, first: int, decisions: pa.Table) -> Outcome:
        assert all(first <= number < first + len(documents) for number in decisions["document"].to_pylist())
        drop = {row["document"] - first for row in decisions.to_pylist() if not row["keep"]}
        reasons = ["same first word" if row in drop else None for row in range(len(documents))]
        return split(documents, pa.array(reasons, pa.string()))
