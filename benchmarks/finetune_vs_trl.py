"""Instruction tuning with LoRA: tokens per second and peak memory of `puna finetune` beside trl's SFTTrainer with peft.

The same model of random weights, the same conversations rendered to the same tokens, the same adapters (rank 16 on all
linear maps of the layers), AdamW, gradient clipping, about as many tokens a step. Padding does not count as tokens.
The other side gets its best settings: each variant in THEIRS is timed without gradient checkpointing, and the fastest
counts: padded, padded in batches of like length, without padding, packed (`bfd`: conversations stay apart), and
`wrapped`, whose rows mix conversations, which ours never does. Each run is a process of its own; the fastest of each
side then runs twice more, in turn. Memory is a process's peak, libraries included.

    python benchmarks/finetune_vs_trl.py [--conversations FILE] [--device cuda] [--quick] [--json]
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

SHAPES: dict[str, dict[str, int]] = {
    "3M, 4k vocabulary": {
        "vocab_size": 4096,
        "dim": 192,
        "num_layers": 4,
        "num_heads": 3,
        "num_kv_heads": 3,
        "head_dim": 64,
        "hidden_dim": 512,
    },
    "15M, 8k vocabulary": {
        "vocab_size": 8192,
        "dim": 384,
        "num_layers": 6,
        "num_heads": 6,
        "num_kv_heads": 6,
        "head_dim": 64,
        "hidden_dim": 1024,
    },
    "1B, 8k vocabulary": {
        "vocab_size": 8192,
        "dim": 2048,
        "num_layers": 16,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 64,
        "hidden_dim": 8192,
    },
}
CPU_SHAPES, GPU_SHAPES = ("3M, 4k vocabulary", "15M, 8k vocabulary"), ("1B, 8k vocabulary",)
OURS = ("puna fp32", "puna fp32 compiled", "puna bf16")
THEIRS = (
    "trl padded",
    "trl padded by-length",
    "trl padding-free",
    "trl packed",
    "trl wrapped",
    "trl wrapped compiled",
    "trl padded by-length bf16",
)
ROW_LENGTH, ROWS = 512, 8
RANK, LEARNING_RATE = 16, 2e-4
WARM_UP = 3
"""Steps that are not timed."""


def prepare(shape: dict[str, int], conversations: Path, folder: Path) -> None:
    """The model directory that both sides load, and the conversations as tokens."""
    import torch

    from puna.batches.conversations import read_conversations
    from puna.model.config import LlamaConfig
    from puna.model.initialize import initialize
    from puna.model.transformer import Transformer
    from puna.runtime.files import write_jsonl
    from puna.tokenizer.chat import render_chat
    from puna.tokenizer.chat_template import builtin_template
    from puna.tokenizer.load import load_tokenizer
    from puna.tokenizer.train import TokenizerConfig
    from puna.tokenizer.train import main as train_tokenizer
    from puna.weights.load import save_model

    chats = [conversation.messages for conversation in read_conversations(conversations)]
    texts = (
        {"id": str(number), "text": "\n".join(str(m["content"]) for m in chat)} for number, chat in enumerate(chats)
    )
    write_jsonl(folder / "texts.jsonl", texts)
    settings = {"documents": folder / "texts.jsonl", "output": folder / "tokenizer", "vocab_size": shape["vocab_size"]}
    train_tokenizer(TokenizerConfig(**settings))
    tokenizer = load_tokenizer(folder / "tokenizer")
    tokenizer.chat_template = builtin_template("llama3")
    model = Transformer(LlamaConfig(**shape, context_length=ROW_LENGTH))
    initialize(model, 0)
    save_model(model, folder / "model", tokenizer=tokenizer, dtype=torch.float32)
    rendered = ((chat, render_chat(tokenizer, chat)) for chat in chats)
    kept = [(chat, each) for chat, each in rendered if len(each.ids) <= ROW_LENGTH]
    write_jsonl(folder / "conversations.jsonl", ({"messages": chat} for chat, _ in kept))
    write_jsonl(folder / "tokens.jsonl", ({"input_ids": each.ids, "completion_mask": each.mask} for _, each in kept))


def run_puna(folder: Path, options: list[str], steps: int, device: str) -> float:
    """Tokens per second of `puna finetune`, as its own curve has them, without the padding at the ends of rows."""
    from puna.batches.packing import PackedRows
    from puna.batches.shards import TokenShards
    from puna.config import load_config
    from puna.finetune.config import FinetuneConfig
    from puna.finetune.main import main as finetune
    from puna.train.metrics import read_metrics

    with tempfile.TemporaryDirectory() as output:
        settings = [
            f"model={folder / 'model'}",
            f"conversations={folder / 'conversations.jsonl'}",
            f"output={output}/run",
            "peft.kind=lora",
            f"peft.rank={RANK}",
            f"peft.alpha={2 * RANK}",
            f"train.steps={steps}",
            f"train.batch_rows={ROWS}",
            f"train.micro_batch_rows={ROWS}",
            f"train.row_length={ROW_LENGTH}",
            "train.log_every=1",
            "train.tensorboard=false",
            f"train.precision={'bf16' if 'bf16' in options else 'fp32'}",
            f"train.compile={str('compiled' in options).lower()}",
            f"train.device={device}",
            f"train.optimizer.learning_rate={LEARNING_RATE}",
            "train.schedule.kind=constant",
            "train.schedule.warmup_steps=0",
        ]
        finetune(load_config(FinetuneConfig, None, settings))
        curve = read_metrics(Path(output) / "run/metrics.jsonl")[WARM_UP:]
        shards = TokenShards(Path(output) / "run/tokens/train")
        rows = PackedRows(shards, ROW_LENGTH, 0, "whole", 0).rows_per_epoch
    filled = shards.num_tokens / (rows * ROW_LENGTH)
    # The same mean as the other side's: all tokens by all seconds.
    return filled * statistics.harmonic_mean([point["speed/tokens_per_second"] for point in curve])


def run_trl(folder: Path, options: list[str], steps: int, device: str) -> float:
    """Tokens per second of trl's trainer from the end of the last step of warm-up on."""
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    rows = [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]
    mean_length = statistics.mean(len(row["input_ids"]) for row in rows)
    packed, wrapped = "packed" in options, "wrapped" in options
    bf16 = "bf16" in options
    arguments = trl.SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        per_device_train_batch_size=ROWS if packed or wrapped else round(ROWS * ROW_LENGTH / mean_length),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        completion_only_loss=True,
        max_length=None if "padding-free" in options else ROW_LENGTH,
        packing=packed or wrapped,
        packing_strategy="wrapped" if wrapped else "bfd",
        padding_free="padding-free" in options,
        train_sampling_strategy="group_by_length" if "by-length" in options else "random",
        torch_compile="compiled" in options,
        bf16=bf16,
        use_cpu=device == "cpu",
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )

    class Clock(TrainerCallback):  # type: ignore[misc]
        ends: list[float] = []  # noqa: RUF012

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if device != "cpu":
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16 if bf16 else torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    collate, counts = trainer.data_collator, []

    def counting(examples: list[dict[str, Any]]) -> Any:
        """Batches are made in the order of the steps, some ahead of them."""
        counts.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    trainer.data_collator = counting
    trainer.train()
    return sum(counts[WARM_UP:steps]) / (Clock.ends[-1] - Clock.ends[WARM_UP - 1])


