"""Instruction tuning with LoRA: tokens per second and peak memory of `puna finetune` beside trl's SFTTrainer with peft.

The same model of random weights, the same conversations rendered to the same tokens, the same adapters (rank 16 on all
linear maps of the layers), AdamW, gradient clipping, about as many tokens a step. Padding does not count as tokens.
The other side gets its best settings: each variant in THEIRS is timed without gradient checkpointing, and the fastest
counts: padded, padded in batches of like length, without padding, packed (`bfd`: conversations stay apart), and
`wrapped`, whose rows mix conversations, which ours never does. Each run is a process of its own; the fastest of each
side then runs twice more, in turn. Memory is a process's peak, libraries included.

    python benchmarks/finetune_vs_trl.py [--conversations FILE] [--device cuda] [--quick] [--json]
"""

import json
import statistics
import tempfile
from pathlib import Path

from figures import command_line
from race import add_options, in_own_process, race, timed_trainer
from small_models import CPU_SHAPES, GPU_SHAPES, SHAPES, write_model

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
    from puna.batches.conversations import read_conversations
    from puna.runtime.files import write_jsonl
    from puna.tokenizer.chat import render_chat
    from puna.tokenizer.load import load_tokenizer

    chats = [conversation.messages for conversation in read_conversations(conversations)]
    texts = ("\n".join(str(message["content"]) for message in chat) for chat in chats)
    write_model(shape, texts, ROW_LENGTH, folder)
    tokenizer = load_tokenizer(folder / "model")
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
    from transformers import AutoModelForCausalLM, AutoTokenizer

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

    return timed_trainer(
        trl.SFTTrainer,
        device,
        WARM_UP,
        lambda example: len(example["input_ids"]),
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16 if bf16 else torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def main() -> None:
    parser = command_line(__doc__, "float32 and the other side's usual best, the first shape: under 50 s")
    conversations = Path("../shared/data/instruct/alpaca_en_demo.json.gz")
    parser.add_argument(
        "--conversations", type=Path, default=conversations, help="in any form that `puna finetune` reads"
    )
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES))
    add_options(parser)
    arguments = parser.parse_args()
    if arguments.variant:
        library, *options = arguments.variant.split()
        run = {"puna": run_puna, "trl": run_trl}[library]
        in_own_process(
            lambda: run(arguments.folder, options, WARM_UP + arguments.steps, arguments.device), arguments.device
        )
        return
    ours, theirs = (("puna fp32",), ("trl padded by-length",)) if arguments.quick else (OURS, THEIRS)
    shapes = arguments.shapes or (CPU_SHAPES if arguments.device == "cpu" else GPU_SHAPES)
    for shape in shapes[:1] if arguments.quick else shapes:
        with tempfile.TemporaryDirectory() as folder:
            prepare(SHAPES[shape], arguments.conversations, Path(folder))
            race(__file__, f"LoRA, {shape}", ours, theirs, folder, arguments)


if __name__ == "__main__":
    main()
