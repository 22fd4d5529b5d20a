"""Heads say about new texts, through the command line, what they have learnt."""

import json
from pathlib import Path

import pytest
import torch

from puna.cli import main
from puna.config import load_config
from puna.finetune.config import FinetuneConfig
from puna.finetune.main import main as finetune
from puna.finetune.tasks.task import TaskData
from puna.finetune.text.control import Control
from puna.runtime.errors import InputError
from puna.runtime.files import read_jsonl, write_json, write_jsonl
from puna.tokenizer.load import load_tokenizer

TRAIN = [
    "train.steps=60", "train.batch_rows=4", "train.micro_batch_rows=4", "train.row_length=64", "train.log_every=60",
    "train.device=cpu", "train.num_threads=1", "train.tensorboard=false", "train.optimizer.learning_rate=1e-2",
    "train.schedule.warmup_steps=2",
]  # fmt: skip


def learn(base_model: Path, folder: Path, data: Path, *settings: str) -> Path:
    pairs = [f"model={base_model}", f"output={folder / 'out'}", f"data.train={data}", *TRAIN, *settings]
    finetune(load_config(FinetuneConfig, None, pairs))
    return folder / "out"


@pytest.fixture
def predict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Predict":
    return Predict(monkeypatch, capsys)


class Predict:
    """`puna predict`, in this process: the lines that it prints."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> list[dict]:
        self.capsys.readouterr()
        self.monkeypatch.setattr("sys.argv", ["puna", "predict", *map(str, arguments), "--set", "device=cpu"])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = self.capsys.readouterr()
        if stopped.value.code:
            raise InputError(said.err)
        return [json.loads(line) for line in said.out.splitlines()]


TONES = [("the good llama sleeps", "good"), ("a bad herd eats", "bad"), ("good hay", "good"), ("bad city", "bad")]


def test_classes_of_new_texts(base_model: Path, tmp_path: Path, predict: Predict) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"text": text, "label": label} for text, label in TONES])
    output = learn(base_model, tmp_path, tmp_path / "d.jsonl", "task.kind=classification")
    (tmp_path / "new.csv").write_text('id,text\n7,good hay\n8,"bad city"\n')
    lines = predict(output / "model", tmp_path / "new.csv")
    assert [(line["id"], line["text"], line["predicted"]) for line in lines] == [
        ("7", "good hay", "good"), ("8", "bad city", "bad"),
    ]  # fmt: skip
    (tmp_path / "new.txt").write_text("a bad herd eats\n\n")
    assert predict(output / "model", tmp_path / "new.txt", "--output", tmp_path / "found.jsonl") == []
    [line] = read_jsonl(tmp_path / "found.jsonl")
    assert line["predicted"] == "bad"

    from transformers import LlamaForSequenceClassification

    theirs = LlamaForSequenceClassification.from_pretrained(output / "model").eval()
    tokenizer = load_tokenizer(output / "model")
    with torch.no_grad():
        logits = theirs(torch.tensor([[tokenizer.bos_id, *tokenizer.encode("a bad herd eats")]])).logits[0]
    assert line["probability"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)  # float32, six digits

    write_jsonl(tmp_path / "wrong.jsonl", [{"body": "x"}])
    with pytest.raises(InputError, match="no text in its column 'text'"):
        predict(output / "model", tmp_path / "wrong.jsonl")
    # The same head judges what a text task has written.
    task = Control(classifier=output / "model")
    examples = task.open(TaskData(tmp_path / "d.jsonl"), tokenizer, 128).train
    assert task.scores(examples, [text for text, _ in TONES]) == {"validation/obedience": 1.0}
    assert task.scores(examples, ["good hay", "", "", "bad city"]) == {"validation/obedience": 0.5}
    with pytest.raises(InputError, match="has the architecture 'LlamaForCausalLM'"):
        Control(classifier=base_model).check()


def test_several_classes_and_numbers_of_new_texts(base_model: Path, tmp_path: Path, predict: Predict) -> None:
    rows = [{"text": "good hay", "label": ["x", "y"]}, {"text": "bad city", "label": ["x"]}]
    write_jsonl(tmp_path / "d.jsonl", rows)
    several = ["task.kind=classification", "task.problem=many_classes"]
    output = learn(base_model, tmp_path / "several", tmp_path / "d.jsonl", *several, 'peft={kind="ia3"}')
    lines = predict(output / "model", tmp_path / "d.jsonl")
    assert all(0 < value < 1 for line in lines for value in line["probabilities"].values())
    assert all(line["predicted"] == [k for k, v in line["probabilities"].items() if v > 0.5] for line in lines)

    write_jsonl(tmp_path / "n.jsonl", [{"text": "good hay", "label": 3.0}, {"text": "bad city", "label": -1.0}])
    number = ["task.kind=classification", "task.problem=number"]
    output = learn(base_model, tmp_path / "number", tmp_path / "n.jsonl", *number)
    assert [line["predicted"] for line in predict(output / "model", tmp_path / "n.jsonl")] == [
        pytest.approx(3.0, abs=0.5), pytest.approx(-1.0, abs=0.5),
    ]  # fmt: skip


@pytest.mark.parametrize("peft", [[], ['peft={kind="prefix"}', "train.steps=2"]])
def test_entities_in_new_texts(base_model: Path, tmp_path: Path, predict: Predict, peft: list[str]) -> None:
    (tmp_path / "d.conll").write_text("the O\nherd O\nof O\nLima B-LOC\n, O\nPeru B-LOC\n\nhay O\n")
    settings = ["task.kind=tagging", "task.learned_scheme=BIOES"]
    output = learn(base_model, tmp_path, tmp_path / "d.conll", *settings, *peft)
    (tmp_path / "new.txt").write_text("the herd of Lima, Peru\n")
    [line] = predict(output / ("adapter" if peft else "model"), tmp_path / "new.txt")
    assert line["tokens"] == ["the", "herd", "of", "Lima", ",", "Peru"]
    if not peft:
        assert line["tags"] == ["O", "O", "O", "S-LOC", "O", "S-LOC"]
        assert line["entities"][0] == {"text": "Lima", "type": "LOC", "start": 3, "stop": 4}
    write_jsonl(tmp_path / "new.jsonl", [{"tokens": ["hay"]}, {"tokens": []}])
    with pytest.raises(InputError, match="line 2 has neither a text nor a list of words"):
        predict(output / ("adapter" if peft else "model"), tmp_path / "new.jsonl")


def test_answers_and_relations_in_new_texts(base_model: Path, tmp_path: Path, predict: Predict) -> None:
    qas = [
        {"id": "a", "question": "who?", "answers": [{"text": "llama", "answer_start": 4}]},
        {"id": "b", "question": "city?", "answers": [], "is_impossible": True},
    ]
    context = "the llama of Lima sleeps"
    write_json(tmp_path / "d.json", {"data": [{"paragraphs": [{"context": context, "qas": qas}]}]})
    output = learn(base_model, tmp_path / "spans", tmp_path / "d.json", "task.kind=spans", "task.overlap=4")
    asked = [{"id": each["id"], "question": each["question"]} for each in qas]
    write_json(tmp_path / "new.json", {"data": [{"paragraphs": [{"context": context, "qas": asked}]}]})
    assert predict(output / "model", tmp_path / "new.json") == [
        {"id": "a", "question": "who?", "answer": "llama"}, {"id": "b", "question": "city?", "answer": ""},
    ]  # fmt: skip

    rows = [("<e1>hay</e1> of <e2>Lima</e2>", "R(e1,e2)"), ("<e1>hay</e1> or <e2>city</e2>", "Other")]
    write_jsonl(tmp_path / "r.jsonl", [{"text": text, "label": label} for text, label in rows])
    output = learn(base_model, tmp_path / "relations", tmp_path / "r.jsonl", "task.kind=relations")
    write_jsonl(tmp_path / "new.jsonl", [{"text": text} for text, _ in rows])
    assert [line["predicted"] for line in predict(output / "model", tmp_path / "new.jsonl")] == ["R(e1,e2)", "Other"]


def test_what_has_no_head_is_refused(base_model: Path, tmp_path: Path, predict: Predict) -> None:
    (tmp_path / "new.txt").write_text("hay\n")
    with pytest.raises(InputError, match="has the architecture 'LlamaForCausalLM'; a model with a head is one of"):
        predict(base_model, tmp_path / "new.txt")
