"""Answers to compare: drawing that can be broken off, files, and which two are compared."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.evaluate.rating import answers as module
from puna.evaluate.rating.answers import Answered, Question, compare_all, compare_two, draw, keep_answers, read_answers
from puna.evaluate.rating.session import Answer
from puna.infer.config import EngineConfig
from puna.infer.draw import Drawn
from puna.infer.sampling import SamplingParams
from puna.runtime.errors import InputError
from puna.runtime.files import write_jsonl

QUESTIONS = [Question(f"q{n}", "", [{"role": "user", "content": f"What is {n}?"}]) for n in range(5)]


def test_drawing_that_was_broken_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    broken_at = [3]

    def draw_answers(engine: Path, prompts: Sequence[Any], *, seed: int, **more: Any) -> list[list[Drawn]]:
        if len(asked) == broken_at[0]:
            raise KeyboardInterrupt
        asked.append(f"{engine.name} {prompts[0][0]['content']}")
        texts = [f"{engine.name} says {seed % 97}", "cut off", f"{engine.name} says {seed % 97}", ""]
        return [[Drawn(text, (), 1.0, text != "cut off") for text in texts] for _ in prompts]

    monkeypatch.setattr(module, "_AT_ONCE", 2)
    monkeypatch.setattr(module, "load_engine", lambda directory, _: directory)
    monkeypatch.setattr(module, "draw_answers", draw_answers)

    def make(folder: Path) -> list[Answered]:
        return draw(
            {"old": Path("models/a"), "new/er": Path("models/b")},
            QUESTIONS,
            samples=4,
            temperatures=[1.0],
            sampling=SamplingParams(),
            engine=EngineConfig(),
            seed=1,
            whole=True,
            drawn=folder,
        )

    with pytest.raises(KeyboardInterrupt):
        keep_answers(tmp_path / "broken" / "answers", {"seed": 1}, {}, make)
    assert not (tmp_path / "broken" / "answers").exists()
    broken_at[0] = 10**9
    kept = keep_answers(tmp_path / "broken" / "answers", {"seed": 1}, {}, make)
    assert asked == [f"{model} What is {n}?" for model in "ab" for n in (0, 2, 4)], "nothing is drawn twice"
    assert kept == keep_answers(tmp_path / "whole" / "answers", {"seed": 1}, {}, make)
    assert [len(each.answers) for each in kept] == [2] * 5, "two models, one different whole answer each"
    number = len(asked)
    assert kept == keep_answers(tmp_path / "broken" / "answers", {"seed": 1}, {}, make)
    assert len(asked) == number
    assert [path.name for path in (tmp_path / "broken").iterdir()] == ["answers"]
    with pytest.raises(InputError, match=r"other settings \(seed, model changed\)"):
        keep_answers(tmp_path / "broken" / "answers", {"seed": 2}, {"model": "hash"}, make)


texts = st.sampled_from(["a", "b", " a ", "c"])
several = st.lists(st.builds(Answer, st.sampled_from(["old", "new"]), texts), max_size=5, unique=True)


@given(several, st.integers(0, 5))
def test_two_are_compared_if_two_differ_and_of_two_models_where_there_are(own: list[Answer], seed: int) -> None:
    answered = Answered(QUESTIONS[0], tuple(own))
    found, missing = compare_two([answered], seed)
    pairs = [(one, other) for one in own for other in own if one.text.strip() != other.text.strip()]
    assert (len(found), missing) == ((1, 0) if pairs else (0, 1))
    if found:
        first, second = found[0].answers
        assert (first, second) in pairs
        assert (first.model != second.model) == any(one.model != other.model for one, other in pairs)
        assert compare_two([Answered(QUESTIONS[0], tuple(reversed(own)))], seed) == (found, missing)
        assert found[0].item == module.compare(answered, second, first).item, "the order means nothing"


def test_every_two_models_are_compared_by_their_first_answers() -> None:
    own = (Answer("b", "one"), Answer("a", "one"), Answer("b", "two"), Answer("c", "three"))
    found, same = compare_all([Answered(question, own) for question in QUESTIONS[:2]])
    models = [tuple(answer.model for answer in each.answers) for each in found]
    assert models == [("a", "c"), ("b", "c")] * 2
    assert same == 2
    assert len({each.item for each in found}) == 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": []}, "'prompt'"),
        ({"prompt": "Who?", "answers": [{"model": "a"}]}, "text"),
        ({"prompt": "Who?", "answers": [{"model": "a", "text": 3}]}, "an answer has texts"),
        ({"prompt": [{"role": "assistant", "content": "I"}], "answers": []}, "something to answer"),
        ({"prompt": [], "answers": []}, "something to answer"),
    ],
)
def test_what_is_no_answer_is_refused_by_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = {"prompt": "Who?", "answers": [{"model": "a", "text": "I"}], "category": "qa", "id": 7}
    path = tmp_path / "answers.jsonl"
    write_jsonl(path, [good])
    assert read_answers(path) == [
        Answered(Question("7", "qa", [{"role": "user", "content": "Who?"}]), (Answer("a", "I"),))
    ]
    path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=rf"line 2 does not read .*{message}"):
        read_answers(path)
