"""What a worker does with a task: read, cut into parts, call the steps, write what comes out.

A part's files are written before its ledger, each by an atomic rename; a part whose ledger is there is whole. A chunk
that was interrupted is read again, but the parts of it that are there are not worked on again.
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from puna.curate.document import Document, Outcome, Rejected, split, table_of
from puna.curate.engine.counts import StepCount, count_outcome, text_bytes
from puna.curate.engine.guard import Blame, BrokenStep, Guard, call_guarded, is_disk_full
from puna.curate.engine.task import HeldOut, Part, Task
from puna.curate.step import GlobalStep, Step
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, read_json, write_json
from puna.runtime.seeds import derive_seed

_MAX_BATCH_ITEMS = 200_000
"""Documents, or rejects, of a part, however short they are."""


def run_task(task: Task) -> list[Part]:
    """Do a task, or read from its ledger what it made earlier."""
    if (parts := finished(task)) is not None:
        return parts
    blame = Blame.load(task.blame)
    with Guard(task.note, task.unit_timeout_seconds) as guard:
        parts = list(_read_chunk(task, guard, blame)) if task.part is None else [_continue_part(task, guard, blame)]
        write_json(task.ledger, [part.plain() for part in parts])
    return parts


def finished(task: Task) -> list[Part] | None:
    """What a task made, if it was done; its chunk may have another number by now."""
    if not task.ledger.exists():
        return None
    parts = [Part.from_plain(values) for values in read_json(task.ledger)]
    return parts if task.chunk is None else [replace(part, chunk=task.chunk.number) for part in parts]


def _read_chunk(task: Task, guard: Guard, blame: Blame) -> Iterator[Part]:
    """Read a chunk's units and work on them batch by batch."""
    assert task.chunk is not None
    reading = _Reading(task, guard, blame)
    offset, started = 0, time.perf_counter()
    for number, (documents, rejected) in enumerate(reading.batches()):
        table, unusable = to_table(documents, task.source)
        rejected += unusable
        part = Part(task.chunk.number, number, offset, f"{task.fingerprint}-{number:05d}")
        ledger = task.work / f"{part.fingerprint}.json"
        if ledger.exists():
            part = replace(Part.from_plain(read_json(ledger)), chunk=part.chunk)
        else:
            read = StepCount(
                "read",
                documents_in=table.num_rows + len(rejected),
                documents_out=table.num_rows,
                bytes_out=text_bytes(table),
                reasons=Counter(item.reason for item in rejected),
                seconds=time.perf_counter() - started,
            )
            part = replace(_Work(task, guard, blame, part, read, rejected).run(table), input_hash=_text_hash(table))
            write_json(ledger, part.plain())
        yield part
        offset += table.num_rows
        reading.batch_is_saved()
        started = time.perf_counter()


def _continue_part(task: Task, guard: Guard, blame: Blame) -> Part:
    assert task.part is not None
    part = Part(task.part.chunk, task.part.number, task.part.offset, task.fingerprint)
    return _Work(task, guard, blame, part).run(pq.read_table(task.part.files["documents"]))


class _Reading:
    """Reads the units of a chunk, and cuts what comes into batches."""

    def __init__(self, task: Task, guard: Guard, blame: Blame) -> None:
        assert task.chunk is not None
        assert task.reader is not None
        self._units, self._reader, self._batch_bytes = task.chunk.units, task.reader, task.batch_bytes
        self._guard, self._blame = guard, blame
        self._unit = self._items = 0

    def batches(self) -> Iterator[tuple[list[Document], list[Rejected]]]:
        documents: list[Document] = []
        rejected: list[Rejected] = []
        size = 0
        for item in self._all():
            if isinstance(item, Rejected):
                rejected.append(item)
            else:
                if documents and size + len(item.text) > self._batch_bytes:
                    self._items -= 1
                    yield documents, rejected
                    documents, rejected, size = [], [], 0
                    self._items += 1
                documents.append(item)
                size += len(item.text)
            if max(len(documents), len(rejected)) >= _MAX_BATCH_ITEMS:
                yield documents, rejected
                documents, rejected, size = [], [], 0
        if documents or rejected:
            yield documents, rejected

    def batch_is_saved(self) -> None:
        """Whatever happens next, the items so far are done with."""
        self._guard.doing(unit=self._unit, items=self._items)

    def _all(self) -> Iterator[Document | Rejected]:
        for number, unit in enumerate(self._units):
            self._unit, self._items = number, 0
            self._guard.doing(unit=self._unit, items=0)
            limit, reason = self._blame.units.get(str(self._unit), [None, ""])
            try:
                for item in islice(self._reader.read(unit), limit):
                    self._items += 1
                    self._guard.still_alive()
                    yield item
            except InputError:
                raise
            except Exception as error:
                if is_disk_full(error):
                    raise
                yield Rejected(unit, f"the reader failed with {type(error).__name__}")
            if reason:
                yield Rejected(unit, reason)


