"""Beam search beside transformers', and against what it promises."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from puna.infer.beam import BeamParams, beam_search
from puna.infer.config import EngineConfig
from puna.infer.engine import Engine
from puna.infer.llm import LLM
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer
from puna.weights.load import save_model

Search = Callable[..., list[tuple[list[int], float]]]


@pytest.fixture(scope="module")
def theirs(model: Transformer, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Search:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_model(model, directory, tokenizer=tokenizer)
    other = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def search(prompt: list[int], params: BeamParams) -> list[tuple[list[int], float]]:
        ids = torch.tensor([prompt])
        ends = None if params.ignore_eos else [*tokenizer.stop_ids, *params.stop_ids]
        found = other.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=params.num_beams,
            num_return_sequences=params.num_beams,
            max_new_tokens=params.max_tokens,
            length_penalty=params.length_penalty,
            eos_token_id=ends,
            pad_token_id=-1,
            output_scores=True,
            return_dict_in_generate=True,
        )
        texts = [[i for i in row if i >= 0] for row in found.sequences[:, len(prompt) :].tolist()]
        return list(zip(texts, found.sequences_scores.tolist(), strict=True))

    return search


@settings(max_examples=12, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=20), min_size=1, max_size=3),
    num_beams=st.integers(2, 5),
    max_tokens=st.integers(1, 12),
    length_penalty=st.sampled_from((0.0, 0.5, 1.0, 2.0)),
    stop_ids=st.lists(st.integers(0, 255), max_size=60, unique=True),
    ignore_eos=st.booleans(),
    settings=st.sampled_from(
        ({}, {"block_size": 4, "max_rows": 3}, {"prefix_cache": False}, {"cache_tokens": 300, "overcommit": 4.0})
    ),
)
def test_the_same_texts_as_transformers(
    model: Transformer,
    tokenizer: Tokenizer,
    theirs: Search,
    prompts: list[list[int]],
    settings: dict[str, Any],
    **fields: Any,
) -> None:
    if fields["ignore_eos"]:
        fields["stop_ids"] = []
    params = BeamParams(**{**fields, "stop_ids": tuple(fields["stop_ids"])})
    engine = Engine(model, tokenizer, EngineConfig(**settings))
    for prompt, found in zip(prompts, beam_search(engine, prompts, params), strict=True):
        scored = [(list(one.ids), params.score(sum(e.logprob for e in one.logprobs), len(one.ids))) for one in found]
        expected = theirs(prompt, params)
        # Fewer than there are beams may have ended when the search does; transformers then fills up with nothing.
        assert [score for _, score in scored] == pytest.approx([s for _, s in expected][: len(scored)], abs=1e-4)
        assert [ids for ids, _ in scored] == [ids for ids, _ in expected][: len(scored)]
        assert all(score < -1e8 for _, score in expected[len(scored) :])
    assert engine.idle
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks


def test_beams_share_what_is_in_the_cache(model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, EngineConfig(block_size=4, max_rows=4))
    computed = []
    run = engine._runner.run
    engine._runner.run = lambda plan: (computed.append(sum(plan.values())), run(plan))[1]  # type: ignore[method-assign]
    beam_search(engine, [list(range(100))], BeamParams(num_beams=4, max_tokens=8, ignore_eos=True))
    assert computed[0] == 100
    # Each later token costs a beam at most the rest of a block.
    assert sum(computed[1:]) <= 7 * 4 * 4


def test_from_python(model_directory: Path) -> None:
    llm = LLM(model_directory, device="cpu", num_threads=1, max_rows=4)
    one, two = llm.beam_search(["abc", [1, 2]], num_beams=3, max_tokens=6, n=2, ignore_eos=True)
    assert (len(one.completions), len(two.completions)) == (2, 2)
    totals = [sum(entry.logprob for entry in completion.logprobs) for completion in one.completions]
    assert totals == sorted(totals, reverse=True)
    greedy = llm.generate("abc", temperature=0, max_tokens=6, logprobs=0, ignore_eos=True).completions[0]
    assert totals[0] >= sum(entry.logprob for entry in greedy.logprobs) - 1e-4
    [single] = llm.beam_search(["abc"], num_beams=1, max_tokens=6, ignore_eos=True)
    assert (single.text, single.completions[0].ids) == (greedy.text, greedy.ids)
    assert single.completions[0].finish_reason == "length"
    scores = llm.score([[*one.prompt_ids, *one.completions[0].ids]])[0]
    assert scores.logprobs[-1].logprob == pytest.approx(one.completions[0].logprobs[-1].logprob, abs=1e-5)


def test_padding_of_the_vocabulary_is_never_chosen(model: Transformer, tokenizer: Tokenizer) -> None:
    padded = Transformer(replace(model.config, vocab_size=280))
    state = model.state_dict()
    for name in ("embedding.weight", "output.weight"):
        state[name] = torch.cat((state[name], state[name][:20] * 10))
    padded.load_state_dict(state)
    [found] = beam_search(Engine(padded.eval(), tokenizer), [[1, 2, 3]], BeamParams(max_tokens=10))
    assert len(found) == 4
    assert max(token_id for text in found for token_id in text.ids) < 260


def test_mistakes(model_directory: Path) -> None:
    llm = LLM(model_directory, device="cpu", num_threads=1)
    for changes, message in [
        ({"num_beams": 0}, "num_beams is 0"),
        ({"n": 5}, "n is 5; .* num_beams, which is 4"),
        ({"beams": 3}, "no setting beams"),
    ]:
        with pytest.raises(InputError, match=message):
            llm.beam_search(["x"], **changes)
    with pytest.raises(InputError, match="Prompt 2 of 2: The prompt is empty"):
        llm.beam_search(["x", []])
