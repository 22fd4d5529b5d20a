"""Mixed traffic for a long time: no block is lost, no memory grows, no request gets stuck."""

import gc
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from puna.infer.config import EngineConfig, SpeculationConfig
from puna.infer.constrain import Constraint
from puna.infer.engine import Engine
from puna.infer.request import Request
from puna.infer.sampling import SamplingParams
from puna.model.transformer import Transformer
from puna.tokenizer.base import Tokenizer

MAX_CONTEXT = 160
CACHE_TOKENS = 320
WAITING = 24
"""Traffic comes as fast as this many are kept waiting."""
PATIENCE = 3000
"""Steps within which every request has to come to its end, whatever its priority."""


class Traffic:
    """Requests of every kind, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._beginnings = [self._ids(length) for length in (16, 40, 64)]

    def _ids(self, length: int) -> list[int]:
        return [self._chance.randrange(256) for _ in range(length)]

    def prompt(self) -> list[int]:
        if self._chance.random() < 0.5:
            return self._chance.choice(self._beginnings) + self._ids(self._chance.randint(1, 8))
        return self._ids(self._chance.choice((1, 5, 12, 30, 110)))

    def params(self) -> SamplingParams:
        kind = self._chance.random()
        seed = self._chance.randrange(1000)
        most = self._chance.choice((1, 4, 8, 16, 48))
        if kind < 0.4:
            return SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)
        if kind < 0.6:
            return SamplingParams(max_tokens=most, top_p=0.9, top_k=40, logprobs=2)
        if kind < 0.75:
            return SamplingParams(
                max_tokens=most, seed=seed, repetition_penalty=1.2, frequency_penalty=0.1, logit_bias=((7, -5.0),)
            )
        if kind < 0.85:
            return SamplingParams(max_tokens=None, stop=("e", "t\n", "abc"), min_p=0.02)
        if kind < 0.9:
            return SamplingParams(max_tokens=0, prompt_logprobs=1)
        if kind < 0.93:
            return SamplingParams(constraint=Constraint(regex="(" * (1 + seed % 5)))
        if kind < 0.965:
            choice = (f"answer {seed % 300}", "no")  # more of them than are remembered
            return SamplingParams(max_tokens=30, constraint=Constraint(choice=choice))
        schema = {"type": "array", "items": {"type": "integer", "maximum": seed % 7}, "maxItems": 4}
        return SamplingParams(max_tokens=30, constraint=Constraint(json_schema=json.dumps(schema)))

    def batches(self, num_requests: int) -> Iterator[list[tuple[list[int], SamplingParams, int, int | None]]]:
        """Prompt, parameters, priority and the number of steps after which it is cancelled, n of the same prompt."""
        while num_requests > 0:
            n = min(self._chance.choice((1, 1, 1, 2, 4)), num_requests)
            prompt, params, priority = self.prompt(), self.params(), self._chance.choice((0, 0, 0, 0, 1, 2))
            cancelled = self._chance.randint(0, 25) if self._chance.random() < 0.12 else None
            yield [(prompt, params, priority, cancelled)] * n
            num_requests -= n


def soak(engine: Engine, num_requests: int, seed: int = 0) -> Counter[str]:
    """Send requests through; how they ended. Afterwards nothing is left of them."""
    remembered = num_objects(Request)
    ends: Counter[str] = Counter()
    running: dict[Request, tuple[int, int | None]] = {}  # the step at which it came, and at which it is cancelled
    batches = Traffic(seed).batches(num_requests)
    time, exhausted = 0, False
    while running or not exhausted:
        while not exhausted and engine.scheduler.num_waiting < WAITING:
            batch = next(batches, None)
            exhausted = batch is None
            for prompt, params, priority, cancelled in batch or ():
                request = engine.submit(prompt, params, priority=priority)
                running[request] = (time, None if cancelled is None else time + cancelled)
        for request, (came, cancelled) in list(running.items()):
            assert time - came < PATIENCE, "a request is stuck"
            if cancelled == time:
                engine.cancel(request)
                ends["cancelled"] += 1
                del running[request]
        for request in engine.step():
            if request.finish_reason is not None:
                assert request.finish_reason != "failed" or "unclosed group" in request.error
                ends[request.finish_reason] += 1
                del running[request]
        if time % 16 == 0:
            engine.scheduler.check_integrity()
        time += 1
    assert engine.idle
    engine.scheduler.check_integrity()
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    # The runner's table and the last batch's sampler still know some that have ended; the next ones take their places.
    assert num_objects(Request) <= remembered + 3 * engine.max_rows
    return ends


def num_objects(kind: type) -> int:
    gc.collect()
    return sum(type(thing) is kind for thing in gc.get_objects())


def open_engine(model: Transformer, tokenizer: Tokenizer, kind: str) -> Engine:
    speculation = SpeculationConfig(kind=kind)  # type: ignore[arg-type]
    config = EngineConfig(
        max_rows=8,
        max_context=MAX_CONTEXT,
        cache_tokens=CACHE_TOKENS,
        block_size=8,
        overcommit=4.0,
        step_tokens=48,
        speculation=speculation,
    )
    return Engine(model, tokenizer, config)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@torch.inference_mode()
def test_mixed_traffic_leaves_nothing_behind(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = open_engine(model, tokenizer, "lookup")
    ends = soak(engine, 300)
    assert sum(ends.values()) == 300
    assert set(ends) == {"stop", "length", "cancelled", "failed"}
    assert engine.scheduler.num_preemptions > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads its own memory from /proc")
@pytest.mark.parametrize("kind", ["none", "lookup"])
def test_ten_thousand_requests(model: Transformer, tokenizer: Tokenizer, kind: str) -> None:
    engine = open_engine(model, tokenizer, kind)
    # Warms up: allocators, and what is remembered of constraints, reach their size.
    choices = [SamplingParams(max_tokens=1, constraint=Constraint(choice=(f"other {i}",))) for i in range(200)]
    engine.generate([[1]] * len(choices), choices)
    soak(engine, 2000, seed=1)
    before = resident_bytes()
    ends = soak(engine, 10_000)
    grown = resident_bytes() - before
    print(f"{dict(ends)}, {engine.scheduler.num_preemptions} preemptions, {grown / 1e6:+.1f} MB")
    assert sum(ends.values()) == 10_000
    assert min(ends[reason] for reason in ("stop", "length", "cancelled", "failed")) > 50
    assert grown < 4e6
