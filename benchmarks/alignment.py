"""What rejection sampling, DPO, PPO and GRPO make of a small assistant, and what they pay for it in divergence.

    python benchmarks/alignment.py --model runs/trunk/pretrain/model --preferences pairs.json --write docs/alignment.md

For each seed the comparisons are divided anew: some to learn from, some to teach a judge, some held out. An assistant
learns to give both answers of every comparison; then each method teaches it which is better, by the settings of
benchmarks/alignment.toml, and both answer the held-out prompts. Answers are judged by a reward model that has seen
other comparisons than the one that taught, and by a linear classifier of words, which shares nothing with the models.
Everything made is kept below --output, so that an interrupted run goes on. `--quick` takes one seed, few steps, and
says nothing about quality.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from figures import command_line, figure, show
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from puna.batches.preferences import Preference, read_preferences
from puna.config import read_toml
from puna.evaluate.statistics.intervals import Estimate, estimate
from puna.pipeline.run import run_recipe
from puna.runtime.files import atomic_path, read_json, read_jsonl, write_jsonl, write_text

RECIPE = Path(__file__).with_suffix(".toml")
METHODS = {"rejection": "rejection sampling", "dpo": "DPO", "ppo": "PPO", "grpo": "GRPO"}
ANSWERS = ("answer", "baseline_answer")
NUM_HELD_OUT = 200
JUDGED_SHARE = 0.4
"""Of the other comparisons, those that teach the judge."""


def divide(preferences: Sequence[Preference], seed: int, folder: Path) -> None:
    """Write one seed's files."""
    mixed = list(preferences)
    random.Random(seed).shuffle(mixed)
    held_out, others = mixed[:NUM_HELD_OUT], mixed[NUM_HELD_OUT:]
    at = round(JUDGED_SHARE * len(others))
    parts = {"held_out": held_out, "judge": others[:at], "preferences": others[at:]}
    with atomic_path(folder) as place:
        place.mkdir(parents=True)
        for name, part in parts.items():
            rows = ({"prompt": each.prompt, "chosen": each.answers[0], "rejected": each.answers[1]} for each in part)
            write_jsonl(place / f"{name}.jsonl", rows)
        answered = ({"messages": [*each.prompt, *answer]} for each in others for answer in each.answers)
        write_jsonl(place / "conversations.jsonl", answered)


def word_judge(file: Path) -> Pipeline:
    """Tells better from worse answers by their words and pairs of words."""
    rows = list(read_jsonl(file))
    texts = [row[side][0]["content"] for side in ("chosen", "rejected") for row in rows]
    judge = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10))
    return judge.fit(texts, np.repeat([1, 0], len(rows)))


def wins(ours: Sequence[float], theirs: Sequence[float]) -> np.ndarray:
    """1 for each that is greater, half for each that is equal."""
    first, second = np.asarray(ours), np.asarray(theirs)
    return (first > second) + (first == second) / 2


def run_seed(arguments: Any, preferences: Sequence[Preference], seed: int) -> dict[str, Any]:
    """Train and measure everything once."""
    root = arguments.output / f"seed-{seed}"
    data = root / "data"
    if not data.exists():
        divide(preferences, seed, data)
    recipe = root / "recipe.toml"
    text = RECIPE.read_text().replace("DATA", str(data)).replace("MODEL", str(arguments.model))
    write_text(recipe, text)
    settings = [f'output="{root / "run"}"']
    for name, table in read_toml(recipe).items():
        if isinstance(table, dict) and "train" in table:
            settings.append(f"{name}.train.seed={seed}")
            if arguments.quick:
                steps = 8 if name == "ppo" else 2
                settings += [f"{name}.train.steps={steps}", f"{name}.train.schedule.warmup_steps=1"]
    if arguments.quick:
        settings += [f"{name}_rate.max_prompts=8" for name in METHODS] + ["samples.max_prompts=8"]
    run_recipe(recipe, settings)
    judge = word_judge(data / "judge.jsonl")
    held_out = list(read_jsonl(data / "held_out.jsonl"))
    better, worse = ([row[side][0]["content"] for row in held_out] for side in ("chosen", "rejected"))
    found: dict[str, Any] = {
        "word_judge": float(wins(judge.decision_function(better), judge.decision_function(worse)).mean()),
        **{name: read_json(root / "run" / name / "model" / "puna.json")["results"] for name in ("reward", "judge")},
    }
    for name in METHODS:
        folder = root / "run" / f"{name}_rate"
        rows = list(read_jsonl(folder / "comparisons.jsonl"))
        found[name] = {
            "results": read_json(folder / "puna.json")["results"],
            "prompts": [json.dumps(row["prompt"]) for row in rows],
            "judge": wins([row["reward"] for row in rows], [row["baseline_reward"] for row in rows]),
            "words": wins(
                *(judge.decision_function([row[side] for row in rows]) for side in ("answer", "baseline_answer"))
            ),
            "gain": np.subtract([row["reward"] for row in rows], [row["baseline_reward"] for row in rows]),
        }
    return found


