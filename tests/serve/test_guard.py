"""The guard: no text leaves that has not been judged, what is refused looks as OpenAI's client expects it."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puna.config import load_config
from puna.finetune.config import FinetuneConfig
from puna.finetune.main import main as finetune
from puna.infer.request import Delta
from puna.peft.text_classifier import TextClassifier
from puna.runtime.errors import InputError
from puna.runtime.files import write_jsonl
from puna.serve.guard import Guard, GuardConfig, GuardedRun, Held

GOOD, BAD = "hay ", "BOMB "
REFUSAL = "No."


@pytest.fixture(scope="module")
def classifier(model_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained by `puna finetune` to find bombs in hay."""
    folder = tmp_path_factory.mktemp("classifier")
    rows = [
        {"text": GOOD * good + BAD * bad, "label": "unsafe" if bad else "safe"}
        for good in range(12)
        for bad in (0, 0, 1, 5)
        if good or bad
    ]
    write_jsonl(folder / "data.jsonl", rows)
    settings = ["task.kind=classification", f"data.train={folder / 'data.jsonl'}", "train.steps=40"]
    settings += ["train.batch_rows=16", "train.micro_batch_rows=16", "train.row_length=64", "train.device=cpu"]
    settings += ["train.num_threads=1", "train.tensorboard=false", "train.optimizer.learning_rate=1e-2"]
    settings.append("train.schedule.warmup_steps=4")
    finetune(load_config(FinetuneConfig, None, [f"model={model_directory}", f"output={folder / 'out'}", *settings]))
    return folder / "out" / "model"


@pytest.fixture(scope="module")
def guard(classifier: Path) -> Guard:
    config = GuardConfig(model=classifier, window=40, context=20, refusal=REFUSAL, device="cpu", num_threads=1)
    return Guard(config)


@pytest.fixture(scope="module")
def guarded(guard: Guard, serve: Any) -> Iterator[Any]:
    with serve(guard) as served:
        yield served


@pytest.fixture
def client(guarded: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def ask(client: openai.OpenAI, prompt: str, *answers: str, **options: Any) -> Any:
    """Ask for a chat whose answer is one of some texts."""
    outputs = {"structured_outputs": {"choice": list(answers)}}
    messages = [{"role": "user", "content": prompt}]
    return client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=200, seed=0, extra_body=outputs, **options
    )


def judgements(guarded: Any, side: str) -> dict[str, float]:
    return httpx.get(f"{guarded.url}/health").json()["guard"][side]


