"""The engine against recomputation without a cache, against transformers, and against its own promises."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from puna.infer.config import EngineConfig
from puna.infer.engine import Engine
from puna.infer.request import open_decoder
from puna.infer.sampling import SamplingParams
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.convert import read_llama2c_tokenizer
from puna.tokenizer.load import load_tokenizer
from puna.weights.load import load_model, save_model

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
Reciting = Callable[[bytes | list[int]], Engine]


@torch.inference_mode()
def recompute(model: Transformer, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], list[float]]:
    """Greedy continuation and its log-probabilities by a whole forward for each token."""
    ids, logprobs = list(prompt), []
    for _ in range(num_tokens):
        logprobs_V = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        ids.append(int(logprobs_V.argmax()))
        logprobs.append(float(logprobs_V.max()))
    return ids[len(prompt) :], logprobs


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    num_tokens: int
    arrival: int
    cancelled_after: int | None


requests = st.builds(
    Request,
    prompt=st.lists(st.integers(0, 255), min_size=1, max_size=12),
    num_tokens=st.integers(1, 10),
    arrival=st.integers(0, 12),
    cancelled_after=st.one_of(st.none(), st.none(), st.integers(0, 6)),
)


@settings(max_examples=40, deadline=None)
@given(schedule=st.lists(requests, min_size=1, max_size=7), max_rows=st.integers(1, 4))
def test_every_schedule_equals_recomputation(
    model: Transformer, tokenizer: Tokenizer, schedule: list[Request], max_rows: int
) -> None:
    """Batch compositions, admission orders, reused rows and cancellations leave each sequence's tokens alone."""
    engine = Engine(model, tokenizer, EngineConfig(max_rows=max_rows))
    running = []
    for time in range(200):
        for request in [request for request in schedule if request.arrival == time]:
            sequence = engine.submit(request.prompt, replace(GREEDY, max_tokens=request.num_tokens))
            running.append((request, sequence))
        for request, sequence in running:
            if request.cancelled_after == time - request.arrival:
                engine.cancel(sequence)
        engine.step()
        if engine.idle and len(running) == len(schedule):
            break
    assert engine.idle
    for request, sequence in running:
        ids, logprobs = recompute(model, request.prompt, request.num_tokens)
        if sequence.finish_reason == "cancelled":
            assert len(sequence.ids) < request.num_tokens
        else:
            assert len(sequence.ids) == request.num_tokens
        assert sequence.ids == ids[: len(sequence.ids)]
        got = [entry.logprob for entry in sequence.logprobs]
        assert got == pytest.approx(logprobs[: len(got)], abs=1e-5)


