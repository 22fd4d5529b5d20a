"""Results in the terminal."""

from collections.abc import Sequence

from puna.evaluate.harness.run import Result
from puna.evaluate.tasks.task import Metric
from puna.runtime.progress import say


def print_results(results: Sequence[Result]) -> None:
    """A line for each metric of each task, with the interval that holds its true value with 95 % confidence."""
    width = max(len(name) for result in results for name in result.metrics)
    for result in results:
        cut = f"; of {result.num_truncated:,} the beginning was cut off" if result.num_truncated else ""
        say(f"\n{result.task.title} ({result.num_questions:,} questions{cut})")
        for name, metric in result.metrics.items():
            say(f"  {name:<{width}} {show(metric.value):>12}   {interval(metric)}".rstrip())


def interval(metric: Metric) -> str:
    """The ends of a metric's interval."""
    return "" if metric.low is None or metric.high is None else f"95 %: {show(metric.low)} to {show(metric.high)}"


def show(value: float) -> str:
    """Three digits behind the point, or none of a large number."""
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
