"""GRPO and RLOO: tokens per second and peak memory of `puna reinforce` beside trl's GRPOTrainer and RLOOTrainer.

The same model of random weights, the same prompts, answers of the same length (nothing ends one early, so that both
sides draw and learn from equally many tokens), the same number of answers a step, float32, AdamW, a reference, and a
reward that costs nothing. Time is of whole steps: drawing, scoring, the reference, the update. Tokens are those of the
prompts and of the answers. The other side generates with transformers, as it does by default, and without gradient
checkpointing. Each run is a process of its own; they take turns. Memory is a process's peak, libraries included.

    python benchmarks/rollouts_vs_trl.py [--methods grpo rloo] [--quick] [--json]
"""

import argparse
import contextlib
import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from figures import command_line, figure, show

SHAPE = {
    "vocab_size": 4096,
    "dim": 192,
    "num_layers": 4,
    "num_heads": 3,
    "num_kv_heads": 3,
    "head_dim": 64,
    "hidden_dim": 512,
}
PROMPTS, SAMPLES, ANSWER, ROW_LENGTH = 4, 8, 64, 256
WARM_UP = 1
"""Steps that are not timed."""
WORDS = "the llama walks over the high plateau while its herd of Lima eats hay and waits for rain in the cold morning"


def prepare(folder: Path) -> None:
    """The model directory that both sides load, and prompts of 96 tokens or so."""
    import torch

    from puna.model.config import LlamaConfig
    from puna.model.initialize import initialize
    from puna.model.transformer import Transformer
    from puna.runtime.files import write_jsonl
    from puna.tokenizer.chat_template import builtin_template
    from puna.tokenizer.load import load_tokenizer
    from puna.tokenizer.train import TokenizerConfig
    from puna.tokenizer.train import main as train_tokenizer
    from puna.weights.load import save_model

    texts = [f"{number}: {WORDS} {WORDS} {number * 7919}" for number in range(64)]
    write_jsonl(folder / "texts.jsonl", ({"id": str(n), "text": text} for n, text in enumerate(texts)))
    train_tokenizer(TokenizerConfig(documents=folder / "texts.jsonl", output=folder / "tokenizer", vocab_size=300))
    tokenizer = load_tokenizer(folder / "tokenizer")
    tokenizer.chat_template = builtin_template("llama3")
    model = Transformer(LlamaConfig(**SHAPE, context_length=ROW_LENGTH))
    initialize(model, 0)
    save_model(model, folder / "model", tokenizer=tokenizer, dtype=torch.float32)
    write_jsonl(folder / "prompts.jsonl", ({"prompt": [{"role": "user", "content": text}]} for text in texts))


def run_puna(method: str, folder: Path, steps: int) -> float:
    """Tokens per second of `puna reinforce`, by the clock around its rollouts."""
    from puna.align.reinforce.config import ReinforceConfig
    from puna.align.reinforce.main import main as reinforce
    from puna.config import load_config
    from puna.tokenizer.chat import render_chat
    from puna.tokenizer.load import load_tokenizer
    from puna.train.metrics import read_metrics

    settings = [
        f"model={folder / 'model'}",
        f"prompts={folder / 'prompts.jsonl'}",
        f"output={folder / f'puna-{method}'}",
        'rewards=[{kind = "regex", pattern = "a"}]',
        f"prompts_per_rollout={PROMPTS}",
        f"sampling.max_tokens={ANSWER}",
        "sampling.ignore_eos=true",
        f"rows_at_once={PROMPTS * SAMPLES}",
        f"method.kind={method}",
        f"method.samples={SAMPLES}",
        "method.kl_weight=0.04",
        f"train.steps={steps}",
        f"train.batch_rows={PROMPTS * SAMPLES}",
        f"train.micro_batch_rows={PROMPTS * SAMPLES}",
        f"train.row_length={ROW_LENGTH}",
        "train.device=cpu",
        "train.tensorboard=false",
        "train.optimizer.learning_rate=1e-5",
        "train.schedule.kind=constant",
        "train.schedule.warmup_steps=0",
    ]
    reinforce(load_config(ReinforceConfig, None, settings))
    points = read_metrics(folder / f"puna-{method}" / "metrics.jsonl")[WARM_UP:]
    tokenizer = load_tokenizer(folder / "model")
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    prompt = statistics.mean(len(render_chat(tokenizer, row["prompt"], add_generation_prompt=True).ids) for row in rows)
    seconds = sum(point["speed/draw_and_score_seconds"] + point["speed/learn_seconds"] for point in points)
    assert all(point["length"] == ANSWER for point in points)
    return len(points) * PROMPTS * SAMPLES * (prompt + ANSWER) / seconds


