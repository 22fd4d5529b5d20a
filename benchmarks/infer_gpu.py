"""Inference on a GPU: how near decoding comes to the memory's bandwidth, and many requests beside transformers.

Random weights of Llama 3.1 8B's shape in bfloat16. One text is decoded with bfloat16, 8-bit and 4-bit weights: what
counts is the bytes of weights read in a second, beside those that a copy inside the GPU's memory reads and writes. Then
64, 128 and 256 requests at once, prompts and answers of different lengths, beside transformers' continuous batching
(`generate_batch`) with the same prompts, greedily; both sides take turns in one process.

    python benchmarks/infer_gpu.py [--quick] [--json] [--device cuda] [--profile]

It has not run on a GPU yet; `--device cpu` is there to try the script itself. `--profile` adds the share of a decoding
step in which the GPU computes: below 1, it waits for Python to say what comes next.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from figures import Figure, command_line, figure, show
from infer_vs_llamacpp import vocabulary

from puna.compress.apply import quantize
from puna.compress.quantization import Quantization
from puna.infer.config import EngineConfig
from puna.infer.engine import Engine
from puna.infer.sampling import SamplingParams
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.runtime.devices import open_device
from puna.weights.load import load_model, save_model

# Llama 3.1 8B, with room for this benchmark's contexts.
LARGE = LlamaConfig(
    vocab_size=128_256,
    dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    hidden_dim=14_336,
    context_length=2048,
    rope_theta=500_000.0,
)
SMALL = LlamaConfig(
    vocab_size=4096,
    dim=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    hidden_dim=512,
    context_length=512,
)
FORMS = {
    "bfloat16": None,
    "int8": Quantization("int8", keep=()),
    "int4": Quantization("int4", group_size=128, keep=()),
}


def main() -> None:
    parser = command_line(__doc__, "a small model and few tokens: under a minute, also on a CPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--profile", action="store_true", help="how much of a decoding step the GPU computes")
    arguments = parser.parse_args()
    device = open_device(arguments.device)
    config = SMALL if arguments.quick else LARGE
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with torch.device(device):
            model = Transformer(config).to(torch.bfloat16)
        initialize(model, seed=0)
        save_model(model, folder, tokenizer=vocabulary(config.vocab_size))
        del model
        tokens = 16 if arguments.quick else 128
        for found in one_text(folder, config, device, tokens, arguments.profile):
            show(found, arguments.json)
        for found in many_texts(folder, config, device, (4, 8) if arguments.quick else (64, 128, 256), tokens):
            show(found, arguments.json)


def one_text(folder: Path, config: LlamaConfig, device: torch.device, tokens: int, profile: bool) -> Iterator[Figure]:
    """Decoding a single text with each form of the weights."""
    copied = bandwidth(device)
    plain: float | None = None
    for form, quantization in FORMS.items():
        model = load_model(folder, device=device)
        if quantization is not None:
            quantize(model, quantization)
        read = sum(tensor.nbytes for name, tensor in model.state_dict().items() if not name.startswith("embedding"))
        engine = engine_of(model, config, device, rows=1)
        prompts = prompts_of(1, 16, seed=0)
        speeds = [tokens / seconds_of(engine, prompts, [tokens], device, decode_only=True) for _ in range(4)][1:]
        speed = statistics.median(speeds)
        plain = plain or speed
        name = f"decode, 1 text, {form}: weights read / memory copied"
        yield figure(name, speed * read / 1e9, copied, "GB/s", tokens_per_second=speed, beside_bfloat16=speed / plain)
        if profile and device.type == "cuda":
            busy = share_computing(partial(seconds_of, engine, prompts, [tokens], device, decode_only=True))
            yield figure(f"decode, 1 text, {form}: share of time in which the GPU computes", busy, None, "")


def many_texts(
    folder: Path, config: LlamaConfig, device: torch.device, amounts: tuple[int, ...], tokens: int
) -> Iterator[Figure]:
    """Requests at once, beside transformers."""
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    engine = engine_of(load_model(folder, device=device), config, device, rows=max(amounts))
    # It sizes its cache by what a GPU has free, and on a CPU would take all of the memory.
    memory = None if device.type == "cuda" else ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256)
    for amount in amounts:
        lengths = [tokens // 2 + i % tokens for i in range(amount)]  # of the answers
        speeds: dict[str, list[float]] = {"puna": [], "transformers": []}
        for turn in range(4):
            prompts = prompts_of(amount, 3 * tokens, seed=turn)
            taken = seconds_of(engine, prompts, lengths, device)
            speeds["puna"].append(sum(lengths) / taken)
            # One length for all is what generate_batch takes: the mean of ours.
            settings = GenerationConfig(max_new_tokens=sum(lengths) // amount, do_sample=False, eos_token_id=-1)
            started = time.perf_counter()
            answers = theirs.generate_batch(
                inputs=prompts,
                generation_config=settings,
                continuous_batching_config=memory,
                persistent_manager=True,  # its warming up counts only once, and that turn does not
                progress_bar=False,
            )
            synchronize(device)
            taken = time.perf_counter() - started
            made = sum(len(answer.generated_tokens) for answer in answers.values())
            speeds["transformers"].append(made / taken)
        theirs.destroy_cached_continuous_batching_manager()  # it is sized for this many
        ratio = statistics.median(a / b for a, b in zip(speeds["puna"][1:], speeds["transformers"][1:], strict=True))
        ours, other = (statistics.median(found[1:]) for found in speeds.values())
        yield figure(f"{amount} requests at once: Puna / transformers", ours, other, "tokens/s", ratio=ratio)


def engine_of(model: Transformer, config: LlamaConfig, device: torch.device, rows: int) -> Engine:
    context = config.context_length
    settings = EngineConfig(
        max_rows=rows, max_context=context, cache_tokens=rows * 640 + context, step_tokens=2048, device=device.type
    )
    return Engine(model, vocabulary(config.vocab_size), settings)


def prompts_of(amount: int, longest: int, seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    lengths = [generator.randint(longest // 4, longest) for _ in range(amount)]
    return [[generator.randrange(256, 4000) for _ in range(length)] for length in lengths]


def seconds_of(
    engine: Engine, prompts: list[list[int]], tokens: list[int], device: torch.device, *, decode_only: bool = False
) -> float:
    """Time for all answers; without that for the prompts if `decode_only`, which is for a single text."""
    for prompt, count in zip(prompts, tokens, strict=True):
        engine.submit(prompt, SamplingParams(temperature=0, max_tokens=count + decode_only, ignore_eos=True))
    if decode_only:
        engine.step()
    synchronize(device)
    started = time.perf_counter()
    while not engine.idle:
        engine.step()
    synchronize(device)
    return time.perf_counter() - started


def bandwidth(device: torch.device) -> float:
    """Gigabytes a second that a copy inside the device's memory reads and writes, together."""
    size = 2**32 if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size / best / 1e9


def share_computing(work: Callable[[], Any]) -> float:
    """Time of all kernels over that of the work."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        started = time.perf_counter()
        work()
        taken = time.perf_counter() - started
    return sum(event.self_device_time_total for event in seen.key_averages()) / 1e6 / taken


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