def measure(variant: str, folder: Path, steps: int, device: str) -> dict[str, float]:
    """One variant in this process."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    library, *options = variant.split()
    speed = {"puna": run_puna, "trl": run_trl}[library](folder, options, WARM_UP + steps, device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
    if device != "cpu":
        import torch

        peak = torch.cuda.max_memory_allocated() / 1e6
    return {"speed": speed, "megabytes": peak}


def compare(arguments: argparse.Namespace, shape_name: str) -> None:
    """Every variant once, the fastest of each side twice more in turn."""
    variants, rounds, steps = [*OURS, *THEIRS], 3, 12
    if arguments.quick:
        variants, rounds, steps = ["puna fp32", "trl padded by-length"], 1, 3
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as folder:
        prepare(SHAPES[shape_name], arguments.conversations, Path(folder))
        running = variants
        for _ in range(rounds):
            for variant in running:
                command = [sys.executable, __file__, "--variant", variant, "--folder", folder, "--steps", str(steps)]
                done = subprocess.run([*command, "--device", arguments.device], capture_output=True, text=True)
                if done.returncode:
                    print(f"{variant} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                    continue
                found[variant].append(json.loads(done.stdout.splitlines()[-1]))
            speeds = {name: statistics.median(run["speed"] for run in runs) for name, runs in found.items() if runs}
            if not any(name in OURS for name in speeds) or not any(name in THEIRS for name in speeds):
                raise SystemExit("nothing to compare: see above")
            ours = max((name for name in speeds if name in OURS), key=speeds.__getitem__)
            theirs = max((name for name in speeds if name in THEIRS), key=speeds.__getitem__)
            running = [ours, theirs]
    if not arguments.json:
        for name, speed in sorted(speeds.items(), key=lambda item: -item[1]):
            print(f"  {name:<28} {speed:>9,.0f} tokens/s {max(run['megabytes'] for run in found[name]):>9,.0f} MB")
    title = f"LoRA, {shape_name}: {ours} / {theirs}"
    turns = [one["speed"] / other["speed"] for one, other in zip(found[ours], found[theirs], strict=False)]
    show(figure(title, speeds[ours], speeds[theirs], "tokens/s", ratio=statistics.median(turns)), arguments.json)
    peaks = [max(run["megabytes"] for run in found[name]) for name in (ours, theirs)]
    show(figure(f"{title}, peak memory", *peaks, "MB", less_is_better=True), arguments.json)


def main() -> None:
    parser = command_line(__doc__, "float32 and the other side's usual best, the first shape: under 50 s")
    conversations = Path("../shared/data/instruct/alpaca_en_demo.json.gz")
    parser.add_argument(
        "--conversations", type=Path, default=conversations, help="in any form that `puna finetune` reads"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES))
    for name, kind in (("--variant", str), ("--folder", Path), ("--steps", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        # What training says goes to the other stream; the figures are all that is read.
        with contextlib.redirect_stdout(sys.stderr):
            found = measure(arguments.variant, arguments.folder, arguments.steps, arguments.device)
        print(json.dumps(found))
        return
    shapes = arguments.shapes or (CPU_SHAPES if arguments.device == "cpu" else GPU_SHAPES)
    for shape_name in shapes[:1] if arguments.quick else shapes:
        compare(arguments, shape_name)


if __name__ == "__main__":
    main()
