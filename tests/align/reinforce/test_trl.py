"""Losses, advantages and gradients beside trl's GRPO and RLOO trainers, on answers that these have drawn.

Tolerances: two models' float32 logits, and sums over some dozen tokens of them.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from puna.align.reinforce.advantages import group_relative
from puna.align.reinforce.methods import GRPO, RLOO, Method, Scored
from puna.align.reinforce.policy import ReinforceLoss
from puna.align.reinforce.rewards import Prompt
from puna.align.reinforce.rollout import Rollout
from puna.weights.load import load_model
from puna.weights.names import to_hf

SAMPLES, MAX_TOKENS = 4, 6
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # trl calls what transformers has renamed


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(ord, text)) % 7) for text in completions]


def trainer(kind: str, model: Path, output: Path, **settings: Any) -> Any:
    """One of trl's, which has drawn nothing yet."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config, build = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}[kind]
    arguments = config(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        per_device_train_batch_size=2 * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=MAX_TOKENS,
        report_to=[],
        seed=0,
        disable_tqdm=True,
        **settings,
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    return build(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "the llama"}] * 2),
        processing_class=tokenizer,
    )


def drawn_by(theirs: Any) -> dict[str, Tensor]:
    """A rollout of theirs; it moves from the reference only afterwards, so that the divergence is not 0."""
    theirs.model.train()
    theirs.current_gradient_accumulation_steps = 1
    torch.manual_seed(0)
    prompts = ["the llama walks to", "a good city in Peru"]
    rows = [{"prompt": prompt} for prompt in prompts for _ in range(SAMPLES)]
    inputs: dict[str, Tensor] = theirs._generate_and_score_completions(rows)
    return inputs


def as_rollout(inputs: dict[str, Tensor], old: Tensor) -> Rollout:
    prompts = [
        Prompt("", [], tuple(ids[mask.bool()].tolist()), {})
        for ids, mask in zip(inputs["prompt_ids"], inputs["prompt_mask"], strict=True)
    ]
    mask_NL = inputs["completion_mask"].bool()
    ids = [tuple(own[mask].tolist()) for own, mask in zip(inputs["completion_ids"], mask_NL, strict=True)]
    texts = ("",) * len(ids)
    return Rollout(tuple(prompts), tuple(ids), texts, (True,) * len(ids), old * mask_NL, mask_NL)


def ours(method: Method, model: Path, inputs: dict[str, Tensor], old: Tensor, advantages: Tensor) -> Any:
    """Loss and gradients by the names that they have there."""
    rollout = as_rollout(inputs, old)
    policy = load_model(model, dtype=torch.float32).train()
    columns = {
        "advantages": advantages * rollout.mask_NL,
        "weights": method.token_weights(rollout.mask_NL, MAX_TOKENS),
    }
    if "ref_per_token_logps" in inputs:
        columns["reference"] = inputs["ref_per_token_logps"]
    loss, total, count = ReinforceLoss(method), torch.zeros(()), 0
    for batch in rollout.batches(range(rollout.num_answers), 3, torch.device("cpu"), columns):
        part = loss(policy, batch)
        total, count = total + part.total, count + part.count
    (total / count).backward()
    grads = {to_hf(name): p.grad for name, p in policy.named_parameters() if p.grad is not None}
    return total.item() / count, grads, loss.measured()


def check(theirs: Any, inputs: dict[str, Tensor], found: Any) -> None:
    loss, grads, _ = found
    theirs.model.zero_grad()
    expected = theirs._compute_loss(theirs.model, inputs)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=2e-5)
    compared = 0
    for name, parameter in theirs.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(grads[name], parameter.grad, atol=2e-5, rtol=1e-3)
            compared += 1
    assert compared > 10
    assert any(p.grad is not None and p.grad.abs().max() > 1e-3 for p in theirs.model.parameters()), "no gradient"


def away(inputs: dict[str, Tensor], theirs: Any) -> Tensor:
    """Log-probabilities of another policy than the model, far enough for some ratios to be clipped."""
    logprobs, *_ = theirs._get_per_token_logps_and_entropies(
        theirs.model,
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        inputs["completion_ids"].shape[1],
    )
    noise = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1))
    moved: Tensor = logprobs.detach() - 0.3 * noise
    return moved


@pytest.mark.parametrize("share", ["answer", "equal"])
def test_grpo(base_model: Path, tmp_path: Path, share: str) -> None:
    scale = share == "answer"
    theirs = trainer(
        "grpo",
        base_model,
        tmp_path,
        beta=0.3,
        loss_type="grpo" if scale else "dr_grpo",
        scale_rewards="group" if scale else "none",
        epsilon=0.2,
        epsilon_high=0.28,
        use_bias_correction_kl=scale,
    )
    inputs = drawn_by(theirs)
    texts = theirs.processing_class.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
    expected = group_relative(torch.tensor(reward(texts)).view(2, SAMPLES), scale=scale)
    torch.testing.assert_close(expected.flatten(), inputs["advantages"])

    inputs["old_per_token_logps"] = away(inputs, theirs)
    inputs["ref_per_token_logps"] = inputs["old_per_token_logps"].roll(1, 0)
    method = GRPO(
        samples=SAMPLES,
        kl_weight=0.3,
        kl_correction=scale,
        clip_high=0.28,
        scale_rewards=scale,
        token_share=share,  # type: ignore[arg-type]
    )
    found = ours(method, base_model, inputs, inputs["old_per_token_logps"], inputs["advantages"][:, None])
    check(theirs, inputs, found)
    assert 0 < found[2]["clip_fraction"] < 1


def test_rloo(base_model: Path, tmp_path: Path) -> None:
    theirs = trainer("rloo", base_model, tmp_path, beta=0.3, epsilon=0.2, epsilon_high=0.28)
    inputs = drawn_by(theirs)
    mask_NL = inputs["completion_mask"].bool()
    texts = theirs.processing_class.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
    nothing = torch.zeros(mask_NL.shape)
    # Policy and reference are the same when these have drawn, so that the divergence is 0 there.
    scored = Scored(torch.tensor(reward(texts)), nothing, nothing, nothing, mask_NL, SAMPLES)
    method = RLOO(samples=SAMPLES, kl_weight=0.3, clip_high=0.28)
    advantages, _ = method.advantages(scored, method.kl_weight)
    torch.testing.assert_close(advantages[:, 0], inputs["advantages"], atol=1e-4, rtol=1e-4)

    old = away(inputs, theirs)
    inputs["old_logps"] = (old * mask_NL).sum(1)
    found = ours(method, base_model, inputs, old, inputs["advantages"][:, None])
    check(theirs, inputs, found)
    assert 0 < found[2]["clip_fraction"] < 1