class _Work:
    """One part in one pass: steps, keys, files."""

    def __init__(
        self,
        task: Task,
        guard: Guard,
        blame: Blame,
        part: Part,
        read: StepCount | None = None,
        rejected: Sequence[Rejected] = (),
    ) -> None:
        """`part` says where its documents stand; `read` and `rejected` are what reading them came to, if just read."""
        self._task, self._guard, self._blame, self._part = task, guard, blame, part
        self._counts = [read] if read is not None else []
        self._rejected = [_rejected_table(rejected, task.source)] if rejected else []

    def run(self, documents: pa.Table) -> Part:
        """Work on the part's documents; return the part with the files that came of it."""
        does, first = self._task.does, self._part.first
        files: dict[str, str] = {}
        if does.apply is not None and self._task.decisions is not None:
            label, step = does.apply
            decisions = _decisions(self._task.decisions, first, documents.num_rows)
            documents = self._step(label, partial(_apply, step, first, decisions), documents)
        for label, local in does.steps:
            documents = self._step(label, partial(_call, local), documents)
        if does.keys is not None and documents.num_rows:
            label, step = does.keys
            if (keys := self._keys(label, step, documents)) is not None:
                files["keys"] = self._write("keys", keys)
        part = replace(self._part, documents=documents.num_rows)
        if self._task.held_out is not None and documents.num_rows:
            hashes = id_hashes(documents, self._task.held_out)
            part = replace(part, extremes=(min(hashes), max(hashes)))
            is_held_out = pa.array([value < self._task.held_out.share * 2**63 for value in hashes])
            if (held_out := documents.filter(is_held_out)).num_rows:
                files["held_out"] = self._write("held_out", held_out)
            documents = documents.filter(pc.invert(is_held_out))
        if documents.num_rows:
            files["documents"] = self._write("documents", documents)
        if self._rejected:
            files["rejected"] = self._write("rejected", self._rejected_columns())
        return replace(part, files=files, counts=tuple(self._counts))

    def _step(self, label: str, function: "partial[Outcome]", documents: pa.Table) -> pa.Table:
        """Call a step, count what it did, and set rejects aside."""
        if not documents.num_rows:
            self._counts.append(StepCount(label))
            return documents
        started = time.perf_counter()

        def checked(piece: pa.Table, row: int) -> Outcome:
            outcome = function(piece, row)
            if outcome.kept.num_rows + outcome.rejected.num_rows != piece.num_rows:
                kept, rejected = outcome.kept.num_rows, outcome.rejected.num_rows
                raise BrokenStep(f"{label} made {kept} kept and {rejected} rejected documents of {piece.num_rows}.")
            return outcome

        results = call_guarded(
            self._guard, self._blame, f"{self._part.number}/{label}", checked, _reject_all, documents
        )
        outcome = results[0] if len(results) == 1 else _joined(results)
        self._counts.append(count_outcome(label, documents, outcome, time.perf_counter() - started))
        self._set_aside(label, outcome.rejected)
        return outcome.kept

    def _keys(self, label: str, step: GlobalStep, documents: pa.Table) -> pa.Table | None:
        """Keys of a part; a document that none can be made of goes without, and is kept."""
        started = time.perf_counter()
        without: Counter[str] = Counter()

        def keys(piece: pa.Table, row: int) -> pa.Table | None:
            return step.keys(piece, self._part.first + row)

        def none(piece: pa.Table, reason: str) -> pa.Table | None:
            without[f"documents without a key: {reason}"] += 1
            return None

        tables = call_guarded(self._guard, self._blame, f"{self._part.number}/{label} keys", keys, none, documents)
        self._counts.append(StepCount(label, counts=without, seconds=time.perf_counter() - started))
        made = [table for table in tables if table is not None]
        return pa.concat_tables(made) if made else None

    def _set_aside(self, label: str, rejected: pa.Table) -> None:
        if rejected.num_rows:
            table = rejected if self._task.keep_rejected else rejected.drop_columns("text")
            self._rejected.append(table.append_column("step", pa.array([label] * table.num_rows)))

    def _rejected_columns(self) -> pa.Table:
        table = pa.concat_tables(self._rejected, promote_options="permissive")
        front = [name for name in ("id", "source", "step", "reason", "text") if name in table.column_names]
        table = table.select([*front, *(name for name in table.column_names if name not in front)])
        nullable = pa.schema([field.with_nullable(True) for field in table.schema])  # what was not read has no text
        return pa.Table.from_arrays(table.columns, schema=nullable)

    def _write(self, what: str, table: pa.Table) -> str:
        path = self._task.work / f"{self._part.fingerprint}.{what}.parquet"
        write_parquet(path, table)
        return str(path)


