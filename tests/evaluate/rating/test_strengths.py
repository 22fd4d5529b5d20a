"""Strengths, win rates and agreement: planted ones are found again; each beside a slow twin or an outside reference."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize
from sklearn.metrics import cohen_kappa_score

from puna.evaluate.rating.agreement import agreement
from puna.evaluate.rating.logit import fit_choices
from puna.evaluate.rating.records import Rating, Verdict
from puna.evaluate.rating.strengths import ELO_SCALE, strengths
from puna.evaluate.rating.winrates import length_controlled, win_rates


def rating(item: int, left: str, right: str, verdict: Verdict, **more: Any) -> Rating:
    values: dict[str, Any] = {"left_answer": f"of {left}", "right_answer": f"of {right}", "rater": "Ann"}
    values |= {"category": "", "prompt": [{"role": "user", "content": f"What is {item}?"}], "seconds": 1.0}
    return Rating(item=f"{item} {min(left, right)} {max(left, right)}", left=left, right=right, verdict=verdict,
                  **(values | more))  # fmt: skip


def tournament(planted: dict[str, float], tie: float, number: int, rng: np.random.Generator) -> list[Rating]:
    """Ratings drawn from Davidson's model."""
    names = list(planted)
    found = []
    for item in range(number):
        left, right = rng.permutation(names)[:2]
        gap = planted[left] - planted[right]
        odds = np.exp([gap / 2, tie, -gap / 2])
        found.append(rating(item, left, right, [-2, 0, 3][rng.choice(3, p=odds / odds.sum())]))
    return found


def test_planted_strengths_are_found_again_and_intervals_cover_them() -> None:
    planted = {"a": 1.2, "b": 0.4, "c": -0.2, "d": -1.4}
    rng = np.random.default_rng(0)
    covered, bias = 0, []
    for trial in range(25):
        found = {each.model: each for each in strengths(tournament(planted, -0.5, 400, rng), 100, seed=trial)}
        for name, value in planted.items():
            points = 1000 + ELO_SCALE * value
            covered += found[name].interval.low <= points <= found[name].interval.high
            bias.append(found[name].bradley_terry - points)
    # 100 intervals of 95 %: fewer than 88 has a chance below 0.2 % (binomial), were they independent and exact.
    assert covered >= 88
    # A single estimate has a standard deviation of about 20 points, the mean over 100 of 2.
    assert abs(np.mean(bias)) < 1e-6, "strengths are relative to the mean"
    assert np.std(bias) < 30
    assert list(found) == sorted(planted, key=lambda name: -found[name].bradley_terry)
    tallies = [(each.wins + each.ties + each.losses) for each in found.values()]
    assert sum(tallies) == 2 * 400


def test_elo_nears_bradley_terry_with_many_ratings() -> None:
    ratings = tournament({"a": 0.8, "b": 0.0, "c": -0.8}, -9.0, 4000, np.random.default_rng(1))
    for each in strengths(ratings, 20, seed=0):
        # With steps of 16 points Elo wanders by about 16 around where it settles; the mean over 100 orders, by 2.
        assert each.elo == pytest.approx(each.bradley_terry, abs=12)
        assert each.elo_interval.low < each.elo < each.elo_interval.high


def test_who_wins_everything_has_a_finite_strength_and_both_bad_is_a_tie() -> None:
    first, second = strengths([rating(n, "a", "b", -1) for n in range(10)], 50)
    assert (first.model, first.wins, second.losses) == ("a", 10, 10)
    assert 1000 < first.bradley_terry < 2000
    tied = strengths([rating(n, "a", "b", "both_bad" if n % 2 else 0) for n in range(10)], 50)
    assert [each.ties for each in tied] == [10, 10]
    assert tied[0].bradley_terry == pytest.approx(1000)
    with pytest.raises(ValueError, match="no rating"):
        strengths([])


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1))
def test_newton_finds_what_a_general_optimiser_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(5, 3, 4)) * rng.choice([0.1, 1.0, 3.0])
    counts = rng.integers(0, 30, size=(2, 5, 3)) * (rng.random((2, 5, 3)) < 0.6)

    def loss(parameters: NDArray[np.float64], counts_NO: NDArray[np.float64]) -> float:
        logits = features @ parameters
        logs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        return float(-(counts_NO * logs).sum() + (parameters**2).sum() / 32)

    for found, own in zip(fit_choices(features, counts.astype(float)), counts, strict=True):
        best = minimize(loss, np.zeros(4), args=(own,), method="BFGS", options={"gtol": 1e-7})
        # BFGS with differences for gradients ends within about 1e-4 of the optimum.
        assert found == pytest.approx(best.x, abs=2e-3)
        assert loss(found, own) <= loss(best.x, own) + 1e-9


