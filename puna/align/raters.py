"""Raters that are programs: what they think of answers, before anybody compares them."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from puna.align.scoring import answer_rewards, open_reward_model
from puna.batches.preferences import Messages
from puna.runtime.devices import DeviceName, open_device


class Rater(ABC):
    """The settings of a rater; each is a frozen dataclass with a `kind`."""

    kind: str

    @property
    @abstractmethod
    def inputs(self) -> tuple[Path, ...]:
        """What its judgement follows from, besides its settings."""

    @abstractmethod
    def scores(
        self, prompts: Sequence[Messages], answers: Sequence[Sequence[str]], device: DeviceName
    ) -> list[list[float]]:
        """How good each answer to each prompt is: the log odds of preferring one to another are their difference."""


@dataclass(frozen=True, kw_only=True)
class RewardRater(Rater):
    """What a reward model says, such as one that was learnt from people (Gao et al. 2022, arXiv:2210.10760)."""

    kind: Literal["reward"] = "reward"
    """The rater."""
    path: Path
    """Directory of a reward model (`puna reward`): model/ or adapter/."""

    @property
    def inputs(self) -> tuple[Path, ...]:
        return (self.path,)

    def scores(
        self, prompts: Sequence[Messages], answers: Sequence[Sequence[str]], device: DeviceName
    ) -> list[list[float]]:
        head = open_reward_model(self.path)
        head.model.to(open_device(device))
        return answer_rewards(head, prompts, answers)


@dataclass(frozen=True, kw_only=True)
class RuleRater(Rater):
    """Points for what is found in an answer."""

    kind: Literal["rule"] = "rule"
    """The rater."""
    points: dict[str, float] = field(default_factory=dict)
    """Regular expression -> points that an answer gets where it is found, as in { "(?i)please" = 1.0 }."""
    points_per_word: float = 0.0
    """Points for each word; below 0 where short answers are better."""

    def __post_init__(self) -> None:
        if not self.points and not self.points_per_word:
            raise ValueError("A rule needs points or points_per_word; without, all answers are alike to it.")
        for pattern in self.points:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"points has {pattern!r}, which is no regular expression: {error}.") from error

    @property
    def inputs(self) -> tuple[Path, ...]:
        return ()

    def scores(
        self, prompts: Sequence[Messages], answers: Sequence[Sequence[str]], device: DeviceName
    ) -> list[list[float]]:
        return [[self._of(text) for text in own] for own in answers]

    def _of(self, text: str) -> float:
        found = sum(points for pattern, points in self.points.items() if re.search(pattern, text))
        return found + self.points_per_word * len(text.split())


RATERS = {
    "reward": "puna.align.raters:RewardRater",
    "rule": "puna.align.raters:RuleRater",
}
"""Kind of a rater -> its class."""
