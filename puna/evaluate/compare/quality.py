"""Scores of several models on the same questions, and whether they differ by more than luck."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from puna.evaluate.compare.samples import Sample, first_values
from puna.evaluate.compare.section import Figure, Section, Sheet, not_measured
from puna.evaluate.contamination import Contamination, contamination_line
from puna.evaluate.statistics.intervals import Estimate, Interval, estimate, estimate_ratio, wilson
from puna.evaluate.statistics.paired import bootstrap, bootstrap_ratio, mcnemar, paired_difference
from puna.evaluate.statistics.power import smallest_difference
from puna.runtime.errors import InputError
from puna.runtime.page import new_figure, plain_label, to_svg

Samples = Mapping[str, Mapping[str, Sample]]
"""Task -> question's id -> its numbers."""

_LIKELIHOOD = "log_likelihood"
_BYTES = "bytes"
_BITS = "bits per byte"


@dataclass(frozen=True, slots=True)
class Difference:
    """One model against another on one task."""

    task: str
    metric: str
    ours: str
    theirs: str
    count: int
    """Questions that both were asked."""
    mean: float
    """Ours minus theirs."""
    interval: Interval
    """Of the paired difference, by Student's t over clusters."""
    resampled: Interval
    """The same by bootstrap."""
    p: float
    """McNemar's exact where answers are right or wrong and none are clustered, else of the paired t-test."""
    test: str
    """Which of the two."""
    detectable: float | None
    """The true difference that so many questions show with a chance of 80 %; None where that is not known."""


def quality_section(
    samples: Mapping[str, Samples], contamination: Contamination | None, missing: Sequence[str]
) -> Section:
    """Compare all pairs of models on all tasks that both were asked.

    Args:
        samples: model's name -> what it answered.
        contamination: what `puna contamination` found.
        missing: why models are not among `samples`.
    """
    tasks = list(dict.fromkeys(task for of_model in samples.values() for task in of_model))
    scores = [_score_row(task, samples) for task in tasks]
    differences = [
        compare_pair(task, (one, other), samples[one][task], samples[other][task])
        for task in tasks
        for one, other in combinations(samples, 2)
        if task in samples[one] and task in samples[other]
    ]
    adjusted = stats.false_discovery_control([d.p for d in differences]) if differences else []
    notes = [
        f"{task}, {name}: {contamination_line(contamination, task, first_values(of_model[task]))}"
        for task in tasks
        for name, of_model in samples.items()
        if task in of_model and not _is_text(of_model[task])
    ]
    sheets = []
    if scores:
        sheets.append(Sheet("Scores with 95 % intervals", ["task", *samples], scores))
    if differences:
        columns = ["task", "pair", "difference (95 %)", "adjusted p", "p", "bootstrap", "count", "detectable"]
        rows = [_difference_row(d, float(p)) for d, p in zip(differences, adjusted, strict=True)]
        sheets.append(Sheet("Paired differences", columns, rows, terminal_columns=4))
    if notes:
        sheets.append(Sheet("Contamination", ["task and model"], [[note] for note in notes]))
    return Section(
        "Quality",
        "Differences are paired, question by question, so that what is hard for both does not count. One with an "
        "interval that leaves out 0 is more than luck of the questions. p is that of McNemar's exact test where "
        "answers are right or wrong, else of the paired t-test; adjusted p allows for the number of comparisons "
        "(Benjamini and Hochberg). Detectable is the true difference that so many questions show in four of five "
        "cases: smaller ones stay hidden. Bits per byte: less is better. All this is about the luck of the questions, "
        "not of the training: the same recipe with another seed makes another model.",
        sheets,
        [_figure(differences)] if differences else [],
        missing,
        [_sentence(d, float(p)) for d, p in zip(differences, adjusted, strict=True)],
        data={
            "differences": [asdict(d) | {"adjusted_p": float(p)} for d, p in zip(differences, adjusted, strict=True)]
        },
    )


def compare_pair(
    task: str, names: tuple[str, str], ours: Mapping[str, Sample], theirs: Mapping[str, Sample]
) -> Difference:
    """The paired difference on the questions that both were asked.

    Raises:
        InputError: there is none, or they have other metrics.
    """
    ids = [key for key in ours if key in theirs]
    if not ids:
        raise InputError(f"{names[0]} and {names[1]} were asked different questions of {task}, so nothing is paired.")
    if other := next((key for key in ids if ours[key].prompt_hash != theirs[key].prompt_hash), None):
        raise InputError(
            f"{names[0]} and {names[1]} were asked question {other} of {task} in different words (other shots, "
            "template or data), so their scores cannot be paired. Evaluate both with the same settings."
        )
    clusters: list[str] = [ours[key].cluster or key for key in ids]
    first, second = [ours[key].values for key in ids], [theirs[key].values for key in ids]
    if _LIKELIHOOD in first[0] and _BYTES in first[0]:
        return _compare_likelihoods(task, names, first, second)
    metric = next(iter(first[0]))
    if metric not in second[0]:
        raise InputError(f"{task} has {metric} for {names[0]}, but only {', '.join(second[0])} for {names[1]}.")
    a, b = np.array([row[metric] for row in first]), np.array([row[metric] for row in second])
    found = paired_difference(a, b, clusters)
    clustered = len(set(clusters)) < len(clusters)
    right_or_wrong = not clustered and set(np.concatenate([a, b]).tolist()) <= {0.0, 1.0}
    return Difference(
        task,
        metric,
        *names,
        len(ids),
        found.mean,
        found.interval,
        bootstrap(a, b, clusters) if len(set(clusters)) > 1 else found.interval,
        mcnemar(a, b) if right_or_wrong else _t_test(found, len(set(clusters))),
        "McNemar" if right_or_wrong else "paired t",
        _detectable(found),
    )


