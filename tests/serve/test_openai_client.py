"""OpenAI's own client against the server, from end to end."""

import json
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch

from puna.infer.engine import Engine
from puna.infer.sampling import SamplingParams
from puna.tokenizer.chat import render_chat

MESSAGES = [{"role": "user", "content": "Hi!"}]
FREE = {"ignore_eos": True}


@pytest.fixture
def client(served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "puna"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("huge")
    assert caught.value.code == "model_not_found"


def test_chat_equals_the_engine(client: openai.OpenAI, model, tokenizer) -> None:
    prompt = render_chat(tokenizer, MESSAGES, add_generation_prompt=True)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    [expected] = Engine(model, tokenizer).generate([prompt.ids], params)
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_completion_tokens=8, extra_body=FREE
    )
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt.ids), 8)
    assert answer.usage.total_tokens == len(prompt.ids) + 8


def test_streamed_chat_equals_the_whole(client: openai.OpenAI) -> None:
    request = {
        "model": "tiny",
        "messages": MESSAGES,
        "seed": 4,
        "max_tokens": 30,
        "n": 2,
        "logprobs": True,
        "extra_body": FREE,
    }
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.model_dump(exclude={"prompt_tokens_details"}) == whole.usage.model_dump(
        exclude={"prompt_tokens_details"}
    )
    # Full blocks of 16 tokens were computed by the first request.
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens // 16 * 16
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert whole.choices[0].message.content != whole.choices[1].message.content
    for choice in whole.choices:
        pieces = [piece for chunk in chunks for piece in chunk.choices if piece.index == choice.index]
        assert pieces[0].delta.role == "assistant"
        assert "".join(piece.delta.content or "" for piece in pieces) == choice.message.content
        assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [choice.finish_reason]
        logprobs = [entry.logprob for piece in pieces if piece.logprobs for entry in piece.logprobs.content]
        assert logprobs == pytest.approx([entry.logprob for entry in choice.logprobs.content], abs=1e-5)


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3, extra_body=FREE
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 5
    assert bytes(b for entry in content for b in entry.bytes).decode(errors="replace") == (
        answer.choices[0].message.content
    )
    for entry in content:
        best = [top.logprob for top in entry.top_logprobs]
        assert len(best) == 3
        assert best == sorted(best, reverse=True)
        assert entry.logprob == pytest.approx(best[0], abs=1e-6)  # greedy


def test_completions_take_text_and_ids(client: openai.OpenAI, tokenizer) -> None:
    def texts(prompt, **options) -> list[str]:
        answer = client.completions.create(
            model="tiny", prompt=prompt, temperature=0, max_tokens=6, extra_body=FREE, **options
        )
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    one, two = texts("one"), texts("two")
    assert texts(["one", "two"]) == one + two
    ids = [tokenizer.bos_id, *tokenizer.encode("one")]
    assert texts(ids) == one
    assert texts([ids, ids]) == one + one
    assert texts(["one", "two"], n=2) == one * 2 + two * 2
    assert texts(["one", "two"], echo=True) == ["one" + one[0], "two" + two[0]]


def test_completion_logprobs_and_stream(client: openai.OpenAI) -> None:
    request = {"model": "tiny", "prompt": "x", "temperature": 0, "max_tokens": 12, "logprobs": 2, "extra_body": FREE}
    whole = client.completions.create(**request)
    [choice] = whole.choices
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == 12
    assert choice.logprobs.text_offset[0] == 0
    assert choice.logprobs.text_offset == sorted(choice.logprobs.text_offset)
    for token, logprob, top in zip(
        choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert len(top) == 2
        assert top[token] == pytest.approx(logprob, abs=1e-6)
    chunks = list(client.completions.create(**request, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    assert [t for chunk in chunks for t in chunk.choices[0].logprobs.tokens] == choice.logprobs.tokens
    assert [o for chunk in chunks for o in chunk.choices[0].logprobs.text_offset] == choice.logprobs.text_offset


def test_the_prompts_logprobs_can_be_measured(client: openai.OpenAI, model) -> None:
    """As evaluation harnesses ask for them: the prompt back, with its log-probabilities, and no answer."""
    ids = [256, *b"hello"]
    request = {"model": "tiny", "prompt": ids, "max_tokens": 0, "logprobs": 1, "echo": True}
    with torch.inference_mode():
        expected = model(torch.tensor([ids]))[0].log_softmax(-1)
    for number in range(2):  # the second time the prompt is in the cache
        [choice] = client.completions.create(**request).choices
        assert (choice.text, choice.finish_reason) == ("hello", "length")
        assert choice.logprobs.tokens == ["<|begin_of_text|>", *"hello"]
        assert choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.top_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(
            [expected[t, ids[t + 1]].item() for t in range(5)], abs=1e-5
        ), number
    request |= {"max_tokens": 3, "temperature": 0, "extra_body": FREE}
    [choice] = client.completions.create(**request).choices
    chunks = list(client.completions.create(**request, stream=True))
    assert len(choice.logprobs.tokens) == 9
    assert choice.text.startswith("hello")
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    assert [t for chunk in chunks for t in chunk.choices[0].logprobs.tokens] == choice.logprobs.tokens


def test_penalties_and_bias(client: openai.OpenAI, model, tokenizer) -> None:
    request = {"model": "tiny", "prompt": "x", "temperature": 0, "max_tokens": 12, "extra_body": FREE}

    def text(**more) -> str:
        return client.completions.create(**request | more).choices[0].text

    assert text(logit_bias={"113": 100}) == "q" * 12
    penalties = {"presence_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": {"113": 3, "114": -2}}
    params = SamplingParams(
        12,
        temperature=0,
        presence_penalty=1.5,
        frequency_penalty=0.5,
        repetition_penalty=1.3,
        logit_bias=((113, 3.0), (114, -2.0)),
        ignore_eos=True,
    )
    [expected] = Engine(model, tokenizer).generate([[256, *b"x"]], params)
    extra = FREE | {"repetition_penalty": 1.3}
    assert text(**penalties, extra_body=extra) == expected.text
    stopped = client.completions.create(
        **request | {"logit_bias": {"113": 100}, "extra_body": {"stop_token_ids": [113]}}
    )
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")


def test_stop_string(client: openai.OpenAI) -> None:
    request = {"model": "tiny", "prompt": "x", "seed": 1, "max_tokens": 200, "extra_body": FREE}
    text = client.completions.create(**request).choices[0].text
    stop = next(c for c in text if c != "\ufffd" and c.isprintable())
    for streamed in (False, True):
        answer = client.completions.create(**request, stop=[stop, "\n"], stream=streamed)
        parts = [chunk.choices[0] for chunk in answer] if streamed else answer.choices
        assert "".join(part.text for part in parts) == text[: min(i for i in map(text.find, (stop, "\n")) if i >= 0)]
        assert parts[-1].finish_reason == "stop"


def test_concurrent_requests_share_batches(client: openai.OpenAI, served) -> None:
    served.engine.widest = 0

    def ask(number: int) -> str:
        answer = client.completions.create(
            model="tiny", prompt=f"request {number}", temperature=0, max_tokens=60 + number, extra_body=FREE
        )
        assert answer.usage.completion_tokens == 60 + number
        return answer.choices[0].text

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(8)))
    assert served.engine.widest >= 3
    assert together == [ask(number) for number in range(8)]
    assert served.engine.idle


def test_a_client_that_goes_away_frees_its_rows(client: openai.OpenAI, served, post) -> None:
    before = served.engine.num_cancelled
    stream = client.completions.create(model="tiny", prompt="x", max_tokens=4000, stream=True, extra_body=FREE)
    next(iter(stream))
    stream.close()
    assert served.wait_until_idle()
    assert served.engine.num_cancelled == before + 1
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{served.url}/v1/completions",
            json={"model": "tiny", "prompt": ["x", "y"], "max_tokens": 4000, **FREE},
            timeout=0.3,
        )
    assert served.wait_until_idle()
    assert served.engine.num_cancelled == before + 3
    assert post("completions", prompt="x", max_tokens=1).status_code == 200


