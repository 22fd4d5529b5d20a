import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from puna.evaluate.statistics.paired import bootstrap, mcnemar, paired_difference

OURS = [1] * 5 + [1] * 9 + [0] * 2 + [0] * 4
THEIRS = [1] * 5 + [0] * 9 + [1] * 2 + [0] * 4


def test_mcnemar_by_hand() -> None:
    # 9 against 2 of 11: P(at most 2 heads) = (1 + 11 + 55) / 2048, twice; mid-p takes off P(2) = 55 / 2048 once.
    assert mcnemar(OURS, THEIRS) == pytest.approx(2 * 67 / 2048)
    assert mcnemar(OURS, THEIRS, "mid-p") == pytest.approx((2 * 67 - 55) / 2048)
    assert mcnemar(OURS, THEIRS, "chi2") == pytest.approx(stats.chi2.sf(49 / 11, 1))
    assert mcnemar([1, 0, 1], [1, 0, 1]) == 1
    assert mcnemar([1, 0], [0, 1], "mid-p") == pytest.approx(1)
    with pytest.raises(ValueError, match="right and wrong only"):
        mcnemar([0.5, 1], [1, 0])
    with pytest.raises(ValueError, match="2 are ours, 3 theirs"):
        mcnemar([0, 1], [1, 0, 1])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_is_the_sign_test_of_scipy(pairs: list[tuple[bool, bool]]) -> None:
    ours, theirs = zip(*pairs, strict=True)
    only_ours = sum(a and not b for a, b in pairs)
    only_theirs = sum(b and not a for a, b in pairs)
    expected = stats.binomtest(only_ours, only_ours + only_theirs).pvalue if only_ours + only_theirs else 1
    assert mcnemar(ours, theirs) == pytest.approx(expected)
    assert mcnemar(theirs, ours) == pytest.approx(expected)
    assert mcnemar(ours, theirs, "mid-p") <= expected + 1e-12


def test_mcnemar_rejects_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    p = {"exact": [], "mid-p": [], "chi2": []}
    for ours, theirs in draw.integers(0, 2, (700, 2, 80)):
        for method, found in p.items():
            found.append(mcnemar(ours, theirs, method))
    share = {method: float((np.array(found) < 0.05).mean()) for method, found in p.items()}
    assert share["exact"] < 0.05
    assert share["exact"] < share["mid-p"] < 0.065  # nominal 0.05; two standard errors of 700 draws are 0.016
    assert share["chi2"] < 0.07


def test_paired_difference_is_the_paired_t_test() -> None:
    ours, theirs = [0.9, 0.4, 0.8, 0.7], [0.5, 0.5, 0.4, 0.1]
    expected = stats.ttest_rel(ours, theirs).confidence_interval()
    assert paired_difference(ours, theirs).interval == pytest.approx((expected.low, expected.high))
    assert paired_difference(ours, theirs).mean == pytest.approx(0.325)


def test_bootstrap_is_scipy_s() -> None:
    draw = np.random.default_rng(2)
    ours, theirs = draw.normal(1, 1, 30), draw.normal(0.5, 1, 30)
    expected = stats.bootstrap(
        (ours - theirs,), np.mean, n_resamples=2000, rng=np.random.default_rng(0), batch=64
    ).confidence_interval
    found = bootstrap(ours, theirs, resamples=2000)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert bootstrap(ours, theirs, resamples=2000) == found
    assert bootstrap([1, 1, 0], [0, 0, -1]) == (1, 1)
    with pytest.raises(ValueError, match="at least two questions, or two clusters"):
        bootstrap([1, 0], [0, 0], ["a", "a"])


def test_bootstrap_draws_whole_clusters() -> None:
    draw = np.random.default_rng(3)
    clusters = np.repeat(np.arange(30), 6)
    ours = draw.normal(0, 1, 30)[clusters] + draw.normal(0, 0.2, 180)
    theirs = np.zeros(180)
    plain, clustered = (
        bootstrap(ours, theirs, resamples=1000),
        bootstrap(ours, theirs, clusters.tolist(), resamples=1000),
    )
    expected = paired_difference(ours, theirs, clusters.tolist()).interval
    assert clustered.high - clustered.low > 2 * (plain.high - plain.low)
    # The bootstrap's own spread with 1000 resamples, and Student's against none, are a tenth of the width.
    assert clustered == pytest.approx(expected, abs=0.1 * (expected.high - expected.low))
