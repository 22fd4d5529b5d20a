"""Tasks with written answers: what they ask, and what they make of answers, beside lm-eval's filters and metrics."""

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.evaluate.harness.run import prepare
from puna.evaluate.maths import between_dollars
from puna.evaluate.tasks.custom_generation import CustomGeneration
from puna.evaluate.tasks.generation import GeneratedAnswers
from puna.evaluate.tasks.gsm8k import Gsm8k
from puna.evaluate.tasks.hendrycks_math import HendrycksMath
from puna.evaluate.tasks.mbpp import Mbpp, pass_at_k
from puna.evaluate.tasks.request import Generated, Generation
from puna.evaluate.tasks.table import TASKS, TaskKinds
from puna.evaluate.tasks.task import Example, Task
from puna.evaluate.tasks.triviaqa import TriviaQa
from puna.runtime.errors import InputError
from puna.runtime.files import write_jsonl

KINDS = TaskKinds("task", TASKS)


def said(*texts: str, finished: bool = True) -> list[Generated]:
    return [Generated(text, finished, len(text)) for text in texts]


def example(target: str = "", **extra: Any) -> Example:
    return Example(id="1", where="line 1", prompt="Question: why?\nAnswer:", target=target, extra=extra)


def prompts(task: Task, data: Path | None) -> list[Generation]:
    found = [request for requests in prepare(task, data).requests for request in requests]
    assert all(isinstance(request, Generation) for request in found)
    return found  # type: ignore[return-value]


