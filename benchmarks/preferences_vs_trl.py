"""Reward models and DPO on HH-RLHF: `puna reward` and `puna align` beside trl's RewardTrainer and DPOTrainer.

Speed: the same model of random weights, the same comparisons, rendered to the same tokens, AdamW, gradient clipping,
about as many comparisons a step. A token counts as often as it stands in the comparisons, so a prompt counts for both
answers on both sides, although ours computes it once; padding does not count. Both sides ask the reference model before
training, which is not timed; `trl padded` asks it in each step. The other side gets its best settings: each variant
runs without gradient checkpointing, and the fastest counts (padding-free batches are switched off in
trl 1.16, and batches of like length need a column that its trainers for pairs drop).
Each run is a process of its own. Memory is a process's peak, libraries included.

Quality (--model DIRECTORY, one that has learnt something): accuracy on held-out comparisons after the same number of
steps, learning rate and comparisons a step, for each of --seeds; a seed also divides the comparisons.

    python benchmarks/preferences_vs_trl.py [--model DIRECTORY --seeds 0 1 2] [--device cuda] [--quick] [--json]
"""

import argparse
import json
import random
import statistics
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

from figures import command_line, figure, show
from race import add_options, in_own_process, race, timed_trainer
from small_models import CPU_SHAPES, GPU_SHAPES, SHAPES, write_model

OURS = ("puna fp32", "puna bf16")
THEIRS = {
    "reward": ("trl padded", "trl padded bf16"),
    "dpo": ("trl padded precomputed", "trl padded", "trl padded precomputed bf16"),
}
ROW_LENGTH, ROWS = 512, 8
LEARNING_RATE = {"reward": 1e-4, "dpo": 1e-5}
WARM_UP = 1
"""Steps that are not timed."""
HELD_OUT, QUALITY_STEPS = 200, 100


def prepare(preferences: Path, folder: Path, model: Path, held_out: int, seed: int, most: int | None = None) -> None:
    """Comparisons that fit both sides as messages and as tokens: train.jsonl and held_out.jsonl."""
    from puna.batches.preferences import Preference, read_preferences
    from puna.runtime.files import write_jsonl
    from puna.tokenizer.chat import render_chat
    from puna.tokenizer.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    rows: list[dict[str, Any]] = []
    for each in islice((each for each in read_preferences(preferences) if isinstance(each, Preference)), most):
        chosen, rejected = ([*each.prompt, *answer] for answer in each.answers[:2])
        ids = [render_chat(tokenizer, chat).ids for chat in (chosen, rejected)]
        shared = next((n for n, (one, other) in enumerate(zip(*ids, strict=False)) if one != other), 0)
        if sum(map(len, ids)) - shared + 2 <= ROW_LENGTH:  # what is shared stands once, but for two tokens at most
            messages = {"prompt": each.prompt, "chosen": each.answers[0], "rejected": each.answers[1]}
            rows.append(messages | {"chosen_ids": ids[0], "rejected_ids": ids[1]})
    # Transcripts that begin alike go to the same side, so that nothing held out was half seen.
    openings = sorted({json.dumps(row["prompt"][0]) for row in rows})
    random.Random(seed).shuffle(openings)
    kept_back = set(openings[: round(held_out / len(rows) * len(openings))])
    for name, inside in (("held_out", True), ("train", False)):
        write_jsonl(
            folder / f"{name}.jsonl", [row for row in rows if (json.dumps(row["prompt"][0]) in kept_back) == inside]
        )


def run_puna(
    task: str, model: Path, folder: Path, output: Path, steps: int, device: str, *more: str, rows: int = ROWS
) -> Any:
    """Train as `puna reward` or `puna align` does; gives the manifest's results."""
    from puna.align.config import AlignConfig
    from puna.align.main import main as align
    from puna.align.reward import RewardConfig
    from puna.align.reward import main as reward
    from puna.config import load_config
    from puna.runtime.manifest import Manifest

    settings = [
        f"model={model}",
        f"preferences={folder / 'train.jsonl'}",
        f"output={output}",
        f"train.steps={steps}",
        f"train.batch_rows={rows}",
        f"train.micro_batch_rows={rows}",
        f"train.row_length={ROW_LENGTH}",
        "train.log_every=1",
        "train.tensorboard=false",
        f"train.device={device}",
        f"train.optimizer.learning_rate={LEARNING_RATE[task]}",
        "train.optimizer.weight_decay=0.0",
        "train.optimizer.beta2=0.999",
        "train.schedule.kind=constant",
        "train.schedule.warmup_steps=0",
        *more,
    ]
    if task == "reward":
        reward(load_config(RewardConfig, None, settings))
    else:
        align(load_config(AlignConfig, None, [*settings, "formatting=true"]))
    return Manifest.read(output / "model").results


