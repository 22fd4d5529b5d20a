"""`puna curate`: sources and steps to a folder of documents, a held-out part of them, and what became of the rest."""

import contextlib
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table
from rich.text import Text

from puna.config import to_plain
from puna.curate.engine.counts import total
from puna.curate.engine.local import LocalExecutor
from puna.curate.engine.output import num_rows, write_output
from puna.curate.engine.run import Progress, Settings, Source, plan, run
from puna.curate.engine.task import HeldOut
from puna.curate.steps import AnyReader, AnyStep
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, only_process
from puna.runtime.manifest import Manifest
from puna.runtime.progress import console, say

if TYPE_CHECKING:
    from puna.curate.engine.cluster import RayExecutor

MEGABYTE = 1_000_000


def _exact_duplicates() -> tuple[AnyStep, ...]:
    from puna.curate.dedup.exact import ExactDuplicates

    return (ExactDuplicates(),)


@dataclass(frozen=True)
class SourceConfig:
    """Documents of one kind, from one place."""

    name: str
    """In the column `source` of its documents."""
    read: AnyReader
    """What reads it."""
    steps: tuple[AnyStep, ...] = ()
    """Done to documents of this source only, before the steps that are done to all."""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("name is empty.")


@dataclass(frozen=True)
class CurateConfig:
    """Read raw files into clean documents."""

    output: Path
    """Folder to write to; replaced when it exists."""
    source: str | None = None
    """A folder of text files, or `python` for the sources and documentation of this machine's standard library: short
    for one entry in `sources`."""
    sources: tuple[SourceConfig, ...] = ()
    """Where documents come from."""
    steps: tuple[AnyStep, ...] = field(default_factory=_exact_duplicates)
    """Done to the documents of all sources, in this order; `exact_duplicates` alone where nothing is said."""
    held_out_share: float = 0.05
    """Share of documents that are kept from training; 0 for none. Chosen by their ids, so that a new document moves no
    other to the other side."""
    seed: int = 0
    """Of the choice of what is held out."""
    keep_rejected: bool = True
    """Keep the texts of rejected documents, for a look at them; without, only their ids, reasons and metadata."""
    executor: Literal["local", "ray"] = "local"
    """Where the work is done: processes on this machine, or a Ray cluster whose machines see the same files."""
    cluster: str = ""
    """Address of the Ray cluster, such as "auto" or "head:6379"; empty to start one on this machine."""
    workers: int = 0
    """Processes on this machine; 0 for one on each core."""
    batch_megabytes: int = 32
    """Characters, in millions, that a process works on at a time; it needs about ten times as much memory."""
    memory_megabytes: int = 4000
    """Memory for the decisions of steps that look at all documents at once, such as deduplication; the rest of what
    they look at is on disk."""
    unit_timeout_seconds: float = 1800.0
    """A file is given up when reading its next document takes longer. A step that takes longer over a batch goes
    through it again document by document, and a document over which it takes longer still is given up."""
    keep_work: bool = False
    """Keep what each pass made, beside the output in .NAME.work, so that a later run with other settings makes again
    only what depends on them. What an interrupted run made is always kept."""

    def __post_init__(self) -> None:
        if self.source is not None and self.sources:
            raise ValueError("source is short for one entry in sources; set one of the two.")
        names = Counter(source.name for source in self.sources)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"two sources are called {twice[0]!r}; each needs a name of its own.")
        if not 0 <= self.held_out_share < 1:
            raise ValueError(f"held_out_share is {self.held_out_share}; it has to be at least 0 and less than 1.")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; it has to be 0 (one on each core) or more.")
        for name in ("batch_megabytes", "memory_megabytes", "unit_timeout_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be more than 0.")


def main(config: CurateConfig) -> None:
    """Write documents/, held_out/, rejected/, ledger.json and the manifest.

    Raises:
        InputError: nothing to read, or next to nothing left; a step's settings or files are wrong.
    """
    batch_bytes = int(config.batch_megabytes * MEGABYTE)
    planned = plan(_sources(config), config.steps, batch_bytes)
    work = config.output.absolute().parent / f".{config.output.name}.work"
    held_out = HeldOut(config.held_out_share, config.seed) if config.held_out_share else None
    cores = len(os.sched_getaffinity(0))
    settings = Settings(
        work=work,
        batch_bytes=batch_bytes,
        memory_bytes=config.memory_megabytes * 1_000_000,
        threads=cores,
        unit_timeout_seconds=config.unit_timeout_seconds,
        held_out=held_out,
        keep_rejected=config.keep_rejected,
    )
    with _alone_in(work):
        workers = config.workers or cores
        with LocalExecutor(workers) if config.executor == "local" else _cluster(config.cluster, workers) as executor:
            used = run(planned, executor, settings)
        _check_enough(config, planned)
        with atomic_path(config.output) as folder:
            folder.mkdir()
            write_output(folder, planned, held_out, work)
            results = _results(planned, folder)
            Manifest("curate", to_plain(config), _input_hashes(planned), results).write(folder)
        _clean(work, used if config.keep_work else set())
    _show(planned)
    say(
        f"{results['num_documents']:,} documents, {results['num_bytes'] / 1e6:.1f} MB, in {config.output}; "
        f"{results['num_held_out_documents']:,} of them held out"
    )


