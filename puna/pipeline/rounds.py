"""What rounds came to, side by side."""

import re
from collections.abc import Mapping

from puna.runtime.manifest import Manifest

_FIGURES: dict[str, dict[str, str]] = {
    "simulate": {"num_preferences": "preferences"},
    "collect": {"num_preferences": "preferences"},
    "reward": {"validation/accuracy": "held-out accuracy"},
    "reject": {"num_kept": "answers kept", "mean_reward_kept": "their reward"},
    "align": {"validation/accuracy": "held-out accuracy"},
    "winrate": {
        "greedy_win_rate": "win rate, greedy",
        "free_win_rate": "win rate, temperature 1",
        "free_win_rate_equal_length": "at equal length",
        "free_reward_gain": "reward gained",
        "divergence_nats": "divergence, nats an answer",
        "mean_tokens": "tokens an answer",
    },
}
"""Stage -> result -> what it is called."""


def round_lines(manifests: Mapping[str, Manifest]) -> tuple[list[str], list[list[str]]]:
    """The rounds of a run, and a line for each figure: its stage, what it is, and its value in each round.

    Args:
        manifests: by the stage's name within the run, such as "round2/dpo".
    """
    rounds: list[str] = []
    figures: dict[tuple[str, str], dict[str, str]] = {}
    for name, manifest in manifests.items():
        found = re.fullmatch(r"round(\d+)/(.+)", name)
        if found is None:
            continue
        number, stage = found.groups()
        rounds += [number] if number not in rounds else []
        for key, title in _FIGURES.get(manifest.stage, {}).items():
            if key in manifest.results:
                figures.setdefault((stage, title), {})[number] = _text(manifest.results, key)
    return rounds, [[*names, *(values.get(number, "") for number in rounds)] for names, values in figures.items()]


def _text(results: Mapping[str, float], key: str) -> str:
    value = results[key]
    text = f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
    if f"{key}_low" in results:
        return f"{text} [{results[f'{key}_low']:.3f}, {results[f'{key}_high']:.3f}]"
    if f"{key}_error" in results:
        return f"{text} ± {results[f'{key}_error']:.3f}"
    return text
