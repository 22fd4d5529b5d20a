import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.batches.tokenize import TokenizeConfig
from puna.batches.tokenize import main as tokenize
from puna.config import parse_config
from puna.evaluate.contamination import NOT_CHECKED, Contamination, ContaminationConfig, contamination_line, main
from puna.evaluate.overlap import Overlap, find_overlaps
from puna.runtime.errors import InputError

some_words = st.lists(st.sampled_from("abcd"), max_size=9)


def naive(question: list[str], answer: list[str], corpus: list[list[str]], length: int) -> tuple | float | None:
    """Share of words in common runs, whether one reaches into the answer, and the first run's first document."""
    text = question + answer
    if len(text) < length:
        return None
    runs = [tuple(text[at : at + length]) for at in range(len(text) - length + 1)]
    holders = [
        next(
            (n for n, words in enumerate(corpus) if run in {tuple(words[i : i + length]) for i in range(len(words))}),
            None,
        )
        for run in runs
    ]
    places = [at for at, holder in enumerate(holders) if holder is not None]
    if not places:
        return 0.0
    covered = {word for at in places for word in range(at, at + length)}
    return len(covered) / len(text), places[-1] + length > len(question), str(holders[places[0]])


@settings(max_examples=40)
@given(
    st.lists(st.tuples(some_words, some_words), min_size=1, max_size=4),
    st.lists(some_words, max_size=4),
    st.integers(1, 3),
)
def test_overlaps_agree_with_plain_python(questions, corpus, length) -> None:
    texts = [(" ".join(question), " " + " ".join(answer)) for question, answer in questions]
    documents = [(str(n), "; ".join(words)) for n, words in enumerate(corpus)]
    found = find_overlaps(texts, documents, [length, 7])[0]
    for (question, answer), overlap in zip(questions, found, strict=True):
        expected = naive(question, answer, corpus, length)
        if isinstance(overlap, Overlap):
            assert (overlap.share, overlap.in_answer, overlap.document) == expected
            assert len(overlap.run.split()) == length
        else:
            assert overlap == expected


PREMISE = "A man is sitting on a roof that he mended last summer with his two brothers. He"


@pytest.fixture
def config(tmp_path: Path) -> dict:
    rows = [
        {"question": PREMISE, "choices": ["starts pulling up the roofing again", "is"], "answer": 0},
        {
            "question": "Which animal is raised on the puna, the high plateau of the Andes?",
            "choices": ["llamas", "cod"],
            "answer": 0,
        },
        {"question": "Two and two make", "choices": ["four", "five"], "answer": 0},
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    leak = "Seen on the web: a MAN is sitting on a roof -- that he mended last summer with his 2 brothers."
    documents = [{"id": "clean", "text": "Nothing of interest. " * 20}, {"id": "leak", "text": leak}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    return {
        "tasks": [
            {
                "kind": "choice",
                "name": "mine",
                "file": str(tmp_path / "questions.jsonl"),
                "prompt": "{question}",
                "choices": "choices",
                "answer": "answer",
                "limit": 1,
            }
        ],
        "against": [str(tmp_path / "corpus.jsonl")],
        "output": str(tmp_path / "contamination"),
    }


def run(values: dict) -> dict:
    main(parse_config(ContaminationConfig, values, "test"))
    return json.loads((Path(values["output"]) / "contamination.json").read_text())["tasks"]


def test_a_leak_is_found(config: dict, capsys: pytest.CaptureFixture[str]) -> None:
    counts = run(config)["mine"]
    assert {
        key: counts["13"][key] for key in ("questions", "long_enough", "contaminated", "contaminated_in_answer")
    } == {
        "questions": 3,
        "long_enough": 2,
        "contaminated": 1,
        "contaminated_in_answer": 0,
    }
    assert counts["13"]["share"] == 0.5
    assert (counts["8"]["long_enough"], counts["8"]["contaminated"]) == (2, 1)
    assert "stands in leak" in capsys.readouterr().out
    found = Contamination.read(Path(config["output"]))
    assert [len(found.clean["mine"]), len(found.contaminated["mine"])] == [1, 1]


def test_token_shards_are_read_by_their_own_tokenizer(config: dict, base_model: Path, tmp_path: Path) -> None:
    tokenize(TokenizeConfig(tmp_path / "corpus.jsonl", base_model, tmp_path / "tokens", workers=1))
    expected = run(config)
    assert run(config | {"against": [str(tmp_path / "tokens")]}) == expected
    moved = tmp_path / "tokens" / "puna.json"
    moved.write_text(moved.read_text().replace(str(base_model), "/nowhere"))
    with pytest.raises(InputError, match="tokenizer /nowhere, which is not there"):
        run(config | {"against": [str(tmp_path / "tokens")]})
    assert run(config | {"against": [str(tmp_path / "tokens")], "tokenizer": str(base_model)}) == expected


def test_scores_are_told_apart(config: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [
        {"task": "mine", "id": str(n), "values": {"accuracy": value}, "cluster": "", "prompt_hash": "x"}
        for n, value in ((1, 1.0), (2, 0.0), (3, 1.0))
    ]
    (tmp_path / "evaluation").mkdir()
    path = tmp_path / "evaluation" / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in samples))
    run(config | {"evaluation": str(path.parent)})
    shown = capsys.readouterr().err
    assert "0.000 on 1 clean; 1.000 on 1 contaminated; 1 too short to tell" in shown
    path.write_text(
        json.dumps({"task": "other", "id": "1", "values": {"accuracy": 1.0}, "cluster": "", "prompt_hash": "x"})
    )
    with pytest.raises(InputError, match="has no answers to mine, only to other"):
        run(config | {"evaluation": str(path.parent)})


def test_no_clean_score_without_a_check() -> None:
    assert contamination_line(None, "mine", {"1": 1.0}) == NOT_CHECKED
    found = Contamination(("corpus",), {"mine": frozenset({"1", "2", "3"})}, {"mine": frozenset({"4"})})
    assert contamination_line(found, "other", {"1": 1.0}) == NOT_CHECKED
    line = contamination_line(found, "mine", {"1": 1.0, "2": 0.0, "3": 1.0})
    assert line == "contamination, against corpus: 0.667 ± 0.333 on 3 clean"


def test_real_questions_planted_in_a_corpus(real_data: Path, tmp_path: Path) -> None:
    lines = (real_data / "eval" / "piqa.jsonl").read_text().splitlines()[:40]
    planted = [{"id": str(n), "text": " ".join(map(str, json.loads(line).values()))} for n, line in enumerate(lines)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in planted))
    values = {"tasks": ["piqa"], "data": str(real_data / "eval"), "against": [str(tmp_path / "corpus.jsonl")]}
    counts = run(values | {"output": str(tmp_path / "out"), "ngram_words": [8]})["piqa"]["8"]
    assert 30 <= counts["contaminated"] <= 60
    assert counts["questions"] > 1000


def test_mistakes_are_named(config: dict) -> None:
    with pytest.raises(InputError, match="each need something in them"):
        run(config | {"ngram_words": []})
    with pytest.raises(InputError, match="Two tasks have the same name"):
        run(config | {"tasks": config["tasks"] * 2})
    with pytest.raises(InputError, match="does not exist"):
        run(config | {"against": ["nowhere.jsonl"]})
    with pytest.raises(InputError, match="not an output of `puna contamination`"):
        Contamination.read(Path(config["against"][0]).parent)
