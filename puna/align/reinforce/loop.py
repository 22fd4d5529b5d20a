"""Roll out, score, learn: the loop around the one training step.

Shapes: N answers, L tokens of the longest answer.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from puna.align.reinforce.advantages import explained_variance
from puna.align.reinforce.config import ReinforceConfig
from puna.align.reinforce.dashboard import write_dashboard
from puna.align.reinforce.diagnose import Point, diagnose, is_healthy
from puna.align.reinforce.losses import adapted_weight, divergence
from puna.align.reinforce.methods import PPO, Scored
from puna.align.reinforce.policy import ReinforceLoss, expected_values, reference_logprobs
from puna.align.reinforce.rewards import Prompt, Scorer
from puna.align.reinforce.rollout import Rollout, prompts_of_rollout, roll_out
from puna.infer.engine import Engine
from puna.model.transformer import Transformer
from puna.runtime.files import write_jsonl
from puna.runtime.progress import progress
from puna.runtime.seeds import derive_seed
from puna.train.anomaly import VERDICTS
from puna.train.checkpoint import Checkpoints
from puna.train.loss import Loss, with_penalty
from puna.train.metrics import MetricsWriter, read_metrics
from puna.train.state import TrainState
from puna.train.step import StepResult, train_step

_UPDATE_LEFT_OUT = (VERDICTS.index("the loss is not finite"), VERDICTS.index("the gradient is not finite"))


@dataclass(frozen=True)
class Run:
    """All that the loop needs."""

    config: ReinforceConfig
    state: TrainState
    reference: Transformer | None
    """See `puna.align.reinforce.policy.open_reference`."""
    engine: Engine
    """Over `state.model`."""
    scorer: Scorer
    """Gives rewards."""
    judge: Scorer | None
    """Only looks on."""
    prompts: Sequence[Prompt]
    """To learn from."""
    held_out: Sequence[Prompt]
    """To measure on."""
    penalty: Callable[[Transformer], Tensor] | None
    """See `puna.peft.method.Training.penalty`."""
    device: torch.device


@dataclass(frozen=True, slots=True)
class Experience:
    """What one rollout gives to learn from, on the CPU."""

    rollout: Rollout
    rewards: list[float]
    """Of each answer."""
    scored: Scored
    """The same with what reference and critic say."""
    columns: dict[str, Tensor]
    """For `Rollout.batches`."""
    point: dict[str, float]
    """What it shows, for the curves."""


def reinforce(run: Run, plain: dict[str, Any], checkpoints: Checkpoints) -> str:
    """Train until the last step.

    A checkpoint is saved only while nothing looks wrong, so that the newest is the last good one.

    Args:
        plain: the configuration, for what is logged.

    Returns:
        What went wrong, in words; the state is then that of the newest checkpoint, or of the end if there is none.
    """
    config, state = run.config, run.state
    path = config.output / "metrics.jsonl"
    points = [point for point in read_metrics(path) if point["step"] <= state.step] if path.exists() else []
    loss = ReinforceLoss(config.method)
    complaint = ""
    with ExitStack() as stack:
        writer = MetricsWriter(
            config.output,
            step=state.step,
            tensorboard=config.train.tensorboard,
            wandb_project=config.train.wandb_project,
            config=plain,
        )
        metrics = stack.enter_context(writer)
        advance = stack.enter_context(progress("Reinforcing", total=config.train.steps - state.step))
        if not points and run.held_out:
            points.append({"step": 0, **validate(run)})
            metrics.write(0, {name: value for name, value in points[-1].items() if name != "step"})
        while state.step < config.train.steps and not complaint:
            before = state.step
            point, rewarded = _rollout(run, loss, _kl_weight(config, _of_rollouts(points)))
            last = state.step == config.train.steps
            if run.held_out and (last or _passed(before, state.step, config.train.validate_every)):
                point |= validate(run)
            points.append({"step": state.step, **point})
            metrics.write(state.step, point)
            advance(state.step - before, f"reward {point['reward/mean']:.3f}, {point['length']:.0f} tokens an answer")
            rollouts = _of_rollouts(points)
            complaint = _not_finite(point) or diagnose(rollouts, config.alarms)
            due = last or _passed(before, state.step, config.train.checkpoint_every)
            if due and not complaint and is_healthy(rollouts, config.alarms):
                checkpoints.save(state)
                _show(config, points, rewarded, "")
    if complaint:
        _show(config, points, rewarded, complaint)
        checkpoints.finish()
        if not checkpoints.restore(state):
            state.step = state.batch = 0
    return complaint


def _not_finite(point: Point) -> str:
    """What is wrong with a rollout at once, in words."""
    if point["train/not_finite"]:
        return "Loss or gradient is not finite. Lower the learning rate."
    return ""


def _passed(before: int, now: int, every: int) -> bool:
    return every > 0 and now // every > before // every


def _of_rollouts(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if "reward/mean" in point]


def _kl_weight(config: ReinforceConfig, points: Sequence[Point]) -> float:
    """The divergence's weight in the next rollout; it follows from the curves, which an interrupted run reads."""
    method = config.method
    if not points:
        return method.kl_weight
    weight = points[-1]["kl/weight"]
    if not isinstance(method, PPO) or not method.kl_target:
        return weight
    answers = config.prompts_per_rollout * method.samples
    return adapted_weight(weight, points[-1]["kl/answer"], method.kl_target, answers, method.kl_horizon)


