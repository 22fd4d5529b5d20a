"""The pieces of PPO, with their gradients, beside what an older trl says; make_ppo_vectors.py wrote it down.

Tolerance: a few steps of float32 at numbers of about 1, summed over a dozen tokens.

Shapes: N answers, L tokens of the longest, V vocabulary.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.align.reinforce.advantages import shaped_rewards
from puna.align.reinforce.entropy import linear_logprobs_and_entropies
from puna.align.reinforce.losses import adapted_weight, divergence, is_clipped, policy_loss, value_loss
from puna.align.reinforce.methods import PPO, Scored

VECTORS: dict[str, Any] = json.loads(Path(__file__).with_name("ppo_vectors.json").read_text(encoding="utf-8"))
SETTINGS = VECTORS["settings"]
INPUTS, EXPECTED = (
    {name: torch.tensor(values) for name, values in VECTORS[part].items()} for part in ("inputs", "expected")
)
MASK_NL = torch.arange(max(SETTINGS["lengths"])) < torch.tensor(SETTINGS["lengths"])[:, None]
METHOD = PPO(
    kl_weight=SETTINGS["kl_coef"],
    clip_low=SETTINGS["cliprange"],
    clip_high=SETTINGS["cliprange"],
    value_clip=SETTINGS["cliprange_value"],
    value_weight=SETTINGS["vf_coef"],
    discount=SETTINGS["gamma"],
    trace=SETTINGS["lam"],
)


def check(found: Tensor, name: str) -> None:
    assert EXPECTED[name].any(), "nothing to compare"
    torch.testing.assert_close(found.detach(), EXPECTED[name], atol=2e-6, rtol=1e-5)


def mean(values_NL: Tensor) -> Tensor:
    return values_NL[MASK_NL].mean()


def test_rewards_and_advantages() -> None:
    gap_NL = divergence(INPUTS["old"], INPUTS["reference"], "k1")
    check(gap_NL * MASK_NL, "divergence")
    check(shaped_rewards(INPUTS["scores"], gap_NL, MASK_NL, METHOD.kl_weight), "rewards")
    scored = Scored(INPUTS["scores"], INPUTS["old"], INPUTS["reference"], INPUTS["old_values"], MASK_NL, samples=1)
    advantages_NL, returns_NL = METHOD.advantages(scored, METHOD.kl_weight)
    check(advantages_NL, "advantages")  # whitened
    check(returns_NL, "returns")


def logprobs_and_entropies(logits_NLV: Tensor) -> Tensor:
    """With the logits in place of hidden states."""
    size = logits_NLV.shape[-1]
    both = linear_logprobs_and_entropies(logits_NLV.view(-1, size), torch.eye(size), INPUTS["labels"].flatten())
    return both.view(2, *MASK_NL.shape)


def test_policy_loss() -> None:
    logits_NLV = INPUTS["logits"].clone().requires_grad_()
    logprobs_NL, _ = logprobs_and_entropies(logits_NLV)
    given = (logprobs_NL, INPUTS["old"], EXPECTED["advantages"], METHOD.clip_low, METHOD.clip_high)
    loss = mean(policy_loss(*given))
    check(loss, "policy_loss")
    check(torch.autograd.grad(loss, logits_NLV)[0], "policy_loss_by_logits")
    check(mean(is_clipped(*given).float()), "clip_fraction")


def test_value_loss() -> None:
    values_NL = INPUTS["values"].clone().requires_grad_()
    each_NL = value_loss(values_NL, INPUTS["old_values"], EXPECTED["returns"], METHOD.value_clip)
    loss = METHOD.value_weight * mean(each_NL)
    check(loss, "weighted_value_loss")
    check(torch.autograd.grad(loss, values_NL)[0], "weighted_value_loss_by_values")


def test_entropy() -> None:
    logits_NLV = INPUTS["logits"].clone().requires_grad_()
    _, entropies_NL = logprobs_and_entropies(logits_NLV)
    check(mean(entropies_NL), "entropy")
    check(torch.autograd.grad(mean(entropies_NL), logits_NLV)[0], "entropy_by_logits")


def test_adapted_weight() -> None:
    weight = SETTINGS["kl_coef"]
    for gap, answers, expected in VECTORS["expected"]["kl_weights"]:
        weight = adapted_weight(weight, gap, SETTINGS["kl_target"], answers, SETTINGS["kl_horizon"])
        assert weight == pytest.approx(expected, rel=1e-12)
