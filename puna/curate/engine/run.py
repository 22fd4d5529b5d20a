"""One run: every part of every source through all passes, with a decision between two passes.

What is finished lies in a work folder, in files named after a fingerprint of everything that they were made from; so a
run that was killed goes on, and a run with other settings makes again only what depends on them.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from puna.curate.engine.chunks import chunks, fingerprint, settings_of
from puna.curate.engine.counts import StepCount
from puna.curate.engine.guard import Blame, Guard
from puna.curate.engine.local import Died, Executor, LocalExecutor
from puna.curate.engine.task import Chunk, HeldOut, Part, Pass, Task, is_global, passes
from puna.curate.engine.worker import finished, run_task
from puna.curate.step import GlobalStep, Reader, Step
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path
from puna.runtime.manifest import code_version
from puna.runtime.progress import progress, say

_FEW_CHUNKS = 32
"""With fewer, large ones are read in a pass of their own, so that many workers can go on with what one has read."""


@dataclass(frozen=True)
class Source:
    """A reader with a name, and the steps for what it reads."""

    name: str
    """The column `source` of its documents."""
    reader: Reader
    """Where they come from."""
    steps: tuple[Step | GlobalStep, ...] = ()
    """Before the steps that all sources share."""


@dataclass(frozen=True)
class Settings:
    """What holds for the whole run."""

    work: Path
    """Folder for what is finished."""
    batch_bytes: int
    """A part holds about so many characters of text."""
    memory_bytes: int
    """For the decision of a global step."""
    threads: int
    """For the decision of a global step."""
    unit_timeout_seconds: float
    """Longest time without progress in a unit or a step."""
    held_out: HeldOut | None
    """What is kept from training."""
    keep_rejected: bool
    """Write the texts of rejected documents too."""


class Progress:
    """How far a source has come."""

    def __init__(self, source: Source, common: Sequence[Step | GlobalStep], cut: list[Chunk], read_apart: bool) -> None:
        """`read_apart`: read in a pass of its own, so that many can go on with what one worker reads."""
        self.source = source
        self.chunks = cut
        row = passes(source.steps, common)
        self.passes = [Pass(), *row] if read_apart else row
        self.num_own = len(self.passes) - 1 - sum(map(is_global, common))
        """Passes that end before the other sources are waited for."""
        self.parts: list[list[Part]] = []
        """Of each pass that is done."""
        self.decision: tuple[Path | None, str] = (None, "")
        """The file of the decision after the last pass, and its fingerprint."""
        sizes = {name: size for chunk in cut for name, size, _ in chunk.files}
        self.counts = {"read": StepCount("read", bytes_in=sum(sizes.values()))}
        """By step, in their order."""
        for does in row:
            for label, _ in (*filter(None, [does.apply]), *does.steps):
                self.counts[label] = StepCount(label)


def plan(sources: Sequence[Source], common: Sequence[Step | GlobalStep], batch_bytes: int) -> list[Progress]:
    """Look at what there is to read.

    Raises:
        InputError: a reader finds nothing.
    """
    cut: list[list[Chunk]] = []
    for source in sources:
        cut.append(chunks(source.reader, batch_bytes, first=sum(map(len, cut))))
    few = sum(map(len, cut)) < _FEW_CHUNKS
    return [
        Progress(source, common, own, few and any(chunk.bytes > 2 * batch_bytes for chunk in own))
        for source, own in zip(sources, cut, strict=True)
    ]


def run(planned: list[Progress], executor: Executor, settings: Settings) -> set[str]:
    """Bring everything through all passes; return the fingerprints of the files that this run uses.

    Raises:
        InputError: settings or models that a step cannot work with, or a task that kills every process it is given to.
        OSError: the disk is full.
    """
    used: set[str] = set()
    rounds = [
        [[one] for one in planned if number < one.num_own] for number in range(max(one.num_own for one in planned))
    ] + [[planned]] * (len(planned[0].passes) - planned[0].num_own)
    for number, groups in enumerate(rounds, start=1):
        title = f"Pass {number} of {len(rounds)}" if len(rounds) > 1 else "Curating"
        _pass([one for group in groups for one in group], executor, settings, used, title)
        for group in groups:
            _decide(group, settings, used)
    return used


def _pass(active: list[Progress], executor: Executor, settings: Settings, used: set[str], title: str) -> None:
    tasks: list[tuple[Progress, Task]] = []
    for one in active:
        does, is_last = one.passes[len(one.parts)], len(one.parts) == len(one.passes) - 1
        work = settings.work / f"{len(one.parts):02d}"
        work.mkdir(exist_ok=True)
        made_by = _Maker(one, does, settings, settings.held_out if is_last else None, work)
        tasks += [(one, task) for task in made_by.tasks()]
        one.parts.append([])
    used.update(task.fingerprint for _, task in tasks)
    for number, parts in _do([task for _, task in tasks], executor, title):
        one = tasks[number][0]
        for part in parts:
            for count in part.counts:
                one.counts[count.step].add(count)
            one.parts[-1].append(replace(part, counts=()))
    for one in active:
        one.parts[-1].sort(key=lambda part: (part.chunk, part.number))


class _Maker:
    """Makes the tasks of one source in one pass."""

    def __init__(self, one: Progress, does: Pass, settings: Settings, held_out: HeldOut | None, work: Path) -> None:
        self._one, self._does = one, does
        named: list[tuple[str, Step | GlobalStep]] = [*does.steps]
        named += [step for step in (does.apply, does.keys) if step is not None]
        self._common = [
            code_version(),
            settings.batch_bytes,
            settings.keep_rejected,
            [(label, settings_of(step)) for label, step in named],
            vars(held_out) if held_out else None,
        ]
        self._blank = Task(
            work=work,
            fingerprint="",
            source=one.source.name,
            does=does,
            reader=None,
            chunk=None,
            part=None,
            decisions=one.decision[0],
            held_out=held_out,
            batch_bytes=settings.batch_bytes,
            keep_rejected=settings.keep_rejected,
            unit_timeout_seconds=settings.unit_timeout_seconds,
        )

    def tasks(self) -> Iterator[Task]:
        one = self._one
        if not one.parts:
            read = [one.source.name, settings_of(one.source.reader)]
            for chunk in one.chunks:
                place = chunk.number if self._does.keys else None
                name = fingerprint(self._common, read, chunk.units, chunk.files, place)
                yield replace(self._blank, fingerprint=name, reader=one.source.reader, chunk=chunk)
            return
        for part in one.parts[-1]:
            if part.documents:
                place = part.first if self._does.keys or self._does.apply else None
                name = fingerprint(self._common, part.fingerprint, one.decision[1], place)
                yield replace(self._blank, fingerprint=name, part=part)


def _do(tasks: Sequence[Task], executor: Executor, title: str) -> Iterator[tuple[int, list[Part]]]:
    """Do tasks, again where a process died; yield what each made."""
    waiting: list[int] = []
    started, documents, text_bytes = time.monotonic(), 0, 0
    with progress(title, total=len(tasks)) as advance:
        for number, task in enumerate(tasks):
            if (parts := finished(task)) is not None:
                advance(note="done before")
                yield number, parts
            else:
                waiting.append(number)
        while waiting:
            again: list[int] = []
            for position, result in executor.map(run_task, [tasks[number] for number in waiting]):
                number = waiting[position]
                if isinstance(result, Died):
                    _learn(tasks[number])
                    again.append(number)
                    continue
                for part in result:
                    documents += part.counts[0].documents_out if part.counts else 0
                    text_bytes += part.counts[0].bytes_out if part.counts else 0
                seconds = time.monotonic() - started
                advance(note=f"{documents / seconds:,.0f} documents/s, {text_bytes / 1e6 / seconds:.1f} MB/s")
                yield number, result
            waiting = sorted(again)


def _learn(task: Task) -> None:
    """Find out what a process died of."""
    note = Guard.last_words(task.note)
    blame = Blame.load(task.blame)
    where = f"in {task.source}"
    if note and "unit" in note and task.chunk:
        where = f"reading {task.chunk.units[note['unit']]}"
    elif note:
        where += f" at {note['call'].partition('/')[2]}"
    if not blame.learn(note, task.unit_timeout_seconds):
        raise InputError(
            f"Processes keep dying {where}. If memory is short, set fewer workers or a smaller batch_megabytes; what "
            "is finished is kept, and the same command goes on from there."
        )
    blame.save(task.blame)
    say(f"A process died {where}; another one tries again.")


def _decide(group: list[Progress], settings: Settings, used: set[str]) -> None:
    """Let the global step that these sources have come to decide."""
    keys_of = group[0].passes[len(group[0].parts) - 1].keys
    for one in group:
        one.decision = (None, "")
    if keys_of is None:
        return
    label, step = keys_of
    parts = [part for one in group for part in one.parts[-1] if "keys" in part.files]
    if not parts:
        return
    name = fingerprint(code_version(), settings_of(step), [(part.fingerprint, part.first) for part in parts])
    used.add(name)
    decision = Decision(
        step, tuple(Path(part.files["keys"]) for part in parts), settings.work / name, settings.memory_bytes
    )
    if not decision.result.exists():
        with progress(f"Deciding {label}", total=1) as advance, LocalExecutor(1, settings.threads) as executor:
            for _, result in executor.map(decide, [decision]):
                if isinstance(result, Died):
                    raise InputError(
                        f"The process that decided {label} was killed, perhaps for memory; set a smaller "
                        "memory_megabytes. What is finished is kept, and the same command goes on from there."
                    )
                advance()
    for one in group:
        one.decision = (decision.result, name)


@dataclass(frozen=True)
class Decision:
    """A global step's task between two passes."""

    step: GlobalStep
    """Who decides."""
    keys: tuple[Path, ...]
    """By what."""
    folder: Path
    """Where to."""
    memory_bytes: int
    """With how much."""

    @property
    def result(self) -> Path:
        """The file of decisions, there when they are all made."""
        return self.folder / "decisions.parquet"


def decide(decision: Decision) -> None:
    """Make a decision in a folder beside its place, and move it there when it is whole."""
    with atomic_path(decision.folder) as folder:
        folder.mkdir()
        decision.step.decide(decision.keys, folder, decision.memory_bytes)
        for path in folder.iterdir():
            if path.name != decision.result.name:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
