"""What a comparison consists of: sections of tables and figures, which terminal and page show alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table of texts; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    terminal_columns: int | None = None
    """How many of its columns the terminal shows, all where absent; the page shows all."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing with what it shows."""

    caption: str
    svg: str


@dataclass(frozen=True, slots=True)
class Section:
    """One side of the comparison."""

    title: str
    text: str
    """How to read it."""
    sheets: Sequence[Sheet] = ()
    figures: Sequence[Figure] = ()
    missing: Sequence[str] = ()
    """What was not measured, and why."""
    summary: Sequence[str] = ()
    """What it comes down to, a sentence each; it stands at the top of the page."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """The numbers themselves, for compare.json."""


def not_measured(why: str) -> str:
    """What stands in place of a number that there is not."""
    return f"not measured: {why}"
