"""What rounds came to, a line for each."""

import re
from collections.abc import Mapping

from puna.runtime.manifest import Manifest

_COLUMNS: dict[str, dict[str, str]] = {
    "simulate": {"num_preferences": "preferences"},
    "collect": {"num_preferences": "preferences"},
    "reward": {"validation/accuracy": "held-out accuracy"},
    "reject": {"num_kept": "answers kept", "mean_reward_kept": "their reward"},
    "align": {"validation/accuracy": "held-out accuracy"},
    "winrate": {
        "greedy_win_rate": "win rate, greedy",
        "free_win_rate": "win rate, temperature 1",
        "free_reward_gain": "reward gained",
        "divergence_nats": "divergence, nats an answer",
        "mean_tokens": "tokens an answer",
    },
}
"""Stage -> result -> what the column is called."""


def round_lines(manifests: Mapping[str, Manifest]) -> tuple[list[str], list[list[str]]]:
    """The columns, and one line for each round of a run; nothing where there are no rounds.

    Args:
        manifests: by the stage's name within the run, such as "round2/dpo".
    """
    rounds: dict[str, dict[str, str]] = {}
    for name, manifest in manifests.items():
        found = re.fullmatch(r"round(\d+)/(.+)", name)
        if found is None:
            continue
        line = rounds.setdefault(found[1], {})
        for key, title in _COLUMNS.get(manifest.stage, {}).items():
            if key in manifest.results:
                line[f"{found[2]}: {title}"] = _text(manifest.results, key)
    columns = list(dict.fromkeys(column for line in rounds.values() for column in line))
    return columns, [[number, *(line.get(column, "") for column in columns)] for number, line in rounds.items()]


def _text(results: Mapping[str, float], key: str) -> str:
    value = results[key]
    text = f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
    if f"{key}_low" in results:
        return f"{text} [{results[f'{key}_low']:.3f}, {results[f'{key}_high']:.3f}]"
    if f"{key}_error" in results:
        return f"{text} ± {results[f'{key}_error']:.3f}"
    return text
