"""What has to hold before the first step; what does not is said in plain words, with what to do.

Shapes: N answers, L tokens of the longest answer.
"""

from itertools import combinations

import torch

from puna.align.reinforce.loop import Run, draw
from puna.align.reinforce.policy import policy_logprobs
from puna.align.reinforce.rewards import Prompt
from puna.batches.preferences import Preference, read_preferences
from puna.evaluate.statistics.intervals import wilson
from puna.runtime.errors import InputError
from puna.runtime.progress import say

_ENGINE_TOLERANCE = {"fp32": 1e-3, "bf16": 0.25}
"""Largest difference between the engine's and the trainer's log-probability of a token: both round in other places, and
unlikely tokens' log-probabilities by the dtype's step at their logits' size."""
_MOST_PAIRS = 500
"""Pairs of held-out preferences that rewards are checked by."""


def preflight(run: Run) -> dict[str, float]:
    """Check rewards, engine and reference on the first rollout; returns what was seen.

    Raises:
        InputError: nothing can be learnt, or something would be learnt wrongly.
    """
    config = run.config
    found: dict[str, float] = {}
    if config.held_out_preferences is not None:
        found |= _check_agreement(run)
    experience = draw(run, 0, config.method.kl_weight)
    rollout, mask_NL = experience.rollout, experience.rollout.mask_NL
    trainer_NL = policy_logprobs(run.state.model, rollout, config.train.micro_batch_rows, run.device)

    gap = float((rollout.logprobs_NL - trainer_NL)[mask_NL].abs().max())
    found["engine_gap"] = gap
    tolerance = _ENGINE_TOLERANCE["fp32" if config.train.precision == "fp32" else "bf16"]
    if gap > tolerance:
        raise InputError(
            f"The engine that draws answers and the training differ by {gap:.3g} nats in the log-probability of a "
            f"token, more than rounding explains ({tolerance}); what is learnt would be about another model. This is "
            "a fault of ours; train.precision = 'fp32' may help until it is mended."
        )
    if config.needs_reference and config.reference is None:
        away = float((experience.scored.reference_NL - trainer_NL)[mask_NL].abs().max())
        found["reference_gap"] = away
        if away > tolerance:
            raise InputError(
                f"The model is {away:.3g} nats away from its reference before anything was learnt, which are meant to "
                "be the same. Set reference, if this is meant, or check what peft changes about the model."
            )
    rewards_N = experience.scored.rewards_N
    found["first_reward"] = float(rewards_N.mean())
    found["first_reward_deviation"] = float(rewards_N.std(correction=0))
    found["first_unfinished"] = experience.point["unfinished"]
    if not torch.isfinite(rewards_N).all():
        raise InputError("A reward is not finite; check the reward model.")
    if float(rewards_N.max()) == float(rewards_N.min()):
        raise InputError(
            f"All {len(rewards_N)} rewards of the first rollout are {float(rewards_N[0]):g}: there is nothing to learn "
            f"from. {_hint(float(rewards_N[0]), found['first_unfinished'])} The first answer: {rollout.texts[0]!r}."
        )
    if (mixed := experience.point.get("reward/mixed_prompts")) is not None:
        found["mixed_prompts"] = mixed
        if mixed == 0 and config.method.kind != "ppo":
            raise InputError(
                f"In the first rollout all answers to a prompt have the same reward, for each of its "
                f"{config.prompts_per_rollout} prompts; {config.method.kind} learns from differences between them. "
                "Raise method.samples, or take prompts that are answered well now and then."
            )
    say("Before the first step: " + ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in found.items()))
    return found


def _hint(reward: float, unfinished: float) -> str:
    if unfinished > 0.5:
        return f"{unfinished:.0%} of the answers do not end within sampling.max_tokens; raise it, or fine-tune first."
    if reward == 0:
        return "No answer is right; fine-tune first, or begin with easier prompts."
    return "Take harder prompts, or another reward."


def _check_agreement(run: Run) -> dict[str, float]:
    """How often the rewards agree with people on held-out preferences."""
    path = run.config.held_out_preferences
    assert path is not None
    prompts: list[Prompt] = []
    better: list[str] = []
    worse: list[str] = []
    for preference in read_preferences(path):
        if not isinstance(preference, Preference) or preference.is_judged:
            continue
        texts = [str(answer[-1].get("content") or "") for answer in preference.answers]
        ranked = sorted(zip(preference.ranks, texts, strict=True))
        prompt = Prompt(preference.where, preference.prompt, (), {})
        for (rank, one), (lower, other) in combinations(ranked, 2):
            if rank < lower and len(better) < _MOST_PAIRS:
                prompts.append(prompt)
                better.append(one)
                worse.append(other)
    if not better:
        raise InputError(f"{path} has no pair of a better and a worse answer to check the rewards by.")
    rewards, _ = run.scorer(prompts * 2, better + worse, [True] * (2 * len(better)))
    right = sum(one > other for one, other in zip(rewards[: len(better)], rewards[len(better) :], strict=True))
    interval = wilson(right, len(better))
    if interval.low <= 0.5:
        raise InputError(
            f"The rewards prefer the better answer in {right} of {len(better)} pairs of {path} "
            f"({right / len(better):.0%}, 95 % interval {interval.low:.0%} to {interval.high:.0%}), which is "
            "not surely more than by chance. Train the reward model longer or on more, or give more pairs to check by."
        )
    return {"reward_accuracy": right / len(better)}
