"""The settings of `puna search`."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from puna.config import Kinds
from puna.finetune.selection import LOSS

Value = bool | int | float | str

_OURS = ("output", "selection.metric", "selection.goal")
"""Keys of the recipe that the search sets."""


class Parameter(ABC):
    """A setting of the recipe and the values that it may have; each kind is a frozen dataclass with a `kind`."""

    key: str

    @property
    @abstractmethod
    def extremes(self) -> Sequence[Value]:
        """Values for which the recipe has to be right, for all others to be."""


@dataclass(frozen=True, kw_only=True)
class FloatParameter(Parameter):
    """A real number."""

    kind: Literal["float"] = "float"
    """This kind's name."""
    key: str
    """The setting, as with --set: "train.optimizer.learning_rate"."""
    low: float
    """The least value."""
    high: float
    """The greatest."""
    log: bool = False
    """Whether its logarithm is what is spread evenly, as is good for learning rates."""

    def __post_init__(self) -> None:
        _check_range(self.key, self.low, self.high, self.log)

    @property
    def extremes(self) -> Sequence[Value]:
        """See `Parameter.extremes`."""
        return self.low, self.high


@dataclass(frozen=True, kw_only=True)
class IntegerParameter(Parameter):
    """A whole number."""

    kind: Literal["integer"] = "integer"
    """This kind's name."""
    key: str
    """The setting, as with --set: "train.steps"."""
    low: int
    """The least value."""
    high: int
    """The greatest."""
    log: bool = False
    """Whether its logarithm is what is spread evenly."""
    step: int = 1
    """Only `low` and every so many above it."""

    def __post_init__(self) -> None:
        _check_range(self.key, self.low, self.high, self.log)
        if self.step < 1 or (self.high - self.low) % self.step:
            raise ValueError(f"{self.key}: from {self.low} to {self.high} is no whole number of steps of {self.step}.")
        if self.log and self.step > 1:
            raise ValueError(f"{self.key}: log and step do not go together; choose one.")

    @property
    def extremes(self) -> Sequence[Value]:
        """See `Parameter.extremes`."""
        return self.low, self.high


@dataclass(frozen=True, kw_only=True)
class ChoiceParameter(Parameter):
    """One of several values without an order."""

    kind: Literal["choice"] = "choice"
    """This kind's name."""
    key: str
    """The setting, as with --set: "train.batch_rows"."""
    values: tuple[Value, ...]
    """What it may be."""

    def __post_init__(self) -> None:
        if len(self.values) < 2 or len({repr(value) for value in self.values}) < len(self.values):
            raise ValueError(f"{self.key}: values has to name at least two, each once.")

    @property
    def extremes(self) -> Sequence[Value]:
        """See `Parameter.extremes`."""
        return self.values


def _check_range(key: str, low: float, high: float, log: bool) -> None:
    if not low < high:
        raise ValueError(f"{key}: low ({low}) has to be less than high ({high}).")
    if log and low <= 0:
        raise ValueError(f"{key}: low is {low}; with log it has to be above 0.")


PARAMETERS = {
    "float": "puna.finetune.search.config:FloatParameter",
    "integer": "puna.finetune.search.config:IntegerParameter",
    "choice": "puna.finetune.search.config:ChoiceParameter",
}
"""Kind of a parameter -> its class."""


@dataclass(frozen=True)
class PruningConfig:
    """Trials that do worse than others did at the same point end early."""

    kind: Literal["none", "median", "hyperband"] = "median"
    """`median` ends a trial whose best value so far is worse than the median of the values that the trials which ran
    to their ends had at the same validation; `hyperband` gives most trials few validations and the best ones more (Li
    et al. 2018, arXiv:1603.06560)."""
    startup_trials: int = 5
    """`median` only: the first trials that run to their ends, for the others to be compared with."""
    min_validations: int = 1
    """No trial ends before so many validations."""

    def __post_init__(self) -> None:
        if self.startup_trials < 0 or self.min_validations < 1:
            raise ValueError("pruning.startup_trials cannot be negative, and min_validations has to be at least 1.")


@dataclass(frozen=True)
class SearchConfig:
    """Try settings of a fine-tuning recipe, each time learning from the trials before which to try next."""

    recipe: Path
    """The recipe of `puna finetune` that is varied. It needs held-out data and train.validate_every."""
    output: Path
    """Gets trials/, best.toml (a recipe for `puna finetune`), search.html and study.db, from which the same command
    goes on if it was interrupted."""
    parameters: tuple[Annotated[Parameter, Kinds("parameter", PARAMETERS)], ...]
    """The settings that are searched, and what they may be."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Other settings that differ from the recipe, by name: settings.data.train="mine.csv"."""
    metric: str = LOSS
    """What is compared: a curve that validations draw, such as "validation/loss", or "validation/f1" of a task. The
    best value of a trial counts, and its model is kept as it was then."""
    goal: Literal["lowest", "highest"] = "lowest"
    """Which value is best."""
    trials: int = 20
    """How many, those included that ended early or failed; more can be asked for later."""
    workers: int = 1
    """Trials at the same time, each in a process of its own. They share the cores; on a GPU they share that."""
    sampler: Literal["tpe", "random"] = "tpe"
    """How the next trial is chosen: `tpe` (Bergstra et al. 2011, "Algorithms for hyper-parameter optimization", section
    4) prefers values like those of good trials, from the 11th on; `random` does not look."""
    pruning: PruningConfig = field(default_factory=PruningConfig)
    """When trials end early."""
    keep_models: Literal["best", "all"] = "best"
    """Whether the models and checkpoints of the other trials are deleted; their curves and logs stay."""
    seed: int = 0
    """Of the choices. With one worker the same search chooses the same trials."""

    def __post_init__(self) -> None:
        keys = [parameter.key for parameter in self.parameters]
        if not keys:
            raise ValueError("There is nothing to search: name at least one setting in parameters.")
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"parameters has {twice[0]} twice.")
        overridden = list(dotted_keys(self.settings))
        for key in (*keys, *overridden):
            if key in _OURS:
                raise ValueError(f"{key} is what the search itself sets; leave it out of parameters and settings.")
        if both := [key for key in keys if key in overridden]:
            raise ValueError(f"{both[0]} is both in parameters and in settings; leave one of them out.")
        if self.trials < 1 or self.workers < 1:
            raise ValueError("trials and workers have to be at least 1.")


def dotted_keys(values: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The keys of values that are no tables, as --set takes them."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from dotted_keys(value, f"{path}{key}.")
        else:
            yield f"{path}{key}"
