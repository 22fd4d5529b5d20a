"""The engine's log-probabilities are those of the training forward, whatever runs beside a text and has run before."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.infer.config import EngineConfig, SpeculationConfig
from puna.infer.engine import Engine
from puna.infer.request import Request, TokenLogprob
from puna.infer.sampling import SamplingParams
from puna.model.transformer import Transformer
from puna.tokenizer.base import Tokenizer

TOLERANCE = 1e-5
"""float32; sums of a few dozen products are rounded differently by products of different shapes."""


@dataclass(frozen=True)
class Text:
    prompt: list[int]
    max_tokens: int
    scored: bool
    seed: int
    priority: int
    arrival: int


texts = st.builds(
    Text,
    # Few different tokens, so that texts begin alike.
    prompt=st.lists(st.sampled_from((1, 1, 1, 2, 200)), min_size=1, max_size=40),
    max_tokens=st.integers(0, 12),
    scored=st.booleans(),
    seed=st.integers(0, 3),
    priority=st.sampled_from((0, 0, 1)),
    arrival=st.integers(0, 8),
)
configs = st.builds(
    dict,
    max_rows=st.integers(1, 5),
    block_size=st.sampled_from((1, 4, 16)),
    step_tokens=st.sampled_from((1, 7, 512)),
    overcommit=st.sampled_from((1.0, 5.0)),
    prefix_cache=st.booleans(),
)
modes = st.sampled_from(("plain", "plain", "invariant", "lookup", "layers"))


def training_logprobs(model: Transformer, ids: Sequence[int]) -> list[float]:
    """Of each token but the first, with gradients on, as in a training step."""
    logprobs_TV = model(torch.tensor([ids]))[0].log_softmax(-1)
    return [logprobs_TV[place, token_id].item() for place, token_id in enumerate(ids[1:])]


def check(model: Transformer, request: Request) -> None:
    expected = training_logprobs(model, request.tokens)

    def close(entries: Sequence[TokenLogprob], first: int) -> None:
        place = slice(first - 1, first - 1 + len(entries))
        assert [entry.id for entry in entries] == request.tokens[first : first + len(entries)]
        assert [entry.logprob for entry in entries] == pytest.approx(expected[place], abs=TOLERANCE, rel=0)

    close(request.logprobs, request.num_prompt)
    assert len(request.logprobs) == request.num_generated
    if request.params.prompt_logprobs is not None:
        close(request.prompt_logprobs, 1)
        assert len(request.prompt_logprobs) == request.num_prompt - 1


@settings(max_examples=25, deadline=None)
@given(schedule=st.lists(texts, min_size=1, max_size=8), config=configs, mode=modes, gated=st.booleans())
def test_every_logprob_is_the_training_forwards(
    model: Transformer,
    gated_model: Transformer,
    tokenizer: Tokenizer,
    schedule: list[Text],
    config: dict[str, Any],
    mode: str,
    gated: bool,
) -> None:
    """For batch compositions, chunk sizes, cache states, preemption and speculation; and for a mixture of depths, of
    which the forward of evaluation is meant."""
    model = gated_model if gated else model
    if mode == "invariant":
        config = {**config, "batch_invariant": True}
    elif mode != "plain":
        layers = 1 if mode == "layers" else None
        config = {**config, "speculation": SpeculationConfig(kind=mode, layers=layers)}  # type: ignore[arg-type]
    engine = Engine(model, tokenizer, EngineConfig(max_context=56, cache_tokens=80, **config))
    requests = []
    for time in range(9):
        for text in [text for text in schedule if text.arrival == time]:
            params = SamplingParams(
                max_tokens=0 if text.scored and text.max_tokens < 6 else text.max_tokens + 1,
                prompt_logprobs=0 if text.scored else None,
                seed=text.seed,
                temperature=0.0 if text.seed == 0 else 1.0,
                ignore_eos=True,
                logprobs=0,
            )
            requests.append(engine.submit(text.prompt, params, priority=text.priority))
        engine.step()
    while not engine.idle:
        engine.step()
    for request in requests:
        check(model, request)


@pytest.mark.parametrize("name", ["model", "gated_model"])
def test_preemption_is_among_the_cases(request: pytest.FixtureRequest, name: str, tokenizer: Tokenizer) -> None:
    """What the property above may meet by chance: a text gives its blocks up half-way, and is computed again."""
    model: Transformer = request.getfixturevalue(name)
    config = EngineConfig(max_context=56, cache_tokens=80, max_rows=4, overcommit=5.0, block_size=4, step_tokens=8)
    engine = Engine(model, tokenizer, config)
    params = SamplingParams(max_tokens=16, prompt_logprobs=0, logprobs=0, temperature=0, ignore_eos=True)
    requests = [engine.submit([n, *range(30)], params, priority=n) for n in range(4)]
    while not engine.idle:
        engine.step()
    assert engine.scheduler.num_preemptions > 0
    for submitted in requests:
        check(model, submitted)
