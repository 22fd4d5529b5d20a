"""Numbers of the families of tasks, worked by hand or by another way to compute them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.evaluate.tasks.calibration import calibration_error
from puna.evaluate.tasks.continuation import exponential
from puna.evaluate.tasks.copa import Copa
from puna.evaluate.tasks.data import Row
from puna.evaluate.tasks.perplexity import Perplexity, ratio
from puna.evaluate.tasks.request import Likelihood
from puna.evaluate.tasks.task import Example, Metric, mean_metric
from puna.evaluate.tasks.template import fill
from puna.evaluate.tasks.winogrande import WinoGrande
from puna.runtime.errors import InputError


def example(*choices: str, gold: int = 0) -> Example:
    return Example(id="1", where="line 1", prompt="x", target=" y", choices=choices, gold=gold)


def likelihoods(*values: float) -> list[Likelihood]:
    return [Likelihood(value, greedy=False, num_tokens=1) for value in values]


def test_a_long_answer_wins_by_length_and_a_wide_one_by_bytes():
    # Per character -1, -0.6 and -1.2; per byte -1, -0.6 and -0.4.
    score = Copa().score(example("ab", "abcde", "山", gold=1), likelihoods(-2.0, -3.0, -1.2))
    assert score.record["chosen"] == 2
    assert score.values == {"accuracy": 0.0, "accuracy_by_characters": 1.0, "accuracy_by_bytes": 0.0}
    weights = np.exp([-2.0, -3.0, -1.2])
    assert score.record["confidence"] == pytest.approx(weights[2] / weights.sum())


def test_a_tie_goes_to_the_first():
    assert Copa().score(example("ab", "cd", gold=0), likelihoods(-2.0, -2.0)).values["accuracy"] == 1.0
    assert Copa().score(example("ab", "cd", gold=1), likelihoods(-2.0, -2.0)).values["accuracy"] == 0.0


def test_calibration_by_hand():
    # Two bins: |0.95 - 0.5| of two answers and |0.35 - 1| of one.
    found = calibration_error([0.95, 0.95, 0.35], [1, 0, 1])
    assert found.value == pytest.approx((2 * 0.45 + 0.65) / 3)
    assert not found.higher_is_better
    assert calibration_error([1.0, 0.0], [1, 0]).value == 0
    assert calibration_error([0.5], [1]).low is None


@settings(max_examples=20)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=2, max_size=40), st.integers(1, 12))
def test_calibration_is_the_gap_of_each_bin(answers: list[tuple[float, bool]], bins: int) -> None:
    total = 0.0
    for number in range(bins):
        own = [(c, r) for c, r in answers if number == max(math.ceil(c * bins) - 1, 0)]
        if own:
            gap = abs(np.mean([c for c, _ in own]) - np.mean([r for _, r in own]))
            total += len(own) / len(answers) * float(gap)
    found = calibration_error([c for c, _ in answers], [float(r) for _, r in answers], bins)
    assert found.value == pytest.approx(total, abs=1e-9)
    assert found.low is not None
    assert found.high is not None
    assert 0 <= found.low <= found.high <= 1


def test_perplexities_by_hand():
    task = Perplexity(file="docs.jsonl")  # type: ignore[arg-type]
    texts = ["ab c", "山"]
    examples = [Example(id=str(n), where="", prompt="", target=text) for n, text in enumerate(texts)]
    answers = [Likelihood(-4.0, False, 2), Likelihood(-3.0, False, 3)]
    scores = [task.score(each, [answer]) for each, answer in zip(examples, answers, strict=True)]
    found = task.metrics(examples, scores)
    assert found["bits_per_byte"].value == pytest.approx(7 / 7 / math.log(2))
    assert found["byte_perplexity"].value == pytest.approx(math.e)
    assert found["word_perplexity"].value == pytest.approx(math.exp(7 / 3))
    assert found["token_perplexity"].value == pytest.approx(math.exp(7 / 5))


@given(st.lists(st.tuples(st.floats(0.1, 9), st.floats(1, 20)), min_size=2, max_size=30))
def test_a_ratio_of_equal_wholes_is_a_mean(pairs: list[tuple[float, float]]) -> None:
    parts = [part for part, _ in pairs]
    metric = ratio(parts, [4.0] * len(parts), 2.0)
    assert metric.value == pytest.approx(np.mean(parts) / 2)
    assert metric.standard_error == pytest.approx(np.std(parts, ddof=1) / len(parts) ** 0.5 / 2, abs=1e-9)
    other = ratio(parts, [whole for _, whole in pairs], 1.0)
    assert other.value == pytest.approx(sum(parts) / sum(whole for _, whole in pairs))


def test_the_exponential_keeps_the_interval_around_it():
    found = exponential(Metric(-2.0, -2.5, -1.5, 0.25, 10), -1)
    assert (found.value, found.low, found.high) == pytest.approx((math.exp(2), math.exp(1.5), math.exp(2.5)))
    assert found.standard_error == pytest.approx(0.25 * math.exp(2))
    assert exponential(Metric(-2.0, None, None, None, 1), -1).low is None


def test_intervals_of_shares_and_of_clusters():
    assert mean_metric([1.0, 0.0, 1.0], ["a", "b", "c"]).low == pytest.approx(0.2077, abs=1e-4)  # Wilson, 2 of 3
    clustered = mean_metric([1.0, 1.0, 0.0, 0.0], ["a", "a", "b", "b"])
    assert clustered.standard_error == pytest.approx(0.5)
    alone = mean_metric([0.5], ["a"])
    assert (alone.value, alone.low, alone.standard_error) == (0.5, None, None)


def test_templates_leave_other_braces_alone_and_name_what_is_missing():
    row = Row({"a": 1, "b": "two", "c": ["x"]}, "sums.csv, line 2")
    assert fill("{a} + {b}, {}, {{b}}, \\frac{1+2}", row) == "1 + two, {}, {two}, \\frac{1+2}"
    with pytest.raises(InputError, match=r"sums.csv, line 2: there is no 'd'"):
        fill("{d}", row)
    with pytest.raises(InputError, match=r"line 2: 'c' is \['x'\]"):
        fill("{c}", row)


def test_a_sentence_is_no_answer_of_a_chat():
    with pytest.raises(ValueError, match="no answer of a chat"):
        WinoGrande(chat=True)
