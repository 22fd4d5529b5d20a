"""The engine against the training forward: whatever it does to save work, log-probabilities are the same."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.infer.config import EngineConfig, SpeculationConfig
from puna.infer.engine import Engine
from puna.infer.request import Completion
from puna.infer.sampling import SamplingParams
from puna.model.config import LlamaConfig, RopeScaling
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.tiktoken_ranks import TiktokenTokenizer

CONTEXT = 96
# float32 rounding; the log-probabilities are about -5.
TOLERANCE = 1e-5


def build(**flags: object) -> Transformer:
    config = LlamaConfig(
        vocab_size=258,
        dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        hidden_dim=48,
        context_length=CONTEXT,
        **flags,  # type: ignore[arg-type]
    )
    model = Transformer(config)
    initialize(model, seed=1)
    return model.eval()


MODELS = [
    build(),
    build(rope_scaling=RopeScaling("llama3", 8.0, original_context_length=32), tie_embeddings=True),
    build(qkv_bias=True, qk_norm=True),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    special = {"<|begin_of_text|>": 256, "<|end_of_text|>": 257}
    return TiktokenTokenizer({bytes([i]): i for i in range(256)}, "llama3", special)


@dataclass(frozen=True)
class Ask:
    """A request; prompts of the same family begin alike, so that they share blocks."""

    family: int
    length: int
    own: int
    num_tokens: int
    arrival: int
    priority: int
    reports_prompt: bool
    cancelled_after: int | None

    @property
    def prompt(self) -> list[int]:
        shared = [(self.family * 7 + 3 * i) % 256 for i in range(self.length)]
        return [*shared, self.own]


asks = st.builds(
    Ask,
    family=st.integers(0, 1),
    length=st.integers(0, 60),
    own=st.integers(0, 255),
    num_tokens=st.integers(0, 12),
    arrival=st.integers(0, 12),
    priority=st.sampled_from((0, 0, 1)),
    reports_prompt=st.booleans(),
    cancelled_after=st.sampled_from((None, None, None, 0, 4)),
)
configs = st.builds(
    EngineConfig,
    max_rows=st.integers(1, 4),
    step_tokens=st.sampled_from((1, 5, 16, 64)),
    block_size=st.sampled_from((1, 4, 16)),
    cache_tokens=st.sampled_from((CONTEXT, CONTEXT + 40, 400)),
    overcommit=st.sampled_from((1.0, 4.0)),
    prefix_cache=st.booleans(),
    batch_invariant=st.sampled_from((False, False, True)),
)
guesses = st.sampled_from(
    (
        SpeculationConfig(),
        SpeculationConfig("lookup", tokens=3, shortest_match=1),
        SpeculationConfig("layers", layers=1),
    )
)


def serve(engine: Engine, schedule: list[Ask]) -> list[Completion | None]:
    """Every request at its time; None for those that were cancelled."""
    requests = {}
    for time in range(3000):
        for number, ask in enumerate(schedule):
            if ask.arrival == time:
                params = SamplingParams(
                    max_tokens=ask.num_tokens,
                    temperature=1.5,
                    seed=number,
                    ignore_eos=True,
                    logprobs=2,
                    prompt_logprobs=1 if ask.reports_prompt else None,
                )
                requests[number] = engine.submit(ask.prompt, params, priority=ask.priority)
            if number in requests and ask.cancelled_after == time - ask.arrival:
                engine.cancel(requests[number])
        engine.step()
        engine.scheduler.check_integrity()
        if engine.idle and len(requests) == len(schedule):
            break
    assert engine.idle
    completions = [requests[number].completion() for number in range(len(schedule))]
    return [None if one.finish_reason == "cancelled" else one for one in completions]


@settings(max_examples=80, deadline=None)
@given(
    model=st.sampled_from(MODELS),
    config=configs,
    guess=guesses,
    schedule=st.lists(asks, min_size=1, max_size=6),
    twice=st.booleans(),
)
def test_logprobs_are_the_training_forwards(
    model: Transformer,
    tokenizer: Tokenizer,
    config: EngineConfig,
    guess: SpeculationConfig,
    schedule: list[Ask],
    twice: bool,
) -> None:
    """For every batch, piece and block size, shared prefix, preemption, cancellation and speculation."""
    if not config.batch_invariant:
        config = replace(config, speculation=guess)
    engine = Engine(model, tokenizer, config)
    if twice:
        serve(engine, schedule)  # so that the cache is warm
    for ask, completion in zip(schedule, serve(engine, schedule), strict=True):
        if completion is None:
            continue
        ids = [*ask.prompt, *completion.ids]
        assert len(completion.ids) == min(ask.num_tokens, CONTEXT - len(ask.prompt))
        with torch.inference_mode():
            expected_TV = model(torch.tensor([ids]))[0].log_softmax(-1)
        reported = [*completion.prompt.logprobs, *completion.logprobs]
        first = 1 if ask.reports_prompt else len(ask.prompt)
        assert [entry.id for entry in reported] == ids[first:]
        for position, entry in enumerate(reported, start=first):
            expected_V = expected_TV[position - 1]
            assert entry.logprob == pytest.approx(expected_V[ids[position]].item(), abs=TOLERANCE)
            for token_id, logprob in entry.top:
                assert logprob == pytest.approx(expected_V[token_id].item(), abs=TOLERANCE)


@settings(max_examples=40, deadline=None)
@given(
    config=configs.map(lambda config: replace(config, max_rows=4, batch_invariant=True)),
    schedule=st.lists(asks, min_size=2, max_size=6),
)
def test_batch_invariant_results_do_not_depend_on_neighbours(
    tokenizer: Tokenizer, config: EngineConfig, schedule: list[Ask]
) -> None:
    """Bit by bit, with neighbours, preemptions and shared prefixes."""
    crowd = serve(Engine(MODELS[0], tokenizer, config), schedule)
    for number, completion in enumerate(crowd):
        if completion is not None:
            alone = [ask if n == number else Ask(0, 0, 0, 0, 0, 0, False, 0) for n, ask in enumerate(schedule)]
            expected = serve(Engine(MODELS[0], tokenizer, config), alone)[number]
            assert expected is not None
            assert (completion.ids, completion.logprobs) == (expected.ids, expected.logprobs)
            assert completion.prompt.logprobs == expected.prompt.logprobs


def test_what_is_shared_is_counted(tokenizer: Tokenizer) -> None:
    engine = Engine(MODELS[0], tokenizer, EngineConfig(block_size=4, max_rows=2))
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompt = list(range(30))
    [first] = engine.generate([prompt], params)
    [second] = engine.generate([[*prompt, *first.ids, 7]], params)
    [third, fourth] = engine.generate([[99, *prompt], [99, *prompt]], params)
    assert [one.prompt.num_cached_tokens for one in (first, second, third, fourth)] == [0, 32, 0, 28]
    assert third.ids == fourth.ids
