"""`puna rate`: from answers and ratings to the report."""

from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from puna.config import load_config
from puna.evaluate.rating.answers import compare_all, read_answers, read_questions
from puna.evaluate.rating.human import RateConfig, main
from puna.evaluate.rating.records import RatingLog
from puna.evaluate.rating.session import Session
from puna.runtime.errors import InputError
from puna.runtime.files import read_json, write_jsonl
from puna.runtime.manifest import Manifest


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    """Of three models to six prompts; two are the same."""

    def of(n: int) -> list[dict[str, str]]:
        texts = {"good": f"very good {n}", "fair": f"fair {n}", "<b>bad</b>": f"bad {n}" if n else "fair 0"}
        return [{"model": model, "text": text} for model, text in texts.items()]

    rows = [{"prompt": f"What is {n}?", "category": ["qa", "coding"][n % 2], "answers": of(n)} for n in range(6)]
    write_jsonl(tmp_path / "answers.jsonl", rows)
    return tmp_path / "answers.jsonl"


def run(*settings: str) -> None:
    main(load_config(RateConfig, None, ["resamples=100", "port=0", *settings]))


def test_everything_rated_gives_the_report(answers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comparisons, same = compare_all(read_answers(answers))
    assert (len(comparisons), same) == (3 * 6 - 1, 1)
    assert len({each.item for each in comparisons}) == 17
    output = tmp_path / "out"
    session = Session(comparisons, RatingLog(output / "ratings.jsonl"), raters=2, seed=0)
    ranks = {"good": 2, "fair": 1, "<b>bad</b>": 0}
    for n, each in enumerate(comparisons):
        for rater in ("Ann", "Bo") if n < 9 else ("Ann",):
            turn = session.turn(each.item, rater)
            better = ranks[turn.right.model] - ranks[turn.left.model]
            session.rate(each.item, rater, better * 2 if n % 5 else 0, 1.0)

    run(f"answers={answers}", f"output={output}", "overlap=0")
    results = read_json(output / "results.json")
    assert [each["model"] for each in results["strengths"]] == ["good", "fair", "<b>bad</b>"]
    assert [(each["model"], each["other"]) for each in results["win_rates"]] == [
        ("<b>bad</b>", "fair"),
        ("<b>bad</b>", "good"),
        ("fair", "good"),
    ]
    assert [each["category"] for each in results["win_rates"][0]["by_category"]] == ["coding", "qa"]
    assert results["agreement"]["num_comparisons"] == 9
    assert results["agreement"]["raw"]["mean"] == 1
    manifest = Manifest.read(output)
    assert manifest.results["num_same_answers"] == 1
    assert manifest.results["num_comparisons_finished"] == 17
    page = (output / "report.html").read_text()
    assert "&lt;b&gt;bad&lt;/b&gt; beside fair" in page
    assert "<b>bad" not in page
    assert "17 of\n17 comparisons are finished, and\n1 more were not shown" in page
    said = capsys.readouterr().out
    assert "<b>bad</b> beside good" in said
    assert "2 raters agree in 100% of the 9 comparisons" in said

    # A file of ratings, whoever gave them, says the same.
    run(f"ratings={output / 'ratings.jsonl'}", f"output={tmp_path / 'again'}")
    assert read_json(tmp_path / "again" / "results.json") == results
    assert "did not know" not in (tmp_path / "again" / "report.html").read_text()


def test_one_rating_is_enough_for_a_report(answers: Path, tmp_path: Path) -> None:
    comparisons, _ = compare_all(read_answers(answers))
    session = Session(comparisons, RatingLog(tmp_path / "ratings.jsonl"), raters=1, seed=0)
    session.rate(comparisons[0].item, "Ann", -1, 1.0)
    run(f"ratings={tmp_path / 'ratings.jsonl'}", f"output={tmp_path / 'out'}")
    [rate] = read_json(tmp_path / "out" / "results.json")["win_rates"]
    assert rate["rate"]["standard_error"] is None, "one prompt says nothing about how prompts differ"
    assert "nothing is known about how far raters agree" in (tmp_path / "out" / "report.html").read_text()


def test_our_prompts() -> None:
    questions = read_questions(Path(str(files("puna.evaluate.rating").joinpath("prompts.jsonl"))))
    assert set(Counter(each.category for each in questions).values()) == {5}
    kinds = "advice brainstorming classification closed_QA coding creative_writing extraction persona open_QA reasoning"
    wanted = [kind.replace("_", " ") for kind in f"{kinds} rewriting summarisation".split()]
    assert {each.category for each in questions} == set(wanted)
    assert len({each.id for each in questions}) == len({repr(each.prompt) for each in questions}) == 60
    assert len({each.category for each in questions[:12]}) == 12, "max_prompts = 12 takes one of each"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["models.one=x"], "at least two models"),
        (["ratings=x", "answers={answers}"], "leave models, prompts, answers and judge out"),
        (["ratings={same}"], "compares one with itself"),
        (["ratings=absent.jsonl"], "absent.jsonl does not exist"),
        (["answers={answers}", "resamples=10"], "need at least 100"),
    ],
)
def test_what_cannot_be_reported_is_explained(answers: Path, tmp_path: Path, settings: list[str], message: str) -> None:
    rating: dict[str, Any] = {"item": "i", "prompt": [], "category": "", "left": "one", "right": "one", "verdict": 1}
    rating |= {"left_answer": "a", "right_answer": "b", "rater": "Ann", "seconds": 1.0}
    write_jsonl(tmp_path / "same.jsonl", [rating])
    named = {"answers": answers, "same": tmp_path / "same.jsonl"}
    with pytest.raises(InputError, match=message):
        run(f"output={tmp_path / 'out'}", *(setting.format(**named) for setting in settings))
    assert not (tmp_path / "out").exists()
