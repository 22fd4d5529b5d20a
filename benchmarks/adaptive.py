"""Mixture-of-Depths beside the plain model: loss after equal training FLOPs, and FLOPs and seconds of inference.

Both models have the same shape; every second layer of the other lets an eighth of the tokens through
(arXiv:2404.02258), and as a step of it costs less, it is trained for more steps. Text is this machine's Python standard
library; one file in twenty is held out. The held-out loss and the seconds are those of inference, where the predictor
decides. FLOPs are those of the matrix products (`puna.model.accounting`), with the share of tokens that passed.

Generation is that of the engine, from its cache, where the plain model's layers go through the native kernels and the
gated one's through torch; and without a cache, where both go through torch.

    python benchmarks/adaptive.py [--quick] [--json]
"""

import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from figures import Figure, command_line, figure, show

from puna.batches.tokenize import TokenizeConfig
from puna.batches.tokenize import main as tokenize
from puna.infer.config import EngineConfig
from puna.infer.engine import Engine
from puna.infer.sampling import SamplingParams
from puna.model.accounting import forward_flops_per_token
from puna.model.config import LlamaConfig
from puna.model.depths import GatedLayer
from puna.model.transformer import Transformer
from puna.pretrain.main import MixtureOfDepths, PretrainConfig
from puna.pretrain.main import main as pretrain
from puna.runtime.devices import open_device
from puna.runtime.files import write_jsonl
from puna.runtime.manifest import Manifest
from puna.tokenizer.load import load_tokenizer
from puna.tokenizer.train import TokenizerConfig
from puna.tokenizer.train import main as train_tokenizer
from puna.train.config import OptimizerConfig, ScheduleConfig, TrainConfig
from puna.weights.load import load_model

ROW_LENGTH, BATCH_ROWS = 256, 8
SHAPE = LlamaConfig(
    vocab_size=2048,
    dim=192,
    num_layers=6,
    num_heads=3,
    num_kv_heads=3,
    head_dim=64,
    hidden_dim=512,
    context_length=ROW_LENGTH,
)
PROMPT, ANSWER = 128, 64
TEXTS_AT_ONCE = (1, 8)
DEPTHS = MixtureOfDepths(every=2, capacity=0.125)


@dataclass(frozen=True)
class Measured:
    """One trained model."""

    steps: int
    training_flops: float
    held_out_nats: float
    passed_share: float
    inference_flops_per_token: float
    scoring_seconds_per_1000_tokens: float
    uncached_seconds_per_token: float
    engine_seconds_per_token: dict[int, float]


def flops_per_token(gated_layers: int, share: float) -> float:
    """Of a forward pass over whole rows, in which `share` of the tokens pass through each gated layer."""

    def layer(mean_context: float) -> float:
        taller = replace(SHAPE, num_layers=SHAPE.num_layers + 1)
        return forward_flops_per_token(taller, mean_context) - forward_flops_per_token(SHAPE, mean_context)

    whole = forward_flops_per_token(SHAPE, (ROW_LENGTH + 1) / 2)
    routing = 2 * (SHAPE.dim + SHAPE.dim * 128 + 128)
    gated = share * layer((share * ROW_LENGTH + 1) / 2) + routing
    return whole + gated_layers * (gated - layer((ROW_LENGTH + 1) / 2))


def prepare_text(folder: Path, megabytes: float) -> None:
    """Documents, a tokenizer and token shards of the standard library's first files."""
    rows: list[dict[str, str]] = []
    size = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        size += len(text)
        rows.append({"id": path.name, "text": text})
        if size > megabytes * 1e6:
            break
    write_jsonl(folder / "train.jsonl", (row for n, row in enumerate(rows) if n % 20))
    write_jsonl(folder / "held_out.jsonl", (row for n, row in enumerate(rows) if n % 20 == 0))
    tokenizer = folder / "tokenizer"
    train_tokenizer(TokenizerConfig(documents=folder / "train.jsonl", output=tokenizer, vocab_size=SHAPE.vocab_size))
    for name in ("train", "held_out"):
        tokenize(TokenizeConfig(documents=folder / f"{name}.jsonl", tokenizer=tokenizer, output=folder / name))


def measure(folder: Path, name: str, depths: MixtureOfDepths | None, steps: int, repeats: int) -> Measured:
    """Train one model and run it."""
    train = TrainConfig(
        steps=steps,
        batch_rows=BATCH_ROWS,
        micro_batch_rows=BATCH_ROWS,
        row_length=ROW_LENGTH,
        tensorboard=False,
        optimizer=OptimizerConfig(kind="muon", learning_rate=1e-2),
        schedule=ScheduleConfig(warmup_steps=min(20, steps), final_ratio=0.05),
    )
    config = PretrainConfig(
        tokens=folder / "train",
        held_out_tokens=folder / "held_out",
        tokenizer=folder / "tokenizer",
        output=folder / name,
        model=SHAPE,
        mixture_of_depths=depths,
        train=train,
    )
    pretrain(config)
    results = Manifest.read(folder / name / "model").results
    model = load_model(folder / name / "model")
    gated = [layer for layer in model.layers if isinstance(layer, GatedLayer)]
    open_device("cpu")
    scoring, uncached, share = run(model, gated, repeats)
    training_share = DEPTHS.capacity if gated else 1.0
    return Measured(
        steps=steps,
        training_flops=3 * flops_per_token(len(gated), training_share) * steps * BATCH_ROWS * ROW_LENGTH,
        held_out_nats=results["validation_loss"],
        passed_share=share,
        inference_flops_per_token=flops_per_token(len(gated), share),
        scoring_seconds_per_1000_tokens=scoring,
        uncached_seconds_per_token=uncached,
        engine_seconds_per_token=generate(model, folder / name / "model", repeats),
    )