@pytest.fixture(scope="module")
def lm_eval_settings() -> Callable[[str], dict[str, Any]]:
    """What lm-eval's file of a task says."""
    pytest.importorskip("lm_eval")
    import lm_eval
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads what names a function as nothing."""

    Loader.add_constructor("!function", lambda loader, node: None)
    folder = Path(lm_eval.__file__).parent / "tasks"
    return lambda name: yaml.load((folder / name).read_text(), Loader)


@pytest.fixture(scope="module")
def lm_eval_match(lm_eval_settings: Callable[[str], dict[str, Any]]) -> Callable[[str, str, str, Sequence[str]], bool]:
    """Whether lm-eval, by its file of a task and one of the filters in it, counts an answer as right."""
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    def match(file: str, name: str, answer: str, references: Sequence[str]) -> bool:
        found = lm_eval_settings(file)
        (chosen,) = (each for each in found["filter_list"] if each["name"] == name)
        for step in chosen["filter"]:
            if step["function"] == "regex":
                options = {key: value for key, value in step.items() if key != "function"}
                ((answer,),) = RegexFilter(**options).apply([[answer]], [{}])
            elif step["function"] == "remove_whitespace":
                answer = answer.lstrip()
        (metric,) = found["metric_list"]
        options = {key: value for key, value in metric.items() if key.startswith(("ignore", "regexes"))}
        return any(exact_match_hf_evaluate([answer], [one], **options)["exact_match"] for one in references)

    return match


ANSWERS = st.lists(
    st.sampled_from(
        ["#### ", "18", "$18", "-18", "1,8", "18.0", "18.", ".", " so ", "\n", "The answer is ", "####18", "x", ",$"]
    ),
    max_size=6,
).map("".join)


@settings(max_examples=40)
@given(ANSWERS, st.sampled_from(["18", "-18", "1,800", "18.5"]))
def test_gsm8k_scores_as_lm_eval(
    lm_eval_match: Callable[[str, str, str, Sequence[str]], bool], answer: str, number: str
) -> None:
    reference = f" It is 3 + 15 = {number}.\n#### {number}"
    values = Gsm8k().values(example(reference), answer)
    for ours, theirs in (("strict_match", "strict-match"), ("flexible_match", "flexible-extract")):
        assert values[ours] == lm_eval_match("gsm8k/gsm8k.yaml", theirs, answer, [reference])


@given(st.lists(st.sampled_from(["Onion", "onion", "s", "'", " ", "-", "The ", "Bulb", "\t"]), max_size=4).map("".join))
def test_triviaqa_scores_as_lm_eval(lm_eval_match: Callable[[str, str, str, Sequence[str]], bool], answer: str) -> None:
    aliases = ["Onion", "Bulb onion", "The Onions"]
    values = TriviaQa().values(example(" Onion", aliases=tuple(aliases)), answer)
    expected = lm_eval_match("triviaqa/default.yaml", "remove_whitespace", answer.rstrip(), aliases)
    assert values["exact_match"] == expected
    assert values["exact_match"] <= values["f1"]


def test_what_is_asked_is_what_lm_eval_asks(real_data: Path, lm_eval_settings: Callable[[str], dict[str, Any]]) -> None:
    import jinja2

    from puna.evaluate.tasks.data import read_rows

    data = real_data / "eval"
    for task, file, source, columns in (
        (Gsm8k(limit=2), "gsm8k/gsm8k.yaml", "gsm8k/test.jsonl.gz", {}),
        (HendrycksMath(limit=2), "hendrycks_math/hendrycks_math_algebra.yaml", "math.jsonl.gz", {"problem": "context"}),
    ):
        found = lm_eval_settings(file)
        rows = list(read_rows(data / source))
        prepared = prepare(task, data)
        assert task.until == tuple(found["generation_kwargs"]["until"])
        assert task.shots == found.get("num_fewshot", 0)
        for one, requests in zip(prepared.examples, prepared.requests, strict=True):
            row = dict(rows[int(one.id) - 1].values)
            row |= {theirs: row[ours] for theirs, ours in columns.items()}
            question = jinja2.Template(found["doc_to_text"]).render(**row)
            (request,) = requests
            assert isinstance(request, Generation)
            assert str(request.prompt).endswith(question)
            assert one.target.strip() == jinja2.Template(found["doc_to_target"]).render(**row).strip()
    trivia = lm_eval_settings("triviaqa/default.yaml")
    assert TriviaQa().until == tuple(trivia["generation_kwargs"]["until"])


def test_gsm8k_reads_its_shots_from_the_training_data(real_data: Path) -> None:
    task = KINDS.read({"kind": "gsm8k", "limit": 3})
    assert isinstance(task, Gsm8k)
    (first, *_) = found = prompts(task, real_data / "eval")
    assert len(found) == 3
    assert str(first.prompt).count("Question:") == 6
    assert str(first.prompt).count("#### ") == 5
    prepared = prepare(task, real_data / "eval")
    right = task.score(prepared.examples[0], said("It is 18.\n#### 18"))
    assert right.values == {"strict_match": 1.0, "flexible_match": 1.0, "cut_off": 0.0}


def test_a_solution_without_its_number_is_named(tmp_path: Path) -> None:
    (tmp_path / "gsm8k").mkdir()
    write_jsonl(tmp_path / "gsm8k/test.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    import gzip

    (tmp_path / "gsm8k/test.jsonl.gz").write_bytes(gzip.compress((tmp_path / "gsm8k/test.jsonl").read_bytes()))
    with pytest.raises(InputError, match=r"test.jsonl.gz, line 1: the answer does not say what it comes to"):
        prepare(Gsm8k(shots=0), tmp_path)


def test_maths_answers_by_hand() -> None:
    problem = example(r" \frac{1}{2}", answer=r"\frac{1}{2}")
    task = HendrycksMath()
    both = task.values(problem, r" It is $\frac12$")
    assert both == {"accuracy": 0.0, "exact_match": 1.0}  # Not boxed, and more than the answer.
    assert task.values(problem, r" $1$ and $2$ so \boxed{0.5}") == {"accuracy": 1.0, "exact_match": 0.0}
    assert between_dollars(r" It is $\frac12$") == r"\frac12"


def test_several_samples_count_as_one_question_and_show_their_spread() -> None:
    task = CustomGeneration(
        file=Path("none"), prompt="", answer="{x}", scorer="number", temperature=1.0, samples=2, max_tokens=8
    )
    examples = [example("1"), example("2")]
    scores = task.score_all(examples, [said("1", "so 1"), said("2", "3", finished=False)])
    assert scores[0].values == {"accuracy": 1.0, "cut_off": 0.0}
    assert scores[1].values == {"accuracy": 0.5, "cut_off": 1.0}
    found = task.metrics(examples, scores)
    assert found["accuracy"].value == 0.75
    assert found["accuracy"].count == 2
    assert found["cut_off"].value == 0.5
    assert not found["cut_off"].higher_is_better
    # The first draw has 2 of 2 right, the second 1 of 2: standard deviation of 1.0 and 0.5.
    assert found["accuracy_spread"].value == pytest.approx(math.sqrt(0.125))


def test_samples_differ_in_their_seeds_and_nothing_else() -> None:
    task = KINDS.read({"kind": "triviaqa", "temperature": 0.7, "samples": 3, "seed": 1})
    requests = task.requests(example(" x"), [])
    assert len(set(requests)) == 3
    assert len({request.seed for request in requests if isinstance(request, Generation)}) == 3
    with pytest.raises(InputError, match="several samples need a temperature"):
        KINDS.read({"kind": "triviaqa", "samples": 3})
    with pytest.raises(InputError, match="max_tokens"):
        KINDS.read({"kind": "triviaqa", "max_tokens": 0})


@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_choices_with_one_that_passed(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    choices = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_mbpp_programs_run_against_their_tests(real_data: Path) -> None:
    task = Mbpp(limit=2, samples=4, temperature=1.0, k=(2,))
    prepared = prepare(task, real_data / "eval")
    first, second = prepared.examples
    good, bad = first.target, "    return None\n"
    stopped = "    import os\n    os._exit(0)\n"
    scores = task.score_all([first, second], [said(good, bad, bad, good), said(stopped, bad, bad, bad)])
    assert scores[0].values == pytest.approx({"pass@1": 0.5, "stopped": 0.0, "cut_off": 0.0, "pass@2": 5 / 6})
    assert scores[1].values["pass@1"] == 0.0
    assert scores[0].record["outcomes"] == ["passed", "failed", "failed", "passed"]
    assert "TypeError" in scores[0].record["outputs"][1]
    assert next(iter(task.metrics(prepared.examples, scores))) == "pass@1"
    assert task.values(first, good)["pass@1"] == 1.0


def test_every_solution_of_mbpp_passes_in_chat_and_in_plain_text(real_data: Path) -> None:
    for chat in (False, True):
        task = Mbpp(chat=chat, limit=12, shots=1)
        prepared = prepare(task, real_data / "eval")
        written = [
            f"Here it is:\n```python\n{one.prompt}{one.target}\n```\nIt works." if chat else one.target + "\n"
            for one in prepared.examples
        ]
        scores = task.score_all(prepared.examples, [said(text) for text in written])
        assert [score.values["pass@1"] for score in scores] == [1.0] * 12
        if chat:
            (request,) = prepared.requests[0]
            assert isinstance(request, Generation)
            assert not isinstance(request.prompt, str)
            assert [message["role"] for message in request.prompt] == ["user", "assistant", "user"]
            assert "```python\ndef " in request.prompt[0]["content"]


def test_k_needs_as_many_samples() -> None:
    with pytest.raises(InputError, match="at most samples"):
        KINDS.read({"kind": "mbpp", "k": [10], "samples": 5, "temperature": 0.8})


@pytest.mark.parametrize(
    ("scorer", "answer", "right", "wrong"),
    [
        ("exact", "The Andes", "andes.", "Alps"),
        ("number", "12", "it is 12.0", "it is 21"),
        ("mentions", "Lima", "I think it is Lima, in Peru", "Limassol"),
        ("maths", r"\frac{1}{2}", r"so \boxed{0.5}", "0.6"),
        ("pattern", "^(yes|aye)", "aye, aye", "no, yes"),
        ("f1", "red house", "a red house", "blue"),
    ],
)
def test_a_task_of_ones_own(tmp_path: Path, scorer: str, answer: str, right: str, wrong: str) -> None:
    write_jsonl(tmp_path / "own.jsonl", [{"q": "What?", "a": answer}, {"q": "How?", "a": answer}])
    recipe = tmp_path / "own.toml"
    recipe.write_text(
        f'kind = "generation"\nfile = "own.jsonl"\nprompt = "Q: {{q}}\\nA:"\nanswer = " {{a}}"\nscorer = "{scorer}"\n'
        + ("shots = 1\n" if scorer != "pattern" else "")
    )
    task = KINDS.read(str(recipe))
    assert isinstance(task, CustomGeneration)
    prepared = prepare(task, None)
    (request,) = prepared.requests[0]
    assert isinstance(request, Generation)
    shown = "" if scorer == "pattern" else f"Q: How?\nA: {answer}\n\n"
    assert request.prompt == f"{shown}Q: What?\nA:"
    assert request.until == ("\n",)
    scores = task.score_all(prepared.examples, [said(right), said(wrong)])
    assert [next(iter(score.values.values())) for score in scores] == [1.0, 0.0]


def test_shots_and_a_pattern_do_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a pattern is not"):
        KINDS.parse(
            {"kind": "generation", "file": "x", "prompt": "", "answer": "", "scorer": "pattern", "shots": 1}, "t"
        )


def test_every_task_with_written_answers_says_whether_they_were_cut_off() -> None:
    for kind in ("gsm8k", "math", "triviaqa", "mbpp", "simple_safety_tests", "over_refusal"):
        task = KINDS.read(kind)
        assert isinstance(task, GeneratedAnswers)
        whole = example(" #### 1", answer="1", aliases=("1",), tests="")
        scores = task.score_all([whole] * 2, [said("1"), said("1", finished=False)])
        assert [score.values["cut_off"] for score in scores] == [0.0, 1.0]


def test_the_engine_gives_the_answers(base_model: Path, tmp_path: Path) -> None:
    from puna.evaluate.harness.ask import Asker
    from puna.evaluate.harness.cache import AnswerCache
    from puna.evaluate.harness.run import evaluate
    from puna.infer.config import EngineConfig
    from puna.infer.load import load_engine
    from puna.infer.sampling import SamplingParams

    write_jsonl(tmp_path / "own.jsonl", [{"q": question, "a": "the city"} for question in ("the llama", "a good")])
    settings = {"kind": "generation", "file": str(tmp_path / "own.jsonl"), "prompt": "{q}", "answer": " {a}"}
    settings |= {"max_tokens": 6, "until": [], "scorer": "f1"}
    engine = load_engine(base_model, EngineConfig(device="cpu"))
    asker = Asker(engine, AnswerCache(tmp_path / "answers", "base"))
    plain = evaluate(asker, prepare(KINDS.parse(settings, "own"), None))
    for sample, question in zip(plain.samples, ("the llama", "a good"), strict=True):
        (expected,) = engine.generate([engine.encode(question)], SamplingParams(max_tokens=6, temperature=0))
        assert sample["answers"] == [expected.text]
    drawn = settings | {"chat": True, "temperature": 1.0, "samples": 3}
    again = [evaluate(asker, prepare(KINDS.parse(drawn, "own"), None)).samples for _ in range(2)]
    assert again[0] == again[1]
    assert len(set(again[0][0]["answers"])) > 1


def test_computer_algebra_is_asked_about_what_strings_leave_open(monkeypatch: pytest.MonkeyPatch) -> None:
    from puna.evaluate.tasks import hendrycks_math

    asked = []

    def equivalent(pairs: list[tuple[str, str]]) -> list[bool]:
        asked.extend(pairs)
        return [text == "2x" for text, _ in pairs]

    monkeypatch.setattr(hendrycks_math, "equivalent_all", equivalent)
    task = HendrycksMath(algebra=True, samples=2, temperature=1.0)
    problems = [example(" x+x", answer="x+x"), example(" 3", answer="3")]
    scores = task.score_all(problems, [said("2x", "x+x"), said("4", "3")])
    assert asked == [("2x", "x+x"), ("4", "3")]
    assert [score.values["equivalent"] for score in scores] == [1.0, 0.5]
    assert [score.values["accuracy"] for score in scores] == [0.5, 0.5]
