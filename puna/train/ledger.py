"""Where a run's time went, over all its restarts: `ledger.jsonl`, beside the metrics, only ever appended to.

Its lines, each with the wall-clock `time`:
    start    a process began
    back     steps above `step` will be done again: training goes on from a checkpoint
    spent    seconds of each phase since the line before, up to `step`
    stop     the run ended, or it is its user's turn: what follows until the next start is not its time

Every moment of a process belongs to exactly one phase, so that the parts add up to the whole. What a kill cuts off
between the last line and the next start counts as restart.
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from puna.runtime.errors import InputError
from puna.runtime.progress import duration

Phase = Literal["start_up", "compute", "data", "validation", "checkpoint", "checks"]
FILE_NAME = "ledger.jsonl"


@dataclass(frozen=True)
class Goodput:
    """Where the time of a run went, in seconds."""

    wall: float = 0.0
    """From the first start to the last line, without the time after a stop."""
    compute: float = 0.0
    """Steps that count."""
    data: float = 0.0
    """Waiting for batches."""
    validation: float = 0.0
    """Measuring on held-out rows."""
    checkpoint: float = 0.0
    """Waiting for checkpoints."""
    checks: float = 0.0
    """Looking for corrupted values."""
    start_up: float = 0.0
    """From the start of training in a process to its first step."""
    restart: float = 0.0
    """From the last sign of a process that died to the start of the next."""
    lost: float = 0.0
    """All that was spent on steps that had to be done again."""
    restarts: int = 0
    """How often a process took over from one that died."""

    @property
    def effective_share(self) -> float:
        """Share of the wall time that went into steps that count."""
        return self.compute / self.wall if self.wall else 0.0

    def __str__(self) -> str:
        seconds = asdict(self)
        names = [name for name in seconds if name not in ("wall", "compute", "restarts")]
        rest = [
            f"{name.replace('_', '-')} {seconds[name] / self.wall:.1%}"
            for name in names
            if seconds[name] >= 5e-4 * self.wall
        ]
        died = f", {self.restarts} restarts" if self.restarts else ""
        return (
            f"effective training time {self.effective_share:.1%} of {duration(self.wall)}{died}"
            f"{'; ' if rest else ''}{', '.join(rest)}"
        )


class Ledger:
    """Writes the ledger of one process; use as a context manager around the whole training.

    It ends with a stop when the block ends well, by Ctrl-C, or with an InputError, which is for the user to mend; after
    any other exception the run has died.

    Args:
        directory: gets ledger.jsonl.
        writes: whether this rank does; one has to.
        every_seconds: a line at most so often, besides those that `flush` asks for.
    """

    def __init__(self, directory: Path, *, writes: bool = True, every_seconds: float = 1.0) -> None:
        self._every = every_seconds
        self._spent: dict[Phase, float] = defaultdict(float)
        self._phase: Phase = "start_up"
        self._clock = time.time() - time.monotonic()
        self._since = self._flushed = time.monotonic()
        self._step = 0
        self._file = None
        if writes:
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / FILE_NAME
            torn = path.exists() and not path.read_bytes().endswith(b"\n")
            self._file = path.open("a", encoding="utf-8")
            self._file.write("\n" if torn else "")
            self._write("start")

    def __enter__(self) -> "Ledger":
        return self

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Book the block's time on `phase`; what follows belongs to the phase before again."""
        before = self._phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    def went_back(self, step: int) -> None:
        """Training goes on from the state after `step`."""
        self.flush(self._step)
        self._write("back", step=step)
        self._step = step

    def advance(self, step: int) -> None:
        """`step` is done."""
        self._step = step
        if time.monotonic() - self._flushed >= self._every:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Write what was spent so far; call it at each checkpoint, so that no line spans one."""
        self._step = step
        self._enter("compute")
        self._write("spent", step=step, seconds=dict(self._spent))
        self._spent.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            if error is None or isinstance(error, (KeyboardInterrupt, InputError)):
                self.flush(self._step)
                self._write("stop")
            self._file.close()

    def _enter(self, phase: Phase) -> None:
        now = time.monotonic()
        self._spent[self._phase] += now - self._since
        self._since, self._phase = now, phase

    def _write(self, event: str, **values: Any) -> None:
        self._flushed = self._since
        if self._file is not None:
            self._file.write(json.dumps({"event": event, "time": self._clock + self._since, **values}) + "\n")
            self._file.flush()


def read_goodput(directory: Path) -> Goodput:
    """Add up the ledger of a run, finished or not; all zeros where there is none."""
    path = directory / FILE_NAME
    wall = restart = lost = 0.0
    restarts, spent = 0, list[tuple[int, dict[str, float]]]()
    before = {"event": "stop", "time": 0.0}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut short by a kill
        since = 0.0 if before["event"] == "stop" else line["time"] - before["time"]
        wall += since
        if line["event"] == "start" and before["event"] != "stop":
            restart, restarts = restart + since, restarts + 1
        elif line["event"] == "spent":
            spent.append((line["step"], line["seconds"]))
        elif line["event"] == "back":
            lost += sum(sum(seconds.values()) for step, seconds in spent if step > line["step"])
            spent = [(step, seconds) for step, seconds in spent if step <= line["step"]]
        before = line
    phases: dict[str, float] = defaultdict(float)
    for _, seconds in spent:
        for phase, value in seconds.items():
            phases[phase] += value
    return Goodput(wall=wall, restart=restart, lost=lost, restarts=restarts, **phases)
