"""Explanations of what a head says about a text: heat maps of integrated gradients and of attention rollout.

Shapes: T tokens, C outputs of the head, K explained outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from puna.finetune.explain.gradients import (
    FEWEST_POINTS,
    Attributions,
    Baseline,
    Target,
    baseline_embeddings,
    head_function,
    head_outputs,
    integrated_gradients,
)
from puna.finetune.explain.rollout import attention_rollout
from puna.finetune.explain.texts import Asked
from puna.finetune.explain.units import Join, readable_units
from puna.finetune.tasks.head import predict
from puna.finetune.tasks.task import Example
from puna.model.transformer import Transformer
from puna.peft.heads import Attention, HeadSpec
from puna.runtime.devices import DeviceName
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class HeadSettings:
    """How a head's answers are explained."""

    labels: tuple[str, ...] = ()
    """Outputs to explain, by name; where absent, every class of a text, and every tag but O that a word was given."""
    max_outputs: int = 8
    """At most so many outputs of a text, those with the greatest probability."""
    baseline: Baseline = "padding"
    """What stands for the absence of a word: the padding token, the BOS token, or an embedding of zeros, which takes
    more points. Special tokens stay."""
    tolerance: float = 0.01
    """Contributions are complete if their sum misses what they have to explain by at most this share of the sum of
    their absolute values."""
    max_points: int = 2048
    """Gradients on the way from the baseline to the text, at most; as many are computed as completeness takes."""
    join: Join = "words"
    """Whether a word's pieces are shown as one."""
    device: DeviceName = "auto"
    """"auto" takes a GPU where there is one."""

    def __post_init__(self) -> None:
        if self.max_outputs < 1:
            raise ValueError(f"head.max_outputs is {self.max_outputs}; it has to be at least 1.")
        if self.max_points < FEWEST_POINTS:
            raise ValueError(f"head.max_points is {self.max_points}; it has to be at least {FEWEST_POINTS}.")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"head.tolerance is {self.tolerance}; it has to be between 0 and 1.")


@dataclass(frozen=True, slots=True)
class Cell:
    """A stretch of text with its colour."""

    text: str
    value: float
    """Sum over its tokens."""
    strength: float
    """Share of the greatest absolute value of a text's words, with the value's sign."""
    special: bool
    """Whether it is a special token, which takes no part in the scale."""


@dataclass(frozen=True, slots=True)
class Contributions:
    """Integrated gradients of one output."""

    label: str
    """The output."""
    word: str
    """The word whose tag it is; empty where it is about the whole text."""
    output: float
    """Its probability; for regression the number itself."""
    baseline_output: float
    """The same for the baseline."""
    gap: float
    """How far contributions are from adding up to the difference."""
    bound: float
    """How far they may be."""
    num_points: int
    cells: list[Cell]

    @property
    def complete(self) -> bool:
        """Whether they add up."""
        return self.gap <= self.bound


@dataclass(frozen=True, slots=True)
class Rollout:
    """Attention rollout to the place where the head is asked."""

    word: str
    """The word at that place; empty where it is about the whole text."""
    cells: list[Cell]


@dataclass(frozen=True, slots=True)
class HeadExplanation:
    """One text."""

    name: str
    """Where it is from."""
    answers: list[tuple[str, str, float]]
    """What the head says: word or "", output, and its probability or number; for a class all outputs, the greatest
    first, for tags what each word was given."""
    contributions: list[Contributions]
    rollouts: list[Rollout]
    """None where attention does not stay within the text (prefix and prompt tuning)."""
    num_left_out: int
    """Outputs beyond `HeadSettings.max_outputs`."""


def explain_head(
    model: Transformer,
    tokenizer: Tokenizer,
    spec: HeadSpec,
    attention: Attention,
    asked: Asked,
    settings: HeadSettings,
) -> HeadExplanation:
    """Explain what a head says about one text.

    Raises:
        InputError: the settings name an output that the head does not have.
    """
    if unknown := [label for label in settings.labels if label not in spec.labels]:
        raise InputError(f"The head has no output {unknown[0]!r}; it has {', '.join(spec.labels)}.")
    ids = asked.ids
    [logits_TC] = predict(model, [Example(ids, [0] * len(ids))], spec.module, attention, tokenizer.pad_id)
    outputs_TC = head_outputs(logits_TC, spec)
    wanted = _targets(outputs_TC, asked, spec, settings)
    chosen = wanted[: settings.max_outputs]
    contributions, rollouts = [], []
    if chosen:
        function = head_function(model, ids, spec, attention, chosen)
        x_TD = model.embedding.weight.detach()[ids]
        baseline_TD = baseline_embeddings(model, ids, tokenizer, settings.baseline)
        found = integrated_gradients(
            function, x_TD, baseline_TD, tolerance=settings.tolerance, max_points=settings.max_points
        )
        words = dict(zip(asked.positions, asked.words, strict=True))
        contributions = [
            _contributions(found, k, spec.labels[target.label], words[target.position], tokenizer, ids, settings.join)
            for k, target in enumerate(chosen)
        ]
        shares_TT = attention_rollout(model, ids, attention)
        if shares_TT is not None:
            for position in dict.fromkeys(target.position for target in chosen):
                cells = heat_cells(tokenizer, ids, shares_TT[position], settings.join)
                rollouts.append(Rollout(words[position], cells))
    answers = _answers(outputs_TC, asked, spec)
    return HeadExplanation(asked.name, answers, contributions, rollouts, len(wanted) - len(chosen))


def _targets(outputs_TC: Tensor, asked: Asked, spec: HeadSpec, settings: HeadSettings) -> list[Target]:
    """What is worth explaining, the greatest first."""
    targets = []
    for position, word in zip(asked.positions, asked.words, strict=True):
        best = int(outputs_TC[position].argmax())
        for number, label in enumerate(spec.labels):
            given = not word or (number == best and label != "O")
            if given and (not settings.labels or label in settings.labels):
                targets.append(Target(position, number))
    return sorted(targets, key=lambda target: -float(outputs_TC[target.position, target.label]))


def _answers(outputs_TC: Tensor, asked: Asked, spec: HeadSpec) -> list[tuple[str, str, float]]:
    answers = []
    for position, word in zip(asked.positions, asked.words, strict=True):
        values, numbers = outputs_TC[position].sort(descending=True)
        pairs = list(zip(numbers.tolist(), values.tolist(), strict=True))[: 1 if word else None]
        answers += [(word, spec.labels[number], value) for number, value in pairs]
    return answers


def _contributions(
    found: Attributions, k: int, label: str, word: str, tokenizer: Tokenizer, ids: Sequence[int], join: Join
) -> Contributions:
    return Contributions(
        label,
        word,
        output=float(found.outputs_K[k]),
        baseline_output=float(found.baseline_outputs_K[k]),
        gap=float(found.gaps_K[k]),
        bound=float(found.bounds_K[k]),
        num_points=found.num_points,
        cells=heat_cells(tokenizer, ids, found.values_KT[k], join),
    )


def heat_cells(tokenizer: Tokenizer, ids: Sequence[int], values_T: Tensor, join: Join) -> list[Cell]:
    """Readable stretches of a text with the sums of their tokens' values."""
    units = readable_units(tokenizer, ids, join)
    sums = [float(values_T[unit.start : unit.stop].sum()) for unit in units]
    scale = max((abs(value) for unit, value in zip(units, sums, strict=True) if not unit.special), default=0.0)
    return [
        Cell(unit.text, value, 0.0 if unit.special or not scale else value / scale, unit.special)
        for unit, value in zip(units, sums, strict=True)
    ]