def test_a_failing_engine_gives_up_its_requests_and_goes_on(client: openai.OpenAI, served, caplog) -> None:
    served.engine.broken = True
    with pytest.raises(openai.InternalServerError, match="a fault on purpose"):
        client.completions.create(model="tiny", prompt="x")
    served.engine.broken = True
    with pytest.raises(openai.APIError, match="a fault on purpose"):
        list(client.completions.create(model="tiny", prompt="x", stream=True))
    assert (
        client.completions.create(model="tiny", prompt="x", max_tokens=2, extra_body=FREE).usage.completion_tokens == 2
    )
    assert "requests that it worked on are given up" in caplog.text


def test_logprobs_are_probabilities(client: openai.OpenAI) -> None:
    request = {
        "model": "tiny",
        "prompt": "x",
        "max_tokens": 1,
        "logprobs": 5,
        "temperature": 2,
        "seed": 0,
        "extra_body": FREE,
    }
    logprobs = client.completions.create(**request).choices[0].logprobs
    assert 0 < sum(math.exp(value) for value in logprobs.top_logprobs[0].values()) < 1


SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}, "marks": {"type": "integer", "minimum": 1, "maximum": 6}},
    "required": ["mood", "marks"],
    "additionalProperties": False,
}


def test_answers_in_json(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "school", "schema": SCHEMA, "strict": True}}
    request = {"model": "tiny", "messages": MESSAGES, "response_format": form, "n": 3, "seed": 0}
    whole = [choice.message.content for choice in client.chat.completions.create(**request).choices]
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**request, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == whole
    for text in whole:
        assert json.loads(text)["mood"] in ("good", "bad")
        assert 1 <= json.loads(text)["marks"] <= 6
    bias = {str(byte): 30 for byte in b"}"}
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format={"type": "json_object"}, logit_bias=bias
    )
    assert json.loads(answer.choices[0].message.content) == {}


def test_other_constraints(client: openai.OpenAI) -> None:
    for constraint, pattern in [
        ({"regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"choice": ["left", "right"]}, "left|right"),
        ({"grammar": 'start: "x" | "x" "," start'}, "x(,x)*"),
        ({"json": SCHEMA}, r"\s*\{.*\}\s*"),
    ]:
        answer = client.completions.create(
            model="tiny", prompt="x", max_tokens=200, extra_body={"structured_outputs": constraint}
        )
        assert answer.choices[0].finish_reason == "stop"
        assert re.fullmatch(pattern, answer.choices[0].text, re.DOTALL)


def test_a_refused_constraint_in_a_stream(client: openai.OpenAI, served) -> None:
    """The stream has begun when the constraint is looked at, so it ends with the error; others are not touched."""
    stream = client.completions.create(
        model="tiny", prompt="x", n=2, stream=True, extra_body={"structured_outputs": {"regex": "(a"}}
    )
    with pytest.raises(openai.APIError, match="unclosed group") as caught:
        list(stream)
    assert caught.value.param == "structured_outputs"
    assert served.wait_until_idle()
    assert client.completions.create(model="tiny", prompt="x", max_tokens=2).usage.completion_tokens <= 2
