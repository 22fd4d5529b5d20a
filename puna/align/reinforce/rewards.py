"""What an answer is worth: reward models, and rewards that can be verified."""

import importlib
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch

from puna.align.scoring import open_reward_model
from puna.batches.preferences import Messages
from puna.config import Kinds
from puna.evaluate.sandbox.run import Limits, run_all, with_tests
from puna.evaluate.scorers import exact, matches, same_maths, same_number
from puna.peft.heads import last_logits
from puna.runtime.errors import InputError
from puna.tokenizer.chat import render_chat


@dataclass(frozen=True, slots=True)
class Prompt:
    """Something to answer."""

    where: str
    """File and line."""
    messages: Messages
    """The conversation so far."""
    ids: tuple[int, ...]
    """As the model reads it."""
    columns: Mapping[str, Any]
    """What else its row has, such as the right answer."""


Judge = Callable[[Sequence[Prompt], Sequence[str]], list[float]]
"""Gives each answer, which stands beside its prompt, a number."""


class Reward(ABC):
    """The settings of a reward; each is a frozen dataclass with a `kind`.

    Attributes:
        columns: what the rows of prompts need to have.
        weight: factor in the sum of all rewards.
    """

    columns: ClassVar[tuple[str, ...]] = ()

    kind: str
    weight: float

    @property
    def paths(self) -> list[Path]:
        """What it reads."""
        return []

    @abstractmethod
    def open(self, device: torch.device) -> Judge:
        """Read what there is to read.

        Raises:
            InputError: it is broken.
        """