def puna_speed(task: str, options: list[str], folder: Path, steps: int, device: str) -> float:
    """Tokens per second, as the training's own curve has them, with prompts counted for each answer."""
    from puna.batches.shards import TokenShards
    from puna.train.metrics import read_metrics

    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "run"
        run_puna(
            task,
            folder / "model",
            folder,
            output,
            steps,
            device,
            f"train.precision={'bf16' if 'bf16' in options else 'fp32'}",
            rows=int((folder / "rows_a_step").read_text()),
        )
        curve = read_metrics(output / "metrics.jsonl")[WARM_UP:]
        counted = TokenShards(output / "tokens" / "train").num_tokens / (pairs_and_rows(output)[1] * ROW_LENGTH)
    return counted * statistics.harmonic_mean([point["speed/tokens_per_second"] for point in curve])


def pairs_and_rows(output: Path) -> tuple[int, int]:
    """Comparisons, and rows that they fill, of a training of ours."""
    from puna.batches.preference_rows import PreferenceRows
    from puna.batches.shards import TokenShards

    rows = PreferenceRows(TokenShards(output / "tokens" / "train"), ROW_LENGTH, 0, 0, share_prompts=True)
    return rows.num_groups, rows.rows_per_epoch


def trl_arguments(
    task: str,
    options: list[str],
    folder: Path,
    output: Path,
    model: Path,
    pairs: int,
    steps: int,
    device: str,
    seed: int,
) -> tuple[Any, dict[str, Any]]:
    """A trainer of trl's, and its arguments."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    bf16 = "bf16" in options
    columns = ("chosen_ids", "rejected_ids") if task == "reward" else ("prompt", "chosen", "rejected")
    data = {}
    for name in ("train", "held_out"):
        lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        data[name] = Dataset.from_list([{key: line[key] for key in columns} for line in lines])
    common: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": steps,
        "per_device_train_batch_size": pairs,
        "learning_rate": LEARNING_RATE[task],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "max_length": ROW_LENGTH,
        "bf16": bf16,
        "use_cpu": device == "cpu",
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": seed,
    }
    dtype = torch.bfloat16 if bf16 else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(seed)
    if task == "reward":
        kind, arguments = trl.RewardTrainer, trl.RewardConfig(**common)
        loaded = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=dtype)
        loaded.config.pad_token_id = tokenizer.pad_token_id
    else:
        kind = trl.DPOTrainer
        arguments = trl.DPOConfig(**common, precompute_ref_log_probs="precomputed" in options)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    return kind, {
        "model": loaded,
        "args": arguments,
        "train_dataset": data["train"],
        "eval_dataset": data["held_out"],
        "processing_class": tokenizer,
    }


def trl_speed(task: str, options: list[str], folder: Path, steps: int, device: str) -> float:
    """Tokens per second of a trainer of trl's."""
    pairs = int((folder / "pairs").read_text())
    kind, arguments = trl_arguments(task, options, folder, folder / "trl", folder / "model", pairs, steps, device, 0)
    names = ("chosen_ids", "rejected_ids")

    def tokens_of(example: Any) -> int:
        return sum(len(example[name]) for name in names) + 2 * len(example.get("prompt_ids", []))

    return timed_trainer(kind, device, WARM_UP, tokens_of, **arguments)


