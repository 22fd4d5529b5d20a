"""Training tokens per second: Puna's step beside the models of `transformers` and `litgpt` in a plain loop.

Same shape, same tokens, same batch, same optimiser (fused AdamW, gradient clipping), one run. The other side gets its
best settings: every variant in THEIRS is timed (attention through scaled_dot_product_attention, the library's
default), and the fastest counts. In pretraining both see the same rows, where ours keeps attention inside documents,
which theirs does not do; in fine-tuning theirs pads conversations and ours packs them. Padding does not count as
tokens. Each variant runs in a process of its own; the fastest of each side then runs twice more, in turn, so that a
machine whose speed drifts hits both alike. A variant's figure is the median of its runs' median steps.

    python benchmarks/train_vs_transformers.py [--quick] [--json]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from figures import command_line, figure, show
from small_models import SHAPES as SMALL_SHAPES

SHAPES: dict[str, dict[str, Any]] = {
    # Pretraining rows for a model of five million parameters with a small vocabulary.
    "pretraining, 5M, 4k vocabulary": {
        "model": {
            "vocab_size": 4096,
            "dim": 224,
            "num_layers": 5,
            "num_heads": 7,
            "num_kv_heads": 7,
            "head_dim": 32,
            "hidden_dim": 608,
        },
        "rows": 8,
        "row_length": 512,
    },
    # The same model on rows as long as Llama 1's.
    "pretraining, 5M, 4k vocabulary, long rows": {
        "model": {
            "vocab_size": 4096,
            "dim": 224,
            "num_layers": 5,
            "num_heads": 7,
            "num_kv_heads": 7,
            "head_dim": 32,
            "hidden_dim": 608,
        },
        "rows": 2,
        "row_length": 2048,
    },
    # Pretraining rows for the 15M model of llama2.c with the Llama 2 vocabulary.
    "pretraining, 15M, 32k vocabulary": {
        "model": {
            "vocab_size": 32_000,
            "dim": 288,
            "num_layers": 6,
            "num_heads": 6,
            "num_kv_heads": 6,
            "head_dim": 48,
            "hidden_dim": 768,
        },
        "rows": 16,
        "row_length": 256,
    },
    # Fine-tuning on short conversations, as the quickstart does: the other side pads them to the longest of the batch.
    "conversations, 3M, 4k vocabulary": {
        "model": SMALL_SHAPES["3M, 4k vocabulary"],
        "conversations": 96,
        "row_length": 512,
    },
    # About one billion parameters, for a GPU.
    "pretraining, 1B, 32k vocabulary": {
        "model": {
            "vocab_size": 32_000,
            "dim": 2048,
            "num_layers": 16,
            "num_heads": 32,
            "num_kv_heads": 8,
            "head_dim": 64,
            "hidden_dim": 8192,
        },
        "rows": 8,
        "row_length": 2048,
    },
}
GPU_SHAPES = ("pretraining, 1B, 32k vocabulary",)
CPU_SHAPES = tuple(name for name in SHAPES if name not in GPU_SHAPES)
OURS = ("puna fp32", "puna bf16", "puna fp32 compiled", "puna bf16 compiled")
THEIRS = (
    "transformers fp32",
    "transformers bf16",
    "transformers autocast",
    "transformers fp32 compiled",
    "transformers bf16 compiled",
    "litgpt fp32",
    "litgpt fp32 compiled",
    "litgpt bf16 compiled",
)
LEARNING_RATE = 1e-4


def documents_of(shape: dict[str, Any]) -> list[Any]:
    """Random ids of every document of the batch; those of a pretraining row stand one after another.

    Pretraining rows hold three documents each. Conversations have the lengths of the quickstart's: 27 to 120 tokens,
    45 on average.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    if "conversations" in shape:
        spread = torch.empty(shape["conversations"]).exponential_(1 / 18, generator=generator)
        lengths = (27 + spread.clamp(max=93)).int().tolist()
    else:
        third = shape["row_length"] // 3
        lengths = [third, third, shape["row_length"] - 2 * third] * shape["rows"]
    vocab_size = shape["model"]["vocab_size"]
    return [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]


def puna_step(shape: dict[str, Any], precision: str, compiled: bool) -> Callable[[], float]:
    import torch

    from puna.batches.packing import IGNORE, PADDING, TokenBatch, best_fit
    from puna.model.config import LlamaConfig
    from puna.model.initialize import initialize
    from puna.model.transformer import Transformer
    from puna.runtime.devices import open_device
    from puna.train.config import OptimizerConfig, ScheduleConfig, TrainConfig
    from puna.train.loop import prepare
    from puna.train.loss import causal_lm_loss
    from puna.train.optimizer import build_optimizers
    from puna.train.state import TrainState
    from puna.train.step import train_step

    documents = documents_of(shape)
    rows = best_fit([len(ids) for ids in documents], shape["row_length"])
    if "conversations" not in shape:
        rows = [[3 * row, 3 * row + 1, 3 * row + 2] for row in range(shape["rows"])]
    size = (len(rows), shape["row_length"])
    ids_BT, positions_BT = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    labels_BT, documents_BT = torch.full(size, IGNORE), torch.full(size, PADDING)
    for row, members in enumerate(rows):
        at = 0
        for number, member in enumerate(members):
            ids = documents[member]
            span = slice(at, at + len(ids))
            ids_BT[row, span], positions_BT[row, span] = ids, torch.arange(len(ids))
            labels_BT[row, at : at + len(ids) - 1], documents_BT[row, span] = ids[1:], number
            at = span.stop

    config = TrainConfig(
        steps=1000,
        batch_rows=len(rows),
        micro_batch_rows=len(rows),
        row_length=shape["row_length"],
        precision=precision,  # type: ignore[arg-type]
        compile=compiled,
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE),
        schedule=ScheduleConfig("constant", warmup_steps=0),
    )
    device = open_device("auto")
    model = Transformer(LlamaConfig(**shape["model"], context_length=shape["row_length"]))
    initialize(model, 0)
    prepare(model, config, device)
    state = TrainState(model, build_optimizers(model, config.optimizer))
    batch = TokenBatch(ids_BT, labels_BT, positions_BT, documents_BT).to(device)
    return lambda: train_step(state, [batch], causal_lm_loss, config).loss


