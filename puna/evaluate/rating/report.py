"""What raters found, as a page and as tables in the terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from puna.evaluate.rating.findings import Findings
from puna.evaluate.rating.strengths import Strength
from puna.evaluate.rating.winrates import Tally, WinRate
from puna.evaluate.statistics.intervals import Interval
from puna.runtime.page import write_page


class _Bar(NamedTuple):
    """A tally as widths in percent."""

    tally: Tally
    wins: float
    ties: float
    losses: float


@dataclass(frozen=True, slots=True)
class _Whisker:
    """A strength as places on a line of 0 to 100."""

    strength: Strength
    low: float
    middle: float
    high: float


def write_report(path: Path, title: str, findings: Findings, counts: dict[str, int], created: str) -> None:
    """One self-contained page.

    Args:
        counts: num_comparisons, num_comparisons_finished and num_same_answers, where they are known; for a judge
            num_unreadable_verdicts.
        created: when.
    """
    write_page(
        path,
        files("puna.evaluate.rating").joinpath("report.html.jinja").read_text(encoding="utf-8"),
        title=title,
        created=created,
        counts=counts,
        num_ratings=len(findings.ratings),
        num_raters=len({rating.rater for rating in findings.ratings}),
        num_prompts=len({repr(rating.prompt) for rating in findings.ratings}),
        num_both_bad=sum(rating.verdict == "both_bad" for rating in findings.ratings),
        agreement=findings.agreement,
        whiskers=_whiskers(findings.strengths),
        pairs=[(rate, [_bar(tally) for tally in (rate.overall, *rate.by_category)]) for rate in findings.win_rates],
        percent=_percent,
        between=_between,
    )


def print_tables(findings: Findings) -> None:
    """The same numbers for the terminal."""
    console = Console(highlight=False)
    ranking = Table(title="Strength, in Elo points (1000 is the mean)")
    for name in ("model", "Bradley-Terry", "95 %", "Elo", "95 %", "won/tied/lost"):
        ranking.add_column(name, justify="left" if name == "model" else "right", no_wrap=True)
    for each in findings.strengths:
        intervals = [f"{interval.low:.0f} to {interval.high:.0f}" for interval in (each.interval, each.elo_interval)]
        points = [f"{each.bradley_terry:.0f}", intervals[0], f"{each.elo:.0f}", intervals[1]]
        ranking.add_row(each.model, *points, f"{each.wins}/{each.ties}/{each.losses}")
    console.print(ranking)
    for rate in findings.win_rates:
        console.print(_table(rate))
    if findings.agreement is not None:
        console.print(str(findings.agreement), soft_wrap=True)


def _table(rate: WinRate) -> Table:
    table = Table(
        title=f"{rate.model} beside {rate.other}",
        caption=(
            f"win rate (a tie is half a win) {_percent(rate.rate.mean)}, {_between(rate.rate.interval)}; if answers "
            f"were equally long {_percent(rate.controlled)}, {_between(rate.controlled_interval)}"
        ),
    )
    for name in ("requests", "won", "tied", "lost", "share won", "95 %"):
        table.add_column(name, justify="left" if name == "requests" else "right")
    for tally in (*rate.by_category, rate.overall):
        counts = [f"{count:,}" for count in (tally.wins, tally.ties, tally.losses)]
        share = _percent(tally.wins / tally.total)
        table.add_row(tally.category or "all", *counts, share, _between(tally.wins_interval))
    return table


def _bar(tally: Tally) -> _Bar:
    return _Bar(tally, *(100 * count / tally.total for count in (tally.wins, tally.ties, tally.losses)))


def _whiskers(strengths: Sequence[Strength]) -> list[_Whisker]:
    points = [value for each in strengths for value in (*each.interval, each.bradley_terry)]
    lowest, span = min(points), (max(points) - min(points)) or 1.0
    places = [[100 * (value - lowest) / span for value in (*each.interval, each.bradley_terry)] for each in strengths]
    return [_Whisker(each, low, middle, high) for each, (low, high, middle) in zip(strengths, places, strict=True)]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _between(interval: Interval) -> str:
    """An interval of a share, which lies within 0 and 1 whatever the approximation says."""
    return f"{_percent(max(0.0, interval.low))} to {_percent(min(1.0, interval.high))}"
