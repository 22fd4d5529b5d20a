"""Judging by a model: a made-up judge behind a real server, and one of ours that talks nonsense."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from puna.evaluate.harness.run import prepare
from puna.evaluate.judge import JudgeConfig, judge_all, read_rating, read_winner, win_of_first
from puna.evaluate.tasks.mt_bench import MtBench, MtBenchPairs, read_answers
from puna.evaluate.tasks.request import Generated, Generation
from puna.evaluate.tasks.table import TASKS, TaskKinds
from puna.runtime.errors import InputError
from puna.runtime.files import write_jsonl

KINDS = TaskKinds("task", TASKS)
CATEGORIES = ("writing", "math")


class Judge:
    """A server whose answers a test decides, and what it was asked."""

    def __init__(self) -> None:
        self.decide: Callable[[str], Any] = lambda prompt: "Rating: [[5]]"
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.asked.append(body)
                judge.keys.append(self.headers["Authorization"])
                said = judge.decide(body["messages"][-1]["content"])
                reply = {"choices": [{"message": {"content": said}}]} if isinstance(said, str) else said
                self.send_response(500 if said is None else 200)
                self.end_headers()
                self.wfile.write(json.dumps(reply).encode())

            def log_message(self, format: str, *args: object) -> None:
                """Says nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        self.config = JudgeConfig(url=f"http://127.0.0.1:{self.server.server_port}/v1", parallel=2)


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    made = Judge()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two questions and short prompts, in FastChat's form."""
    folder = tmp_path / "mt_bench"
    folder.mkdir()
    questions = [
        {"question_id": 80 + n, "category": category, "turns": [f"Do {category}.", f"Do {category} again."]}
        for n, category in enumerate(CATEGORIES, start=1)
    ]
    reference = {"question_id": 82, "choices": [{"index": 0, "turns": ["R1", "R2"]}]}
    templates = {
        "single-v1": "{question}|{answer}",
        "single-v1-multi-turn": "{question_1}|{answer_1}|{question_2}|{answer_2}",
        "pair-v2": "{question}|{answer_a}|{answer_b}",
        "pair-v2-multi-turn": "{question_1}|{question_2}|{answer_a_1}|{answer_a_2}|{answer_b_1}|{answer_b_2}",
    }
    templates |= {
        name.replace("-v1", "-math-v1").replace("-v2", "-math-v1"): template
        + "|{ref_answer_1}"
        + ("|{ref_answer_2}" if "multi" in name else "")
        for name, template in templates.items()
    }
    prompts = [{"name": name, "system_prompt": "Judge.", "prompt_template": text} for name, text in templates.items()]
    write_jsonl(folder / "question.jsonl", questions)
    write_jsonl(folder / "reference_gpt-4.jsonl", [reference])
    write_jsonl(folder / "judge_prompts.jsonl", prompts)
    return tmp_path


def said(*texts: str) -> list[Generated]:
    return [Generated(text, True, 1) for text in texts]


def test_verdicts_are_read_only_in_their_form() -> None:
    assert read_rating("The form is [[rating]]. Rating: [[7.5]]") == 7.5
    assert read_rating("First [[3]], no: [[4]]") == 4.0
    assert [read_rating(text) for text in ("8", "[8]", "[[11]]", "[[0]]", "[[-1]]", "[[eight]]", "")] == [None] * 7
    assert read_winner("Not [[A]] but [[B]].") == "B"
    assert read_winner("A is better") is None


def test_who_does_not_win_both_orders_has_drawn() -> None:
    assert win_of_first("A", "B") == 1.0
    assert win_of_first("B", "A") == 0.0
    draws = [("A", "A"), ("B", "B"), ("C", "C"), ("C", "B"), ("A", "C")]
    assert [win_of_first(*pair) for pair in draws] == [0.5] * 5  # type: ignore[arg-type]
    assert win_of_first(None, "A") is None
    assert win_of_first("A", None) is None


def test_two_turns_are_asked_at_the_temperature_of_their_category(judge: Judge, data: Path) -> None:
    task = MtBench(judge=judge.config)
    prepared = prepare(task, data)
    for example, requests in zip(prepared.examples, prepared.requests, strict=True):
        (first,) = requests
        assert isinstance(first, Generation)
        assert first.prompt == ({"role": "user", "content": f"Do {example.group}."},)
        assert first.temperature == {"writing": 0.7, "math": 0.0}[example.group]
        (second,) = task.follow_up(example, said(" Done. "))
        assert isinstance(second, Generation)
        assert [message["content"] for message in second.prompt] == [  # type: ignore[index]
            f"Do {example.group}.",
            "Done.",
            f"Do {example.group} again.",
        ]
        assert task.follow_up(example, said("a", "b")) == []


