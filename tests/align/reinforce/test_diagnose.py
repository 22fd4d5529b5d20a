"""What goes wrong is named, after as many rollouts as asked for; what goes right is left alone."""

from collections.abc import Callable

import pytest

from puna.align.reinforce.config import AlarmConfig
from puna.align.reinforce.diagnose import diagnose, is_healthy

ALARMS = AlarmConfig(patience=3)


def run(count: int, **curves: Callable[[int], float]) -> list[dict[str, float]]:
    """Rollouts that go well but for some curves."""
    usual: dict[str, Callable[[int], float]] = {
        "reward/mean": lambda n: 0.1 + 0.02 * n,
        "reward/deviation": lambda n: 0.3,
        "entropy": lambda n: 1.0 - 0.01 * n,
        "kl/token": lambda n: 0.001 * n,
        "length": lambda n: 20.0,
        "unfinished": lambda n: 0.0,
    }
    return [{"step": float(n), **{name: curve(n) for name, curve in (usual | curves).items()}} for n in range(count)]


def since(start: int, wrong: float, right: float) -> Callable[[int], float]:
    return lambda n: wrong if n >= start else right


WRONG: dict[str, tuple[dict[str, Callable[[int], float]], str]] = {
    "divergence": ({"kl/token": since(20, 3.0, 0.1)}, "runs away from its reference: 3.00 nats"),
    "entropy": ({"entropy": since(20, 0.001, 1.0), "reward/mean": since(20, 0.2, 0.4)}, "Entropy has collapsed"),
    "equal": ({"reward/deviation": since(20, 0.0, 0.3), "reward/mean": since(20, 0.0, 0.4)}, "All rewards are equal"),
    "length": ({"length": since(20, 70.0, 20.0), "unfinished": since(20, 0.9, 0.1)}, "Answers grow without end"),
    "reward": ({"reward/mean": since(20, -0.5, 0.2)}, "reward has fallen to -0.500"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str) -> None:
    curves, message = WRONG[name]
    assert message in diagnose(run(23, **curves), ALARMS)
    assert not diagnose(run(22, **curves), ALARMS), "two rollouts are not yet three"
    assert not is_healthy(run(21, **curves), ALARMS), "but the model is not one to keep"
    assert is_healthy(run(20, **curves), ALARMS)


def test_right() -> None:
    for count in range(1, 40):
        assert not diagnose(run(count), ALARMS)
        assert is_healthy(run(count), ALARMS)


def test_done_is_not_wrong() -> None:
    """Everything right, so that all rewards are equal, and the model sure of it."""
    curves = {
        "reward/mean": lambda n: min(1.0, 0.1 + 0.05 * n),
        "reward/deviation": lambda n: 0.0 if n >= 18 else 0.3,
        "entropy": lambda n: 0.0 if n >= 18 else 0.5,
    }
    assert not diagnose(run(30, **curves), ALARMS)


def test_critic_has_time_to_learn() -> None:
    bad = {"critic/explained_variance": lambda n: -0.5}
    assert not diagnose(run(22, **bad), ALARMS)
    assert "critic explains -0.50" in diagnose(run(23, **bad), ALARMS)


def test_exploited_reward() -> None:
    points = run(30)
    for place, judged in ((2, 1.0), (20, 0.8), (28, 0.7)):
        points[place]["validation/judge"] = judged
    assert "likes the answers less (1.000 to 0.700)" in diagnose(points, ALARMS)
    points[28]["validation/judge"] = 1.1
    assert not diagnose(points, ALARMS)