def test_safe_texts_pass_unchanged(client: openai.OpenAI, guarded: Any) -> None:
    before = judgements(guarded, "answers")
    answer = GOOD * 24 + "hay"
    whole = ask(client, "hay?", answer)
    [choice] = whole.choices
    assert (choice.message.content, choice.message.refusal, choice.finish_reason) == (answer, None, "stop")
    chunks = list(ask(client, "hay?", answer, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(piece.delta.content or "" for piece in pieces) == answer
    assert max(len(piece.delta.content or "") for piece in pieces) <= 40
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["stop"]
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens >= len(answer)
    after = judgements(guarded, "answers")
    assert after["judged"] - before["judged"] == 2 * 3  # 99 characters in windows of 40, twice
    assert after["refused"] == before["refused"]
    assert after["seconds"] > before["seconds"]
    assert 0 < after["most_seconds"] <= after["seconds"]


def test_an_unsafe_prompt_is_refused_before_anything_is_computed(client: openai.OpenAI, guarded: Any) -> None:
    before = judgements(guarded, "prompts")
    conversation = [{"role": "user", "content": BAD * 5}, {"role": "assistant", "content": "hay"}]
    conversation.append({"role": "user", "content": "hay hay"})
    answer = client.chat.completions.create(model="tiny", messages=conversation, n=2)
    for choice in answer.choices:
        assert (choice.message.content, choice.message.refusal) == (None, REFUSAL)
        assert choice.finish_reason == "content_filter"
    assert answer.usage.completion_tokens == 0
    assert answer.usage.prompt_tokens > 0
    [_, refusal] = list(ask(client, BAD * 5, "hay", stream=True))
    assert (refusal.choices[0].delta.refusal, refusal.choices[0].delta.content) == (REFUSAL, None)
    assert refusal.choices[0].finish_reason == "content_filter"
    text = client.completions.create(model="tiny", prompt=["hay hay", BAD * 5], max_tokens=2)
    assert [(choice.text, choice.finish_reason) for choice in text.choices] == [("", "content_filter")] * 2
    ids = list((BAD * 5).encode())
    assert client.completions.create(model="tiny", prompt=ids).choices[0].finish_reason == "content_filter"
    after = judgements(guarded, "prompts")
    assert (after["judged"] - before["judged"], after["refused"] - before["refused"]) == (7, 4)
    with pytest.raises(openai.ContentFilterFinishReasonError):
        client.chat.completions.parse(model="tiny", messages=conversation)


def test_an_answer_is_broken_off_where_it_becomes_unsafe(client: openai.OpenAI, guarded: Any) -> None:
    answer = GOOD * 20 + BAD * 20
    [choice] = ask(client, "hay?", answer).choices
    assert (choice.message.content, choice.message.refusal) == (None, REFUSAL)
    assert choice.finish_reason == "content_filter"
    pieces = [chunk.choices[0] for chunk in ask(client, "hay?", answer, stream=True)]
    assert "".join(piece.delta.content or "" for piece in pieces) == GOOD * 20, "the two windows that were safe"
    assert (pieces[-1].delta.refusal, pieces[-1].finish_reason) == (REFUSAL, "content_filter")
    assert guarded.wait_until_idle(), "it is computed no further"


def test_answers_beside_a_refused_one_go_on(client: openai.OpenAI, guarded: Any) -> None:
    good, bad = GOOD * 24 + "hay", BAD * 20
    answer = ask(client, "hay?", good, bad, n=8)
    found = {(choice.message.content, choice.message.refusal, choice.finish_reason) for choice in answer.choices}
    assert found == {(good, None, "stop"), (None, REFUSAL, "content_filter")}
    assert guarded.wait_until_idle()


def test_log_probabilities_would_show_what_has_not_been_judged(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="log-probabilities would show more") as caught:
        ask(client, "hay?", "hay", logprobs=True)
    assert caught.value.param == "logprobs"
    with pytest.raises(openai.BadRequestError, match="log-probabilities would show more"):
        client.completions.create(model="tiny", prompt="hay", logprobs=0)


def test_without_a_verdict_nothing_leaves(client: openai.OpenAI, guard: Guard, monkeypatch: Any) -> None:
    def fail(texts: Sequence[str]) -> list[bool]:
        if any(text.startswith(GOOD * 2) for text in texts):
            raise RuntimeError("on purpose")
        return [False] * len(texts)

    monkeypatch.setattr(guard, "is_unsafe", fail)
    with pytest.raises(openai.InternalServerError, match="The guard failed: on purpose"):
        ask(client, GOOD * 3, "hay")
    with pytest.raises(openai.InternalServerError, match="The guard failed: on purpose"):
        ask(client, "hay?", GOOD * 3)
    got = []
    with pytest.raises(openai.APIError, match="The guard failed: on purpose"):
        got += [chunk.choices[0].delta.content for chunk in ask(client, "hay?", GOOD * 3, stream=True)]
    assert not any(got)


def twin(text: str, window: int, context: int) -> list[tuple[str, str]]:
    """What is judged, and what leaves after it, from the whole text at once."""
    starts = list(range(0, len(text), window)) or [0]
    return [(text[max(0, start - context) : start + window], text[start : start + window]) for start in starts]


@given(st.lists(st.text("ab \u00e9\u5e73", max_size=12), min_size=1), st.integers(1, 9), st.integers(0, 9))
def test_windows_do_not_depend_on_how_an_answer_comes(parts: list[str], window: int, context: int) -> None:
    held, found, num_ids = Held(window, context), [], 0
    for number, part in enumerate(parts):
        is_last = number == len(parts) - 1
        held.add(Delta(part, (number,), (), "stop" if is_last else None))
        while (due := held.due()) is not None:
            released = held.release()
            assert due.endswith(released.text), "it was judged"
            found.append((due, released.text))
            num_ids += len(released.ids)
            if released.finish_reason is not None:
                assert is_last
                break
    assert released.finish_reason == "stop"
    assert found == twin("".join(parts), window, context)
    assert num_ids == len(parts)


class ScriptedRun:
    """Answers that come as a script says."""

    def __init__(self, script: Sequence[tuple[int, Delta]]) -> None:
        self.script, self.dropped = script, list[int]()

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        for number, delta in self.script:
            if number not in self.dropped:
                yield number, delta

    def drop(self, number: int) -> None:
        self.dropped.append(number)


@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from(["a", "BOMB", "aaaa", "aaBOMBaa", ""])), max_size=12))
def test_no_window_with_a_bomb_leaves(guard: Guard, script: list[tuple[int, str]]) -> None:
    """With a guard that knows what it looks for, whatever comes when."""

    async def allows(side: str, texts: Sequence[str]) -> bool:
        return not any("BOMB" in text for text in texts)

    watched = type("Watched", (), {"config": guard.config, "allows": staticmethod(allows)})()
    ends = [(number, Delta("", (), (), "stop")) for number in range(2)]
    run = ScriptedRun([*((number, Delta(text, (), (), None)) for number, text in script), *ends])

    async def collect() -> list[tuple[int, Delta]]:
        return [item async for item in GuardedRun(run, watched, 2).deltas()]

    found = asyncio.run(collect())
    for number in range(2):
        text = "".join(part for own, part in script if own == number)
        own = [delta for each, delta in found if each == number]
        left = "".join(delta.text for delta in own if delta.finish_reason != "content_filter")
        assert "BOMB" not in left
        assert text.startswith(left)
        assert own[-1].finish_reason == ("content_filter" if "BOMB" in text else "stop")
        assert (number in run.dropped) == ("BOMB" in text)
        assert "BOMB" in text or left == text