def _opened(path: Path, device: torch.device) -> Callable[[Sequence[Prompt], Sequence[str]], list[float]]:
    """A reward model's own rewards."""
    head = open_reward_model(path)
    head.model.to(device)

    @torch.no_grad()
    def judge(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        texts = [
            render_chat(head.tokenizer, [*prompt.messages, {"role": "assistant", "content": answer}]).ids
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return [float(reward) for reward in last_logits(head, texts)[:, 0]]

    return judge


@dataclass(frozen=True)
class ModelReward(Reward):
    """What a reward model gives."""

    kind: Literal["model"] = "model"
    """The reward."""
    weight: float = 1.0
    """Factor in the sum of all rewards."""
    path: Path = field(kw_only=True)
    """Directory of the reward model (`puna reward`)."""

    @property
    def paths(self) -> list[Path]:
        return [self.path]

    def open(self, device: torch.device) -> Judge:
        return _opened(self.path, device)


@dataclass(frozen=True)
class SafeHelpfulReward(Reward):
    """A safety model's reward where it is low or the prompt is marked unsafe, a helpfulness model's elsewhere.

    R_c of Llama 2 (arXiv:2307.09288, section 3.2.3); combine it with PPO's `whiten_rewards`, as there.
    """

    kind: Literal["safe_helpful"] = "safe_helpful"
    """The reward."""
    weight: float = 1.0
    """Factor in the sum of all rewards."""
    helpfulness: Path = field(kw_only=True)
    """Directory of a reward model that knows what helps."""
    safety: Path = field(kw_only=True)
    """Directory of one that knows what is safe."""
    threshold: float = 0.15
    """An answer whose safety, as a probability, is below this is judged by safety alone. So are answers to prompts
    whose column "unsafe" is true."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold}; it has to be between 0 and 1.")

    @property
    def paths(self) -> list[Path]:
        return [self.helpfulness, self.safety]

    def open(self, device: torch.device) -> Judge:
        helpful, safe = _opened(self.helpfulness, device), _opened(self.safety, device)
        # Rewards are what the paper has after its LOGIT, so the threshold is turned into one.
        limit = math.log(self.threshold / (1 - self.threshold))

        def judge(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
            both = zip(prompts, helpful(prompts, answers), safe(prompts, answers), strict=True)
            return [
                safety if prompt.columns.get("unsafe") or safety < limit else helpfulness
                for prompt, helpfulness, safety in both
            ]

        return judge


class CompareReward(Reward):
    """1 where the answer is right by the prompt's column "answer", 0 elsewhere."""

    columns: ClassVar[tuple[str, ...]] = ("answer",)

    @abstractmethod
    def right(self, answer: str, reference: str) -> bool:
        """Whether an answer is right."""

    def open(self, device: torch.device) -> Judge:
        def judge(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
            return [
                float(self.right(answer, str(prompt.columns["answer"])))
                for prompt, answer in zip(prompts, answers, strict=True)
            ]

        return judge


@dataclass(frozen=True)
class ExactReward(CompareReward):
    """1 where the answer is the column "answer", 0 elsewhere."""

    kind: Literal["exact"] = "exact"
    """The reward."""
    weight: float = 1.0
    """Factor in the sum of all rewards."""

    def right(self, answer: str, reference: str) -> bool:
        return exact(answer, reference)


@dataclass(frozen=True)
class NumberReward(CompareReward):
    """1 where the answer's last number is that of the column "answer", 0 elsewhere."""

    kind: Literal["number"] = "number"
    """The reward."""
    weight: float = 1.0
    """Factor in the sum of all rewards."""

    def right(self, answer: str, reference: str) -> bool:
        return same_number(answer, reference)


@dataclass(frozen=True)
class MathsReward(CompareReward):
    """1 where the boxed answer means the same as the column "answer", 0 elsewhere."""

    kind: Literal["maths"] = "maths"
    """The reward."""
    weight: float = 1.0
    """Factor in the sum of all rewards."""

    def right(self, answer: str, reference: str) -> bool:
        return same_maths(answer, reference)


@dataclass(frozen=True)
class RegexReward(Reward):
    """1 where a regular expression fits somewhere in the answer, 0 elsewhere."""

    kind: Literal["regex"] = "regex"
    """The reward."""
    weight: float = 1.0
    """Factor in the sum of all rewards."""
    pattern: str = field(kw_only=True)
    """Python's syntax; begin with \\A and end with \\Z to mean the whole answer."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern is {self.pattern!r}, which is no regular expression: {error}.") from error

    def open(self, device: torch.device) -> Judge:
        return lambda prompts, answers: [float(matches(answer, self.pattern)) for answer in answers]


@dataclass(frozen=True)
class SchemaReward(Reward):
    """1 where the answer is JSON that fits a schema, 0 elsewhere."""

    kind: Literal["json_schema"] = "json_schema"
    """The reward."""
    weight: float = 1.0
    """Factor in the sum of all rewards."""
    schema: Path = field(kw_only=True)
    """A file with the JSON schema."""

    @property
    def paths(self) -> list[Path]:
        return [self.schema]

    def open(self, device: torch.device) -> Judge:
        try:
            jsonschema = importlib.import_module("jsonschema")
        except ImportError as error:
            raise InputError("The reward json_schema needs jsonschema: pip install 'puna[align]'.") from error
        try:
            schema = json.loads(self.schema.read_text(encoding="utf-8"))
            kind = jsonschema.validators.validator_for(schema)
            kind.check_schema(schema)
        except (ValueError, jsonschema.SchemaError) as error:
            raise InputError(f"{self.schema} is no JSON schema: {error}") from error
        validator = kind(schema)

        def fits(answer: str) -> bool:
            try:
                return bool(validator.is_valid(json.loads(answer)))
            except ValueError:
                return False

        return lambda prompts, answers: [float(fits(answer)) for answer in answers]


@dataclass(frozen=True)
class TestsReward(Reward):
    """1 where the answer's code passes the tests of the column "tests" in a sandbox, 0 elsewhere.

    Code is what stands in the answer's first ``` block, or else all of it.
    """

    columns: ClassVar[tuple[str, ...]] = ("tests",)

    kind: Literal["unit_tests"] = "unit_tests"
    """The reward."""
    weight: float = 1.0
    """Factor in the sum of all rewards."""
    wall_seconds: float = 10.0
    """Time for each answer."""
    workers: int = 2
    """Answers that are tested at once."""

    def __post_init__(self) -> None:
        if self.wall_seconds <= 0 or self.workers < 1:
            raise ValueError("wall_seconds has to be above 0, and workers at least 1.")

    def open(self, device: torch.device) -> Judge:
        limits = Limits(wall_seconds=self.wall_seconds)

        def judge(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
            programs = [
                with_tests(code_of(answer), _program(prompt.columns["tests"]))
                for prompt, answer in zip(prompts, answers, strict=True)
            ]
            outcomes = run_all(programs, limits=limits, workers=self.workers)
            return [float(outcome.status == "passed") for outcome in outcomes]

        return judge


def _program(tests: Any) -> str:
    """Tests given as a text, or as a list of lines or assertions."""
    return tests if isinstance(tests, str) else "\n".join(tests)


def code_of(answer: str) -> str:
    """The content of an answer's first fenced block, or the answer."""
    block = re.search(r"```[a-zA-Z0-9]*\n(.*?)```", answer, re.S)
    return block[1] if block else answer


REWARDS = {
    "model": "puna.align.reinforce.rewards:ModelReward",
    "safe_helpful": "puna.align.reinforce.rewards:SafeHelpfulReward",
    "exact": "puna.align.reinforce.rewards:ExactReward",
    "number": "puna.align.reinforce.rewards:NumberReward",
    "maths": "puna.align.reinforce.rewards:MathsReward",
    "regex": "puna.align.reinforce.rewards:RegexReward",
    "json_schema": "puna.align.reinforce.rewards:SchemaReward",
    "unit_tests": "puna.align.reinforce.rewards:TestsReward",
}
"""Kind of a reward -> its class."""

AnyReward = Annotated[Reward, Kinds("reward", REWARDS)]


class Scorer:
    """The weighted sum of several rewards, and each of them for the curves.

    Args:
        rewards: their settings.
        device: where reward models compute.
        unfinished_reward: of an answer that did not end by itself, whatever else it deserves; None judges it like
            any other.
    """

    def __init__(self, rewards: Sequence[Reward], device: torch.device, unfinished_reward: float | None) -> None:
        self._parts = [(reward, reward.open(device)) for reward in rewards]
        self._unfinished_reward = unfinished_reward

    def __call__(
        self, prompts: Sequence[Prompt], answers: Sequence[str], finished: Sequence[bool]
    ) -> tuple[list[float], dict[str, float]]:
        """The reward of each answer, and the mean of each kind of reward over all of them."""
        totals = [0.0] * len(answers)
        means: dict[str, float] = {}
        for number, (reward, judge) in enumerate(self._parts):
            values = judge(prompts, answers)
            totals = [total + reward.weight * value for total, value in zip(totals, values, strict=True)]
            if len(self._parts) > 1:
                means[f"{reward.kind}_{number}"] = sum(values) / len(values)
        if self._unfinished_reward is not None:
            totals = [
                total if whole else self._unfinished_reward for total, whole in zip(totals, finished, strict=True)
            ]
        return totals, means
