"""What a model makes of groups: which words it finds likelier of them, and how it goes on about them.

Shapes: G groups of an axis, I items (a template with a pair of words, or an opening).
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

from puna.evaluate.bias.templates import ATTRIBUTE, GROUP, Axis, Contrast, Opening, Templates
from puna.evaluate.harness.ask import Asker
from puna.evaluate.statistics.intervals import Estimate, estimate
from puna.evaluate.tasks.request import Continuation, Generated, Generation, Likelihood, Request
from puna.runtime.seeds import derive_seed

Part = TypeVar("Part", Contrast, Opening)

Scorer = Callable[[Sequence[str]], Sequence[float]]
"""How hostile each text is, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Item:
    """What was measured of every group with the same words."""

    text: str
    """The template with its pair of words, or the opening."""
    cluster: str
    """Items that share it go together: their words are the same."""
    values: tuple[float, ...]
    """Of each group."""


@dataclass(frozen=True, slots=True)
class Table:
    """One measure on one axis."""

    measure: str
    """The contrast's name, or "hostility"."""
    axis: Axis
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """How a group compares to the others of its axis."""

    measure: str
    language: str
    axis: str
    group: str
    value: Estimate
    """By how many nats the first word of a pair is likelier than the second; of hostility, the mean score."""
    difference: Estimate
    """To the mean of the other groups, item by item."""
    effect: float
    """The difference in standard deviations of the items' differences (Cohen's d of paired samples)."""
    p: float
    """Probability of a difference at least so large if there were none (t test on clusters)."""
    q: float
    """The false discovery rate at which it would be reported (Benjamini and Hochberg 1995), over all findings."""


@dataclass(frozen=True, slots=True)
class Continued:
    """A text that the model wrote about a group."""

    language: str
    axis: str
    group: str
    opening: str
    text: str
    score: float


def likelihoods(asker: Asker, templates: Templates) -> list[Table]:
    """By how many nats the first word of each pair is likelier than the second, of each group.

    A difference of differences: how likely a group is, or a word by itself, cancels.
    """
    tables, requests = [], list[Request]()
    for axis, contrast in _in_one_language(templates.axis, templates.contrast):
        tables.append((axis, contrast))
        for template, pair in _items(contrast):
            for group in axis.groups:
                before, _, after = template.partition(ATTRIBUTE)
                requests += [Continuation(before.replace(GROUP, group), word + after) for word in pair]
    answers = iter(asker.ask(requests, "Measuring likelihoods"))

    def nats() -> float:
        answer = next(answers)
        assert isinstance(answer, Likelihood)
        return answer.log_likelihood

    return [
        Table(
            contrast.name,
            axis,
            tuple(
                Item(f"{template} ({'/'.join(pair)})", pair[0], tuple(nats() - nats() for _ in axis.groups))
                for template, pair in _items(contrast)
            ),
        )
        for axis, contrast in tables
    ]


def continuations(
    asker: Asker, templates: Templates, *, samples: int, max_tokens: int, temperature: float, seed: int
) -> list[Continued]:
    """What the model writes about each group, not yet scored. Every group gets the same numbers to draw by."""
    places = [
        (axis, group, opening, sample)
        for axis, openings in _in_one_language(templates.axis, templates.opening)
        for group in axis.groups
        for opening in openings.texts
        for sample in range(samples)
    ]
    answers = asker.ask(
        [
            Generation(
                opening.replace(GROUP, group),
                max_tokens,
                until=("\n",),
                temperature=temperature,
                seed=derive_seed(seed, opening, sample) % 2**63,
            )
            for _, group, opening, sample in places
        ],
        "Going on",
    )
    found = []
    for (axis, group, opening, _), answer in zip(places, answers, strict=True):
        assert isinstance(answer, Generated)
        found.append(Continued(axis.language, axis.name, group, opening, answer.text, 0.0))
    return found


def hostility(continued: Sequence[Continued], axes: Sequence[Axis]) -> list[Table]:
    """The mean score of each opening's continuations, of each group."""
    tables = []
    for axis in axes:
        own = [each for each in continued if (each.language, each.axis) == (axis.language, axis.name)]
        items = []
        for opening in dict.fromkeys(each.opening for each in own):
            scores = [
                float(np.mean([each.score for each in own if each.opening == opening and each.group == group]))
                for group in axis.groups
            ]
            items.append(Item(opening, opening, tuple(scores)))
        if items:
            tables.append(Table("hostility", axis, tuple(items)))
    return tables


def compare(tables: Sequence[Table], confidence: float = 0.95) -> list[Finding]:
    """Each group beside the others of its axis. Of two groups only the first is compared: the other's is its mirror."""
    parts = []
    for table in tables:
        values_IG = np.array([item.values for item in table.items])
        clusters = [item.cluster for item in table.items]
        num_groups = len(table.axis.groups)
        for number in range(num_groups if num_groups > 2 else 1):
            others_I = np.delete(values_IG, number, axis=1).mean(1)
            difference_I = values_IG[:, number] - others_I
            parts.append(
                (
                    table,
                    table.axis.groups[number],
                    estimate(values_IG[:, number], clusters, confidence),
                    estimate(difference_I, clusters, confidence),
                    _effect(difference_I),
                    len(set(clusters)),
                )
            )
    p_values = [_p_value(difference, groups) for _, _, _, difference, _, groups in parts]
    q_values = stats.false_discovery_control(p_values) if p_values else []
    return [
        Finding(table.measure, table.axis.language, table.axis.name, group, value, difference, effect, p, float(q))
        for (table, group, value, difference, effect, _), p, q in zip(parts, p_values, q_values, strict=True)
    ]


def word_scorer(words: Sequence[str], *, spaced: bool) -> Scorer:
    """1 for a text with one of the words, else 0.

    Args:
        spaced: whether the language puts blanks between words, so that only whole words count.
    """
    ends = r"\b" if spaced else ""
    pattern = re.compile(ends + "(?:" + "|".join(map(re.escape, words)) + ")" + ends, re.IGNORECASE)
    return lambda texts: [float(bool(pattern.search(text))) for text in texts]


def _effect(difference_I: NDArray[np.float64]) -> float:
    deviation = float(difference_I.std(ddof=1))
    return float(difference_I.mean()) / deviation if deviation else 0.0


def _p_value(difference: Estimate, num_clusters: int) -> float:
    if not difference.standard_error:
        return 1.0 if difference.mean == 0 else 0.0
    if math.isinf(difference.standard_error):
        return 1.0
    return float(2 * stats.t.sf(abs(difference.mean) / difference.standard_error, num_clusters - 1))


def _items(contrast: Contrast) -> Iterator[tuple[str, tuple[str, str]]]:
    return ((template, pair) for template in contrast.templates for pair in contrast.pairs)


def _in_one_language(axes: Sequence[Axis], parts: Sequence[Part]) -> Iterator[tuple[Axis, Part]]:
    """Each axis with each part in its language."""
    return ((axis, part) for axis in axes for part in parts if axis.language == part.language)
