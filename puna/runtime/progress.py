"""Progress that suits where it is shown: a live bar in a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)


def say(message: str) -> None:
    """Tell the user something in one line; long lines are not broken, so that paths can be copied."""
    console.print(message, soft_wrap=True, markup=False)


class Advance(Protocol):
    """Reports that work was done."""

    def __call__(self, amount: int = 1, note: str = "") -> None:
        """`amount` of the total was done since the last call; `note` is shown behind the bar."""
        ...


@contextmanager
def progress(title: str, total: int | None, *, every_seconds: float = 10.0) -> Iterator[Advance]:
    """Show progress towards `total` (None when it is unknown) while the block runs."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as bar:
            task = bar.add_task(title, total=total, note="")

            def advance(amount: int = 1, note: str = "") -> None:
                bar.update(task, advance=amount, note=note)

            yield advance
        return

    started = shown = time.monotonic()
    done = 0

    def report(amount: int = 1, note: str = "") -> None:
        nonlocal done, shown
        done += amount
        now = time.monotonic()
        if done == total or now - shown >= every_seconds:
            shown = now
            left = f", {duration((now - started) / done * (total - done))} left" if total and 0 < done < total else ""
            of = f"/{total:,}" if total else ""
            console.print(f"{title}: {done:,}{of}{left}{', ' + note if note else ''}", soft_wrap=True)

    yield report


def duration(seconds: float) -> str:
    """Seconds for people: 48 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
