"""Weights replaced in an engine that is at work."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.compress.apply import quantize
from puna.compress.quantization import Quantization
from puna.infer.config import EngineConfig, SpeculationConfig
from puna.infer.engine import Engine
from puna.infer.sampling import SamplingParams
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer
from puna.weights.load import save_model

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)


@pytest.fixture(scope="module")
def other(model: Transformer) -> Transformer:
    """The same shape, other weights."""
    other = Transformer(model.config)
    initialize(other, seed=2)
    other.output.weight.data *= 4
    return other.eval()


def copy_of(model: Transformer) -> Transformer:
    twin = Transformer(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.eval()


@torch.inference_mode()
def recompute(model: Transformer, prompt: Sequence[int], num_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=20), min_size=1, max_size=5),
    steps=st.integers(0, 10),
    step_tokens=st.sampled_from((4, 16, 512)),
    guessing=st.booleans(),
)
def test_texts_go_on_with_the_new_weights(
    model: Transformer,
    other: Transformer,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    steps: int,
    step_tokens: int,
    guessing: bool,
) -> None:
    """Wherever the change comes, each text is what the old weights began and the new ones go on with."""
    speculation = SpeculationConfig(kind="layers", layers=1) if guessing else SpeculationConfig()
    config = EngineConfig(max_rows=3, block_size=4, step_tokens=step_tokens, speculation=speculation)
    engine = Engine(copy_of(model), tokenizer, config)
    requests = [engine.submit(prompt, GREEDY) for prompt in prompts]
    for _ in range(steps):
        engine.step()
    begun = [list(request.ids) for request in requests]
    engine.load_weights(other.state_dict())
    engine.scheduler.check_integrity()
    while not engine.idle:
        engine.step()
    for prompt, request, ids in zip(prompts, requests, begun, strict=True):
        assert ids == recompute(model, prompt, len(ids))
        assert request.ids == ids + recompute(other, [*prompt, *ids], 12 - len(ids))
    # And what comes later finds nothing of the old weights in the cache.
    for prompt in prompts:
        [completion] = engine.generate([prompt], GREEDY)
        assert list(completion.ids) == recompute(other, prompt, 12)
    assert engine.weight_version == 1
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks


def test_old_prefixes_are_never_matched(model: Transformer, other: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(copy_of(model), tokenizer, EngineConfig(block_size=4))
    prompt = [7] * 20

    def cached() -> int:
        return engine.generate([prompt], GREEDY)[0].prompt.num_cached_tokens

    assert [cached(), cached()] == [0, 16]
    engine.load_weights(other.state_dict())
    assert [cached(), cached()] == [0, 16]
    engine.load_weights(model.state_dict())  # the first ones again count as new
    assert cached() == 0


def test_a_prompts_logprobs_are_from_one_model(model: Transformer, other: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(copy_of(model), tokenizer, EngineConfig(step_tokens=4, max_rows=2))
    prompt = list(range(40, 60))
    request = engine.submit(prompt, SamplingParams(max_tokens=0, prompt_logprobs=0))
    engine.step()
    assert 0 < len(request.prompt_logprobs) < 19
    engine.load_weights(other.state_dict())
    while not engine.idle:
        engine.step()
    with torch.inference_mode():
        logprobs_TV = other(torch.tensor([prompt]))[0].log_softmax(-1)
    expected = [logprobs_TV[place, token_id].item() for place, token_id in enumerate(prompt[1:])]
    assert [entry.logprob for entry in request.prompt_logprobs] == pytest.approx(expected, abs=1e-5)


def test_from_a_directory(model: Transformer, other: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(other, tmp_path / "other", tokenizer=tokenizer)
    engine = Engine(copy_of(model), tokenizer)
    engine.load_weights(tmp_path / "other")
    assert list(engine.generate([[1, 2]], GREEDY)[0].ids) == recompute(other, [1, 2], 12)


def test_quantised_weights(model: Transformer, other: Transformer, tokenizer: Tokenizer) -> None:
    """What a kernel has laid out in its own order is laid out anew."""
    before, after = copy_of(model), copy_of(other)
    for one in (before, after):
        quantize(one, Quantization(kind="int8"))
    engine, fresh = Engine(before, tokenizer), Engine(after, tokenizer)
    old = engine.generate([[1, 2]], GREEDY)
    engine.load_weights(after.state_dict())
    new = engine.generate([[1, 2]], GREEDY)
    assert new == fresh.generate([[1, 2]], GREEDY)
    assert new[0].ids != old[0].ids
    with pytest.raises(InputError, match="missing"):
        engine.load_weights(other.state_dict())


def test_what_does_not_fit_changes_nothing(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    engine = Engine(copy_of(model), tokenizer)
    state = model.state_dict()
    half = {name: tensor for name, tensor in state.items() if "feed_forward" not in name}
    cut = state | {"embedding.weight": state["embedding.weight"][:100] + 1}
    sharper = Transformer(replace(model.config, rope_theta=7.0))
    initialize(sharper, seed=0)
    save_model(sharper, tmp_path / "sharper")
    request = engine.submit([1, 2], GREEDY)
    engine.step()
    for source, message in [
        (half, r"in the given state .* 8 missing: layers\.0\.feed_forward"),
        (cut, r"wrong shape: embedding\.weight \(100x32, expected 260x32\)"),
        (state | {"extra": state["norm.weight"]}, "1 unexpected: extra"),
        (tmp_path / "sharper", r"another model .* rope_theta = 7\.0 in place of"),
        (tmp_path / "absent", "no checkpoint at"),
    ]:
        with pytest.raises(InputError, match=message):
            engine.load_weights(source)
    assert engine.weight_version == 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in engine.model.state_dict().items())
    while not engine.idle:
        engine.step()
    assert request.ids == recompute(model, [1, 2], 12)