def generate(model: Transformer, directory: Path, repeats: int) -> dict[int, float]:
    """Seconds a step of the engine takes, by how many texts go on in it, each with a prompt found in the cache."""
    seconds = {}
    engine = Engine(model, load_tokenizer(directory), EngineConfig(max_rows=max(TEXTS_AT_ONCE)))
    generator = torch.Generator().manual_seed(1)
    start = torch.randint(300, SHAPE.vocab_size, (max(TEXTS_AT_ONCE), 1), generator=generator)
    own = SamplingParams(max_tokens=PROMPT - 1, seed=0, ignore_eos=True)
    prompts = [
        [*ids, *done.ids] for ids, done in zip(start.tolist(), engine.generate(start.tolist(), own), strict=True)
    ]
    for count in TEXTS_AT_ONCE:

        def run(max_tokens: int, count: int = count) -> float:
            params = SamplingParams(max_tokens=max_tokens, seed=0, ignore_eos=True)
            started = time.perf_counter()
            engine.generate(prompts[:count], params)
            return time.perf_counter() - started

        run(1)
        seconds[count] = statistics.median((run(ANSWER + 1) - run(1)) / ANSWER for _ in range(repeats))
    return seconds


@torch.inference_mode()
def run(model: Transformer, gated: list[GatedLayer], repeats: int) -> tuple[float, float, float]:
    """Seconds to score 1,000 tokens; to generate one without a cache after 128; mean share that passed gated layers."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(SHAPE.vocab_size, (BATCH_ROWS, ROW_LENGTH), generator=generator)
    # Text of the model's own, so that what passes is what would pass in use.
    row = ids_BT[:, :1]
    for _ in range(ROW_LENGTH - 1 if repeats > 5 else 31):
        probabilities = model(row)[:, -1].float().softmax(-1)
        row = torch.cat([row, torch.multinomial(probabilities, 1, generator=generator)], 1)
    scoring, generating = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        model(row)
        scoring.append((time.perf_counter() - started) / row.numel() * 1000)
    share = statistics.mean(layer.passed_share for layer in gated) if gated else 1.0
    prompt = row[:1, :PROMPT]
    for _ in range(repeats):
        started = time.perf_counter()
        grown = torch.cat([prompt, model(prompt)[:, -1:].argmax(-1)], 1)
        generating.append(time.perf_counter() - started)
        assert grown.shape[1] == prompt.shape[1] + 1
    return statistics.median(scoring), statistics.median(generating), share


def figures_of(gated: Measured, plain: Measured) -> Iterator[Figure]:
    """What was measured, beside each other; less is better of everything."""

    def beside(what: str, ours: float, theirs: float, unit: str, **more: float) -> Figure:
        name = f"mixture of depths, {what}: gated / plain"
        return figure(name, ours, theirs, unit, less_is_better=True, **more)

    steps = {"gated_steps": gated.steps, "plain_steps": plain.steps}
    yield beside("held-out loss", gated.held_out_nats, plain.held_out_nats, "nats/token", **steps)
    yield beside("training", gated.training_flops, plain.training_flops, "FLOP")
    ours, theirs = gated.inference_flops_per_token, plain.inference_flops_per_token
    yield beside("inference", ours, theirs, "FLOP/token", passed_share=gated.passed_share)
    ours, theirs = gated.scoring_seconds_per_1000_tokens, plain.scoring_seconds_per_1000_tokens
    yield beside("scoring", ours * 1e3, theirs * 1e3, "µs/token")
    for count in TEXTS_AT_ONCE:
        ours, theirs = gated.engine_seconds_per_token[count], plain.engine_seconds_per_token[count]
        yield beside(f"generation by the engine, {count} at once", ours * 1e3, theirs * 1e3, "ms/step")
    ours, theirs = gated.uncached_seconds_per_token, plain.uncached_seconds_per_token
    yield beside("generation without a cache", ours * 1e3, theirs * 1e3, "ms/token")


def main() -> None:
    arguments = command_line(__doc__, "little text and few steps: about a minute").parse_args()
    steps, megabytes, repeats = (30, 0.5, 5) if arguments.quick else (150, 4.0, 21)
    more = flops_per_token(0, 1.0) / flops_per_token(SHAPE.num_layers // DEPTHS.every, DEPTHS.capacity)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare_text(folder, megabytes)
        plain = measure(folder, "plain", None, steps, repeats)
        gated = measure(folder, "gated", DEPTHS, round(steps * more), repeats)
    for found in figures_of(gated, plain):
        show(found, arguments.json)


if __name__ == "__main__":
    main()
