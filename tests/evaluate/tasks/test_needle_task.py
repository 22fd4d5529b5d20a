"""Needles as a task: the same questions for every model, scored like all others."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.evaluate.harness.run import prepare
from puna.evaluate.tasks.needle import Needle
from puna.evaluate.tasks.request import Continuation, Likelihood
from puna.evaluate.tasks.table import TASKS, TaskKinds
from puna.runtime.errors import InputError
from puna.runtime.files import write_jsonl

KINDS = TaskKinds("task", TASKS)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("needle") / "d.jsonl"
    write_jsonl(path, ({"id": str(n), "text": f"The llamas of herd {n} graze on the plain. " * 5} for n in range(30)))
    return path


@given(length=st.integers(120, 2000), depth=st.floats(0, 1), seed=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_a_prompt_has_its_length_and_its_needle_at_its_depth(
    documents: Path, length: int, depth: float, seed: int
) -> None:
    task = Needle(file=documents, lengths=(length,), depths=(depth,), trials=2, seed=seed)
    first, second = task.read(None)
    assert first.prompt != second.prompt
    assert task.read(None)[0] == first
    assert len(first.prompt) == length
    city = first.prompt.rsplit(" of ", 1)[1].removesuffix(" is")
    needle = f"\nThe secret number of {city} is{first.target}.\n"
    assert first.prompt.count(needle) == 1
    room = length - len(needle) - len(f"\nThe secret number of {city} is")
    assert round(depth * room) - 40 <= first.prompt.index(needle) <= round(depth * room)
    before, after = first.prompt.split(needle)
    assert before == "" or after.startswith(("\nThe secret", " ", "\n")) or before[-1] == " "


def test_metrics_by_length_and_depth(documents: Path) -> None:
    task = KINDS.read({"kind": "needle", "file": str(documents), "lengths": [200, 400], "depths": [0, 1], "trials": 3})
    prepared = prepare(task, None)
    assert len(prepared.examples) == 12
    assert sorted({example.group for example in prepared.examples}) == [
        f"{length} characters, depth {depth}" for length in (200, 400) for depth in (0, 1)
    ]
    ((request,), *_) = prepared.requests
    assert request == Continuation(prepared.examples[0].prompt, prepared.examples[0].target)
    scores = [task.score(example, [Likelihood(-1.0, "depth 1" in example.group, 3)]) for example in prepared.examples]
    accuracy = task.metrics(prepared.examples, scores)["accuracy"]
    assert accuracy.value == 0.5
    assert accuracy.low is not None
    assert accuracy.high is not None
    assert 0.2 < accuracy.low < 0.5 < accuracy.high < 0.8  # Wilson's, of 6 in 12
    assert task.inputs(None) == [documents]


def test_a_text_without_blanks_is_cut_where_it_is(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "zh.jsonl", [{"id": "1", "text": "羊驼在高原上吃草" * 200}])
    (example,) = Needle(file=tmp_path / "zh.jsonl", lengths=(600,), depths=(0.5,), trials=1).read(None)
    assert 200 < example.extra["place"] < 300


def test_what_cannot_be_is_refused(documents: Path, tmp_path: Path) -> None:
    for changed, message in (
        ({"depths": [1.5]}, "between 0 and 1"),
        ({"trials": 0}, "at least 1"),
        ({"needle": "none"}, "needle lacks {city} and {number}"),
        ({"lengths": []}, "name some"),
        ({"shots": 1}, "no shots"),
    ):
        with pytest.raises(InputError, match=message):
            KINDS.read({"kind": "needle", "file": str(documents), **changed})
    with pytest.raises(InputError, match="no room for needle and question"):
        Needle(file=documents, lengths=(20,)).read(None)
    write_jsonl(tmp_path / "empty.jsonl", [{"id": "1", "text": " "}])
    with pytest.raises(InputError, match="no text to hide"):
        Needle(file=tmp_path / "empty.jsonl").read(None)
