import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.evaluate.statistics.paired import paired_difference
from puna.evaluate.statistics.power import (
    PowerConfig,
    main,
    questions_needed,
    smallest_difference,
    variance_of_disagreement,
)
from puna.evaluate.statistics.seeds import estimate_over_seeds


def test_miller_s_example() -> None:
    assert questions_needed(0.03, variance=1 / 9) == 969  # section 5 of the paper


@given(st.floats(0.001, 0.5), st.floats(0.01, 1), st.floats(0.5, 0.99))
def test_the_two_are_inverse(difference: float, variance: float, power: float) -> None:
    needed = questions_needed(difference, variance, power)
    assert smallest_difference(needed, variance, power) <= difference
    if needed > 2:
        assert smallest_difference(needed - 1, variance, power) >= difference * (1 - 1e-9) or needed == 3


def test_the_power_is_what_was_asked_for() -> None:
    disagreement, difference = 0.2, 0.06
    needed = questions_needed(difference, variance_of_disagreement(disagreement, difference))
    draw = np.random.default_rng(0)
    shares = [(disagreement + difference) / 2, 1 - disagreement, (disagreement - difference) / 2]
    differences = draw.choice([1.0, 0.0, -1.0], (1000, needed), p=shares)
    seen = [paired_difference(row, np.zeros(needed)).interval.low > 0 for row in differences]
    assert np.mean(seen) == pytest.approx(0.8, abs=0.04)  # three standard errors of 1000 draws


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="cannot be seen by any number"):
        questions_needed(0, 1)
    with pytest.raises(ValueError, match="at least 2"):
        smallest_difference(1, 1)
    with pytest.raises(ValueError, match=r"cannot differ by 0\.3"):
        variance_of_disagreement(0.2, 0.3)
    with pytest.raises(ValueError, match="between 0 and 1"):
        PowerConfig(power=1.0)
    with pytest.raises(ValueError, match="cannot be negative"):
        questions_needed(0.1, -1)


def test_the_command_answers_both(capsys: pytest.CaptureFixture[str]) -> None:
    main(PowerConfig(difference=0.03, questions=500, disagreement=0.2))
    assert "in 1,737 questions; 500 questions show one of 5.60%" in capsys.readouterr().err


def test_seeds_by_hand() -> None:
    # Question means 1 and 4; variances within 2 and 8, mean 5; between 4.5 - 5 / 2 = 2.
    found = estimate_over_seeds([[0, 2], [2, 6]])
    assert (found.within, found.between, found.means) == (5, 2, (1, 4))
    assert found.estimate.mean == 2.5
    assert found.floor == 1
    with pytest.raises(ValueError, match="two questions"):
        estimate_over_seeds([[1], [2]])


def test_seeds_recover_planted_variances() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(0, 0.5, (4000, 1)) + draw.normal(0, 1, (4000, 4))
    found = estimate_over_seeds(values)
    assert found.within == pytest.approx(1, rel=0.05)
    assert found.between == pytest.approx(0.25, rel=0.15)
    assert found.floor < found.estimate.standard_error
    assert estimate_over_seeds([[0, 1]] * 50).between == 0
