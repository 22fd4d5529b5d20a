"""The judgement on the device equals its twin on the host."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.train.anomaly import VERDICTS, SpikeLimits, fresh_statistics, judge, naive_judge

LIMITS = SpikeLimits(deviations=10, settle_steps=20)
CPU = torch.device("cpu")
ONE = torch.tensor(1.0)


def double(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


odd = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e30])


@settings(max_examples=80, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 3), st.floats(-5, 20) | odd, st.floats(0, 100) | odd), max_size=40),
    deviations=st.sampled_from([0.0, 0.5, 3.0, 10.0]),
    settle_steps=st.integers(0, 10),
)
def test_equals_the_twin(steps: list[tuple[int, float, float]], deviations: float, settle_steps: int) -> None:
    limits = SpikeLimits(deviations, settle_steps)
    fast, slow = fresh_statistics(CPU), [0.0] * 5
    for units, loss, grad_norm in steps:
        verdict, fast = judge(fast, double(units), double(loss), double(grad_norm), limits)
        expected, slow = naive_judge(slow, units, loss, grad_norm, limits)
        assert VERDICTS[int(verdict)] == VERDICTS[expected]
        # The same double-precision formulas; only the rounding of single operations may differ.
        assert fast.tolist() == pytest.approx(slow, rel=1e-9, abs=1e-9)
        slow = fast.tolist()  # so that a rounding does not turn a later comparison


def test_a_noisy_falling_loss_is_good_and_a_spike_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    statistics = fresh_statistics(CPU)
    for step in range(3000):
        noise = torch.randn(2, generator=generator).double()
        loss = 2 + 8 * math.exp(-step / 100) + 0.1 * noise[0]
        grad_norm = torch.exp(0.3 * noise[1]) * (1 + 10 * math.exp(-step / 30))
        verdict, statistics = judge(statistics, ONE, loss, grad_norm, LIMITS)
        assert verdict == 0, step
    for loss, norm, expected in [(3.2, 1.0, "the loss spikes"), (2.0, 40.0, "the gradient spikes"), (2.5, 3.0, "good")]:
        verdict, after = judge(statistics, ONE, loss * ONE, norm * ONE, LIMITS)
        assert VERDICTS[int(verdict)] == expected
        assert torch.equal(after, statistics) == (expected != "good")


def test_nothing_spikes_before_the_statistics_have_settled_or_when_switched_off() -> None:
    statistics = fresh_statistics(CPU)
    for _ in range(5):
        verdict, statistics = judge(statistics, ONE, ONE, ONE, SpikeLimits(10, 5))
        assert verdict == 0
    huge = 100 * ONE
    assert judge(statistics, ONE, huge, ONE, SpikeLimits(10, 6))[0] == 0
    assert judge(statistics, ONE, huge, ONE, SpikeLimits(0, 0))[0] == 0
    assert VERDICTS[int(judge(statistics, ONE, huge, ONE, SpikeLimits(10, 5))[0])] == "the loss spikes"