def test_win_rates_by_category_count_a_comparison_once() -> None:
    ratings = [
        rating(0, "a", "b", -1, category="coding"),
        rating(0, "b", "a", 2, category="coding", rater="Bo"),
        rating(0, "a", "b", 4, category="coding", rater="Cy"),
        rating(1, "b", "a", -3, category="coding"),
        rating(2, "a", "b", 0, category="advice"),
        rating(3, "a", "b", -1, category="advice"),
        rating(3, "a", "b", 1, category="advice", rater="Bo"),
        rating(4, "a", "c", -1),
    ]
    with_b, with_c = win_rates(ratings, 50)
    assert (with_b.model, with_b.other, with_c.other) == ("a", "b", "c")
    assert [(each.category, each.wins, each.ties, each.losses) for each in with_b.by_category] == [
        ("advice", 0, 2, 0),
        ("coding", 1, 0, 1),
    ]
    assert (with_b.overall.wins, with_b.overall.ties, with_b.overall.losses) == (1, 2, 1)
    # Ratings: a won, won, lost | lost | tied | won, lost.
    assert with_b.rate.mean == pytest.approx((1 + 1 + 0 + 0 + 0.5 + 1 + 0) / 7)
    assert with_c.by_category == ()
    assert with_b.overall.wins_interval == pytest.approx((0.0456, 0.6994), abs=1e-3), "1 of 4, Wilson 1927"


def test_a_liking_for_length_is_taken_out() -> None:
    """Two models equally good, one of which writes more, and raters who like that."""
    rng = np.random.default_rng(2)
    shares, rates, covered = [], [], 0
    for trial in range(10):
        longer = rng.normal(200, 300, size=300)
        chance = 1 / (1 + np.exp(-2.0 * np.tanh(longer / 360)))
        scores = (rng.random(300) < chance).astype(float)
        prompts = [str(n // 2) for n in range(300)]
        rate, interval = length_controlled(scores, 500 + longer, np.full(300, 500.0), prompts, 100, seed=trial)
        shares.append(scores.mean())
        rates.append(rate)
        covered += interval.low <= 0.5 <= interval.high
    assert np.mean(shares) > 0.6
    assert np.mean(rates) == pytest.approx(0.5, abs=0.05), "4 standard errors, each rate having one of 0.04"
    assert covered >= 7, "of 10; fewer has a chance of 0.1 %"
    same, _ = length_controlled([1, 1, 1, 0], [5, 5, 5, 5], [5, 5, 5, 5], list("abcd"), 10)
    # The prior draws log 3 towards 0 by 8 %: precision 1 / 16 beside an information of 4 x 3/4 x 1/4.
    assert same == pytest.approx(0.75, abs=0.02)


def raters(verdicts: list[tuple[Verdict, Verdict]]) -> list[Rating]:
    return [
        rating(n, "a", "b", verdict, rater=who)
        for n, both in enumerate(verdicts)
        for who, verdict in zip(("Ann", "Bo"), both, strict=True)
    ]


def test_agreement_is_krippendorffs_and_near_cohens() -> None:
    rng = np.random.default_rng(3)
    kinds: list[Verdict] = [-2, 0, 2, "both_bad"]
    verdicts: list[tuple[Verdict, Verdict]] = []
    for _ in range(300):
        one = kinds[rng.integers(4)]
        verdicts.append((one, one if rng.random() < 0.6 else kinds[rng.integers(4)]))
    found = agreement(raters(verdicts))
    assert found is not None
    assert (found.num_comparisons, found.num_raters) == (300, 2)
    assert found.raw.mean == np.mean([one == other for one, other in verdicts])
    kappa = cohen_kappa_score(*([str(pair[side]) for pair in verdicts] for side in (0, 1)))
    # Alpha takes both raters' habits together, and corrects for the sample's size: a difference of order 1 / 600.
    assert found.alpha == pytest.approx(kappa, abs=0.01)
    assert found.alpha == pytest.approx(1 - (1 - found.raw.mean) / (1 - found.by_chance))


def test_agreement_does_not_depend_on_sides() -> None:
    verdicts: list[tuple[Verdict, Verdict]] = [(-2, -1), (3, 3), (0, 0), (1, -4), ("both_bad", "both_bad"), (4, 4)]
    straight = raters(verdicts)
    turned = [
        rating(n // 2, "b", "a", each.verdict if each.verdict == "both_bad" else -each.verdict, rater="Bo")
        if each.rater == "Bo"
        else each
        for n, each in enumerate(straight)
    ]
    first, second = agreement(straight), agreement(turned)
    assert first == second
    assert first is not None
    assert first.raw.mean == 5 / 6
    assert 0 < first.alpha_of_strength < 1
    assert agreement(straight[::2]) is None
    same = agreement(raters([(2, 2), (1, 1)]))
    assert same is not None
    assert math.isnan(same.alpha)
    assert "agreement_alpha" not in same.as_results()