def run_trl(method: str, folder: Path, steps: int) -> float:
    """Tokens per second of trl's trainer from the end of the last step of warm-up on."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    arguments, build = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}[method]
    config = arguments(
        output_dir=str(folder / f"trl-{method}"),
        max_steps=steps,
        per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=ANSWER,
        generation_kwargs={"min_new_tokens": ANSWER},
        beta=0.04,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )

    class Clock(TrainerCallback):  # type: ignore[misc]
        ends: list[float] = []  # noqa: RUF012

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.ends.append(time.perf_counter())

    tokens: list[int] = []

    def reward(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **more: Any) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        return [float("a" in completion[0]["content"]) for completion in completions]

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    trainer = build(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    assert set(tokens) == {PROMPTS * SAMPLES * ANSWER}, f"answers of other lengths: {tokens}"
    prompt = statistics.mean(
        len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]) for row in rows
    )
    seconds = Clock.ends[-1] - Clock.ends[WARM_UP - 1]
    return (steps - WARM_UP) * PROMPTS * SAMPLES * (prompt + ANSWER) / seconds


def measure(side: str, method: str, folder: Path, steps: int) -> dict[str, float]:
    """One side in this process."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    speed = {"puna": run_puna, "trl": run_trl}[side](method, folder, WARM_UP + steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
    return {"speed": speed, "megabytes": peak}


def compare(arguments: argparse.Namespace, method: str) -> None:
    """Both sides in turn."""
    rounds, steps = (1, 2) if arguments.quick else (3, 8)
    found: dict[str, list[dict[str, float]]] = {"puna": [], "trl": []}
    for _ in range(rounds):
        for side, runs in found.items():
            with tempfile.TemporaryDirectory() as folder:
                prepare(Path(folder))
                command = [sys.executable, __file__, "--side", side, "--folder", folder, "--steps", str(steps)]
                done = subprocess.run([*command, "--methods", method], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{side} failed: {done.stderr[-2000:]}")
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    ours, theirs = found.values()
    ratio = statistics.median(one["speed"] / other["speed"] for one, other in zip(ours, theirs, strict=True))
    speeds = [statistics.median(run["speed"] for run in side) for side in (ours, theirs)]
    title = f"{method.upper()}, 3M, {PROMPTS} prompts x {SAMPLES} answers of {ANSWER} tokens: puna / trl"
    show(figure(title, *speeds, "tokens/s", ratio=ratio), arguments.json)
    peaks = [max(run["megabytes"] for run in side) for side in (ours, theirs)]
    show(figure(f"{title}, peak memory", *peaks, "MB", less_is_better=True), arguments.json)


def main() -> None:
    parser = command_line(__doc__, "GRPO only, once, two steps: under 50 s")
    parser.add_argument("--methods", nargs="*", choices=["grpo", "rloo"], default=["grpo", "rloo"])
    for name, kind in (("--side", str), ("--folder", Path), ("--steps", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        # What training says goes to the other stream; the figures are all that is read.
        with contextlib.redirect_stdout(sys.stderr):
            found = measure(arguments.side, arguments.methods[0], arguments.folder, arguments.steps)
        print(json.dumps(found))
        return
    for method in arguments.methods[:1] if arguments.quick else arguments.methods:
        compare(arguments, method)


if __name__ == "__main__":
    main()
