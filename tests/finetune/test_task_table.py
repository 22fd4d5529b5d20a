"""The table of docs/tasks.md: its slices open as tasks, its baselines learn, and it is made in pieces."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from puna.finetune.tasks.task import TaskData
from puna.tokenizer.load import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The three modules of the benchmark, which are no package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("task_data", "task_baselines", "tasks")
    return {name: importlib.import_module(name) for name in names}


def test_slices_open_as_tasks(bench: dict[str, ModuleType], real_data: Path, base_model: Path, tmp_path: Path) -> None:
    from puna.config import parse_config
    from puna.finetune.config import FinetuneConfig

    tokenizer = load_tokenizer(base_model)
    for data_set in bench["task_data"].DATA_SETS:
        folder = tmp_path / data_set.name
        files = bench["task_data"].write_slices(data_set, real_data / "tasks", folder, 150, 10)
        settings = {"model": str(base_model), "output": str(tmp_path / "out"), "task": data_set.task}
        settings |= {"data": {side: str(path) for side, path in files.items()}}
        config = parse_config(FinetuneConfig, settings, data_set.name)
        assert isinstance(config.data, TaskData)
        assert config.task is not None
        opened = config.task.open(config.data, tokenizer, 512)
        assert len(opened.train) >= 150
        assert len(opened.held_out) >= 10
        assert len({str(row) for row in bench["task_data"].read_slice(files["train"])}) > 140, "rows repeat"
        train, held_out = (
            {json.dumps(row, sort_keys=True) for row in bench["task_data"].read_slice(files[side])}
            for side in ("train", "held_out")
        )
        assert not train & held_out, f"{data_set.name} is measured on what it learns from"
        if hasattr(opened, "metrics"):
            assert data_set.metric in opened.metrics


def _rows(form: str) -> list[dict[str, Any]]:
    """Examples from which the classical method has to learn a simple rule."""
    cities = ["Lima", "Cusco", "Puno", "Ica"]
    if form == "classification":
        return [
            {"text": f"{word} {n}", "label": label} for n in range(20) for word, label in (("good", "1"), ("bad", "0"))
        ]
    if form == "pairs":
        same = [{"text": f"{city} is high", "other": f"{city} is high", "label": "1"} for city in cities * 5]
        return same + [{"text": f"{city} is high", "other": "a llama eats hay", "label": "0"} for city in cities * 5]
    if form == "relations":
        sentences = [("was born in", "Birth"), ("works at", "Work")]
        return [
            {"text": f"<e1>{city}</e1> {words} <e2>place</e2>", "label": label}
            for city in cities * 3
            for words, label in sentences
        ]
    if form == "tagging":
        return [{"tokens": ["walk", "to", city, "now"], "tags": ["O", "O", "B-LOC", "O"]} for city in cities * 5]
    if form == "spans":
        context = "Nothing here is of use. The capital of Peru is Lima. Hay is dry."
        answers = [{"text": "Lima", "answer_start": context.index("Lima")}]
        return [{"context": context, "id": "1", "question": "What is the capital of Peru?", "answers": answers}]
    if form == "translation":
        pairs = [("one cat", "eine Katze"), ("one dog", "ein Hund"), ("the cat", "die Katze"), ("the dog", "der Hund")]
        return [{"en": en, "de": de} for en, de in pairs]
    return [{"text": "#Person1#: The llama sleeps.", "summary": "The llama sleeps."}]


@pytest.mark.parametrize(
    ("form", "task", "metric", "least"),
    [
        ("classification", "classification", "validation/accuracy", 1.0),
        ("pairs", "classification", "validation/macro_f1", 1.0),
        ("relations", "relations", "validation/f1", 1.0),
        ("tagging", "tagging", "validation/f1", 1.0),
        ("spans", "spans", "validation/f1", 1.0),
        ("translation", "translation", "validation/chrf", 0.4),
        ("summarisation", "summarisation", "validation/rougeL", 0.8),
    ],
)
def test_a_baseline_learns_a_simple_rule(
    bench: dict[str, ModuleType], form: str, task: str, metric: str, least: float
) -> None:
    if form == "tagging":
        pytest.importorskip("sklearn_crfsuite")
    data_set = bench["task_data"].DataSet(form, form, {"kind": task}, metric, "", 64, lambda source: ([], []))
    rows = _rows(form)
    name, value = bench["task_baselines"].baseline(data_set, rows, rows)
    assert name
    assert least <= value <= 1.0


def test_the_table_is_made_in_pieces(
    bench: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = bench["tasks"]
    ran: list[tuple[str, str]] = []

    def cell(data_set: Any, method: str, model: Path, files: dict[str, Path], steps: int, work: Path) -> dict[str, Any]:
        ran.append((data_set.name, method))
        value = {"baseline": 0.5, "full": 0.6, "lora": 0.4}[method]
        costs = {} if method == "baseline" else {"trained_parameters": 1000, "megabytes": 10.0}
        return {"value": value, "seconds": 1.0, **costs}

    monkeypatch.setattr(tasks, "in_own_process", cell)
    monkeypatch.setattr(tasks, "write_slices", lambda *arguments: {})
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tasks.MARKERS[0]}\nold\n{tasks.MARKERS[1]}\nafter\n")

    (tmp_path / "trunk").write_text("one trunk")

    def run(*options: str) -> None:
        options = ("--output", str(tmp_path), "--model", str(tmp_path / "trunk"), "--sets", "SST-2", "MRPC", *options)
        monkeypatch.setattr(sys, "argv", ["tasks.py", *options])
        tasks.main()

    run("--methods", "baseline", "full", "--minutes", "0")
    assert not ran
    run("--methods", "baseline", "full")
    assert ran == [("SST-2", "baseline"), ("MRPC", "baseline"), ("SST-2", "full"), ("MRPC", "full")]
    run("--methods", "baseline", "full", "lora", "--write", str(page))
    assert ran[4:] == [("SST-2", "lora"), ("MRPC", "lora")], "cells that were there ran again"
    assert "SST-2: full" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| baseline | 50.0 | 50.0 |" in text
    assert "| full | **60.0** | **60.0** |" in text
    assert "| lora | 40.0 | 40.0 |" in text

    (tmp_path / "trunk").write_text("another trunk")
    run("--methods", "baseline", "full")
    assert ran[6:] == [("SST-2", "full"), ("MRPC", "full")], "only the baseline does not follow from the trunk"


def test_a_cell_that_fails_says_why(bench: dict[str, ModuleType], tmp_path: Path) -> None:
    data_set = bench["task_data"].DATA_SETS[0]
    files = {"train": tmp_path / "absent.jsonl", "held_out": tmp_path / "absent.jsonl"}
    with pytest.raises(RuntimeError, match=r"absent\.jsonl"):
        bench["tasks"].in_own_process(data_set, "baseline", tmp_path, files, 1, tmp_path / "work")