def _compare_likelihoods(
    task: str, names: tuple[str, str], first: Sequence[Mapping[str, float]], second: Sequence[Mapping[str, float]]
) -> Difference:
    """Bits per byte, paired by document."""
    sizes = np.array([row[_BYTES] for row in first])
    if any(row[_BYTES] != size for row, size in zip(second, sizes, strict=True)):
        raise InputError(f"{names[0]} and {names[1]} were given different documents in {task}.")
    bits = np.array([(b[_LIKELIHOOD] - a[_LIKELIHOOD]) / math.log(2) for a, b in zip(first, second, strict=True)])
    found = estimate_ratio(bits, sizes)
    return Difference(
        task,
        _BITS,
        *names,
        len(sizes),
        found.mean,
        found.interval,
        bootstrap_ratio(bits, sizes) if len(sizes) > 1 else found.interval,
        _t_test(found, len(sizes)),
        "paired t",
        _detectable(found),
    )


def _t_test(found: Estimate, num_clusters: int) -> float:
    """Probability of a mean so far from 0, if it were 0."""
    if found.standard_error == 0:
        return 1.0 if found.mean == 0 else 0.0
    if found.standard_error == math.inf:
        return 1.0
    return float(2 * stats.t.sf(abs(found.mean) / found.standard_error, num_clusters - 1))


def _detectable(found: Estimate) -> float | None:
    """What the questions at hand show, given how much they vary."""
    if found.standard_error in (0, math.inf):
        return None
    return smallest_difference(found.count, found.count * found.standard_error**2)


def _is_text(samples: Mapping[str, Sample]) -> bool:
    """Whether a task measures the likelihood of documents."""
    return {_LIKELIHOOD, _BYTES} <= next(iter(samples.values())).values.keys()


def _score_row(task: str, samples: Mapping[str, Samples]) -> list[str]:
    row = [task]
    for of_model in samples.values():
        own = of_model.get(task)
        row.append(not_measured("not asked") if own is None else _score(own))
    return row


def _score(samples: Mapping[str, Sample]) -> str:
    rows = [sample.values for sample in samples.values()]
    if _is_text(samples):
        bits = [-row[_LIKELIHOOD] / math.log(2) for row in rows]
        found = estimate_ratio(bits, [row[_BYTES] for row in rows])
        return f"{found.mean:.3f} ({_span(found.interval)})"
    clusters = [sample.cluster or key for key, sample in samples.items()]
    values = list(first_values(samples).values())
    found = estimate(values, clusters)
    interval = found.interval
    if set(values) <= {0.0, 1.0} and len(set(clusters)) == len(clusters):
        interval = wilson(int(sum(values)), len(values))
    return f"{found.mean:.3f} ({_span(interval)})"


def _span(interval: Interval) -> str:
    return "no interval: one question" if math.isinf(interval.low) else f"{interval.low:.3f} to {interval.high:.3f}"


def _difference_row(found: Difference, adjusted: float) -> list[str]:
    return [
        f"{found.task}, {found.metric}",
        f"{found.ours} - {found.theirs}",
        f"{found.mean:+.3f} ({_span(found.interval)})",
        _p(adjusted),
        f"{_p(found.p)} ({found.test})",
        _span(found.resampled),
        f"{found.count:,}",
        "unknown" if found.detectable is None else f"{found.detectable:.3f}",
    ]


def _p(value: float) -> str:
    return "< 1e-6" if value < 1e-6 else f"{value:.2g}"


def _sentence(found: Difference, adjusted: float) -> str:
    """What a difference comes down to."""
    less_is_better = found.metric == _BITS
    better, worse = (found.ours, found.theirs) if (found.mean < 0) is less_is_better else (found.theirs, found.ours)
    if adjusted >= 0.05:
        return (
            f"{found.task}: no difference shown between {found.ours} and {found.theirs} in {found.count:,} "
            + ("documents" if less_is_better else "questions")
            + ("." if found.detectable is None else f"; one of {found.detectable:.3f} would mostly have shown.")
        )
    low, high = found.interval if found.mean > 0 else (-found.interval.high, -found.interval.low)
    by = f"{abs(found.mean):.3f} ({low:.3f} to {high:.3f})"
    return f"{found.task}: {better} is better than {worse}, by {by} {found.metric}."


def _figure(differences: Sequence[Difference]) -> Figure:
    """A forest plot: each difference with its interval, on a scale of its own metric."""
    metrics = list(dict.fromkeys(found.metric == _BITS for found in differences))
    heights = [sum((found.metric == _BITS) is metric for found in differences) for metric in metrics]
    figure = new_figure(9, 0.4 * sum(heights) + 1.1 * len(metrics))
    for axes, bits in zip(
        figure.subplots(len(metrics), 1, squeeze=False, height_ratios=heights).flat, metrics, strict=True
    ):
        own = [found for found in differences if (found.metric == _BITS) is bits]
        for place, found in enumerate(own):
            low, high = found.interval
            sure = low > 0 or high < 0
            colour = "tab:orange" if sure else "tab:gray"
            if not math.isinf(low):
                axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot([found.mean], [place], "o", color=colour)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(own)), [plain_label(f"{d.task}: {d.ours} - {d.theirs}") for d in own])
        axes.set_ylim(len(own) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
        axes.set(
            xlabel="bits per byte, less is better for the first" if bits else "score, more is better for the first"
        )
    figure.tight_layout()
    return Figure("Paired differences with 95 % intervals; orange where 0 is left out.", to_svg(figure))