def test_ratings_of_a_made_up_judge(judge: Judge, data: Path) -> None:
    ratings = {
        "Do writing.|w1": "A fine text. Rating: [[8]]",
        "Do writing.|w1|Do writing again.|w2": "Rating: [[5]]",
        "Do math.|m1|R1": "Wrong. [[2]]",
        "Do math.|m1|Do math again.|m2|R1|R2": "[[1]]",
    }
    judge.decide = ratings.__getitem__
    task = MtBench(judge=judge.config)
    examples = prepare(task, data).examples
    scores = task.score_all(examples, [said("w1", " w2"), said("m1", "m2")])
    assert [score.values["rating"] for score in scores] == [6.5, 1.5]
    found = task.metrics(examples, scores)
    assert next(iter(found)) == "rating"
    values = {name: metric.value for name, metric in found.items()}
    expected = {"rating": 4.0, "rating_turn_1": 5.0, "rating_turn_2": 3.0, "unreadable": 0.0, "cut_off": 0.0}
    assert values == expected
    assert judge.asked[0]["messages"][0] == {"role": "system", "content": "Judge."}
    assert {(body["model"], body["temperature"]) for body in judge.asked} == {("judge", 0.0)}
    assert set(judge.keys) == {"Bearer secret"}
    assert scores[0].record["judge"][0] == ["A fine text. Rating: [[8]]"]


def test_unreadable_verdicts_are_asked_for_again_then_counted_then_refused(judge: Judge, data: Path) -> None:
    examples = prepare(MtBench(judge=judge.config), data).examples
    answers = [said("w1", "w2"), said("m1", "m2")]

    judge.decide = lambda prompt: "[[6]]" if prompt != "Do math.|m1|R1" or judge.asked[-1]["temperature"] else "Hm."
    task = MtBench(judge=judge.config)
    assert [score.values["unreadable"] for score in task.score_all(examples, answers)] == [0.0, 0.0]
    assert len(judge.asked) == 5

    judge.decide = lambda prompt: "Hm." if prompt == "Do math.|m1|R1" else "[[6]]"
    lenient = MtBench(judge=JudgeConfig(url=judge.config.url, max_unreadable=0.25))
    scores = lenient.score_all(examples, answers)
    assert [score.values["unreadable"] for score in scores] == [0.0, 0.5]
    assert [score.values["rating"] for score in scores] == [6.0, 6.0]
    assert lenient.metrics(examples, scores)["rating_turn_1"].count == 1
    with pytest.raises(InputError, match=r"1 of 4 verdicts .* cannot be read.*'Hm\.'"):
        task.score_all(examples, answers)

    judge.decide = lambda prompt: "Hm." if "math" in prompt else "[[6]]"
    generous = MtBench(judge=JudgeConfig(url=judge.config.url, max_unreadable=0.5))
    with pytest.raises(InputError, match="verdicts on question 82 cannot be read"):
        generous.score_all(examples, answers)


def test_what_a_judge_has_said_is_kept(judge: Judge, tmp_path: Path) -> None:
    """Second attempts as well; and what was said before a server broke down."""
    kept = tmp_path / "answers"
    conversations = [[{"role": "user", "content": f"Question {n}?"}] for n in range(20)]
    judge.decide = lambda prompt: "[[7]]" if judge.asked[-1]["temperature"] else "Hm."
    first = judge_all(judge.config, conversations[:1], read_rating, kept)
    assert [body["temperature"] for body in judge.asked] == [0.0, 0.7]
    assert judge_all(judge.config, conversations[:1], read_rating, kept) == first
    assert len(judge.asked) == 2

    judge.decide = lambda prompt: None if "19" in prompt else "[[6]]"
    with pytest.raises(InputError, match="answers 500"):
        judge_all(judge.config, conversations, read_rating, kept)
    judge.asked.clear()
    judge.decide = lambda prompt: "[[5]]"
    found = judge_all(judge.config, conversations, read_rating, kept)
    assert [one.verdict for one in found] == [7.0, *[6.0] * 16, *[5.0] * 3]
    assert len(judge.asked) == 3
    other = JudgeConfig(url=judge.config.url, name="another", parallel=2)
    assert [one.verdict for one in judge_all(other, conversations[:2], read_rating, kept)] == [5.0, 5.0]


