"""Advantages and losses: hand-worked cases, and slow twins that say what is right."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from puna.align.reinforce.advantages import (
    explained_variance,
    generalized_advantages,
    group_relative,
    leave_one_out,
    shaped_rewards,
    whiten,
)
from puna.align.reinforce.losses import adapted_weight, divergence, is_clipped, policy_loss, value_loss
from puna.align.reinforce.methods import GRPO, PPO, RLOO, Scored


def naive_generalized_advantages(
    rewards: list[float], values: list[float], discount: float, trace: float
) -> list[float]:
    """Equation 16 as a sum, for one answer."""
    length = len(rewards)
    surprises = [rewards[t] + discount * (values[t + 1] if t + 1 < length else 0.0) - values[t] for t in range(length)]
    return [
        sum((discount * trace) ** (later - t) * surprises[later] for later in range(t, length)) for t in range(length)
    ]


def test_advantages_by_hand() -> None:
    # Two tokens, reward 1 at the end, values 0.5 and 0.25, discount 0.9, lambda 0.5:
    # surprises 0.9 * 0.25 - 0.5 = -0.275 and 1 - 0.25 = 0.75; first advantage -0.275 + 0.45 * 0.75 = 0.0625.
    mask = torch.tensor([[True, True, False]])
    rewards = torch.tensor([[0.0, 1.0, 0.0]])
    values = torch.tensor([[0.5, 0.25, 7.0]])
    advantages, returns = generalized_advantages(rewards, values, mask, 0.9, 0.5)
    assert advantages.tolist()[0] == pytest.approx([0.0625, 0.75, 0.0])
    assert returns.tolist()[0] == pytest.approx([0.5625, 1.0, 0.0])


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 2**16),
)
def test_advantages_equal_the_sum(lengths: list[int], discount: float, trace: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rewards = torch.randn(mask.shape, generator=generator) * mask
    values = torch.randn(mask.shape, generator=generator)
    advantages, returns = generalized_advantages(rewards, values, mask, discount, trace)
    for row, length in enumerate(lengths):
        expected = naive_generalized_advantages(
            rewards[row, :length].tolist(), values[row, :length].tolist(), discount, trace
        )
        # Sums of at most six float32 numbers of about 1.
        assert advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-5)
        assert not advantages[row, length:].any()
    assert torch.equal(returns, advantages + values * mask)


def test_shaped_rewards_by_hand() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    divergence_NL = torch.tensor([[0.1, 0.2, 0.3], [0.5, 9.0, 9.0]])
    shaped = shaped_rewards(torch.tensor([1.0, -1.0]), divergence_NL, mask, 2.0)
    assert shaped.flatten().tolist() == pytest.approx([-0.2, -0.4, 0.4, -2.0, 0.0, 0.0])


def test_groups_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    deviation = math.sqrt(4 * 0.25 / 3) + 1e-4
    assert group_relative(rewards, scale=True)[0].tolist() == pytest.approx(
        [0.5 / deviation, -0.5 / deviation, -0.5 / deviation, 0.5 / deviation]
    )
    assert not group_relative(rewards, scale=True)[1].any()
    assert group_relative(rewards, scale=False)[0].tolist() == [0.5, -0.5, -0.5, 0.5]
    # The first answer's baseline is the mean of the other three, 1/3.
    assert leave_one_out(rewards)[0].tolist() == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])


@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 2**16))
def test_leaving_one_out_scales_the_mean(prompts: int, samples: int, seed: int) -> None:
    """r - mean of others = S / (S - 1) * (r - mean of all) (arXiv:2402.14740, section 4)."""
    rewards = torch.randn(prompts, samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = samples / (samples - 1) * group_relative(rewards, scale=False)
    torch.testing.assert_close(leave_one_out(rewards), expected)


def test_whiten() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    values = torch.tensor([[1.0, 2.0, 100.0], [3.0, 4.0, 10.0]])
    chosen = np.array([1.0, 2.0, 3.0, 4.0, 10.0])
    expected = (chosen - chosen.mean()) / chosen.std(ddof=1)
    assert whiten(values, mask)[mask].numpy() == pytest.approx(expected, rel=1e-5)
    assert whiten(values, mask)[0, 2] == 0
    assert not whiten(values[:1, :1], mask[:1, :1]).any(), "one value has no variance"


def test_explained_variance() -> None:
    returns = torch.tensor([0.0, 1.0, 2.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.ones(3), returns) == 0
    assert explained_variance(-returns, returns) < 0
    assert math.isnan(explained_variance(returns, torch.ones(3)))


def test_divergences() -> None:
    """k1 and k3 have the true divergence as their mean over the policy, and k3 is nowhere negative."""
    policy = torch.tensor([0.5, 0.3, 0.2]).double().log()
    reference = torch.tensor([0.4, 0.4, 0.2]).double().log()
    true = float((policy.exp() * (policy - reference)).sum())
    for estimator in ("k1", "k3"):
        estimate = divergence(policy, reference, estimator)  # type: ignore[arg-type]
        assert float((policy.exp() * estimate).sum()) == pytest.approx(true)
    assert (divergence(policy, reference, "k3") >= 0).all()
    assert divergence(policy, reference, "k2").tolist() == pytest.approx(((policy - reference) ** 2 / 2).tolist())


@given(st.floats(-1, 1), st.floats(-2, 2), st.floats(0.05, 0.5), st.floats(0.05, 0.5))
def test_policy_loss_by_cases(log_ratio: float, advantage: float, low: float, high: float) -> None:
    logprob = torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True)
    old, gain = torch.zeros((), dtype=torch.float64), torch.tensor(advantage, dtype=torch.float64)
    loss = policy_loss(logprob, old, gain, low, high)
    ratio = math.exp(log_ratio)
    expected = -advantage * (min(ratio, 1 + high) if advantage >= 0 else max(ratio, 1 - low))
    assert loss.item() == pytest.approx(expected)
    (slope,) = torch.autograd.grad(loss, logprob)
    assert bool(is_clipped(logprob, old, gain, low, high)) == (slope == 0 and advantage != 0)


def test_value_loss_by_hand() -> None:
    values = torch.tensor([1.0, 1.0, 0.1], requires_grad=True)
    loss = value_loss(values, torch.tensor([0.0, 0.0, 0.0]), torch.tensor([2.0, 0.5, 2.0]), 0.2)
    # Clipped to 0.2: errors 1.8 against 1 (the greater counts, no slope); 0.3 against 0.5; not clipped: 1.9.
    assert loss.tolist() == pytest.approx([1.8**2 / 2, 0.5**2 / 2, 1.9**2 / 2])
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([0.0, 0.5, -1.9])


def test_adapted_weight() -> None:
    assert adapted_weight(0.1, 6.0, 6.0, 100, 1000) == 0.1
    assert adapted_weight(0.1, 6.6, 6.0, 100, 1000) == pytest.approx(0.1 * 1.01)
    assert adapted_weight(0.1, 60.0, 6.0, 100, 1000) == pytest.approx(0.1 * 1.02), "at most a fifth"
    assert adapted_weight(0.1, -5.0, 6.0, 100, 1000) == pytest.approx(0.1 * 0.98)


@pytest.fixture
def scored() -> Scored:
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(6, 4, generator=generator)

    mask = torch.arange(4) < torch.tensor([4, 2, 1, 3, 4, 2])[:, None]
    rewards = torch.randn(6, generator=generator)
    return Scored(rewards, draw() * mask, draw() * mask, draw() * mask, mask, samples=3)


def test_methods_compose_them(scored: Scored) -> None:
    mask = scored.mask_NL
    gap = (scored.logprobs_NL - scored.reference_NL) * mask

    advantages, returns = PPO(samples=3, trace=0.9).advantages(scored, 0.3)
    shaped = shaped_rewards(scored.rewards_N, gap, mask, 0.3)
    expected, expected_returns = generalized_advantages(shaped, scored.values_NL, mask, 1.0, 0.9)
    torch.testing.assert_close(advantages, whiten(expected, mask))
    torch.testing.assert_close(returns, expected_returns)

    advantages, _ = GRPO(samples=3).advantages(scored, 0.3)
    torch.testing.assert_close(advantages[:, 0], group_relative(scored.rewards_N.view(2, 3), scale=True).flatten())
    advantages, _ = RLOO(samples=3).advantages(scored, 0.3)
    shaped_N = scored.rewards_N - 0.3 * gap.sum(1)
    torch.testing.assert_close(advantages[:, 0], leave_one_out(shaped_N.view(2, 3)).flatten())
    assert torch.equal(advantages != 0, mask)

    answer, equal = (GRPO(samples=3, token_share=share).token_weights(mask, 8) for share in ("answer", "equal"))
    assert answer.sum(1).tolist() == pytest.approx([1.0] * 6)
    assert torch.equal(equal, mask / 8)


def test_refused_settings() -> None:
    for build, message in [
        (lambda: GRPO(samples=1), "measures an answer by the others"),
        (lambda: RLOO(samples=1), "measures an answer by the others"),
        (lambda: PPO(clip_low=1.5), "clip_low"),
        (lambda: PPO(kl_weight=0.0, kl_target=3.0), "cannot be adapted"),
        (lambda: GRPO(kl_weight=-1.0), "cannot be negative"),
        (lambda: PPO(trace=1.5), "trace"),
    ]:
        with pytest.raises(ValueError, match=message):
            build()  # type: ignore[no-untyped-call]
