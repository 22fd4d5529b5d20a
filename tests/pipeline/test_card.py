import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from puna.cli import app
from puna.pipeline.card import MARK, write_card
from puna.runtime.errors import InputError
from puna.runtime.manifest import Manifest, content_hash


@pytest.fixture
def run(base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder as its stages leave it: corpus, tokens, a model, an evaluation of it, a contamination check."""
    monkeypatch.chdir(tmp_path)
    root = Path("runs/mine")

    def stage(name: str, manifest: Manifest, files: dict[str, str]) -> None:
        (root / name).mkdir(parents=True)
        for file, text in files.items():
            (root / name / file).write_text(text)
        manifest.write(root / name)

    sources = [{"name": "notes", "read": {"kind": "folder", "path": "notes"}}]
    counts = {"num_documents": 1200, "num_bytes": 34567}
    stage("corpus", Manifest("curate", {"sources": sources}, {"notes": "0" * 64}, counts), {"documents.jsonl": "{}"})
    tokens = Manifest("tokenize", {}, {"runs/mine/corpus/documents.jsonl": "1" * 64}, {"num_tokens": 9876})
    stage("tokens", tokens, {"ids.bin": "x"})
    shutil.copytree(base_model, root / "base" / "model")
    train = {"steps": 10, "batch_rows": 4, "row_length": 128, "optimizer": {"kind": "adamw", "learning_rate": 3e-4}}
    Manifest("pretrain", {"train": train}, {"runs/mine/tokens": "2" * 64}, {"train_loss": 3.25}).write(
        root / "base/model"
    )
    metric = {"value": 0.75, "low": 0.5, "high": 0.9, "standard_error": 0.1, "count": 4, "higher_is_better": True}
    results = {"tasks": {"mine": {"metrics": {"accuracy": metric}, "task": {"kind": "choice"}}}, "bits_per_byte": 2.5}
    rows = [
        {"task": "mine", "id": str(n), "values": {"accuracy": float(n > 0)}, "cluster": "", "prompt_hash": "x"}
        for n in range(4)
    ]
    inputs = {"runs/mine/base/model": content_hash(root / "base" / "model")}
    files = {
        "results.json": json.dumps(results),
        "samples.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "answers.jsonl": "",
    }
    stage("quality", Manifest("evaluate", {}, inputs), files)
    stage("others", Manifest("evaluate", {}, {"elsewhere/model": "3" * 64}), files)
    return root


def test_a_card_says_what_the_manifests_say(run: Path) -> None:
    card = write_card(run / "base" / "model", licence="apache-2.0")
    read = ModelCard.load(card)
    assert read.data.license == "apache-2.0"
    assert read.data.model_name == "mine/base"
    scores = {(result.dataset_name, result.metric_type): result for result in read.data.eval_results}
    assert scores.keys() == {("mine", "accuracy"), ("quality", "bits_per_byte")}
    assert scores["mine", "accuracy"].metric_value == 0.75
    assert scores["mine", "accuracy"].metric_args == {"interval": "0.5 to 0.9", "count": "4"}
    text = " ".join(read.text.split())
    for part in (
        "| curate | `runs/mine/corpus/documents.jsonl` | 1,200 documents, 34,567 bytes | `notes` |",
        "| tokenize | `runs/mine/tokens` | 9,876 tokens |",
        "10 steps of 4 rows of 128 tokens (at most 5,120 tokens); adamw, learning rate 0.0003",
        "training loss at the end 3.250 nats a token",
        "| mine | accuracy | 0.75 | 0.5 to 0.9 | 4 | contamination: not checked, so there is no clean score |",
        "| quality | bits_per_byte | 2.5 | unknown |",
        "It was trained to continue text only",
        "apache-2.0, as given by whoever wrote this card. The model was made from `notes`, whose licences",
        "`runs/mine/tokens` (puna tokenize), content 222222222222",
    ):
        assert part in text
    assert "others" not in text


def test_a_card_does_not_change_what_the_model_is(run: Path) -> None:
    model = run / "base" / "model"
    before = content_hash(model)
    first = write_card(model).read_text()
    assert content_hash(model) == before
    assert write_card(model).read_text() == first
    (run / "corpus" / "sub").mkdir()
    (run / "corpus" / "sub" / "README.md").write_text("a document")
    with_document = content_hash(run / "corpus")
    (run / "corpus" / "sub" / "README.md").write_text("another document")
    assert content_hash(run / "corpus") != with_document


def test_contamination_checks_are_found(run: Path) -> None:
    rows = [{"task": "mine", "id": str(n), "clean": n > 0} for n in range(4)]
    (run / "check").mkdir()
    (run / "check" / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "check" / "contamination.json").write_text(json.dumps({"against": ["runs/mine/corpus"], "tasks": {}}))
    Manifest("contamination", {}, {}).write(run / "check")
    text = write_card(run / "base" / "model").read_text()
    assert "contamination, against runs/mine/corpus: 1.000 ± 0.000 on 3 clean; 0.000 on 1 contaminated" in text
    assert "was not checked." not in text


def test_what_is_unknown_is_said_to_be(base_model: Path, tmp_path: Path) -> None:
    shutil.copytree(base_model, tmp_path / "found")
    (tmp_path / "found" / "puna.json").unlink(missing_ok=True)
    text = write_card(tmp_path / "found").read_text()
    assert ModelCard(text).data.eval_results is None
    for part in (
        "license: unknown",
        "how it was made is unknown",
        "Unknown: no manifest leads to the data.",
        "Unknown: there is no manifest of a training.",
        "Nothing is known about how good the model is.",
        "Unknown: nobody has given one.",
    ):
        assert part in text


def test_the_command_and_its_mistakes(run: Path) -> None:
    model = str(run / "base" / "model")
    shown = CliRunner().invoke(app, ["inspect", model, "--card"])
    assert shown.exit_code == 0
    card = Path(model) / "README.md"
    assert MARK in card.read_text()
    assert "parameters" in CliRunner().invoke(app, ["inspect", model]).output
    alone = CliRunner().invoke(app, ["inspect", "model", model, "--licence", "mit"])
    assert "belong to --card" in str(alone.exception)
    card.write_text("# Mine\n")
    with pytest.raises(InputError, match="was not written by `puna inspect --card`, so it is left alone"):
        write_card(Path(model))
    assert card.read_text() == "# Mine\n"
