"""`from puna import LLM`."""

import math
from pathlib import Path

import pytest
import torch

import puna
from puna import LLM
from puna.infer.engine import Engine
from puna.infer.sampling import SamplingParams
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.chat import render_chat

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def llm(model_directory: Path) -> LLM:
    return LLM(model_directory, device="cpu", num_threads=1, max_rows=3)


def test_generate(llm: LLM, model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    expected = engine.generate([engine.encode("one"), [1, 2]], GREEDY)
    one, two = llm.generate(["one", [1, 2]], GREEDY)
    assert [one.completions[0].ids, two.completions[0].ids] == [completion.ids for completion in expected]
    assert (one.text, one.prompt_ids) == (expected[0].text, tuple(engine.encode("one")))
    assert llm.generate("one", temperature=0, max_tokens=6, ignore_eos=True).text == one.text


def test_several_completions_differ_and_are_repeatable(llm: LLM) -> None:
    first, again = (llm.generate("x" * 40, max_tokens=8, seed=3, n=3, ignore_eos=True) for _ in range(2))
    assert [c.ids for c in first.completions] == [c.ids for c in again.completions]
    assert len({c.ids for c in first.completions}) == 3
    assert [c.prompt.num_cached_tokens for c in first.completions] == [0, 32, 32]


def test_chat_and_stream(llm: LLM, tokenizer: Tokenizer) -> None:
    answer = llm.chat(HELLO, GREEDY)
    assert answer.prompt_ids == tuple(render_chat(tokenizer, HELLO, add_generation_prompt=True).ids)
    several = llm.chat([HELLO, [{"role": "user", "content": "Bye"}]], GREEDY, n=2)
    assert [len(output.completions) for output in several] == [2, 2]
    assert several[0].text == answer.text
    assert "".join(delta.text for delta in llm.stream(HELLO, GREEDY)) == answer.text
    assert "".join(delta.text for delta in llm.stream("one", GREEDY)) == llm.generate("one", GREEDY).text


def test_score(llm: LLM, model: Transformer) -> None:
    with torch.inference_mode():
        expected = model(torch.tensor([[256, *b"abc"]]))[0].log_softmax(-1)
    one, whole_context = llm.score(["abc", [7] * 256], top=2)
    assert one.ids == (256, *b"abc")
    assert [entry.logprob for entry in one.logprobs] == pytest.approx(
        [expected[t, one.ids[t + 1]].item() for t in range(3)], abs=1e-5
    )
    assert one.total == pytest.approx(sum(entry.logprob for entry in one.logprobs))
    assert [len(entry.top) for entry in one.logprobs] == [2] * 3
    assert len(whole_context.logprobs) == 255
    assert llm.score("abc").total == pytest.approx(one.total, abs=1e-4)


def test_embed(llm: LLM, model: Transformer) -> None:
    texts = ["a", "abc" * 20, "b" * 200, "abc" * 20]
    vectors = llm.embed(texts)
    assert vectors.shape == (4, 32)
    assert vectors.norm(dim=1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    torch.testing.assert_close(vectors[1], vectors[3], rtol=0, atol=1e-5)
    hidden = {}
    with torch.inference_mode():
        model(torch.tensor([[256, *b"abc" * 20]]), head=lambda h, output: hidden.update(states=h[0]))
    alone = llm.embed(["abc" * 20], pooling="last", normalize=False)[0]
    torch.testing.assert_close(alone, hidden["states"][-1], rtol=1e-4, atol=1e-5)
    assert llm.embed([]).shape == (0, 32)


def test_mistakes_are_named(llm: LLM, model_directory: Path) -> None:
    with pytest.raises(InputError, match=r"no setting temprature. Did you mean temperature\?"):
        llm.generate("x", temprature=1)
    with pytest.raises(InputError, match=r"no setting rows"):
        LLM(model_directory, rows=3)
    with pytest.raises(InputError, match="n is 0"):
        llm.generate("x", n=0)
    with pytest.raises(InputError, match="has 257 tokens"):
        llm.embed(["x" * 256])
    with pytest.raises(AttributeError, match="no attribute 'LLMs'"):
        _ = puna.LLMs


def test_scores_are_nats(llm: LLM) -> None:
    """Summed over every token that could come next, probabilities are 1."""
    [entry] = llm.score([[1, 2]], top=260)[0].logprobs
    assert sum(math.exp(logprob) for _, logprob in entry.top) == pytest.approx(1, abs=1e-5)