def plain_step(model: Any, precision: str, compiled: bool, loss_of: Callable[[Any], Any]) -> Callable[[], float]:
    """A plain loop's step around another library's model."""
    import torch

    if precision == "bf16":
        model = model.to(torch.bfloat16)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step() -> float:
        loss = loss_of(forward)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step


def transformers_step(shape: dict[str, Any], precision: str, compiled: bool) -> Callable[[], float]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    else:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    model_shape = shape["model"]
    config = LlamaConfig(
        vocab_size=model_shape["vocab_size"],
        hidden_size=model_shape["dim"],
        intermediate_size=model_shape["hidden_dim"],
        num_hidden_layers=model_shape["num_layers"],
        num_attention_heads=model_shape["num_heads"],
        num_key_value_heads=model_shape["num_kv_heads"],
        max_position_embeddings=shape["row_length"],
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(device)
    documents = documents_of(shape)
    if "conversations" in shape:
        inputs = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True).to(device)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in documents], batch_first=True).to(device)
        labels = inputs.masked_fill(mask == 0, -100)
    else:
        inputs = labels = torch.cat(documents).view(shape["rows"], shape["row_length"]).to(device)
        mask = None

    def loss_of(forward: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast"):
            return forward(input_ids=inputs, attention_mask=mask, labels=labels, use_cache=False).loss

    return plain_step(model, precision, compiled, loss_of)


def litgpt_step(shape: dict[str, Any], precision: str, compiled: bool) -> Callable[[], float]:
    """The model, loss and optimiser of litgpt's `pretrain.py`; attention crosses documents there too."""
    import torch
    from litgpt.model import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model_shape = shape["model"]
    documents = documents_of(shape)
    if "conversations" in shape:
        inputs = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True).to(device)
        targets = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=-100).to(device)
    else:
        inputs = targets = torch.cat(documents).view(shape["rows"], shape["row_length"]).to(device)
    config = Config(
        block_size=shape["row_length"],
        vocab_size=model_shape["vocab_size"],
        padded_vocab_size=model_shape["vocab_size"],
        n_layer=model_shape["num_layers"],
        n_head=model_shape["num_heads"],
        n_query_groups=model_shape["num_kv_heads"],
        n_embd=model_shape["dim"],
        head_size=model_shape["head_dim"],
        intermediate_size=model_shape["hidden_dim"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=1e-5,
        mlp_class_name="LLaMAMLP",
    )
    model = GPT(config).to(device)

    def loss_of(forward: Any) -> Any:
        return chunked_cross_entropy(forward(inputs[:, :-1]), targets[:, 1:], chunk_size=0)

    return plain_step(model, precision, compiled, loss_of)


BUILD = {"puna": puna_step, "transformers": transformers_step, "litgpt": litgpt_step}


def measure(variant: str, shape_name: str, seconds: float) -> dict[str, float]:
    """Median seconds a step of one variant, timed for about `seconds` after two steps of warm-up."""
    library, precision, *rest = variant.split()
    step = BUILD[library](SHAPES[shape_name], precision, bool(rest))
    step()
    loss = step()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return {"seconds": statistics.median(times), "loss": loss}


def main() -> None:
    parser = command_line(__doc__, "float32 without compilation, the first shape: under 50 s")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(measure(arguments.variant, arguments.shape, arguments.seconds)))
        return

    import torch

    shapes = GPU_SHAPES if torch.cuda.is_available() else CPU_SHAPES
    variants = [*OURS, *THEIRS]
    rounds, seconds = 3, 5.0
    if arguments.quick:
        shapes, rounds, seconds = shapes[:1], 2, 1.0
        variants = ["puna fp32", "transformers fp32"]
    for shape_name in shapes:
        shape = SHAPES[shape_name]
        tokens = sum(len(ids) for ids in documents_of(shape))
        samples: dict[str, list[float]] = {variant: [] for variant in variants}
        running = variants
        for _ in range(rounds):
            for variant in running:
                command = [sys.executable, __file__, "--variant", variant, "--shape", shape_name]
                done = subprocess.run([*command, "--seconds", str(seconds)], capture_output=True, text=True)
                if done.returncode:
                    print(f"{variant} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                    continue
                samples[variant].append(tokens / json.loads(done.stdout.splitlines()[-1])["seconds"])
            speeds = {variant: statistics.median(found) for variant, found in samples.items() if found}
            ours = max((v for v in speeds if v in OURS), key=speeds.__getitem__)
            theirs = max((v for v in speeds if v in THEIRS), key=speeds.__getitem__)
            running = [ours, theirs]
        if not arguments.json:
            for variant, speed in sorted(speeds.items(), key=lambda item: -item[1]):
                print(f"  {variant:<28} {speed:>9,.0f} tokens/s")
        show(
            figure(f"training, {shape_name}: {ours} / {theirs}", speeds[ours], speeds[theirs], "tokens/s"),
            arguments.json,
        )


if __name__ == "__main__":
    main()