def _rollout(run: Run, loss: ReinforceLoss, kl_weight: float) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Draw, score and learn once; returns what was measured, and the answers with their rewards."""
    state = run.state
    started = time.monotonic()
    experience = draw(run, state.batch, kl_weight)
    drawn = time.monotonic()
    state.model.train()
    results = list(_learn(run, experience, loss if run.penalty is None else with_penalty(loss, run.penalty)))
    state.model.eval()
    state.batch += 1
    ended = time.monotonic()
    measured = torch.stack([result.measured for result in results])
    verdicts = measured[:, 3]
    point = experience.point | {f"train/{name}": value for name, value in loss.measured().items()}
    point |= {
        "kl/weight": kl_weight,
        "train/loss": float(measured[:, 0].mean()),
        "train/grad_norm": float(measured[:, 1].mean()),
        "train/learning_rate": results[-1].learning_rate,
        "train/left_out": float((verdicts > 0).sum()),
        "train/not_finite": float(sum((verdicts == verdict).sum() for verdict in _UPDATE_LEFT_OUT)),
        "speed/draw_and_score_seconds": drawn - started,
        "speed/learn_seconds": ended - drawn,
        "speed/tokens_per_second": float(experience.rollout.mask_NL.sum()) / (ended - started),
    }
    rollout = experience.rollout
    rows = zip(rollout.prompts, rollout.texts, experience.rewards, rollout.finished, strict=True)
    rewarded = [
        {"id": p.where, "prompt": p.messages, "answer": text, "reward": reward, "finished": finished}
        for p, text, reward, finished in rows
    ]
    return point, rewarded


def draw(run: Run, number: int, kl_weight: float) -> Experience:
    """Rollout `number` of a run, by the model as it is; it follows from weights, seed and number alone."""
    config, model, method = run.config, run.state.model, run.config.method
    seed, rows = config.train.seed, config.train.micro_batch_rows
    model.eval()
    run.engine.weights_changed()
    prompts = prompts_of_rollout(run.prompts, number, config.prompts_per_rollout, seed)
    rollout = roll_out(run.engine, prompts, method.samples, config.sampling, (seed, "answer", number))
    rewards, parts = run.scorer(rollout.prompts, rollout.texts, rollout.finished)
    mask_NL, logprobs_NL = rollout.mask_NL, rollout.logprobs_NL
    reference_NL = (
        reference_logprobs(model, run.reference, rollout, rows, run.device) if config.needs_reference else logprobs_NL
    )
    has_critic = isinstance(method, PPO)
    values_NL = expected_values(model, rollout, rows, run.device) if has_critic else torch.zeros_like(logprobs_NL)
    scored = Scored(torch.tensor(rewards), logprobs_NL, reference_NL, values_NL, mask_NL, method.samples)
    advantages_NL, returns_NL = method.advantages(scored, kl_weight)
    columns = {
        "reference": reference_NL,
        "values": values_NL,
        "advantages": advantages_NL,
        "returns": returns_NL,
        "weights": method.token_weights(mask_NL, config.sampling.max_tokens or 0),
    }
    spread_P = scored.rewards_N.view(-1, method.samples).std(1, correction=0)
    point = {
        "reward/mean": float(scored.rewards_N.mean()),
        "reward/deviation": float(scored.rewards_N.std(correction=0)),
        **{f"reward/{name}": value for name, value in parts.items()},
        "entropy": float(-logprobs_NL[mask_NL].mean()),  # unbiased, as the tokens were drawn from it
        "length": float(mask_NL.sum(1).float().mean()),
        "unfinished": 1 - sum(rollout.finished) / rollout.num_answers,
    }
    if method.samples > 1:
        point["reward/mixed_prompts"] = float((spread_P > 0).float().mean())
    if config.needs_reference:
        point["kl/token"] = float(divergence(logprobs_NL, reference_NL, "k3")[mask_NL].mean())
        point["kl/answer"] = float((divergence(logprobs_NL, reference_NL, "k1") * mask_NL).sum(1).mean())
    if has_critic:
        point["critic/explained_variance"] = explained_variance(values_NL[mask_NL], returns_NL[mask_NL])
    return Experience(rollout, rewards, scored, columns, point)


def _learn(run: Run, experience: Experience, loss: Loss) -> Iterator[StepResult]:
    train, rollout = run.config.train, experience.rollout
    for epoch in range(run.config.method.epochs):
        seed = derive_seed(train.seed, "order", run.state.batch, epoch)
        order = np.random.default_rng(seed).permutation(rollout.num_answers).tolist()
        for start in range(0, len(order), train.batch_rows):
            chosen = order[start : start + train.batch_rows]
            batches = list(rollout.batches(chosen, train.micro_batch_rows, run.device, experience.columns))
            yield train_step(run.state, batches, loss, train)


def validate(run: Run) -> dict[str, float]:
    """Rewards of the likeliest answers to held-out prompts."""
    config = run.config
    run.state.model.eval()
    run.engine.weights_changed()
    prompts = run.held_out[: config.train.validation_rows]
    rollout = roll_out(run.engine, prompts, 1, replace(config.sampling, temperature=0), (0, "validation"))
    rewards, _ = run.scorer(rollout.prompts, rollout.texts, rollout.finished)
    point = {
        "validation/reward": sum(rewards) / len(rewards),
        "validation/length": float(rollout.mask_NL.sum(1).float().mean()),
        "validation/unfinished": 1 - sum(rollout.finished) / rollout.num_answers,
    }
    if run.judge is not None:
        judged, _ = run.judge(rollout.prompts, rollout.texts, rollout.finished)
        point["validation/judge"] = sum(judged) / len(judged)
    return point


def _show(config: ReinforceConfig, points: Sequence[Point], rewarded: Sequence[dict[str, Any]], complaint: str) -> None:
    """What a person looks at: the last answers, and the page of curves."""
    write_jsonl(config.output / "answers.jsonl", rewarded)
    write_dashboard(config, points, rewarded, complaint)
