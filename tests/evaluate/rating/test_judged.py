"""A judge model's verdicts as ratings."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from puna.config import load_config
from puna.evaluate.judge import JudgeConfig, Judgement
from puna.evaluate.rating.human import RateConfig, main
from puna.evaluate.rating.judged import judge_comparisons, read_verdict
from puna.evaluate.rating.records import read_ratings
from puna.evaluate.rating.session import Answer, Comparison
from puna.runtime.files import read_json, write_jsonl
from puna.runtime.manifest import Manifest


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[[A>>B]]", -4),
        ("A is fine. [[A>B]]", -2),
        ("[[A>B]] No, rather: [[A=B]]", 0),
        ("[[B>A]].", 2),
        ("[[B>>A]]", 4),
        ("A is better.", None),
        ("[[A<B]] [A>B]", None),
    ],
)
def test_the_last_verdict_counts(text: str, verdict: int | None) -> None:
    assert read_verdict(text) == verdict


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One who likes the word good, else what stands first, and is at a loss with riddles. Keeps what it reads."""
    asked: list[str] = []

    def judge_all(
        config: JudgeConfig, conversations: Sequence[Any], read: Callable[[str], int | None], kept: Path | None
    ) -> list[Judgement[int]]:
        found = []
        for _, message in conversations:
            asked.append(message["content"])
            first, second = message["content"].split("[End of answer A]")
            good = "good" in first.split("[Begin of answer A]")[1], "good" in second
            said = "[[A>>B]]" if good == (True, False) else "[[B>>A]]" if good == (False, True) else "[[A>B]]"
            text = "Who knows?" if "riddle" in message["content"] else said
            found.append(Judgement(read(text), text))
        return found

    monkeypatch.setattr("puna.evaluate.rating.judged.judge_all", judge_all)
    return asked


def test_both_orders_are_judged_and_what_cannot_be_read_is_no_rating(judge: list[str]) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": ["x"]}]
    prompt = [*talk, {"role": "user", "content": "Who?"}]
    answers = Answer("one", "a good llama"), Answer("two", "a llama")
    same = Answer("one", "a cow"), Answer("two", "a cat")
    riddle = [{"role": "user", "content": "a riddle"}]
    compared = [Comparison(str(n), *each) for n, each in enumerate([
        (prompt, "qa", answers), (prompt, "", same), (riddle, "", answers)])]  # fmt: skip
    ratings = judge_comparisons(compared, JudgeConfig(url="http://nowhere"))
    assert [(each.item, each.rater, each.left, each.verdict) for each in ratings] == [
        ("0", "judge", "one", -4),
        ("0", "judge, swapped", "two", 4),
        ("1", "judge", "one", -2),
        ("1", "judge, swapped", "two", -2),
    ]
    assert (ratings[0].prompt, ratings[0].category, ratings[1].left_answer) == (prompt, "qa", "a llama")
    assert 'User: Hi\n\nAssistant: {"tool_calls": ["x"]}\n\nUser: Who?\n[End of conversation]' in judge[0]
    assert not any("one" in asked or "two" in asked for asked in judge), "the judge is told no model's name"


def test_puna_rate_with_a_judge(judge: list[str], tmp_path: Path) -> None:
    def row(n: int) -> dict[str, Any]:
        texts = {"one": f"good {n}" if n else "plain", "two": f"bad {n}"}
        answers = [{"model": model, "text": text} for model, text in texts.items()]
        return {"prompt": f"What is {n}?" if n < 4 else "a riddle", "answers": answers}

    write_jsonl(tmp_path / "answers.jsonl", map(row, range(5)))
    settings = [f"answers={tmp_path / 'answers.jsonl'}", "judge.url=http://nowhere", "resamples=100"]
    main(load_config(RateConfig, None, [*settings, f"output={tmp_path / 'out'}"]))
    assert len(judge) == 10
    assert len(read_ratings(tmp_path / "out" / "judge_ratings.jsonl")) == 8
    results = read_json(tmp_path / "out" / "results.json")
    [rate] = results["win_rates"]
    overall = rate["overall"]
    assert (overall["wins"], overall["ties"], overall["losses"]) == (3, 1, 0), "where orders disagree, it is a tie"
    assert results["agreement"]["raw"]["mean"] == 3 / 4
    counts = Manifest.read(tmp_path / "out").results
    assert (counts["num_unreadable_verdicts"], counts["num_comparisons_finished"]) == (2, 4)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Evaluation by a judge" in page
    assert "2 verdicts could not be read" in page
