"""Inference beside llama.cpp and transformers: decoding one text and several, reading a prompt, and memory.

The same random weights, the same bits, the same threads, in one run: int8 by channel beside Q8_0, and int4 in groups of
32 beside Q4_0, embedding and output included on their side, the output on ours (an embedding is looked up, not
multiplied); with --same-file, Puna reads llama.cpp's own file instead. Both round activations to 8 bits: theirs in
blocks of 32, ours token by token. transformers computes in bfloat16. Each side is a process of its own that loads the
model from disk; they take turns, figure by figure, and the median of their ratios counts, so that a machine whose speed
drifts hits all alike.

    python benchmarks/infer_vs_llamacpp.py [--quick] [--json] [--size 0.1B --size 1B] [--bits 4 --bits 8] [--same-file]
        [--beside llama.cpp --beside transformers]

Needs the extra `dev`, and llama-cpp-python built on this machine: pip install --no-binary :all: llama-cpp-python, which
takes some ten minutes and lets llama.cpp use all that this processor has.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from figures import Figure, command_line, figure, show

SHAPES: dict[str, dict[str, Any]] = {
    "0.1B": {
        "vocab_size": 32_000,
        "dim": 768,
        "num_layers": 12,
        "num_heads": 12,
        "num_kv_heads": 12,
        "head_dim": 64,
        "hidden_dim": 2048,
        "context_length": 2048,
    },
    # Llama 3.2 1B.
    "1B": {
        "vocab_size": 128_256,
        "dim": 2048,
        "num_layers": 16,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 64,
        "hidden_dim": 8192,
        "context_length": 2048,
        "rope_theta": 500_000.0,
        "tie_embeddings": True,
    },
}
PROMPT = 16
"""Tokens before those that are decoded in earnest."""
CONTEXT = 640
GGUF_TYPES = {4: "q4_0", 8: "q8_0"}


def main() -> None:
    parser = command_line(__doc__, "0.1B and few tokens: under 50 s")
    parser.add_argument("--size", action="append", choices=SHAPES, help="model size; all where absent")
    parser.add_argument(
        "--bits", action="append", type=int, choices=GGUF_TYPES, help="bits of a weight; both where absent"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side for each figure")
    parser.add_argument(
        "--beside", action="append", choices=[side for side in WORKERS if side != "puna"], help="whom; all where absent"
    )
    parser.add_argument("--same-file", action="store_true", help="Puna runs llama.cpp's file, not a model of its own")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(WORKERS[arguments.worker](arguments.model))
        return
    sizes = arguments.size or (["0.1B"] if arguments.quick else list(SHAPES))
    beside = arguments.beside or ["llama.cpp", *([] if arguments.quick else ["transformers"])]
    for size in sizes:
        for bits in arguments.bits or list(GGUF_TYPES):
            with tempfile.TemporaryDirectory() as folder:
                weight_bytes = prepare(size, bits, Path(folder), beside, arguments.same_file)
                tokens = 16 if arguments.quick else 64 if size == "0.1B" else 24
                name = f"{size}, {bits} bits" + (", the same file" if arguments.same_file else "")
                for found in compare(name, Path(folder), beside, tokens, arguments.rounds, weight_bytes):
                    show(found, arguments.json)


def compare(
    name: str, folder: Path, beside: list[str], tokens: int, rounds: int, weight_bytes: int
) -> Iterator[Figure]:
    """All figures of one model. One text gets `tokens`, and each of several fewer, as all together take longer."""
    sides = ["puna", *beside]
    tasks = [("decode", batch, max(8, tokens // part)) for batch, part in ((1, 1), (8, 2), (32, 4))]
    tasks.append(("prefill", 512, 1))
    with Sides(sides, folder) as running:
        for kind, amount, count in tasks:
            speeds: dict[str, list[float]] = {side: [] for side in sides}
            measured: list[float] = []
            for turn in range(rounds + 1):
                for side in sides:
                    if side == "transformers" and (kind, amount) not in (("decode", 1), ("prefill", 512)):
                        continue
                    speed = running.ask(side, kind=kind, amount=amount, tokens=count, seed=turn)
                    if turn:  # the first one warms up
                        speeds[side].append(speed)
                if turn and (kind, amount) == ("decode", 1):
                    measured.append(bandwidth())
            what = f"decode, batch {amount}" if kind == "decode" else f"prefill of {amount}"
            for side in sides[1:]:
                if speeds[side]:
                    yield figure_of(f"{name}, {what}: Puna / {side}", speeds["puna"], speeds[side], "tokens/s")
            if measured:
                gigabytes = [speed * weight_bytes / 1e9 for speed in speeds["puna"]]
                yield figure_of(f"{name}, {what}: weights read / memory bandwidth", gigabytes, measured, "GB/s")
        memory = {side: running.ask(side, kind="memory") for side in sides}
        for side in sides[1:]:
            what = f"{name}, peak memory: Puna / {side}"
            yield figure(what, memory["puna"], memory[side], "MB", less_is_better=True)


def figure_of(name: str, ours: list[float], theirs: list[float], unit: str) -> Figure:
    """Medians of both, and of the ratios of those that were taken one after the other."""
    ratio = statistics.median(mine / other for mine, other in zip(ours, theirs, strict=True))
    return figure(name, statistics.median(ours), statistics.median(theirs), unit, ratio=ratio)


def bandwidth() -> float:
    """Gigabytes a second that all threads read, of a matrix larger than any cache, multiplied with a vector."""
    import torch

    matrix, vector = torch.ones(2**15, 2**13), torch.ones(2**13)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        matrix @ vector
        best = min(best, time.perf_counter() - started)
    return matrix.nbytes / best / 1e9


def prepare(size: str, bits: int, folder: Path, beside: list[str], same_file: bool) -> int:
    """Write the model in all sides' forms; returns the bytes that ours reads for one token."""
    import torch

    from puna.compress.apply import linear_names, quantize
    from puna.compress.quantization import Quantization
    from puna.model.config import LlamaConfig
    from puna.model.initialize import initialize
    from puna.model.transformer import Transformer
    from puna.weights.gguf import save_gguf
    from puna.weights.load import save_model

    model = Transformer(LlamaConfig(**SHAPES[size]))
    initialize(model, seed=0)
    model.to(torch.bfloat16)
    tokenizer = vocabulary(model.config.vocab_size)
    if same_file or "llama.cpp" in beside:
        save_gguf(model, folder / "llama.cpp", type=GGUF_TYPES[bits], pure=True, tokenizer=tokenizer)
    if "transformers" in beside:
        save_model(model, folder / "transformers")
    if same_file:
        (folder / "puna").mkdir()
        (folder / "puna" / "model.gguf").symlink_to(folder / "llama.cpp")
        maps = (model.get_submodule(name).get_parameter("weight") for name in linear_names(model))
        return sum(weight.numel() * (bits * 32 + 32) // 256 for weight in maps)  # a float32 scale for 32 weights
    group_size = 32 if bits == 4 else None
    quantization = Quantization(f"int{bits}", group_size=group_size, activations="int8", keep=())
    quantize(model, quantization)
    save_model(model, folder / "puna", tokenizer=tokenizer, quantization=quantization.to_config(()))
    stored = itertools.chain(model.layers.parameters(), model.layers.buffers(), model.output.buffers())
    return sum(tensor.nbytes for tensor in stored)


def vocabulary(vocab_size: int) -> Any:
    """A made-up tokenizer of that size, like Llama 3's: bytes, pairs of bytes, and triples."""
    from puna.tokenizer.tiktoken_ranks import TiktokenTokenizer

    single = [bytes([i]) for i in range(256)]
    pairs = (a + b for a in single for b in single)
    triples = (a + b + c for a in single for b in single for c in single)
    pieces = itertools.islice(itertools.chain(single, pairs, triples), vocab_size - 256)
    return TiktokenTokenizer({piece: rank for rank, piece in enumerate(pieces)}, "llama3")


class Sides:
    """The processes of all sides, each with its model loaded."""

    def __init__(self, sides: list[str], folder: Path) -> None:
        self._processes = {
            side: subprocess.Popen(
                [sys.executable, __file__, "--worker", side, "--model", str(folder / side)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for side in sides
        }

    def __enter__(self) -> "Sides":
        return self

    def ask(self, side: str, **task: Any) -> float:
        process = self._processes[side]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise SystemExit(f"{side} gave up; run with --worker {side} to see why.")
        return float(answer)

    def __exit__(self, *error: object) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()


Speed = Callable[[str, int, int, list[list[int]]], float]
"""Seconds for a kind of task, an amount, a number of tokens, and prompts."""


def work(seconds: Speed) -> None:
    """Answer tasks from standard input with tokens per second."""
    for line in sys.stdin:
        task = json.loads(line)
        if task["kind"] == "memory":
            print(peak_megabytes(), flush=True)
            continue
        generator = random.Random(task["seed"])
        batch, length = (task["amount"], PROMPT) if task["kind"] == "decode" else (1, task["amount"])
        prompts = [[generator.randrange(256, 30_000) for _ in range(length)] for _ in range(batch)]
        taken = seconds(task["kind"], task["amount"], task["tokens"], prompts)
        print(task["amount"] * task["tokens"] / taken, flush=True)


def peak_megabytes() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1000


def puna(path: Path) -> Speed:
    from puna.infer.config import EngineConfig
    from puna.infer.load import load_engine
    from puna.infer.sampling import SamplingParams

    config = EngineConfig(
        max_rows=32, max_context=CONTEXT, cache_tokens=32 * 128 + CONTEXT, step_tokens=1024, device="cpu"
    )
    engine = load_engine(path, config)

    def seconds(kind: str, amount: int, tokens: int, prompts: list[list[int]]) -> float:
        params = SamplingParams(temperature=0, max_tokens=tokens + (kind == "decode"), ignore_eos=True)
        for prompt in prompts:
            engine.submit(prompt, params)
        if kind == "decode":
            engine.step()  # reads the prompts
        started = time.perf_counter()
        while not engine.idle:
            engine.step()
        return time.perf_counter() - started

    return seconds


def llama_cpp(path: Path) -> Speed:
    import ctypes

    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified = 32 * 128 + CONTEXT, 32, True
    params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
    context = llama_cpp.llama_init_from_model(model, params)
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(512, 0, 1)

    def decode(items: list[tuple[int, int, int, bool]]) -> None:
        batch.n_tokens = len(items)
        for i, (token, position, sequence, wanted) in enumerate(items):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")

    def likeliest(row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, row)
        return int(np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (vocab_size,)).argmax())

    def seconds(kind: str, amount: int, tokens: int, prompts: list[list[int]]) -> float:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        read = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        if kind == "prefill":
            started = time.perf_counter()
            decode(read)
            likeliest(len(read) - 1)
            return time.perf_counter() - started
        decode(read)
        chosen = [likeliest((sequence + 1) * PROMPT - 1) for sequence in range(len(prompts))]
        started = time.perf_counter()
        for step in range(tokens):
            decode([(token, PROMPT + step, sequence, True) for sequence, token in enumerate(chosen)])
            chosen = [likeliest(sequence) for sequence in range(len(prompts))]
        return time.perf_counter() - started

    return seconds


def transformers(path: Path) -> Speed:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)

    @torch.inference_mode()
    def seconds(kind: str, amount: int, tokens: int, prompts: list[list[int]]) -> float:
        ids = torch.tensor(prompts)
        started = time.perf_counter()
        output = model(ids, use_cache=True, logits_to_keep=1)
        if kind == "prefill":
            return time.perf_counter() - started
        started = time.perf_counter()
        for _ in range(tokens):
            ids = output.logits[:, -1:].argmax(-1)
            output = model(ids, past_key_values=output.past_key_values, use_cache=True)
        return time.perf_counter() - started

    return seconds


WORKERS: dict[str, Callable[[Path], Speed]] = {"puna": puna, "llama.cpp": llama_cpp, "transformers": transformers}


if __name__ == "__main__":
    main()