def test_nothing_of_a_long_text_is_overlooked(classifier: Path) -> None:
    reader = TextClassifier(classifier, torch.device("cpu"))
    [unsafe] = reader.columns(["unsafe"])
    assert reader.max_tokens == 64
    texts = [GOOD * 100, GOOD * 50 + BAD * 8 + GOOD * 50, GOOD * 100 + BAD * 3, "hay"]
    assert (reader.probabilities(texts)[:, unsafe] > 0.5).tolist() == [False, True, True, False]
    one_by_one = torch.cat([reader.probabilities([text]) for text in texts])
    torch.testing.assert_close(reader.probabilities(texts), one_by_one, atol=1e-5, rtol=0)


def test_windows_cover_every_token(classifier: Path) -> None:
    reader = TextClassifier(classifier, torch.device("cpu"))
    for length in (0, 1, 62, 63, 64, 94, 95, 200, 201):
        text = "".join(chr(33 + n % 90) for n in range(length))
        windows = reader._windows(text)
        assert all(0 < len(ids) <= reader.max_tokens for ids in windows)
        rest = text.encode()
        for ids in windows:
            assert bytes(ids[1:]) in text.encode()
        covered = {
            start + n for start, ids in zip(range(0, 999, 31), windows, strict=False) for n in range(len(ids) - 1)
        }
        assert covered == set(range(len(rest)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unsafe": ("rude",)}, "no class 'rude'; its classes are safe, unsafe"),
        ({"model": "base"}, "a model with a head is one of"),
        ({"threshold": 0}, "above 0 and at most 1"),
        ({"prompts": False, "answers": False}, "has to judge prompts or answers"),
        ({"window": 0}, "window has to be at least 1"),
    ],
)
def test_what_cannot_guard_is_explained(
    classifier: Path, model_directory: Path, settings: dict[str, Any], message: str
) -> None:
    if settings.get("model") == "base":
        settings = {"model": model_directory}
    with pytest.raises((InputError, ValueError), match=message):
        Guard(GuardConfig(**{"model": classifier, "device": "cpu", "num_threads": 1, **settings}))
