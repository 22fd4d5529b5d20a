"""Speculative decoding beside plain decoding: tokens per second of the same engine on the same texts, in one run.

Without arguments a model of 0.13 billion random weights answers a made-up request, "give this module back with
changes": the prompt is the beginning of a module of Python's standard library, the answer the same with every 30th
token replaced. Random weights would not say that, so what the model says is overruled by the answer, after everything
has been computed. So the cost of each step is real, and so is what lookup finds in the text; the smaller model (0.02
billion) computes its guesses and is then taken to be right about 8 tokens of 10. The last figure is the worst case: an
answer in which nothing can be guessed, though much in it seems to repeat.

With a model directory of your own nothing is overruled: its greedy answers to your prompts are timed, with lookup, and
with a smaller model or its own first layers where they are named.

    python benchmarks/speculation.py [--quick] [--json] [--model DIR --prompts FILE.jsonl [--draft DIR] [--layers N]]
"""

import argparse
import random
import re
import statistics
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from figures import Figure, command_line, figure, show
from torch import Tensor

from puna.infer.choose import Chooser
from puna.infer.config import EngineConfig, SpeculationConfig
from puna.infer.engine import Engine
from puna.infer.generate import GenerateConfig, read_prompts
from puna.infer.load import load_engine
from puna.infer.request import Request
from puna.infer.sampling import SamplingParams
from puna.infer.speculate_draft import Draft, Proposer
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.runtime.devices import open_device
from puna.tokenizer.tiktoken_ranks import TiktokenTokenizer

MODEL = LlamaConfig(
    vocab_size=32_000,
    dim=768,
    num_layers=12,
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    hidden_dim=2048,
    context_length=2048,
)
SMALLER = replace(MODEL, dim=256, num_layers=2, num_heads=4, num_kv_heads=4, hidden_dim=688)
PROMPT_TOKENS, CHANGED_EVERY, RIGHT = 600, 30, 0.8


@dataclass(frozen=True)
class Case:
    name: str
    prompts: list[list[int]]
    answers: list[list[int]]
    speculation: SpeculationConfig


def pieces_of_python() -> tuple[list[int], TiktokenTokenizer]:
    """A module of the standard library in words, blanks and signs, and a tokenizer that knows these."""
    found = re.findall(r"\w+|\s+|[^\w\s]", Path(textwrap.__file__).read_text(encoding="utf-8"))
    ranks = {bytes([i]): i for i in range(256)}
    for piece in found:
        ranks.setdefault(piece.encode(), len(ranks))
    tokenizer = TiktokenTokenizer(ranks, "llama3", {"<|end_of_text|>": len(ranks)})
    return [ranks[piece.encode()] for piece in found], tokenizer


def made_up_cases(text: list[int], num_tokens: int, num_words: int, *, quick: bool) -> list[Case]:
    chance = random.Random(0)

    def changed(tokens: list[int]) -> list[int]:
        return [chance.randrange(num_words) if chance.random() < 1 / CHANGED_EVERY else token for token in tokens]

    rows = 1 if quick else 8
    prompts = [text[row * 100 : row * 100 + PROMPT_TOKENS] for row in range(rows)]
    answers = [changed(prompt[:num_tokens]) for prompt in prompts]
    lookup = SpeculationConfig("lookup")
    smaller = SpeculationConfig("model", model=Path("made up"))
    # Pairs of tokens of the prompt, each going on otherwise than there.
    pairs = [chance.randrange(PROMPT_TOKENS - 1) for _ in range(num_tokens)]
    misleading = [token for place in pairs for token in (*prompts[0][place : place + 2], chance.randrange(num_words))]
    cases = [
        Case("lookup, a changed copy, 1 text", prompts[:1], answers[:1], lookup),
        Case("smaller model, 1 text", prompts[:1], answers[:1], smaller),
        Case("lookup, nothing to guess, 1 text", prompts[:1], [misleading[:num_tokens]], lookup),
    ]
    if not quick:
        cases[2:2] = [
            Case(f"lookup, a changed copy, {rows} texts", prompts, answers, lookup),
            Case(f"smaller model, {rows} texts", prompts, answers, smaller),
        ]
    return cases


class Overruled(Chooser):
    """Computes everything, then says what it is told to."""

    def tell(self, case: Case) -> None:
        self._told = {tuple(prompt): answer for prompt, answer in zip(case.prompts, case.answers, strict=True)}

    def answer(self, request: Request) -> list[int]:
        return self._told[tuple(request.tokens[: request.num_prompt])]

    def allowed(self, sampled: list[Request], logits_RV: Tensor) -> Tensor:
        allowed_RV = super().allowed(sampled, logits_RV).clone()
        ahead, previous = 0, None
        for row, request in enumerate(sampled):
            ahead = ahead + 1 if request is previous else 0
            previous = request
            allowed_RV[row, self.answer(request)[request.num_generated + ahead]] = 1e4
        return allowed_RV


