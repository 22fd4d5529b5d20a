"""GRPO and RLOO: tokens per second and peak memory of `puna reinforce` beside trl's GRPOTrainer and RLOOTrainer.

The same model of random weights, the same prompts, answers of the same length (nothing ends one early, so that both
sides draw and learn from equally many tokens), the same number of answers a step, float32, AdamW, a reference, and a
reward that costs nothing. Time is of whole steps: drawing, scoring, the reference, the update. Tokens are those of the
prompts and of the answers. The other side generates with transformers, as it does by default, and without gradient
checkpointing. Each run is a process of its own; they take turns. Memory is a process's peak, libraries included.

    python benchmarks/rollouts_vs_trl.py [--methods grpo rloo] [--quick] [--json]
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import command_line
from race import add_options, in_own_process, race
from small_models import SHAPES, write_model

SHAPE = "3M, 4k vocabulary"
PROMPTS, SAMPLES, ANSWER, ROW_LENGTH = 4, 8, 64, 256
WARM_UP = 1
"""Steps that are not timed."""
WORDS = "the llama walks over the high plateau while its herd of Lima eats hay and waits for rain in the cold morning"


def prepare(folder: Path) -> None:
    """The model directory that both sides load, and prompts of 96 tokens or so."""
    from puna.runtime.files import write_jsonl

    texts = [f"{number}: {WORDS} {WORDS} {number * 7919}" for number in range(64)]
    write_model(SHAPES[SHAPE], texts, ROW_LENGTH, folder, num_tokens=300)
    write_jsonl(folder / "prompts.jsonl", ({"prompt": [{"role": "user", "content": text}]} for text in texts))


def run_puna(method: str, folder: Path, output: Path, steps: int, device: str) -> float:
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
        f"output={output / 'run'}",
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
        f"train.device={device}",
        "train.tensorboard=false",
        "train.optimizer.learning_rate=1e-5",
        "train.schedule.kind=constant",
        "train.schedule.warmup_steps=0",
    ]
    reinforce(load_config(ReinforceConfig, None, settings))
    points = read_metrics(output / "run" / "metrics.jsonl")[WARM_UP:]
    tokenizer = load_tokenizer(folder / "model")
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    prompt = statistics.mean(len(render_chat(tokenizer, row["prompt"], add_generation_prompt=True).ids) for row in rows)
    seconds = sum(point["speed/draw_and_score_seconds"] + point["speed/learn_seconds"] for point in points)
    assert all(point["length"] == ANSWER for point in points)
    return len(points) * PROMPTS * SAMPLES * (prompt + ANSWER) / seconds


def run_trl(method: str, folder: Path, output: Path, steps: int, device: str) -> float:
    """Tokens per second of trl's trainer from the end of the last step of warm-up on."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    arguments, build = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}[method]
    config = arguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=ANSWER,
        generation_kwargs={"min_new_tokens": ANSWER},
        beta=0.04,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        use_cpu=device == "cpu",
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


def main() -> None:
    parser = command_line(__doc__, "the first method only, once, two steps: under 50 s")
    parser.add_argument("--methods", nargs="*", choices=["grpo", "rloo"], default=["grpo", "rloo"])
    add_options(parser)
    arguments = parser.parse_args()
    if arguments.variant:
        side, method = arguments.variant.split()
        run, steps, device = {"puna": run_puna, "trl": run_trl}[side], WARM_UP + arguments.steps, arguments.device
        with tempfile.TemporaryDirectory() as output:
            in_own_process(lambda: run(method, arguments.folder, Path(output), steps, device), device)
        return
    for method in arguments.methods[:1] if arguments.quick else arguments.methods:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder))
            title = f"{SHAPE}, {PROMPTS} prompts x {SAMPLES} answers of {ANSWER} tokens"
            steps = 5 if arguments.device == "cpu" else 12
            race(__file__, title, [f"puna {method}"], [f"trl {method}"], folder, arguments, steps)


if __name__ == "__main__":
    main()
