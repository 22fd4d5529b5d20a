"""Filters against transformers, draws against probabilities."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from puna.infer.sampling import Penalties, Sampler, SamplingParams
from puna.runtime.errors import InputError

CPU = torch.device("cpu")

params_strategy = st.builds(
    SamplingParams,
    temperature=st.one_of(st.just(0.0), st.floats(0.1, 3)),
    top_k=st.one_of(st.integers(0, 40), st.just(400)),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.9),
)


@settings(max_examples=200, deadline=None)
@given(
    params=params_strategy.filter(lambda p: p.temperature > 0),
    vocab_size=st.sampled_from((3, 32, 1000)),
    seed=st.integers(0, 2**31),
)
def test_filters_are_those_of_transformers(params: SamplingParams, vocab_size: int, seed: int) -> None:
    logits_BV = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    theirs = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        theirs.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        theirs.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        theirs.append(MinPLogitsWarper(params.min_p))
    expected_BV = theirs(torch.zeros(4, 1, dtype=torch.long), logits_BV).softmax(-1)
    got_BV = Sampler([params] * 4, CPU).filter(logits_BV).softmax(-1)
    torch.testing.assert_close(got_BV, expected_BV)


def test_ties_are_kept() -> None:
    params = [SamplingParams(top_k=2), SamplingParams(top_p=0.6)]
    kept_BV = Sampler(params, CPU).filter(torch.tensor([[3.0, 2.0, 2.0, 1.0]] * 2)).isfinite()
    assert kept_BV.tolist() == [[True, True, True, False]] * 2


def test_draws_follow_the_filtered_distribution() -> None:
    """Chi-squared below its 99.9 % quantile for 9 degrees of freedom, the most that a row has."""
    num_draws, num_copies = 20_000, 500
    params = [SamplingParams(), SamplingParams(temperature=0.5, top_k=4), SamplingParams(temperature=2, top_p=0.8)]
    sampler = Sampler(params * num_copies, CPU)
    logits_BV = torch.randn(3, 10, generator=torch.Generator().manual_seed(0)).repeat(num_copies, 1) * 2
    probabilities_BV = sampler.filter(logits_BV).softmax(-1)[:3]
    uniform = random.Random(0).random
    draws = [sampler(logits_BV, [uniform() for _ in logits_BV]) for _ in range(num_draws // num_copies)]
    counts_BV = torch.stack([torch.cat(draws)[row::3].bincount(minlength=10) for row in range(3)])
    for counts_V, probabilities_V in zip(counts_BV, probabilities_BV, strict=True):
        kept = probabilities_V > 0
        assert counts_V[~kept].sum() == 0
        expected = probabilities_V[kept] * num_draws
        assert ((counts_V[kept] - expected).square() / expected).sum() < 27.9


@settings(max_examples=100, deadline=None)
@given(
    batch=st.lists(st.tuples(params_strategy, st.integers(0, 99), st.floats(0, 1, exclude_max=True)), min_size=1),
)
def test_a_row_does_not_depend_on_its_neighbours(batch: list[tuple[SamplingParams, int, float]]) -> None:
    logits_BV = torch.stack([torch.randn(600, generator=torch.Generator().manual_seed(seed)) for _, seed, _ in batch])
    together = Sampler([params for params, _, _ in batch], CPU)(logits_BV, [u for _, _, u in batch])
    alone = [Sampler([params], CPU)(logits_BV[[i]], [u]).item() for i, (params, _, u) in enumerate(batch)]
    assert together.tolist() == alone


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_no_uniform_number_reaches_a_token_that_is_ruled_out(uniform: float) -> None:
    logits_BV = torch.tensor([[-torch.inf, 1.0, 1.0, -torch.inf], [0.0, 5.0, 0.0, 0.0]])
    ids = Sampler([SamplingParams(), SamplingParams(top_k=1)], CPU)(logits_BV, [uniform] * 2).tolist()
    assert ids[0] in (1, 2)
    assert ids[1] == 1


def test_vanishing_temperature_is_greedy() -> None:
    logits_BV = torch.tensor([[1.0, 3.0, 2.0]] * 3)
    params = [SamplingParams(temperature=t) for t in (0, 1e-40, 1e-3)]
    assert Sampler(params, CPU)(logits_BV, [0.99] * 3).tolist() == [1, 1, 1]


def test_broken_logits_are_not_sampled() -> None:
    for broken in (torch.nan, torch.inf):
        with pytest.raises(FloatingPointError, match="not finite"):
            Sampler([SamplingParams(temperature=0)] * 2, CPU)(torch.tensor([[0.0, 1], [broken, 0]]), [0, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": -1}, "max_tokens is -1; it has to be at least 0, or absent"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0; it has to be above 0 and at most 1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"stop": ("",)}, "none of them empty"),
        ({"stop": "END"}, "stop is 'END'; it has to be a tuple"),
        ({"logprobs": -1}, "logprobs is -1"),
    ],
)
def test_wrong_parameters_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(SamplingParams(), **change)


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    ids=st.lists(st.integers(0, 9), max_size=6),
    repetition=st.floats(0.5, 2),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    bias=st.lists(st.tuples(st.integers(0, 9), st.floats(-100, 100)), max_size=3),
    seed=st.integers(0, 2**31),
)
def test_penalties_by_the_book(
    prompt: list[int],
    ids: list[int],
    repetition: float,
    presence: float,
    frequency: float,
    bias: list[tuple[int, float]],
    seed: int,
) -> None:
    """Repetition as `transformers` has it; presence and frequency by the formula in OpenAI's documentation."""
    logits_V = torch.randn(10, generator=torch.Generator().manual_seed(seed)) * 3
    params = SamplingParams(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=tuple(bias),
    )
    expected_V = logits_V.clone()
    for token_id, value in bias:
        expected_V[token_id] += value
    expected_V = RepetitionPenaltyLogitsProcessor(repetition)(torch.tensor([[*prompt, *ids]]), expected_V[None])[0]
    for token_id in range(10):
        count = ids.count(token_id)
        expected_V[token_id] -= count * frequency + float(count > 0) * presence
    for noted in range(len(ids) + 1):
        penalties = Penalties(params, prompt, ids[:noted], vocab_size=10, device=CPU)
        for token_id in ids[noted:]:
            penalties.note(token_id)
        torch.testing.assert_close(penalties.adjusted(logits_V), expected_V, rtol=1e-5, atol=1e-4)
