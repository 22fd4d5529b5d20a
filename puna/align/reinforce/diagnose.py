"""Whether it is going wrong, said in plain words; from the curves alone, so that an interrupted run ends where another
would."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from puna.align.reinforce.config import AlarmConfig

Point = Mapping[str, float]
_CRITIC_LEARNS = 20
"""Rollouts before which nothing is expected of a critic."""


def is_healthy(points: Sequence[Point], alarms: AlarmConfig) -> bool:
    """Whether the last rollout looks right, so that the model is worth keeping."""
    return not diagnose(points, replace(alarms, patience=1))


def diagnose(points: Sequence[Point], alarms: AlarmConfig) -> str:
    """What is going wrong, and what to do; empty where nothing is.

    Args:
        points: of all rollouts, the oldest first.
    """
    return next(_complaints(points, alarms), "")


def _complaints(points: Sequence[Point], alarms: AlarmConfig) -> Iterator[str]:
    if len(points) <= alarms.patience:
        return
    before, last = points[: -alarms.patience], points[-alarms.patience :]
    now = {name: fmean(point[name] for point in last) for name in last[-1] if all(name in point for point in last)}
    over = f"in the last {alarms.patience} rollouts" if alarms.patience > 1 else "in the last rollout"
    best = max(fmean(p["reward/mean"] for p in window) for window in _windows(before, alarms.patience))
    first = before[0]

    if all(point.get("kl/token", 0.0) > alarms.most_divergence for point in last):
        yield (
            f"The model runs away from its reference: {now['kl/token']:.2f} nats for each token {over}, more than "
            f"alarms.most_divergence ({alarms.most_divergence}). Raise method.kl_weight, or lower the learning rate."
        )
    if all(point["entropy"] < alarms.least_entropy for point in last) and now["reward/mean"] < best:
        yield (
            f"Entropy has collapsed: {now['entropy']:.4f} nats for each token {over}, so that all answers are alike, "
            f"while the reward is {now['reward/mean']:.3f} and has been {best:.3f}. Lower the learning rate, take "
            "fewer epochs, or raise method.kl_weight."
        )
    if all(point["reward/deviation"] == 0 for point in last) and now["reward/mean"] < best:
        yield (
            f"All rewards are equal ({now['reward/mean']:.3f}) {over}, where they have been {best:.3f} in the mean: "
            "there is nothing left to learn from. Lower the learning rate, or raise method.kl_weight."
        )
    long = alarms.most_growth * first["length"]
    if all(point["length"] > long and point["unfinished"] > 0.5 for point in last):
        yield (
            f"Answers grow without end: {now['length']:.0f} tokens {over}, {first['length']:.0f} at first, and "
            f"{now['unfinished']:.0%} do not end. Set unfinished_reward to less than what a bad answer gets, or check "
            "whether the reward likes length."
        )
    if all(point["reward/mean"] < first["reward/mean"] - first["reward/deviation"] for point in last):
        yield (
            f"The reward has fallen to {now['reward/mean']:.3f} {over}, from {first['reward/mean']:.3f} at first. "
            "Lower the learning rate, or take fewer epochs."
        )
    late = len(points) >= _CRITIC_LEARNS + alarms.patience
    if late and all(point.get("critic/explained_variance", 0.0) < alarms.least_explained_variance for point in last):
        yield (
            f"The critic explains {now['critic/explained_variance']:.2f} of the returns' variance {over}, less than a "
            "constant would. Raise method.value_rate, or begin it as the reward model (method.critic)."
        )
    yield from _exploited(points, now)


def _exploited(points: Sequence[Point], now: Point) -> Iterator[str]:
    """Whether a judge that nothing is learnt from likes the answers less and less."""
    judged = [point for point in points if "validation/judge" in point]
    if len(judged) < 3:
        return
    first, *_, last_but_one, last = judged
    worse = max(last_but_one["validation/judge"], last["validation/judge"]) < first["validation/judge"]
    if worse and now["reward/mean"] > first["reward/mean"]:
        yield (
            f"The reward rises ({first['reward/mean']:.3f} to {now['reward/mean']:.3f}) while the judge likes the "
            f"answers less ({first['validation/judge']:.3f} to {last['validation/judge']:.3f}): the reward is being "
            "exploited. Raise method.kl_weight, stop earlier, or train the reward model on such answers."
        )


def _windows(points: Sequence[Point], size: int) -> Iterator[Sequence[Point]]:
    for start in range(max(1, len(points) - size + 1)):
        yield points[start : start + size]