def pooled(seeds: Sequence[dict[str, Any]], method: str, column: str) -> Estimate:
    """Of all seeds together; the same prompt in several is one cluster."""
    parts = [found[method] for found in seeds]
    return estimate(
        np.concatenate([part[column] for part in parts]), [prompt for part in parts for prompt in part["prompts"]]
    )


def _share(found: Estimate) -> str:
    return f"{found.mean:.1%} ({found.interval.low:.1%} to {found.interval.high:.1%})"


def table(seeds: Sequence[dict[str, Any]], names: Sequence[int]) -> str:
    """The Markdown table of docs/alignment.md."""
    lines = [
        "| method | wins by the judge | wins by words | " + " | ".join(f"seed {name}" for name in names)
        + " | divergence, nats an answer | tokens an answer |",
        "| --- | --- | --- | " + " | ".join("---" for _ in names) + " | --- | --- |",
    ]  # fmt: skip
    for method, title in METHODS.items():
        own = [found[method]["results"] for found in seeds]
        cells = [
            title,
            _share(pooled(seeds, method, "judge")),
            _share(pooled(seeds, method, "words")),
            *(f"{found[method]['judge'].mean():.1%} / {found[method]['words'].mean():.1%}" for found in seeds),
            ", ".join(f"{results['divergence_nats']:.1f}" for results in own),
            ", ".join(f"{results['mean_tokens']:.0f}" for results in own),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    before = ", ".join(f"{found['dpo']['results']['baseline_mean_tokens']:.0f}" for found in seeds)
    lines += ["", f"Before, answers had {before} tokens."]
    for name, title in (("reward", "the reward model that taught"), ("judge", "the judge")):
        values = ", ".join(f"{found[name]['validation/accuracy']:.1%}" for found in seeds)
        lines.append(f"Held-out comparisons that {title} gets right: {values}.")
    values = ", ".join(f"{found['word_judge']:.1%}" for found in seeds)
    lines.append(f"Held-out comparisons that the classifier of words gets right: {values}.")
    return "\n".join(lines)


def plot(seeds: Sequence[dict[str, Any]], path: Path) -> None:
    """Wins over divergence, each seed a point."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure_, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for column, title, axis in zip(("judge", "words"), ("the judge", "words"), axes, strict=True):
        for marker, (method, label) in zip("os^D", METHODS.items(), strict=True):
            x = [found[method]["results"]["divergence_nats"] for found in seeds]
            y = [100 * found[method][column].mean() for found in seeds]
            axis.plot(x, y, marker, label=label)
        axis.axhline(50, color="grey", linewidth=0.8)
        axis.set(xlabel="divergence from the assistant, nats an answer", title=f"by {title}")
    axes[0].set_ylabel("answers better than before, %")
    axes[0].legend()
    with atomic_path(path) as place:
        figure_.savefig(place, format="svg")
    plt.close(figure_)


def main() -> None:
    parser = command_line(__doc__, "one seed and few steps, under a minute; nothing is written to --write")
    parser.add_argument("--model", type=Path, required=True, help="a small base model, as recipes/trunk.toml makes it")
    parser.add_argument("--preferences", type=Path, required=True, help="a file of pairs")
    parser.add_argument("--output", type=Path, default=Path("runs/alignment"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--write", type=Path, help="a page: the table goes between its marks, the plot beside it")
    arguments = parser.parse_args()
    names = arguments.seeds[:1] if arguments.quick else arguments.seeds
    preferences = [each for each in read_preferences(arguments.preferences) if isinstance(each, Preference)]
    seeds = [run_seed(arguments, preferences, seed) for seed in names]
    for method in METHODS:
        for column, unit in (("judge", "win rate"), ("words", "win rate")):
            found = pooled(seeds, method, column)
            more = {"low": found.interval.low, "high": found.interval.high}
            show(figure(f"{METHODS[method]}, by {column}", found.mean, 1 - found.mean, unit, **more), arguments.json)
    if arguments.write is not None and not arguments.quick:
        start, end = "<!-- results -->", "<!-- end of results -->"
        page = arguments.write.read_text()
        before, _, rest = page.partition(start)
        _, _, after = rest.partition(end)
        write_text(arguments.write, f"{before}{start}\n\n{table(seeds, names)}\n\n{end}{after}")
        plot(seeds, arguments.write.with_name("alignment.svg"))


if __name__ == "__main__":
    main()