def write_parquet(destination: Path, table: pa.Table) -> None:
    """Write a table, atomically and on to the disk; the same table gives the same bytes."""
    long = {"id", "text"}
    short = [name for name in table.column_names if name not in long]
    with atomic_path(destination) as path:
        pq.write_table(table, path, compression="zstd", use_dictionary=short, write_statistics=short)
        with path.open("rb") as file:
            os.fsync(file.fileno())


def to_table(documents: list[Document], source: str) -> tuple[pa.Table, list[Rejected]]:
    """Documents in columns; those that do not go into a column are rejected, metadata of mixed types becomes text."""
    try:
        return table_of(documents, source), []
    except (UnicodeEncodeError, pa.ArrowException, TypeError):
        pass
    good: list[Document] = []
    rejected: list[Rejected] = []
    for document in documents:
        try:
            table_of([document], source)
            good.append(document)
        except (UnicodeEncodeError, pa.ArrowException, TypeError):
            name = document.id.encode("utf-8", "replace").decode()
            rejected.append(Rejected(name, "not valid Unicode, or metadata that is neither text nor number"))
    try:
        return table_of(good, source), rejected
    except (pa.ArrowException, TypeError):
        as_text = [
            Document(document.text, document.id, {key: str(value) for key, value in document.metadata.items()})
            for document in good
        ]
        return table_of(as_text, source), rejected


def _text_hash(documents: pa.Table) -> str:
    digest = hashlib.sha256()
    for name in ("id", "text"):
        for chunk in documents[name].chunks:
            digest.update(chunk.buffers()[2] or b"")
    return digest.hexdigest()


def id_hashes(documents: pa.Table, held_out: HeldOut) -> list[int]:
    """A 63-bit number for each document, of its id and the seed alone; the smallest are held out."""
    return [derive_seed(held_out.seed, "hold out", name) for name in documents["id"].to_pylist()]


def _call(step: Step, documents: pa.Table, row: int) -> Outcome:
    return step(documents)


def _apply(step: GlobalStep, first: int, decisions: pa.Table, documents: pa.Table, row: int) -> Outcome:
    begin = first + row
    if documents.num_rows:
        number = decisions["document"]
        here = pc.and_(pc.greater_equal(number, begin), pc.less(number, begin + documents.num_rows))
        decisions = decisions.filter(here)
    return step.apply(documents, begin, decisions)


def _decisions(path: Path, first: int, rows: int) -> pa.Table:
    """The rows about documents `first` to `first + rows`; others are not read, where the file's statistics say so."""
    return pq.read_table(path, filters=[("document", ">=", first), ("document", "<", first + rows)])


def _reject_all(documents: pa.Table, reason: str) -> Outcome:
    return split(documents, pa.array([reason] * documents.num_rows))


def _joined(outcomes: list[Outcome]) -> Outcome:
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        counts.update(outcome.counts)
    return Outcome(
        pa.concat_tables([outcome.kept for outcome in outcomes], promote_options="permissive"),
        pa.concat_tables([outcome.rejected for outcome in outcomes], promote_options="permissive"),
        counts,
    )


def _rejected_table(rejected: Sequence[Rejected], source: str) -> pa.Table:
    return pa.table(
        {
            "id": pa.array([item.id.encode("utf-8", "replace").decode() for item in rejected]),
            "source": pa.array([source] * len(rejected)),
            "reason": pa.array([item.reason for item in rejected]),
            "step": pa.array(["read"] * len(rejected)),
        }
    )
