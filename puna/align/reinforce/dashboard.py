"""`dashboard.html`: the curves of a run, its last answers, and what went wrong, if anything did."""

import time
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from puna.align.reinforce.config import ReinforceConfig
from puna.align.reinforce.diagnose import Point
from puna.config import render_values, to_plain
from puna.runtime.errors import InputError
from puna.runtime.page import new_figure, to_svg, write_page
from puna.runtime.progress import say

_CURVES = (
    ("Reward", "", (("reward/mean", "drawn answers"), ("validation/reward", "held out, likeliest answers"))),
    ("Divergence from the reference", "nats per token", (("kl/token", "k3 estimate"),)),
    ("Entropy", "nats per token", (("entropy", ""),)),
    ("Length of answers", "tokens", (("length", "drawn"), ("validation/length", "held out"))),
    ("Unfinished answers", "share", (("unfinished", "drawn"), ("validation/unfinished", "held out"))),
    ("Prompts whose answers differ in reward", "share", (("reward/mixed_prompts", ""),)),
    ("Clipped", "share", (("train/clip_fraction", ""),)),
    ("Moved in a rollout", "nats per token", (("train/policy_divergence", "k3 estimate"),)),
    ("Critic: explained variance", "", (("critic/explained_variance", ""),)),
    ("Critic: loss", "", (("train/value_loss", ""),)),
    ("Weight of the divergence", "", (("kl/weight", ""),)),
    ("Judge on held-out answers", "", (("validation/judge", ""),)),
    ("Norm of the gradient", "", (("train/grad_norm", ""),)),
)
"""Title, unit, and curves with their labels."""
_SHOWN = 12
"""Answers."""


def write_dashboard(
    config: ReinforceConfig, points: Sequence[Point], rewarded: Sequence[dict[str, Any]], complaint: str
) -> None:
    """Write output/dashboard.html; without plots where matplotlib is absent, which is said.

    Args:
        points: of all rollouts.
        rewarded: the answers of the last rollout.
        complaint: what went wrong, or empty.
    """
    figures: list[dict[str, str]] = []
    try:
        for title, unit, curves in _CURVES:
            figures += _figure(title, unit, curves, points)
    except InputError as error:
        say(f"The dashboard has no plots. {error}")
    different = {(row["id"], row["answer"]): row for row in rewarded}
    by_reward = sorted(different.values(), key=lambda row: -float(row["reward"]))
    half = _SHOWN // 2
    shown = by_reward if len(by_reward) <= _SHOWN else by_reward[:half] + by_reward[-half:]
    last = {name: value for point in points[-2:] for name, value in point.items()}
    write_page(
        config.output / "dashboard.html",
        files("puna.align.reinforce").joinpath("dashboard.html.jinja").read_text(encoding="utf-8"),
        title=f"{config.method.kind.upper()}: {config.output.name}",
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        complaint=complaint,
        step=points[-1]["step"],
        steps=config.train.steps,
        numbers=[(name, f"{value:.4g}") for name, value in sorted(last.items()) if name != "step"],
        figures=figures,
        answers=[row | {"question": row["prompt"][-1]["content"]} for row in shown],
        recipe=render_values(_without_empty(to_plain(config))),
    )


def _without_empty(values: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null."""
    return {
        name: _without_empty(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value is not None
    }


def _figure(title: str, unit: str, curves: Sequence[tuple[str, str]], points: Sequence[Point]) -> list[dict[str, str]]:
    """The plot of some curves; none where nothing was measured."""
    measured = {label: [(point["step"], point[name]) for point in points if name in point] for name, label in curves}
    measured = {label: curve for label, curve in measured.items() if curve}
    if not measured:
        return []
    figure = new_figure(4.5, 2.6)
    axes = figure.subplots()
    for label, curve in measured.items():
        axes.plot(*zip(*curve, strict=True), label=label, marker="." if len(curve) < 30 else "")
    axes.set(xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    if any(measured):
        axes.legend(fontsize=8)
    figure.tight_layout()
    return [{"title": title, "svg": to_svg(figure)}]
