import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from puna.evaluate.statistics.intervals import Interval, estimate, estimate_ratio, wilson


def test_wilson_by_hand() -> None:
    # 8 of 10 at z = 1.96: centre (8 + z^2 / 2) / (10 + z^2), half width z / (10 + z^2) * sqrt(8 * 2 / 10 + z^2 / 4)
    z = stats.norm.ppf(0.975)
    centre, half = (8 + z * z / 2) / (10 + z * z), z / (10 + z * z) * math.sqrt(1.6 + z * z / 4)
    assert wilson(8, 10) == pytest.approx((centre - half, centre + half), abs=1e-12)
    assert wilson(0, 20).low == pytest.approx(0, abs=1e-12)
    assert wilson(0, 20).high > 0.1
    with pytest.raises(ValueError, match="11 of 10 is not a share"):
        wilson(11, 10)
    with pytest.raises(ValueError, match="0 of 0 is not a share"):
        wilson(0, 0)


def test_wilson_covers_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    shares = draw.uniform(0.02, 0.98, 40_000)
    low, high = np.array([wilson(count, 60) for count in range(61)])[draw.binomial(60, shares)].T
    # Over many shares, for at a single one the coverage jumps with the coarse counts; 40,000 draws are good to 0.003.
    assert np.mean((low <= shares) & (shares <= high)) == pytest.approx(0.95, abs=0.005)


def test_estimate_is_student_s() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    found = estimate(values)
    assert (found.mean, found.count) == (4.0, 4)
    assert found.standard_error == pytest.approx(stats.sem(values))
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert estimate(values, confidence=0.9).interval == pytest.approx((expected.low, expected.high))


def test_clusters_by_hand_and_as_statsmodels() -> None:
    # Mean 2; sums of deviations of a: -1 + 0 = -1, of b: 3, of c: -2; (1 + 9 + 4) * 3 / 2 = 21; sqrt(21) / 4.
    values, clusters = [1, 2, 5, 0], ["a", "a", "b", "c"]
    assert estimate(values, clusters).standard_error == pytest.approx(math.sqrt(21) / 4)
    # statsmodels 0.14: OLS(values, ones).fit(cov_type="cluster", use_t=True)
    values, clusters = [0, 1, 1, 1, 0, 0, 1, 0.5, 1, 0], [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    found = estimate(values, clusters)
    assert found.standard_error == pytest.approx(0.04690415759823428, abs=1e-12)
    assert found.interval == pytest.approx((0.4007300369490545, 0.6992699630509454), abs=1e-12)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=30))
def test_clusters_of_one_change_nothing(values: list[float]) -> None:
    alone = estimate(values, list(range(len(values))))
    assert alone.standard_error == pytest.approx(stats.sem(values), abs=1e-9)


def test_only_clustered_intervals_cover_where_questions_share_a_passage() -> None:
    draw = np.random.default_rng(1)
    clusters = np.repeat(np.arange(40), 5)
    hits, naive_hits = 0, 0
    for _ in range(600):
        values = draw.normal(0, 1, 40)[clusters] + draw.normal(0, 1, 200)
        low, high = estimate(values, clusters.tolist()).interval
        hits += low <= 0 <= high
        low, high = estimate(values).interval
        naive_hits += low <= 0 <= high
    assert hits / 600 == pytest.approx(0.95, abs=0.03)  # three standard errors of 600 draws
    assert naive_hits / 600 < 0.85


def test_what_is_not_an_estimate() -> None:
    assert estimate([0.5]).standard_error == math.inf
    assert estimate([0.5, 1], ["a", "a"]).interval == Interval(-math.inf, math.inf)
    for values, clusters, message in (
        ([], None, "at least one value"),
        ([1, math.nan], None, "finite values"),
        ([1, 2], ["a"], "1 cluster names for 2 values"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate(values, clusters)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(-5, 5)), min_size=3, max_size=20))
def test_a_ratio_over_clusters_is_a_mean_with_clusters(rows: list[tuple[str, float]]) -> None:
    clusters, values = [name for name, _ in rows], [value for _, value in rows]
    names = sorted(set(clusters))
    sums = [sum(value for name, value in rows if name == own) for own in names]
    found, expected = estimate_ratio(sums, [clusters.count(own) for own in names]), estimate(values, clusters)
    assert found.mean == pytest.approx(expected.mean, abs=1e-9)
    assert found.standard_error == pytest.approx(expected.standard_error, abs=1e-9)
    assert found.interval == pytest.approx(expected.interval, abs=1e-9)


def test_a_ratio_needs_a_whole() -> None:
    for parts, wholes in (([1.0], [1.0, 2.0]), ([1.0], [0.0])):
        with pytest.raises(ValueError, match="as many parts as wholes"):
            estimate_ratio(parts, wholes)