def compare_quality(arguments: argparse.Namespace) -> None:
    """Held-out accuracy of both sides."""
    import logging
    import warnings

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    metric = {"reward": "eval_accuracy", "dpo": "eval_rewards/accuracies"}
    for task in arguments.tasks:
        ours, theirs = [], []
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                prepare(arguments.preferences, folder, arguments.model, HELD_OUT, seed)
                held_out = [f"held_out_preferences={folder / 'held_out.jsonl'}", "train.validation_rows=100000"]
                steps = (arguments.model, folder, folder / "ours", arguments.quality_steps, arguments.device)
                found = run_puna(task, *steps, *held_out, f"train.seed={seed}")
                ours.append(found["validation/accuracy"])
                groups, rows = pairs_and_rows(folder / "ours")
                pairs = round(ROWS * groups / rows)
                options = ["padded", "precomputed"]
                kind, settings = trl_arguments(
                    task,
                    options,
                    folder,
                    folder / "theirs",
                    arguments.model,
                    pairs,
                    arguments.quality_steps,
                    arguments.device,
                    seed,
                )
                trainer = kind(**settings)
                trainer.train()
                theirs.append(trainer.evaluate()[metric[task]])
        spread = {
            name: round(statistics.stdev(values), 4) if len(values) > 1 else None
            for name, values in (("deviation_ours", ours), ("deviation_theirs", theirs))
        }
        title = f"{task} on HH-RLHF, held-out accuracy after {arguments.quality_steps} steps, {len(ours)} seeds"
        means = statistics.fmean(ours), statistics.fmean(theirs)
        show(figure(title, *means, "share of comparisons", **spread), arguments.json)


def main() -> None:
    parser = command_line(__doc__, "float32 and the other side's usual best, fewer rows: under 50 s")
    preferences = Path("../shared/data/preference/hh_rlhf_harmless_base.jsonl.gz")
    parser.add_argument("--preferences", type=Path, default=preferences, help="in any form that `puna align` reads")
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), help="absent: the smallest of the device's")
    parser.add_argument("--tasks", nargs="*", choices=list(THEIRS), default=list(THEIRS))
    parser.add_argument("--model", type=Path, help="compare quality, from this model directory on, and not speed")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--quality-steps", type=int, default=QUALITY_STEPS)
    add_options(parser)
    arguments = parser.parse_args()
    if arguments.variant:
        task, library, *options = arguments.variant.split()
        run = {"puna": puna_speed, "trl": trl_speed}[library]
        steps, device = WARM_UP + arguments.steps, arguments.device
        in_own_process(lambda: run(task, options, arguments.folder, steps, device), device)
        return
    if arguments.model:
        compare_quality(arguments)
        return
    for shape in arguments.shapes or (CPU_SHAPES if arguments.device == "cpu" else GPU_SHAPES)[:1]:
        with tempfile.TemporaryDirectory() as folder:
            compare_speed(arguments, shape, Path(folder))


def compare_speed(arguments: argparse.Namespace, shape: str, folder: Path) -> None:
    """Both tasks with one shape of model."""
    from puna.align.rows import open_rows
    from puna.batches.preferences import Preference, read_preferences
    from puna.tokenizer.load import load_tokenizer

    texts = (
        "\n".join(str(message["content"]) for message in (*each.prompt, *each.answers[0]))
        for each in read_preferences(arguments.preferences)
        if isinstance(each, Preference)
    )
    write_model(SHAPES[shape], texts, ROW_LENGTH, folder)
    on_cpu, quick = arguments.device == "cpu", arguments.quick
    most, rows_a_step = (25, ROWS // 4) if quick else (110 if on_cpu else 500, ROWS)
    prepare(arguments.preferences, folder, folder / "model", most // 6, 0, most=most)
    rows = open_rows(
        folder / "train.jsonl", folder / "rows", tokenizer=load_tokenizer(folder / "model"), row_length=ROW_LENGTH,
        seed=0, judged=False, formatting=True, leave_out=False, share_prompts=True,
    )  # fmt: skip
    (folder / "rows_a_step").write_text(str(rows_a_step))
    (folder / "pairs").write_text(str(round(rows_a_step * rows.num_groups / rows.rows_per_epoch)))
    for task in arguments.tasks:
        ours, theirs = ([f"{task} {name}" for name in names] for names in (OURS, THEIRS[task]))
        if quick:
            ours, theirs = ours[:1], theirs[:1]
        race(__file__, f"{task}, {shape}", ours, theirs, str(folder), arguments, steps=3 if on_cpu else 12)


if __name__ == "__main__":
    main()