@pytest.mark.parametrize("ours_are_better", [True, False])
def test_comparisons_in_both_orders(judge: Judge, data: Path, tmp_path: Path, ours_are_better: bool) -> None:
    # By turns, so that both forms of the other model's answers are read.
    path = tmp_path / "theirs.jsonl"
    if ours_are_better:
        rows = [{"question_id": 80 + n, "choices": [{"turns": ["their 1", "their 2"]}]} for n in (1, 2)]
    else:
        rows = [
            {"task": "mt_bench", "id": str(80 + n), "answers": ["their 1", "their 2"], "verdicts": [1.0, 2.0]}
            for n in (1, 2)
        ]
        rows.append({"task": "gsm8k", "id": "81", "answers": ["18"]})
    write_jsonl(path, rows)

    def decide(prompt: str) -> str:
        if prompt.startswith("Do math."):
            return "[[A]]"  # Looks at the position alone.
        ours_first = prompt.index("our") < prompt.index("their")
        return "[[A]]" if ours_first == ours_are_better else "[[B]]"

    judge.decide = decide
    task = MtBenchPairs(judge=judge.config, against=path)
    examples = prepare(task, data).examples
    scores = task.score_all(examples, [said("our 1", "our 2")] * 2)
    assert [score.values["win_rate"] for score in scores] == [float(ours_are_better), 0.5]
    assert len(judge.asked) == 8
    assert path in task.inputs(data)
    assert task.metrics(examples, scores)["win_rate_turn_2"].value == (1.5 if ours_are_better else 0.5) / 2


def test_the_published_questions_and_prompts(real_data: Path, judge: Judge) -> None:
    against = real_data / "eval/mt_bench/reference_gpt-4.jsonl"
    task = KINDS.read({"kind": "mt_bench", "judge": {"url": judge.config.url}})
    examples = prepare(task, real_data / "eval").examples
    assert len(examples) == 80
    assert len({example.group for example in examples}) == 8
    scores = task.score_all(examples[:1] + examples[20:21], [said("first", "second")] * 2)
    assert [score.values["rating"] for score in scores] == [5.0, 5.0]
    contents = [body["messages"][1]["content"] for body in judge.asked]
    assert sum("Reference" in content for content in contents) == 2
    assert all("first" in content for content in contents)
    with pytest.raises(InputError, match="has no answer to question 81"):
        prepare(MtBenchPairs(judge=judge.config, against=against), real_data / "eval")


def test_what_a_server_does_wrong_is_said(judge: Judge) -> None:
    conversation = [{"role": "user", "content": "?"}]
    judge.decide = lambda prompt: None
    with pytest.raises(InputError, match="answers 500"):
        judge_all(judge.config, [conversation], read_rating)
    judge.decide = lambda prompt: {"choices": []}
    with pytest.raises(InputError, match="no chat completion"):
        judge_all(judge.config, [conversation], read_rating)
    with pytest.raises(InputError, match="cannot be asked"):
        judge_all(JudgeConfig(url="http://127.0.0.1:1/v1"), [conversation], read_rating)


def test_a_model_of_ours_that_talks_nonsense_is_refused(
    base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = JudgeConfig(model=base_model, max_tokens=4)
    with pytest.raises(InputError, match="2 of 2 verdicts of the judge"):
        judge_all(config, [[{"role": "user", "content": "Good?"}]] * 2, read_rating)
    kept = tmp_path / "answers"
    (found,) = judge_all(config, [[{"role": "user", "content": "Good?"}]], len, kept)
    assert found.verdict == len(found.text) > 0
    monkeypatch.setattr("puna.infer.engine.Engine.step", None)  # nothing is computed again
    assert judge_all(config, [[{"role": "user", "content": "Good?"}]], len, kept) == [found]


def test_settings_that_make_no_sense_are_refused(data: Path) -> None:
    for settings, message in (
        ({"judge": {}}, "either a model directory"),
        ({"judge": {"url": "x", "model": "y"}}, "either a model directory"),
        ({"judge": {"url": "x"}, "shots": 1}, "conversation of two turns"),
        ({"judge": {"url": "x", "max_unreadable": 1.0}}, "below 1"),
    ):
        with pytest.raises(InputError, match=message):
            KINDS.read({"kind": "mt_bench", **settings})
    write_jsonl(data / "mt_bench/reference_gpt-4.jsonl", [])
    with pytest.raises(InputError, match="math needs a reference answer; question 82 has none"):
        prepare(MtBench(judge=JudgeConfig(url="x")), data)
    write_jsonl(data / "mt_bench/reference_gpt-4.jsonl", [{"question_id": 82, "choices": [{"turns": ["one"]}]}])
    with pytest.raises(InputError, match="has two turns, but here are 1"):
        prepare(MtBench(judge=JudgeConfig(url="x")), data)
    with pytest.raises(InputError, match='neither "question_id" nor "task"'):
        read_answers(data / "mt_bench/judge_prompts.jsonl")
