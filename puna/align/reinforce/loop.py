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
from puna.align.reinforce.policy import ReinforceLoss, expected_values, reference_logprobs, shares_prompts
from puna.align.reinforce.processes import Drawn, bring_up_to_date, of_all, own_prompts, together
from puna.align.reinforce.rewards import Prompt, Scorer
from puna.align.reinforce.rollout import Rollout, prompts_of_rollout, roll_out
from puna.infer.engine import Engine
from puna.model.transformer import Transformer
from puna.parallel.mesh import is_first_process, wait_for_all
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
    policy: Transformer
    """What draws answers and is asked about them; see `puna.align.reinforce.processes.whole_copy`."""
    reference: Transformer | None
    """See `puna.align.reinforce.policy.open_reference`."""
    engine: Engine
    """Over `policy`."""
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

    A checkpoint is saved only while nothing looks wrong, so that the newest is the last good one. Of several processes
    the first writes.

    Args:
        plain: the configuration, for what is logged.

    Returns:
        What went wrong, in words; the state is then that of the newest checkpoint, or of the end if there is none.
    """
    config, state = run.config, run.state
    path = config.output / "metrics.jsonl"
    points = [point for point in read_metrics(path) if point["step"] <= state.step] if path.exists() else []
    loss = ReinforceLoss(config.method, state.layout.mesh)
    complaint = ""
    wait_for_all()  # until each has read the curves, which are then cut where the run goes on
    with ExitStack() as stack:
        metrics = None
        if is_first_process():
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
            before = validate(run)
            points.append({"step": 0, **before})
            if metrics is not None:
                metrics.write(0, before)
        while state.step < config.train.steps and not complaint:
            start = state.step
            point, rewarded = _rollout(run, loss, _kl_weight(config, _of_rollouts(points)))
            last = state.step == config.train.steps
            if run.held_out and (last or _passed(start, state.step, config.train.validate_every)):
                point |= validate(run)
            point = of_all(point)[0]
            points.append({"step": state.step, **point})
            if metrics is not None:
                metrics.write(state.step, point)
            advance(state.step - start, f"reward {point['reward/mean']:.3f}, {point['length']:.0f} tokens an answer")
            rollouts = _of_rollouts(points)
            complaint = _not_finite(point) or diagnose(rollouts, config.alarms)
            due = last or _passed(start, state.step, config.train.checkpoint_every)
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
    config, method = run.config, run.config.method
    drawn = together(_draw_own(run, number))
    rollout, mask_NL, logprobs_NL = drawn.rollout, drawn.rollout.mask_NL, drawn.rollout.logprobs_NL
    reference_NL, values_NL = drawn.reference_NL, drawn.values_NL
    scored = Scored(torch.tensor(drawn.rewards), logprobs_NL, reference_NL, values_NL, mask_NL, method.samples)
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
        **{f"reward/{name}": value for name, value in drawn.parts.items()},
        "entropy": float(-logprobs_NL[mask_NL].mean()),  # unbiased, as the tokens were drawn from it
        "length": float(mask_NL.sum(1).float().mean()),
        "unfinished": 1 - sum(rollout.finished) / rollout.num_answers,
    }
    if method.samples > 1:
        point["reward/mixed_prompts"] = float((spread_P > 0).float().mean())
    if config.needs_reference:
        point["kl/token"] = float(divergence(logprobs_NL, reference_NL, "k3")[mask_NL].mean())
        point["kl/answer"] = float((divergence(logprobs_NL, reference_NL, "k1") * mask_NL).sum(1).mean())
    if isinstance(method, PPO):
        point["critic/explained_variance"] = explained_variance(values_NL[mask_NL], returns_NL[mask_NL])
    return Experience(rollout, drawn.rewards, scored, columns, point)


def _draw_own(run: Run, number: int) -> Drawn:
    """This process's share of a rollout."""
    config, policy, method = run.config, run.policy, run.config.method
    seed, rows = config.train.seed, config.train.micro_batch_rows
    _catch_up(run)
    prompts = prompts_of_rollout(run.prompts, number, config.prompts_per_rollout, seed)
    own, first = own_prompts(prompts, run.state.layout.mesh)
    rollout = roll_out(run.engine, own, method.samples, config.sampling, (seed, "answer", number), first)
    rewards, parts = run.scorer(rollout.prompts, rollout.texts, rollout.finished)
    reference_NL = rollout.logprobs_NL
    if config.needs_reference:
        reference_NL = reference_logprobs(policy, run.reference, rollout, rows, run.device)
    values_NL = torch.zeros_like(rollout.logprobs_NL)
    if isinstance(method, PPO):
        values_NL = expected_values(policy, rollout, rows, run.device)
    return Drawn(rollout, rewards, parts, reference_NL, values_NL)


def _catch_up(run: Run) -> None:
    """Let the policy that draws, and its engine, know of the updates since."""
    bring_up_to_date(run.policy, run.state.model)
    run.policy.eval()
    run.engine.weights_changed()


def _learn(run: Run, experience: Experience, loss: Loss) -> Iterator[StepResult]:
    train, rollout = run.config.train, experience.rollout
    share_prompts = shares_prompts(run.state.model)
    for epoch in range(run.config.method.epochs):
        seed = derive_seed(train.seed, "order", run.state.batch, epoch)
        order = np.random.default_rng(seed).permutation(rollout.num_answers).tolist()
        for start in range(0, len(order), train.batch_rows):
            chosen = sorted(order[start : start + train.batch_rows])  # answers to the same prompt stand side by side
            own = run.state.layout.own_rows(0, len(chosen))
            batches = rollout.batches(
                chosen[own.start : own.stop],
                train.micro_batch_rows,
                run.device,
                experience.columns,
                share_prompts=share_prompts,
            )
            yield train_step(run.state, list(batches), loss, train)


def validate(run: Run) -> dict[str, float]:
    """Rewards of the likeliest answers to held-out prompts."""
    _catch_up(run)
    mesh, prompts = run.state.layout.mesh, run.held_out[: run.config.train.validation_rows]
    own = prompts[mesh.rank("rows") :: mesh.num_processes]
    measured = [each for part in of_all(_likeliest(run, own) if own else []) for each in part]
    return {f"validation/{name}": sum(each[name] for each in measured) / len(measured) for name in measured[0]}


def _likeliest(run: Run, prompts: Sequence[Prompt]) -> list[dict[str, float]]:
    """What is measured of the likeliest answer to each prompt."""
    rollout = roll_out(run.engine, prompts, 1, replace(run.config.sampling, temperature=0), (0, "validation"))
    given = (rollout.prompts, rollout.texts, rollout.finished)
    found: dict[str, Sequence[float]] = {
        "reward": run.scorer(*given)[0],
        "length": rollout.mask_NL.sum(1).tolist(),
        "unfinished": [not finished for finished in rollout.finished],
    }
    if run.judge is not None:
        found["judge"] = run.judge(*given)[0]
    return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]


def _show(config: ReinforceConfig, points: Sequence[Point], rewarded: Sequence[dict[str, Any]], complaint: str) -> None:
    """What a person looks at: the last answers, and the page of curves."""
    if not is_first_process():
        return
    write_jsonl(config.output / "answers.jsonl", rewarded)
    write_dashboard(config, points, rewarded, complaint)
