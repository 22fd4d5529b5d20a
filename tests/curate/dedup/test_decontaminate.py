import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.batches.shingles import build_set, contained
from puna.curate.dedup.decontaminate import REASON, Decontaminate
from puna.runtime.errors import InputError

QUESTION = "Natalia sold clips to 48 of her friends in April and then half as many in May"


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [{"question": QUESTION, "choices": ["yes", {"text": "one two three four five six"}], "number": 3}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(1, 2**64 - 1) | st.integers(1, 40), max_size=30), st.lists(st.integers(0, 45), max_size=30))
def test_hash_table_is_a_set(values: set[int], asked: list[int]) -> None:
    table = build_set(np.array(sorted(values), np.uint64))
    asked += list(values)
    assert contained(np.array(asked, np.uint64), table).tolist() == [value in values for value in asked]


def test_overlap_is_rejected_whatever_stands_between_words(documents, evaluation: Path) -> None:
    hidden = "Today: NATALIA sold clips, to 52 of her friends in April -- and then half!"
    cut_short = " ".join(QUESTION.split()[:12])
    outcome = Decontaminate(evaluations=(evaluation,))(documents([hidden, cut_short, "", "unrelated " * 30]))
    assert outcome.kept["id"].to_pylist() == ["d1", "d2", "d3"]
    assert outcome.rejected["reason"].to_pylist() == [REASON]
    assert outcome.counts == {"documents that overlap an evaluation set": 1}


def test_fields_and_nested_strings(documents, evaluation: Path) -> None:
    table = documents(["zero one two three four five six seven"])
    assert len(Decontaminate(evaluations=(evaluation,), ngram_words=6)(table).rejected) == 1
    assert len(Decontaminate(evaluations=(evaluation,), ngram_words=6, fields=("question",))(table).rejected) == 0


def test_min_matches_counts_different_runs(documents, evaluation: Path) -> None:
    once = " ".join(QUESTION.split()[:13])
    table = documents([f"{once}. {once}. {once}", QUESTION])
    outcome = Decontaminate(evaluations=(evaluation,), min_matches=2)(table)
    assert outcome.rejected["id"].to_pylist() == ["d1"]


def test_cutting_leaves_the_rest(documents, evaluation: Path) -> None:
    table = documents([f"Before. {QUESTION}. After.", QUESTION, "Nothing to cut."])
    outcome = Decontaminate(evaluations=(evaluation,), mode="cut")(table)
    assert outcome.kept["text"].to_pylist() == ["Before. After.", "Nothing to cut."]
    assert outcome.rejected["reason"].to_pylist() == [REASON]
    assert outcome.rejected["text"].to_pylist() == [QUESTION]
    assert outcome.counts["words cut"] == 2 * len(QUESTION.split())


def naive(texts: list[list[str]], questions: list[list[str]], length: int) -> list[list[str]]:
    runs = {tuple(text[at : at + length]) for text in questions for at in range(len(text) - length + 1)}
    result = []
    for text in texts:
        gone = {
            word
            for at in range(len(text) - length + 1)
            if tuple(text[at : at + length]) in runs
            for word in range(at, at + length)
        }
        result.append([word for at, word in enumerate(text) if at not in gone])
    return result


some_words = st.lists(st.sampled_from("abcd"), max_size=10)


@settings(max_examples=40, deadline=None)
@given(st.lists(some_words, min_size=1, max_size=4), st.lists(some_words, min_size=1, max_size=3), st.integers(1, 3))
def test_cutting_agrees_with_plain_python(tmp_path_factory, texts, questions, length) -> None:
    path = tmp_path_factory.mktemp("evaluation") / "questions.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(text)}) + "\n" for text in [*questions, ["z"] * length]))
    table = pa.table({"id": list(map(str, range(len(texts)))), "text": [" ".join(text) for text in texts]})
    outcome = Decontaminate(evaluations=(path,), ngram_words=length, mode="cut")(table)
    expected = naive(texts, questions, length)
    kept = [text for before, text in zip(texts, expected, strict=True) if text or not before]
    assert [text.split() for text in outcome.kept["text"].to_pylist()] == kept


def test_real_evaluation_sets(documents, real_data: Path) -> None:
    path = real_data / "eval" / "winogrande.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()[:200]]
    texts = [row["context_options"][0] + " " + row["continuation"] for row in rows]
    clean = (real_data / "curation" / "cs336_quality" / "low_quality_cc.txt").read_text()
    outcome = Decontaminate(evaluations=(path,), ngram_words=8)(documents([*texts, clean]))
    contexts = [row["context_options"][0] for row in rows]
    long_enough = {f"d{number}" for number, text in enumerate(contexts) if len(text.split()) > 10}
    assert len(long_enough) > 50
    assert long_enough <= set(outcome.rejected["id"].to_pylist())
    assert "d200" in outcome.kept["id"].to_pylist()


def test_mistakes_are_named(documents, evaluation: Path) -> None:
    with pytest.raises(ValueError, match="evaluations is empty"):
        Decontaminate()
    with pytest.raises(ValueError, match="ngram_words must be at least 1"):
        Decontaminate(evaluations=(evaluation,), ngram_words=0)
    with pytest.raises(InputError, match="lacks the field 'answer'; it has question, choices, number"):
        Decontaminate(evaluations=(evaluation,), fields=("answer",))(documents(["a"]))
    with pytest.raises(InputError, match="has 50 words, so there is nothing to look for"):
        Decontaminate(evaluations=(evaluation,), ngram_words=50)(documents(["a"]))
