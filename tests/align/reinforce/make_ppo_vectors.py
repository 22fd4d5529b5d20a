"""Writes ppo_vectors.json: what trl 0.11.4, the last version with these as functions, makes of some numbers.

Everything is computed by trl's own functions: `PPOTrainer.compute_rewards` (the divergence of each token and the reward
of each token), `PPOTrainer.compute_advantages` (generalised advantages, returns, whitening by `masked_whiten`),
`PPOTrainer.loss` (clipped policy and value losses), `entropy_from_logits`, `logprobs_from_logits` and
`AdaptiveKLController`; gradients by autograd through them. Later versions have the same arithmetic only within
`PPOTrainer.train` (0.29.1: trl/experimental/ppo/ppo_trainer.py, lines 767 to 794 and the minibatch loop after them),
except that they give an answer's reward to the token after its last one, where the table has room for it.

That version does not go together with today's libraries, so it needs a folder of its own, beside torch:

    pip install --no-deps --target OLD trl==0.11.4 transformers==4.46.3 tokenizers==0.20.3 huggingface_hub==0.26.5 \
        accelerate==1.0.1 datasets==3.1.0 tyro==0.8.11 docstring_parser shtab typeguard
    PYTHONPATH=OLD python tests/align/reinforce/make_ppo_vectors.py

Shapes: N answers, L tokens of the longest, V vocabulary.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import PPOTrainer
from trl.core import entropy_from_logits, logprobs_from_logits, masked_mean
from trl.trainer import AdaptiveKLController

LENGTHS, VOCABULARY = (5, 3, 1, 4), 6
SETTINGS: dict[str, Any] = {
    "gamma": 0.97,
    "lam": 0.9,
    "cliprange": 0.2,
    "cliprange_value": 0.15,
    "vf_coef": 0.5,
    "kl_penalty": "kl",
    "whiten_rewards": False,
    "ratio_threshold": 10.0,
}
KL_COEF, KL_TARGET, KL_HORIZON = 0.3, 2.0, 100


def main() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    count, longest = len(LENGTHS), max(LENGTHS)
    mask_NL = (torch.arange(longest) < torch.tensor(LENGTHS)[:, None]).float()
    logits_NLV = draw(count, longest, VOCABULARY).requires_grad_()
    labels_NL = torch.randint(VOCABULARY, (count, longest), generator=generator)
    logprobs_NL = logprobs_from_logits(logits_NLV, labels_NL)
    old_NL = logprobs_NL.detach() - 0.3 * draw(count, longest)  # far enough for some ratios to be clipped
    inputs = {
        "logits": logits_NLV.detach(),
        "labels": labels_NL,
        "old": old_NL,
        "reference": old_NL - 0.5 * draw(count, longest),
        "scores": draw(count),
        "old_values": draw(count, longest),
    }
    values_NL = (inputs["old_values"] + 0.2 * draw(count, longest)).requires_grad_()
    inputs["values"] = values_NL.detach()

    trainer = SimpleNamespace(config=SimpleNamespace(**SETTINGS), kl_ctl=SimpleNamespace(value=KL_COEF))
    trainer._kl_penalty = lambda *both: PPOTrainer._kl_penalty(trainer, *both)
    rewards_NL, _, divergence_NL = PPOTrainer.compute_rewards(
        trainer, inputs["scores"], old_NL, inputs["reference"], mask_NL
    )
    old_values_NL, advantages_NL, returns_NL = PPOTrainer.compute_advantages(
        trainer, inputs["old_values"], rewards_NL, mask_NL
    )
    policy_loss, value_loss, stats = PPOTrainer.loss(
        trainer, old_NL, old_values_NL, logits_NLV, values_NL, logprobs_NL, mask_NL, advantages_NL, returns_NL
    )
    entropy = masked_mean(entropy_from_logits(logits_NLV), mask_NL)
    controller = AdaptiveKLController(KL_COEF, KL_TARGET, KL_HORIZON)
    weights = []
    for divergence in (0.5, 1.9, 2.3, 7.0):
        controller.update(divergence, 16)
        weights.append([divergence, 16, float(controller.value)])
    expected = {
        "divergence": divergence_NL * mask_NL,
        "rewards": rewards_NL * mask_NL,
        "advantages": advantages_NL * mask_NL,
        "returns": returns_NL * mask_NL,
        "policy_loss": policy_loss,
        "weighted_value_loss": value_loss,
        "clip_fraction": stats["policy/clipfrac"],
        "entropy": entropy,
        "policy_loss_by_logits": torch.autograd.grad(policy_loss, logits_NLV, retain_graph=True)[0],
        "weighted_value_loss_by_values": torch.autograd.grad(value_loss, values_NL)[0],
        "entropy_by_logits": torch.autograd.grad(entropy, logits_NLV)[0],
        "kl_weights": weights,
    }
    settings = SETTINGS | {"kl_coef": KL_COEF, "kl_target": KL_TARGET, "kl_horizon": KL_HORIZON, "lengths": LENGTHS}
    vectors = {"trl": "0.11.4", "settings": settings, "inputs": inputs, "expected": expected}
    text = json.dumps(vectors, default=lambda tensor: tensor.detach().tolist())
    Path(__file__).with_name("ppo_vectors.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