class Hinted:
    """A proposer that computes its guesses, and is then right in a share of them."""

    def __init__(self, proposer: Proposer, chooser: Overruled) -> None:
        self._proposer = proposer
        self._chooser = chooser
        self._chance = random.Random(0)

    def propose(self, requests: list[Request], counts: list[int]) -> list[Draft]:
        hinted = []
        for request, draft in zip(requests, self._proposer.propose(requests, counts), strict=True):
            known = self._chooser.answer(request)[request.num_generated :]
            ids = [known[i] if self._chance.random() < RIGHT else guess for i, guess in enumerate(draft.ids)]
            hinted.append(Draft(ids))
        return hinted

    def forget(self, request: Request) -> None:
        self._proposer.forget(request)


def made_up_engine(case: Case, tokenizer: TiktokenTokenizer, speculates: bool, models: list[Transformer]) -> Engine:
    config = EngineConfig(max_rows=len(case.prompts), max_context=1024, prefix_cache=False)
    if speculates:
        config = replace(config, speculation=case.speculation)
    engine = Engine(models[0], tokenizer, config, guesser=models[1])
    chooser = engine.chooser = Overruled(tokenizer, MODEL.vocab_size, models[0].norm.weight.device)
    chooser.tell(case)
    if engine.speculator is not None and case.speculation.kind == "model":
        engine.speculator._proposer = Hinted(engine.speculator._proposer, chooser)  # type: ignore[assignment]
    return engine


def decoding_speed(engine: Engine, prompts: list[list[int]], num_tokens: int) -> float:
    """Tokens per second, from the moment on at which every prompt has been read."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    requests = [engine.submit(prompt, params) for prompt in prompts]
    while any(request.num_generated == 0 for request in requests):
        engine.step()
    before = sum(request.num_generated for request in requests)
    started = time.perf_counter()
    while not engine.idle:
        engine.step()
    seconds = time.perf_counter() - started
    return (sum(request.num_generated for request in requests) - before) / seconds


def compare(
    name: str, plain: Engine, speculating: Engine, prompts: list[list[int]], num_tokens: int, rounds: int
) -> Figure:
    """Both in turn, `rounds` times after one that warms up; medians."""
    speeds: dict[Engine, list[float]] = {plain: [], speculating: []}
    for number in range(rounds + 1):
        for engine, found in speeds.items():
            speed = decoding_speed(engine, prompts, num_tokens)
            if number:
                found.append(speed)
    counted = speculating.speculator
    assert counted is not None
    ours, theirs = (statistics.median(found) for found in (speeds[speculating], speeds[plain]))
    return figure(
        f"speculation, {name}: with / without",
        ours,
        theirs,
        "tokens/s",
        accepted_share=round(counted.num_accepted / max(counted.num_proposed, 1), 3),
        proposed_per_token=round(counted.num_proposed / ((rounds + 1) * len(prompts) * num_tokens), 2),
    )


def made_up(arguments: argparse.Namespace) -> None:
    num_tokens, rounds = (64, 1) if arguments.quick else (256, 3)
    device = open_device("auto")
    models = []
    for config in (MODEL, SMALLER):
        with torch.device("meta"):
            model = Transformer(config)
        model.to_empty(device="cpu")
        initialize(model, 0)
        models.append(model.bfloat16().to(device).eval())
    text, tokenizer = pieces_of_python()
    for case in made_up_cases(text, num_tokens, tokenizer.vocab_size - 1, quick=arguments.quick):
        plain, speculating = (made_up_engine(case, tokenizer, speculates, models) for speculates in (False, True))
        show(compare(case.name, plain, speculating, case.prompts, num_tokens, rounds), arguments.json)


def own(arguments: argparse.Namespace) -> None:
    texts = read_prompts(GenerateConfig(arguments.model, prompts=arguments.prompts))
    num_tokens, rounds = (64, 1) if arguments.quick else (256, 3)
    config = EngineConfig(max_rows=min(len(texts), 8), prefix_cache=False)
    ways = {"lookup": SpeculationConfig("lookup")}
    if arguments.draft:
        ways["smaller model"] = SpeculationConfig("model", model=arguments.draft)
    if arguments.layers:
        ways["first layers"] = SpeculationConfig("layers", layers=arguments.layers)
    plain = load_engine(arguments.model, config)
    prompts = [plain.encode(text) for text in texts]
    for name, way in ways.items():
        speculating = load_engine(arguments.model, replace(config, speculation=way))
        show(compare(f"{name}, {len(prompts)} texts", plain, speculating, prompts, num_tokens, rounds), arguments.json)


def main() -> None:
    parser = command_line(__doc__, "short answers, one text at a time: under 50 s")
    parser.add_argument("--model", type=Path, help="a model directory of your own, with --prompts")
    parser.add_argument("--prompts", type=Path, help="prompts for it, as `puna generate` takes them")
    parser.add_argument("--draft", type=Path, help="a smaller model with the same tokenizer")
    parser.add_argument("--layers", type=int, help="guess by so many of its first layers")
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.prompts is None):
        sys.exit("--model and --prompts go together.")
    run: Callable[[argparse.Namespace], None] = own if arguments.model else made_up
    run(arguments)


if __name__ == "__main__":
    main()
