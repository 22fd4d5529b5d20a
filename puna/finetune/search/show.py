"""What a search has found: a page, and a table in the terminal."""

import time
import warnings
from collections.abc import Sequence
from importlib.resources import files

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table
from rich.text import Text

from puna.finetune.search.study import REASON, Search
from puna.runtime.errors import InputError
from puna.runtime.page import new_figure, to_svg, write_page
from puna.runtime.progress import duration, say
from puna.train.metrics import read_metrics

_SHOWN = 10

_STATES = {TrialState.COMPLETE: "to its end", TrialState.PRUNED: "ended early", TrialState.FAIL: "failed"}


def write_search_page(search: Search) -> None:
    """Write search.html: the best values, which settings matter, how trials went.

    Where matplotlib is absent, without plots.
    """
    config = search.config
    write_page(
        config.output / "search.html",
        files("puna.finetune.search").joinpath("search.html.jinja").read_text(encoding="utf-8"),
        title=f"Search of {config.recipe.stem}",
        created=time.strftime("%Y-%m-%d %H:%M"),
        config=config,
        keys=list(search.distributions),
        best=search.best,
        trials=[_row(trial, list(search.distributions)) for trial in search.finished],
        importances=importances(search),
        figures=_figures(search),
    )


def print_search(search: Search) -> None:
    """Print the best trials, how much each setting matters, and where the best recipe is."""
    config = search.config
    ended = [trial for trial in search.finished if trial.state == TrialState.COMPLETE]
    ended.sort(key=lambda trial: _value(trial), reverse=config.goal == "highest")
    table = Table(title=f"The best of {len(search.finished)} trials", title_justify="left")
    for column in ("trial", config.metric, *search.distributions):
        table.add_column(column.replace(".", ".\n"), justify="right", overflow="fold")
    for trial in ended[:_SHOWN]:
        values = [_number(trial.params[key]) for key in search.distributions]
        table.add_row(str(trial.number), f"{_value(trial):.4f}", *map(Text, values))
    console = Console()
    console.print(table)
    for key, share in importances(search).items():
        console.print(f"{key}: {share:.0%} of what settings explain, by {len(ended)} trials", highlight=False)
    say(f"Best recipe: {config.output / 'best.toml'}. Page: {config.output / 'search.html'}")


def importances(search: Search) -> dict[str, float]:
    """Which share of the differences between trials each setting explains, the greatest first (optuna's PED-ANOVA,
    Watanabe et al. 2023, arXiv:2304.10255); nothing where there are too few trials to tell."""
    ended = [trial for trial in search.finished if trial.state == TrialState.COMPLETE]
    if len(ended) < 2 or len({trial.value for trial in ended}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    try:
        return optuna.importance.get_param_importances(search.study, evaluator=evaluator)
    except (ValueError, RuntimeError):
        return {}  # every trial had the same values


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


def _row(trial: FrozenTrial, keys: Sequence[str]) -> dict[str, object]:
    took = "" if trial.duration is None else duration(trial.duration.total_seconds())
    return {
        "number": trial.number,
        "state": _STATES[trial.state],
        "value": trial.value,
        "values": [_number(trial.params[key]) for key in keys],
        "validations": trial.last_step or 0,
        "took": took,
        "reason": trial.user_attrs.get(REASON, ""),
    }


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _figures(search: Search) -> dict[str, str]:
    """SVG by where they go; none where matplotlib is absent."""
    try:
        new_figure(1, 1)
    except InputError as error:
        say(f"The page has no plots. {error}")
        return {}
    figures = {"history": _history(search)}
    if shares := importances(search):
        figures["importances"] = _bars(shares)
    if curves := _curves(search):
        figures["curves"] = curves
    return figures


def _history(search: Search) -> str:
    """Every trial's value, and the best so far."""
    figure = new_figure(9, 3.2)
    axes = figure.subplots()
    for state, style in ((TrialState.COMPLETE, "o"), (TrialState.PRUNED, "x")):
        chosen = [trial for trial in search.finished if trial.state == state and trial.value is not None]
        if chosen:
            numbers, values = [trial.number for trial in chosen], [trial.value for trial in chosen]
            axes.plot(numbers, values, style, color="tab:orange", label=_STATES[state])
    better = min if search.config.goal == "lowest" else max
    best: list[float] = []
    numbers = []
    for trial in search.finished:
        if trial.state == TrialState.COMPLETE:
            best.append(better([*best[-1:], _value(trial)]))
            numbers.append(trial.number)
    axes.step(numbers, best, where="post", color="tab:blue", label="best so far")
    axes.set(xlabel="trial", ylabel=search.config.metric)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    return to_svg(figure)


def _bars(shares: dict[str, float]) -> str:
    figure = new_figure(9, 0.4 * len(shares) + 0.8)
    axes = figure.subplots()
    drawn = axes.barh(range(len(shares)), list(shares.values()), color="tab:orange")
    axes.bar_label(drawn, labels=[f"{share:.0%}" for share in shares.values()], padding=3)
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="share of what settings explain")
    return to_svg(figure)


def _curves(search: Search) -> str:
    """The metric over the steps of each trial."""
    figure = new_figure(9, 3.2)
    axes = figure.subplots()
    drawn = 0
    for trial in search.finished:
        steps, values = _points(search, trial)
        best = search.best is not None and trial.number == search.best.number
        style = {"color": "tab:orange", "linewidth": 2.5, "zorder": 3} if best else {"color": "tab:gray", "alpha": 0.5}
        if steps:
            axes.plot(steps, values, marker=".", label=f"trial {trial.number}, the best" if best else None, **style)
            drawn += 1
    axes.set(xlabel="step", ylabel=search.config.metric)
    axes.grid(alpha=0.3)
    if search.best is not None:
        axes.legend()
    return to_svg(figure) if drawn else ""


def _points(search: Search, trial: FrozenTrial) -> tuple[Sequence[float], Sequence[float]]:
    path = search.folder(trial.number) / "metrics.jsonl"
    metric = search.config.metric
    points = [point for point in read_metrics(path) if metric in point] if path.exists() else []
    return [point["step"] for point in points], [point[metric] for point in points]