def _cluster(address: str, workers: int) -> "RayExecutor":
    from puna.curate.engine.cluster import RayExecutor

    return RayExecutor(address, workers)


def _sources(config: CurateConfig) -> list[Source]:
    if config.sources:
        return [Source(source.name, source.read, source.steps) for source in config.sources]
    if config.source is None:
        raise InputError(
            'There is nothing to read: set source = "FOLDER", or sources (`puna config curate` shows how).'
        )
    from puna.curate.readers.folder import FolderReader, PythonReader

    if config.source == "python":
        return [Source("python", PythonReader())]
    folder = Path(config.source)
    return [Source(folder.expanduser().resolve().name, FolderReader(path=folder))]


@contextlib.contextmanager
def _alone_in(work: Path) -> Iterator[None]:
    """Make sure that no other process writes to the same place; clear away what a killed one left half-written."""
    with only_process(work, "puna curate"):
        for scratch in work.rglob(".*.tmp-*"):
            shutil.rmtree(scratch, ignore_errors=True)
        yield


def _clean(work: Path, used: set[str]) -> None:
    """Remove what no later run can use; everything if nothing is used."""
    if not used:
        shutil.rmtree(work)
        return
    for path in [*work.glob("*"), *work.glob("*/*.*")]:
        if path.is_file() and path.name[:32] not in used and path.name != "lock":
            path.unlink()
        elif path.is_dir() and len(path.name) == 32 and path.name not in used:
            shutil.rmtree(path)


def _check_enough(config: CurateConfig, planned: list[Progress]) -> None:
    left = sum(part.documents for one in planned for part in one.parts[-1])
    needed = 2 if config.held_out_share else 1
    if left >= needed:
        return
    reasons: Counter[str] = Counter()
    for one in planned:
        for count in one.counts.values():
            reasons.update(count.reasons)
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(5)) or "there is no document"
    what = "one to train on and one to measure on" if needed == 2 else "one"
    raise InputError(
        f"{left} usable document(s) are left of {config.source or 'the sources'} ({why}); at least {needed} "
        f"{'are' if needed == 2 else 'is'} needed, {what}."
    )


def _results(planned: list[Progress], folder: Path) -> dict[str, Any]:
    """For the manifest; what is held out is part of what is read."""
    last = [list(one.counts.values())[-1] for one in planned]
    reasons: Counter[str] = Counter()
    for one in planned:
        for count in one.counts.values():
            reasons.update(count.reasons)
    return {
        "num_documents": sum(count.documents_out for count in last),
        "num_held_out_documents": num_rows(folder / "held_out"),
        "num_bytes": sum(count.bytes_out for count in last),
        "rejected": dict(reasons.most_common()),
    }


def _input_hashes(planned: list[Progress]) -> dict[str, str]:
    """What each source was read from -> hash of its texts as read."""
    hashes = {}
    for one in planned:
        places = [value for value in vars(one.source.reader).values() if isinstance(value, Path)]
        digest = hashlib.sha256("".join(part.input_hash for part in one.parts[0]).encode())
        place = str(places[0]) if places else one.source.name
        hashes[place if place not in hashes else f"{place} ({one.source.name})"] = digest.hexdigest()
    return hashes


def _show(planned: list[Progress]) -> None:
    """A table of what each step did, over all sources."""
    table = Table(title="Documents by step")
    table.add_column("step")
    for column in ("in", "out", "kept", "MB out"):
        table.add_column(column, justify="right")
    table.add_column("most frequent reasons")
    for count in total(count for one in planned for count in one.counts.values()):
        kept = f"{count.documents_out / count.documents_in:.1%}" if count.documents_in else ""
        reasons = "; ".join(f"{reason} ({number:,})" for reason, number in count.reasons.most_common(3))
        table.add_row(
            count.step,
            f"{count.documents_in:,}",
            f"{count.documents_out:,}",
            kept,
            f"{count.bytes_out / 1e6:,.1f}",
            Text(reasons),
        )
    console.print(table)