def test_greedy_equals_transformers(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model", tokenizer=tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    prompts = [[1, 2, 3], [200], list(range(40, 60))]
    completions = Engine(model, tokenizer).generate(prompts, replace(GREEDY, max_tokens=20))
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert list(completion.ids) == out[0, len(prompt) :].tolist()


def test_a_published_model_writes_its_published_story(real_data: Path) -> None:
    stories = real_data / "weights" / "stories260K"
    published = json.loads((stories / "expected_greedy.json").read_text())
    engine = Engine(load_model(stories / "stories260K.bin"), read_llama2c_tokenizer(stories / "tok512.bin"))
    params = SamplingParams(temperature=0, max_tokens=published["steps"])
    story, cut = engine.generate([engine.encode("")] * 2, [params, replace(params, stop=("Lily's mom",))])
    assert story.text == published["expected_text"]
    assert cut.text == published["expected_text"].partition("Lily's mom")[0]


def test_seeded_tokens_do_not_depend_on_neighbours(engine: Engine) -> None:
    params = SamplingParams(seed=7, top_p=0.9, max_tokens=15, ignore_eos=True)
    prompt = [5, 6, 7]
    [alone] = engine.generate([prompt], params)
    others = [SamplingParams(temperature=0), SamplingParams(top_k=3, min_p=0.1), SamplingParams(seed=7), params]
    crowd = engine.generate([[9] * 20, [1], prompt, prompt], others)
    assert crowd[3].ids == alone.ids
    assert crowd[2].ids != alone.ids
    [fresh], [fresher] = (engine.generate([prompt], replace(params, temperature=9.0, seed=None)) for _ in range(2))
    assert fresh.ids != fresher.ids


def test_logprobs_report_chosen_and_likeliest(engine: Engine, model: Transformer) -> None:
    params = replace(GREEDY, temperature=2.0, top_k=2, logprobs=3, seed=0)
    [plain, completion] = engine.generate([[8, 9], [1, 2, 3]], [replace(params, logprobs=None), params])
    assert plain.logprobs == ()
    with torch.inference_mode():
        expected_TV = model(torch.tensor([[1, 2, 3, *completion.ids]])).log_softmax(-1)[0, 2:-1]
    for entry, token_id, expected_V in zip(completion.logprobs, completion.ids, expected_TV, strict=True):
        assert entry.id == token_id
        assert entry.logprob == pytest.approx(float(expected_V[token_id]), abs=1e-5)
        best = expected_V.topk(3)
        assert [i for i, _ in entry.top] == best.indices.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_bfloat16_runs_and_stays_near_float32(model: Transformer, tokenizer: Tokenizer) -> None:
    half = Transformer(model.config)
    half.load_state_dict(model.state_dict())
    [coarse] = Engine(half.bfloat16(), tokenizer).generate([[1, 2, 3]], GREEDY)
    with torch.inference_mode():
        logprobs_TV = model(torch.tensor([[1, 2, 3, *coarse.ids]])).log_softmax(-1)[0, 2:-1]
    exact = logprobs_TV.gather(1, torch.tensor(coarse.ids)[:, None]).squeeze(1).tolist()
    assert [entry.logprob for entry in coarse.logprobs] == pytest.approx(exact, abs=0.25)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_agrees(model: Transformer, tokenizer: Tokenizer) -> None:
    twin = Transformer(model.config)
    twin.load_state_dict(model.state_dict())
    prompts = [[1, 2, 3], [7] * 9, [4]]
    on_cpu = Engine(model, tokenizer, EngineConfig(max_rows=2)).generate(prompts, GREEDY)
    on_gpu = Engine(twin.cuda(), tokenizer, EngineConfig(max_rows=2)).generate(prompts, GREEDY)
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        assert [e.logprob for e in ours.logprobs] == pytest.approx([e.logprob for e in theirs.logprobs], abs=1e-3)


@pytest.mark.parametrize("stop", ["STOP", "w STOP", "xOPP", "STOPPED"])
def test_stop_strings_never_leak(reciting: Reciting, stop: str) -> None:
    """Every token is one byte, so every stop string crosses token boundaries."""
    text = "go STO now STOPPED"
    engine = reciting(text.encode() + b"!" * 40)
    deltas = list(engine.stream([256], SamplingParams(stop=(stop, "!!!"), max_tokens=30)))
    comes = stop if stop in text else "!!!"
    shown, expected = "", text.partition(comes)[0]
    for delta in deltas:
        shown += delta.text
        assert expected.startswith(shown)
    assert shown == expected
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["stop"]
    assert sum(len(delta.ids) for delta in deltas) == len(expected + comes)


def test_held_back_text_is_let_go_at_the_end(reciting: Reciting) -> None:
    [completion] = reciting(b"hello STO").generate([[256]], SamplingParams(stop=("STOP",), max_tokens=9))
    assert (completion.text, completion.finish_reason) == ("hello STO", "length")


def test_streamed_characters_are_whole(reciting: Reciting) -> None:
    text = "a\u00e9\u20ac\U0001f999 \u4e2d"
    deltas = list(reciting(text.encode()).stream([256], SamplingParams(max_tokens=len(text.encode()))))
    assert [delta.text for delta in deltas] == [*text]
    assert sum(len(delta.ids) for delta in deltas) == len(text.encode())
    [cut] = reciting(text.encode()).generate([[256]], SamplingParams(max_tokens=4))
    assert cut.text == "a\u00e9\ufffd"


def test_stop_tokens_end_the_text_and_are_not_part_of_it(reciting: Reciting, tokenizer: Tokenizer) -> None:
    end = tokenizer.special_tokens["<|im_end|>"]
    script = [*b"Hi", end, *b" there", *[0] * 20]
    [completion] = reciting(script).generate([[256]], SamplingParams())
    assert (completion.text, completion.ids, completion.finish_reason) == ("Hi", (*b"Hi", end), "stop")
    [completion] = reciting(script).generate([[256]], SamplingParams(stop_ids=(ord("t"),), ignore_eos=True))
    assert (completion.text, completion.finish_reason) == ("Hi ", "stop")


def test_the_answer_goes_on_where_the_prompt_stops(real_data: Path) -> None:
    """SentencePiece's dummy blank: a continuation keeps it, a text of its own has none."""
    tokenizer = load_tokenizer(real_data / "tokenizers" / "llama2" / "tokenizer.model")
    prompt, answer = tokenizer.encode("Hello"), tokenizer.encode("world")
    assert "".join(map(open_decoder(tokenizer, prompt, new_text=False).push, answer)) == " world"
    assert "".join(map(open_decoder(tokenizer, prompt, new_text=True).push, answer)) == "world"


def test_cancelling_frees_the_row(engine: Engine) -> None:
    long = SamplingParams(ignore_eos=True, max_tokens=None)
    running = [engine.submit([i + 1], long) for i in range(3)]
    waiting = [engine.submit([9], replace(GREEDY, max_tokens=2)) for _ in range(2)]
    engine.step()
    assert [bool(sequence.ids) for sequence in running + waiting] == [True, True, True, False, False]
    engine.cancel(running[0])
    engine.cancel(running[0])
    engine.cancel(waiting[0])
    for _ in range(2):
        engine.step()
    assert waiting[1].finish_reason == "length"
    assert (running[0].finish_reason, waiting[0].finish_reason, waiting[0].ids) == ("cancelled", "cancelled", [])
    assert running[1].finish_reason is None
    engine.cancel(running[1])
    engine.cancel(running[2])
    assert engine.idle


def test_closing_a_stream_cancels(engine: Engine) -> None:
    stream = engine.stream([1], SamplingParams(ignore_eos=True))
    next(stream)
    assert not engine.idle
    stream.close()
    assert engine.idle


def test_max_tokens_and_the_contexts_end(engine: Engine) -> None:
    unlimited = SamplingParams(max_tokens=None, ignore_eos=True)
    capped, to_the_end, last = engine.generate(
        [[1], [1] * 10, [1] * 63], [replace(unlimited, max_tokens=5), unlimited, unlimited]
    )
    assert [len(c.ids) for c in (capped, to_the_end, last)] == [5, 54, 1]
    assert {c.finish_reason for c in (capped, to_the_end, last)} == {"length"}
    assert to_the_end.num_prompt_tokens == 10
    ids, _ = recompute(engine.model, [1] * 10, 54)
    assert engine.generate([[1] * 10], replace(unlimited, temperature=0))[0].ids == tuple(ids)


def test_ids_without_text_are_never_chosen(model: Transformer, tokenizer: Tokenizer) -> None:
    padded = Transformer(replace(model.config, vocab_size=300))
    state = model.state_dict()
    for name in ("embedding.weight", "output.weight"):
        # Rows of the padding win over every other: far along the direction of whatever hidden state.
        state[name] = torch.cat((state[name], state[name][:40] * 10))
    padded.load_state_dict(state)
    for temperature in (0.0, 5.0):
        params = SamplingParams(temperature=temperature, max_tokens=20, ignore_eos=True)
        for completion in Engine(padded, tokenizer).generate([[1], [2], [3]], params):
            assert max(completion.ids) < 260


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is empty"),
        ([1] * 64, "prompt has 64 tokens, but the context holds 64"),
        ([1, 260], "260 is not a token of this model, whose ids end at 259"),
        ([-1], "-1 is not a token"),
    ],
)
def test_prompts_that_cannot_be_continued(engine: Engine, prompt: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine.stream(prompt, SamplingParams())
    with pytest.raises(InputError, match=f"Prompt 2 of 2: .*{message}"):
        engine.generate([[1], prompt], SamplingParams())
    assert engine.idle


def test_what_does_not_fit_together(model: Transformer, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"max_context is 257, but .* at most the 256 tokens"):
        Engine(model, tokenizer, EngineConfig(max_context=257))
    with pytest.raises(InputError, match="max_rows is 0"):
        Engine(model, tokenizer, EngineConfig(max_rows=0))
    small = Transformer(replace(model.config, vocab_size=100))
    with pytest.raises(InputError, match="260 ids and the model only 100"):
        Engine(small, tokenizer)
