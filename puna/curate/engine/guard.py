"""Bad documents, bad files and dead workers: found, counted with a reason, and passed over.

Before a worker reads a unit or calls a step, it notes so in a small file. Should it die (killed for memory, a crash in
native code, or the watchdog here), the file tells the parent what it was about. The parent hands the task out again
with a `Blame`: a unit that killed twice is left out from where it was; a batch that killed a step is gone through
document by document, and the next death names the one to leave out.
"""

import errno
import faulthandler
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from puna.runtime.errors import InputError
from puna.runtime.files import write_json

Result = TypeVar("Result")

TOO_LONG = "took longer than unit_timeout_seconds"
KILLED_READER = "killed the process that read it"
KILLED_STEP = "killed the process that worked on it"
_PATIENCE = 100
"""A step that fails on this many documents of a batch and works on none is broken itself."""


class BrokenStep(RuntimeError):
    """A step does not keep to the contract; no document is to blame."""


@dataclass
class Blame:
    """What earlier attempts at a task died of."""

    deaths: dict[str, int] = field(default_factory=dict)
    """Unit's number, or "start" -> how often a process died there."""
    units: dict[str, list[Any]] = field(default_factory=dict)
    """Unit's number -> [how many documents and rejects to read of it, reason to reject the rest]."""
    rows: dict[str, dict[str, str]] = field(default_factory=dict)
    """Call, such as "3/gopher_quality" (part and step) -> row in its batch -> reason to reject it."""

    @classmethod
    def load(cls, path: Path) -> "Blame":
        """As `save` left it; nobody is to blame where it left nothing."""
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else cls()

    def save(self, path: Path) -> None:
        """Keep for the next attempt, in this run or a later one."""
        write_json(path, vars(self))

    def learn(self, note: dict[str, Any] | None, timeout_seconds: float) -> bool:
        """Take a dead worker's note into account; return whether another attempt makes sense."""
        if note is None:
            self.deaths["start"] = self.deaths.get("start", 0) + 1
            return self.deaths["start"] < 3
        too_long = time.time() - note["since"] >= timeout_seconds
        if "unit" in note:
            unit = str(note["unit"])
            self.deaths[unit] = self.deaths.get(unit, 0) + 1
            if unit in self.units and self.units[unit][0] == 0:
                return False
            if too_long or self.deaths[unit] > 1:
                self.units[unit] = [
                    0 if unit in self.units else note["items"],
                    TOO_LONG if too_long else KILLED_READER,
                ]
            return True
        rows = self.rows.setdefault(note["call"], {})
        if "row" in note:
            if str(note["row"]) in rows:
                return False
            rows[str(note["row"])] = TOO_LONG if too_long else KILLED_STEP
        return True


class Guard:
    """Notes what is being done, and ends this process when that takes too long."""

    def __init__(self, path: Path, timeout_seconds: float) -> None:
        self.path = path
        self.timeout_seconds = timeout_seconds
        self._note: dict[str, Any] = {}
        self._armed = 0.0
        self._silence = Path(os.devnull).open("w")  # noqa: SIM115  (the watchdog needs it as long as it runs)

    def doing(self, **note: Any) -> None:
        """From now on this is being done."""
        self._note = note
        self._write()

    def still_alive(self) -> None:
        """There was progress in what is being done: the time for it starts again. Cheap to call."""
        if time.monotonic() - self._armed > self.timeout_seconds / 10:
            self._write()

    def _write(self) -> None:
        self._armed = time.monotonic()
        self.path.write_text(json.dumps(self._note | {"since": time.time()}), encoding="utf-8")
        # In C, so that it also ends a process that hangs in native code and never comes back to the interpreter.
        faulthandler.dump_traceback_later(self.timeout_seconds, exit=True, file=self._silence)

    def __enter__(self) -> "Guard":
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._silence.close()
        self.path.unlink(missing_ok=True)

    @staticmethod
    def last_words(path: Path) -> dict[str, Any] | None:
        """The note that a dead worker left."""
        try:
            note = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        path.unlink(missing_ok=True)
        return note if isinstance(note, dict) else None


def call_guarded(
    guard: Guard,
    blame: Blame,
    call: str,
    function: Callable[[pa.Table, int], Result],
    reject: Callable[[pa.Table, str], Result],
    documents: pa.Table,
) -> list[Result]:
    """Call `function` on a batch, on pieces of it where the whole fails; what cannot be worked on is rejected.

    Args:
        guard: of this task.
        blame: of this task.
        call: which step on which part.
        function: what to call, with documents and the row of the first of them in the batch.
        reject: makes a result that rejects one document, for a reason.
        documents: the batch.

    Raises:
        InputError, BrokenStep: as `function` did: the settings or the step are wrong, not a document.
        Exception: `function` works on none of many documents.
    """
    guard.doing(call=call)
    if call not in blame.rows:
        return _by_halves(function, reject, documents, call.partition("/")[2])
    results = []
    for row in range(documents.num_rows):
        one = documents.slice(row, 1)
        if reason := blame.rows[call].get(str(row)):
            results.append(reject(one, reason))
        else:
            guard.doing(call=call, row=row)
            results += _by_halves(partial(_at_row, function, row), reject, one, call.partition("/")[2])
    return results


def _at_row(function: Callable[[pa.Table, int], Result], row: int, piece: pa.Table, _: int) -> Result:
    return function(piece, row)


def is_disk_full(error: Exception) -> bool:
    """Whether no document is to blame."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _by_halves(
    function: Callable[[pa.Table, int], Result],
    reject: Callable[[pa.Table, str], Result],
    documents: pa.Table,
    step: str,
) -> list[Result]:
    results: list[Result] = []
    failures = 0
    pieces = [(0, documents.num_rows)]
    while pieces:
        first, end = pieces.pop()
        try:
            results.append(function(documents.slice(first, end - first), first))
        except (InputError, BrokenStep):
            raise
        except Exception as error:
            if is_disk_full(error):
                raise
            if end - first > 1:
                middle = (first + end) // 2
                pieces += [(middle, end), (first, middle)]
                continue
            failures += 1
            if failures == len(results) + 1 and failures >= min(_PATIENCE, max(2, documents.num_rows)):
                raise
            results.append(reject(documents.slice(first, 1), f"{step} failed with {type(error).__name__}"))
    return results
