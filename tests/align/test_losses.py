"""Losses on preferences beside `trl`'s, on the same log-probabilities; and by hand."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from puna.align.losses import DPO, IPO, KTO, ORPO, Answers, Hinge, PairLoss, SimPO


def answers(seed: int, pairs: int) -> tuple[Answers, Answers]:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Answers:
        lengths = torch.randint(1, 30, (pairs,), generator=generator).float()
        policy = -torch.rand(pairs, generator=generator) * 3 * lengths - 0.01
        reference = policy + torch.randn(pairs, generator=generator)
        return Answers(policy.requires_grad_(), reference, lengths)

    return draw(), draw()


def test_by_hand() -> None:
    """One pair: better 2 above its reference and worse 1 below, of 4 and 2 tokens."""
    better = Answers(torch.tensor([-3.0]), torch.tensor([-5.0]), torch.tensor([4.0]))
    worse = Answers(torch.tensor([-4.0]), torch.tensor([-3.0]), torch.tensor([2.0]))

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected: list[tuple[PairLoss, float]] = [
        (DPO(beta=0.5), -math.log(sigmoid(0.5 * 3))),
        (DPO(beta=0.5, label_smoothing=0.1), -0.9 * math.log(sigmoid(1.5)) - 0.1 * math.log(sigmoid(-1.5))),
        (IPO(beta=0.25), ((2 / 4 + 1 / 2) - 2) ** 2),
        (Hinge(beta=0.1), 1 - 0.3),
        (Hinge(beta=1.0), 0.0),
        (SimPO(beta=2, gamma=0.3), -math.log(sigmoid(2 * (-0.75 + 2) - 0.3))),
        (
            ORPO(weight=0.1),
            0.75
            - 0.1
            * math.log(
                sigmoid(
                    (-0.75 - math.log(1 - math.exp(-0.75))) - (-2 - math.log(1 - math.exp(-2))),
                )
            ),
        ),
    ]
    for loss, value in expected:
        assert loss(better, worse).item() == pytest.approx(value, rel=1e-5), loss
    good = torch.tensor([True])
    assert KTO(beta=0.5)(better, good, torch.tensor(0.4)).item() == pytest.approx(1 - sigmoid(0.5 * (2 - 0.4)))
    assert KTO(beta=0.5, bad_weight=3)(better, ~good, torch.tensor(0.4)).item() == pytest.approx(
        3 * (1 - sigmoid(0.5 * (0.4 - 2)))
    )


@given(seed=st.integers(0, 99), pairs=st.integers(1, 9))
def test_at_the_reference(seed: int, pairs: int) -> None:
    """Where the model is still the reference, DPO's loss is ln 2, and its gradient pulls both answers apart alike."""
    better, worse = (Answers(each.policy_N, each.policy_N.detach(), each.lengths_N) for each in answers(seed, pairs))
    loss_P = DPO(beta=0.3)(better, worse)
    torch.testing.assert_close(loss_P, torch.full((pairs,), math.log(2)))
    loss_P.sum().backward()
    for each, sign in ((better, -1), (worse, 1)):
        assert each.policy_N.grad is not None
        torch.testing.assert_close(each.policy_N.grad, torch.full((pairs,), sign * 0.15))


def both(ours: Tensor, theirs: Tensor, *inputs: Tensor) -> None:
    """Losses and gradients are the same, up to the rounding of float32."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(loss.sum(), inputs) for loss in (ours, theirs))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def spread(answers: Answers, width: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities by token that sum up to those of answers, and a mask of the tokens, as trl sees them."""
    mask_NT = torch.arange(width) < answers.lengths_N[:, None]
    return answers.mean_N[:, None] * mask_NT, torch.cat((torch.zeros(len(mask_NT), 1).bool(), mask_NT), 1).long()


def trainer(**settings: Any) -> SimpleNamespace:
    """What trl's methods that compute a loss want to find in `self`."""
    accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x)
    metrics = defaultdict(lambda: defaultdict(list))
    return SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None,
        _tp_size=1, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_weights=[1.0], label_smoothing=0.0,
        use_weighting=False, _metrics=metrics, _total_train_tokens=0, **settings,
    )  # fmt: skip


def outputs(logprobs_NT: Tensor) -> Any:
    zeros = torch.zeros_like(logprobs_NT)
    given = SimpleNamespace(log_probs=logprobs_NT, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    return lambda **arguments: given


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("loss", "loss_type"), [(DPO(beta=0.3), "sigmoid"), (IPO(beta=0.3), "ipo"), (Hinge(beta=0.3), "hinge")]
)
def test_dpo_and_its_kin_are_those_of_trl(loss: Any, loss_type: str) -> None:
    dpo = pytest.importorskip("trl.trainer.dpo_trainer")
    better, worse = answers(0, 7)
    parts = [spread(each, 30) for each in (better, worse)]
    logprobs_NT, mask_NU = (torch.cat(columns) for columns in zip(*parts, strict=True))
    inputs = {
        "input_ids": mask_NU,
        "attention_mask": mask_NU,
        "completion_mask": mask_NU,
        "ref_chosen_logps": better.reference_N,
        "ref_rejected_logps": worse.reference_N,
    }
    theirs = dpo.DPOTrainer._compute_loss(
        trainer(beta=loss.beta, loss_types=[loss_type]), outputs(logprobs_NT), inputs, False
    )
    both(loss(better, worse).mean(), theirs, better.policy_N, worse.policy_N)


@pytest.mark.filterwarnings("ignore")
def test_kto_is_that_of_trl() -> None:
    kto = pytest.importorskip("trl.trainer.kto_trainer")
    own, other = answers(3, 8)
    good_N = torch.tensor([True, False, True, True, False, False, True, False])
    logprobs_NT, mask_NU = spread(own, 30)
    inputs = {
        "input_ids": mask_NU,
        "attention_mask": mask_NU,
        "completion_mask": mask_NU,
        "label": good_N,
        "ref_logps": own.reference_N,
        "ref_KL_logps": other.reference_N,
    }
    settings = trainer(
        beta=0.3,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        _compute_kl_logps=lambda *_: other.policy_N,
    )
    theirs = kto.KTOTrainer._compute_loss(settings, outputs(logprobs_NT), inputs, False)
    divergence = other.log_ratio_N.mean().clamp(min=0).detach()
    ours = KTO(beta=0.3, good_weight=1.5, bad_weight=0.5)(own, good_N, divergence)
    both(ours.mean(), theirs, own.policy_N)


@pytest.mark.filterwarnings("ignore")
def test_simpo_is_that_of_trl() -> None:
    cpo = pytest.importorskip("trl.experimental.cpo")
    better, worse = answers(1, 7)
    settings = trainer(loss_type="simpo", simpo_gamma=0.7, beta=2.0, alpha=0.0)
    theirs, *_ = cpo.CPOTrainer.cpo_loss(settings, better.mean_N, worse.mean_N)
    both(SimPO(beta=2.0, gamma=0.7)(better, worse), theirs, better.policy_N, worse.policy_N)


@pytest.mark.filterwarnings("ignore")
def test_the_odds_ratio_is_that_of_trl() -> None:
    orpo = pytest.importorskip("trl.experimental.orpo")
    better, worse = answers(2, 7)
    minus_loss, *_ = orpo.ORPOTrainer.odds_ratio_loss(trainer(beta=0.2), better.mean_N, worse.mean_N)
    both(ORPO(weight=0.2)(better, worse), -better.mean_N - minus_loss, better.policy_N, worse.policy_N)
