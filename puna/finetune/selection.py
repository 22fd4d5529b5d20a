"""Which moment of a training is kept, and when it ends early: the one with the best value of a metric."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file

from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path
from puna.runtime.progress import say
from puna.train.state import TrainState

BEST_FILE = "best.safetensors"
LOSS = "validation/loss"

Measure = Callable[[Transformer, int], dict[str, float]]
"""Measures a model after a step; the names are those of curves, such as "validation/f1"."""

Judge = Callable[[Sequence[Mapping[str, float]]], bool]
"""Whether training is over after these points of curves, the oldest first; see `puna.train.loop.Watch.ends`."""


@dataclass(frozen=True)
class SelectionConfig:
    """Keep the model as it was when a metric was best, instead of as it is at the end."""

    metric: str = LOSS
    """A curve that validations draw, such as "validation/loss", or "validation/f1" of a task."""
    goal: Literal["lowest", "highest"] = "lowest"
    """Which value is best."""
    patience: int = 0
    """End the training after so many validations in a row without a better value; 0 never does."""

    def __post_init__(self) -> None:
        if self.patience < 0:
            raise ValueError(f"selection.patience is {self.patience}; it cannot be negative.")

    def best(self, points: Sequence[Mapping[str, float]]) -> int | None:
        """The number of the best of the points that have the metric, the first of equals; None where none has."""
        values = self._values(points)
        if not values:
            return None
        return values.index(min(values) if self.goal == "lowest" else max(values))

    def is_over(self, points: Sequence[Mapping[str, float]]) -> bool:
        """Whether patience has run out."""
        best = self.best(points)
        return best is not None and 0 < self.patience < len(self._values(points)) - best

    def _values(self, points: Sequence[Mapping[str, float]]) -> list[float]:
        return [point[self.metric] for point in points if self.metric in point]


class Selector:
    """The `puna.train.loop.Watch` of fine-tuning: measures more than the loss, and writes down the best model.

    Args:
        selection: how to choose; None keeps the last.
        output: gets `BEST_FILE`, the trained parameters at the best validation.
        measure: what to measure beside the loss.
        judge: ends the training too; None leaves that to patience.
    """

    def __init__(
        self, selection: SelectionConfig | None, output: Path, measure: Measure, judge: Judge | None = None
    ) -> None:
        self.selection, self.output, self._measure, self._judge = selection, output, measure, judge

    def measure(
        self, state: TrainState, point: Mapping[str, float], earlier: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        """See `Watch.measure`."""
        model = state.model
        compute_dtype, model.compute_dtype = model.compute_dtype, None
        model.eval()
        try:
            with torch.no_grad():
                measured = self._measure(model, state.step)
        finally:
            model.train()
            model.compute_dtype = compute_dtype
        points = [*(p for p in earlier if LOSS in p), {**point, **measured}]
        if self.selection is not None and self.selection.best(points) == len(points) - 1:
            with atomic_path(self.output / BEST_FILE) as path:
                save_file({name: value.detach().contiguous() for name, value in _trained(model).items()}, path)
        return measured

    def ends(self, points: Sequence[Mapping[str, float]]) -> bool:
        """See `Watch.ends`."""
        impatient = self.selection is not None and self.selection.is_over(points)
        return impatient or (self._judge is not None and self._judge(points))

    def restore_best(self, model: Transformer, points: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Make a trained model what it was at the best validation; returns what is worth noting about that."""
        if self.selection is None:
            return {}
        validated = [point for point in points if self.selection.metric in point]
        number = self.selection.best(validated)
        assert number is not None, "validations draw the metric"
        best = validated[number]
        stored = load_file(self.output / BEST_FILE)
        with torch.no_grad():
            for name, parameter in _trained(model).items():
                parameter.copy_(stored[name])
        say(
            f"Kept step {best['step']:,.0f}, whose {self.selection.metric} was best: {best[self.selection.metric]:.4f}."
        )
        return {"best_step": best["step"], f"best_{self.selection.metric}": best[self.selection.metric]}


def check_selection(selection: SelectionConfig | None, has_held_out: bool, metrics: Sequence[str]) -> None:
    """Refuse a selection that no validation serves, before training.

    Raises:
        InputError: there is nothing held out, or the metric is none of `metrics`.
    """
    if selection is None:
        return
    if not has_held_out:
        raise InputError("selection chooses by what is measured on held-out data, but no held-out data is given.")
    if selection.metric not in metrics:
        raise InputError(f"selection.metric is {selection.metric!r}, but what is measured is {', '.join(metrics)}.")


def _trained(model: Transformer) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
