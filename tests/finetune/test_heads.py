"""Heads learn, are refused bad data, and compute in transformers what they compute here."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from seqeval.scheme import IOB2, IOBES, Entities

from puna.batches.packing import IGNORE
from puna.config import load_config
from puna.finetune.config import FinetuneConfig
from puna.finetune.main import main as finetune
from puna.finetune.tasks.head import predict
from puna.finetune.tasks.spans import overlap_f1
from puna.finetune.tasks.squad import read_squad
from puna.finetune.tasks.tagging import Tagging
from puna.finetune.tasks.tags import Entity, Sentence, detect_scheme, entities, to_tags
from puna.finetune.tasks.task import Example, ExampleRows, collate
from puna.peft.heads import load_head_model
from puna.runtime.errors import InputError
from puna.runtime.files import write_json, write_jsonl
from puna.runtime.manifest import Manifest
from puna.tokenizer.load import load_tokenizer
from puna.train.metrics import read_metrics

TRAIN = [
    "train.steps=40",
    "train.batch_rows=8",
    "train.micro_batch_rows=8",
    "train.row_length=64",
    "train.log_every=20",
    "train.validate_every=20",
    "train.device=cpu",
    "train.num_threads=1",
    "train.tensorboard=false",
    "train.optimizer.learning_rate=1e-2",
    "train.schedule.warmup_steps=2",
]


def tune(base_model: Path, folder: Path, kind: str, data: Path, *more: str) -> Path:
    """Run the stage as the command line does; returns the finished model directory."""
    pairs = [f"model={base_model}", f"output={folder / 'out'}", f"task.kind={kind}", f"data.train={data}"]
    finetune(load_config(FinetuneConfig, None, [*pairs, f"data.held_out={data}", *TRAIN, *more]))
    return folder / "out" / "model"


def write_csv(path: Path, rows: list[tuple[Any, ...]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


SENTENCES = [("the good llama sleeps", "good"), ("a bad herd eats", "bad"), ("good hay", "good"), ("bad city", "bad")]


def their_logits(model: Any, examples: list[list[int]], pad_id: int) -> torch.Tensor:
    """What transformers computes for a padded batch."""
    batch = collate([Example(ids, [IGNORE] * len(ids)) for ids in examples], pad_id)
    with torch.no_grad():
        return model(input_ids=batch.ids_BT, attention_mask=(batch.documents_BT == 0).long())


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_a_text_gets_its_class_and_transformers_agrees(base_model: Path, tmp_path: Path, attention: str) -> None:
    data = write_csv(tmp_path / "data.csv", [("text", "label"), *SENTENCES])
    model = tune(base_model, tmp_path, "classification", data, f"task.attention={attention}")
    results = Manifest.read(model).results
    assert results["validation/accuracy"] == 1.0
    assert results["validation/macro_f1"] == 1.0
    assert "good" in (tmp_path / "out" / "report.txt").read_text()

    from transformers import LlamaForSequenceClassification

    theirs = LlamaForSequenceClassification.from_pretrained(model).eval()
    assert theirs.config.id2label == {0: "bad", 1: "good"}
    tokenizer = load_tokenizer(model)
    ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text, _ in SENTENCES]
    logits = their_logits(theirs, ids, tokenizer.pad_id).logits
    assert [theirs.config.id2label[n] for n in logits.argmax(-1).tolist()] == [label for _, label in SENTENCES]
    ours = our_logits(model, ids, attention)
    torch.testing.assert_close(logits, torch.stack([each[-1] for each in ours]), rtol=1e-5, atol=1e-5)


def our_logits(directory: Path, texts: list[list[int]], attention: Any) -> list[torch.Tensor]:
    """What the same directory computes here."""
    found = load_head_model(directory)
    assert found.attention == attention
    examples = [Example(ids, [0] * len(ids)) for ids in texts]
    return predict(found.model, examples, found.spec.module, found.attention, found.tokenizer.pad_id)


def test_pairs_several_classes_and_numbers(base_model: Path, tmp_path: Path) -> None:
    pairs = [{"a": text, "b": other, "label": int(one == two)} for text, one in SENTENCES for other, two in SENTENCES]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    model = tune(
        base_model, tmp_path / "p", "classification", tmp_path / "pairs.jsonl",
        "task.text=a", "task.second_text=b", "train.steps=2", 'peft={kind="lora",rank=2}',
    )  # fmt: skip
    assert Manifest.read(model).results["validation/mcc"] <= 1.0

    many = write_csv(tmp_path / "many.csv", [("text", "label"), *SENTENCES, ("good bad", "good,bad"), ("a herd", "")])
    model = tune(base_model, tmp_path / "m", "classification", many, "task.problem=many_classes")
    assert Manifest.read(model).results["validation/exact_match"] == 1.0

    numbers = write_csv(tmp_path / "n.csv", [("text", "label"), ("good llama", 2.5), ("bad llama", -1), ("herd", 0.5)])
    model = tune(base_model, tmp_path / "n", "classification", numbers, "task.problem=number")
    results = Manifest.read(model).results
    assert results["validation/mean_absolute_error"] < 0.3
    assert results["validation/pearson"] > 0.95
    assert results["validation/spearman"] == pytest.approx(1.0)


CONLL = """-DOCSTART- O

the O
herd O
of O
Lima I-LOC
eats O

the O
city O
in O
Peru I-LOC

Lima I-LOC
Peru B-LOC
sleeps O
"""


@pytest.mark.parametrize(("attention", "piece"), [("bidirectional", "first"), ("causal", "last")])
def test_words_get_their_tags_and_transformers_agrees(
    base_model: Path, tmp_path: Path, attention: str, piece: str
) -> None:
    (tmp_path / "data.conll").write_text(CONLL)
    settings = [f"task.attention={attention}", f"task.labelled_piece={piece}", "task.learned_scheme=BIOES"]
    model = tune(base_model, tmp_path, "tagging", tmp_path / "data.conll", *settings)
    assert Manifest.read(model).results["validation/f1"] == 1.0
    assert "LOC" in (tmp_path / "out" / "report.txt").read_text()

    from transformers import LlamaForTokenClassification

    theirs = LlamaForTokenClassification.from_pretrained(model).eval()
    tokenizer = load_tokenizer(model)
    texts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in ("the herd of Lima", "in Peru")]
    logits = their_logits(theirs, texts, tokenizer.pad_id).logits
    for row, ours in zip(logits, our_logits(model, texts, attention), strict=True):
        torch.testing.assert_close(row[: len(ours)], ours, rtol=1e-5, atol=1e-5)


def test_the_best_is_kept_and_training_ends_early(base_model: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "data.csv", [("text", "label"), *SENTENCES])
    other = write_csv(tmp_path / "other.csv", [("text", "label"), *((text, "bad") for text, _ in SENTENCES)])
    settings = ["selection.patience=2", "train.validate_every=1", "train.steps=30", f"data.held_out={other}"]
    model = tune(base_model, tmp_path, "classification", data, *settings)
    results = Manifest.read(model).results
    points = [point for point in read_metrics(tmp_path / "out" / "metrics.jsonl") if "validation/loss" in point]
    losses = [point["validation/loss"] for point in points]
    assert results["steps"] < 30
    assert results["best_validation/loss"] == min(losses)
    assert results["best_step"] == losses.index(min(losses)) + 1 == len(losses) - 2
    accuracies = [point["validation/accuracy"] for point in points]
    assert results["validation/accuracy"] == accuracies[losses.index(min(losses))]
    # A run that has ended early does not go on.
    tune(base_model, tmp_path, "classification", data, *settings)
    assert len(read_metrics(tmp_path / "out" / "metrics.jsonl")) == len(points)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([("text", "label")], [], "holds no example"),
        ([("text", "label"), ("a", "x")], [], "Every example in .* has the label 'x'"),
        ([("text", "label"), ("a", "x"), ("", "y")], [], "line 3 has no text in its column 'text'"),
        ([("text", "label"), ("a", "x"), ("b", "")], [], "line 3 has no label in its column 'label'"),
        ([("text", "label"), ("a", "x"), ("b", "y", "z")], [], "line 3 has 3 fields, but there are 2 columns"),
        ([("text", "label"), ("a", "x"), ("b", "y")], ['task.labels=["x", "z"]'], "no example of 'z'"),
        ([("text", "label"), ("a", "x"), ("b", "y")], ["task.problem=number"], "line 2: the label is 'x', which"),
        ([("text", "label"), ("a", "x"), ("b", "y")], ["selection.metric=f1"], "selection.metric is 'f1', but what is"),
        ([("body", "label"), ("a", "x")], [], "no text in its column 'text'. It has body, label"),
    ],
)  # fmt: skip
def test_classes_that_cannot_be_learnt(
    base_model: Path, tmp_path: Path, rows: list[tuple[str, ...]], settings: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tune(base_model, tmp_path, "classification", write_csv(tmp_path / "data.csv", rows), *settings)
    assert not (tmp_path / "out").exists()


def test_labels_and_encodings_that_do_not_fit(base_model: Path, tmp_path: Path) -> None:
    data = write_csv(tmp_path / "data.csv", [("text", "label"), *SENTENCES])
    other = write_csv(tmp_path / "other.csv", [("text", "label"), ("a", "good"), ("a", "fine")])
    with pytest.raises(InputError, match=r"other.csv, line 3: 'fine' is not one of the 2 classes learnt: bad, good"):
        tune(base_model, tmp_path, "classification", data, f"data.held_out={other}")
    other.write_bytes("text,label\na,good\ncafé,bad\n".encode("latin1"))
    with pytest.raises(InputError, match=r"other.csv, line 3: byte 0xe9 is not UTF-8"):
        tune(base_model, tmp_path, "classification", other)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no sentence"),
        ("a O\nb O\n", "tagged O"),
        ("a O\nb\n", "line 2 has a word and no tag"),
        ("a X O\nb O\n", "line 2 has 2 columns, where the lines before have 3"),
        ("a O\nb PER\n", "line 2: 'PER' is not a tag"),
        ("a B-PER\nb O\nc I-PER\n", "line 1 begins an entity with B-.* line 3 begins one with I-"),
        ("a B-PER\nb E-LOC\n", "line 2: E-LOC stands where the entity of type PER"),
        ("a E-PER\n", "line 1: E-PER goes on with an entity that has not begun"),
        ("a S-PER\nb B-PER\n", "line 2: the sentence ends"),
    ],
)
def test_tags_that_cannot_be_learnt(base_model: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "data.conll").write_text(text)
    with pytest.raises(InputError, match=message):
        tune(base_model, tmp_path, "tagging", tmp_path / "data.conll")
    assert not (tmp_path / "out").exists()


def test_tables_of_tags(base_model: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "bad.jsonl", [{"tokens": ["a", "b"], "tags": ["O"]}])
    with pytest.raises(InputError, match="line 1 has 2 words, but 1 tags"):
        tune(base_model, tmp_path, "tagging", tmp_path / "bad.jsonl")
    write_jsonl(tmp_path / "good.jsonl", [{"tokens": ["in", "Peru"], "tags": ["O", "B-LOC"]}])
    write_jsonl(tmp_path / "other.jsonl", [{"tokens": ["in", "Peru"], "tags": ["O", "B-PER"]}])
    with pytest.raises(InputError, match="line 1, word 2: no entity of type PER"):
        tune(base_model, tmp_path, "tagging", tmp_path / "good.jsonl", f"data.held_out={tmp_path / 'other.jsonl'}")


def test_rows_are_every_example_once_an_epoch() -> None:
    examples = [Example([n, n], [IGNORE, 0]) for n in range(7)]
    rows = ExampleRows(examples, pad_id=0, seed=3)
    epochs = [rows.batch(range(epoch * 7, epoch * 7 + 7)).ids_BT[:, 0].tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert rows.batch([9]).ids_BT[0, 0] == epochs[1][2]


SQUAD_CONTEXT = "the llama of Lima sleeps. é the herd walks to Peru."


def squad(folder: Path, *questions: tuple[str, str | None], shift: int = 0) -> Path:
    """A file in the form of SQuAD; None is no answer."""
    qas = [
        {
            "id": str(n),
            "question": question,
            "is_impossible": answer is None,
            "answers": [{"text": answer, "answer_start": SQUAD_CONTEXT.index(answer) + shift}] if answer else [],
        }
        for n, (question, answer) in enumerate(questions)
    ]
    write_json(folder / "squad.json", {"data": [{"paragraphs": [{"context": SQUAD_CONTEXT, "qas": qas}]}]})
    return folder / "squad.json"


def test_answers_are_found_and_transformers_agrees(base_model: Path, tmp_path: Path) -> None:
    data = squad(tmp_path, ("the city?", "Lima"), ("walks?", "Peru"), ("hay?", None))
    settings = ["task.overlap=8", "train.row_length=32", "train.steps=80"]  # in several windows
    model = tune(base_model, tmp_path, "spans", data, *settings)
    assert Manifest.read(model).results["validation/exact_match"] == 1.0

    from transformers import LlamaForQuestionAnswering

    theirs = LlamaForQuestionAnswering.from_pretrained(model).eval()
    tokenizer = load_tokenizer(model)
    texts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in ("the herd of Lima", "in Peru")]
    found = their_logits(theirs, texts, tokenizer.pad_id)
    logits = torch.stack([found.start_logits, found.end_logits], -1)
    for row, ours in zip(logits, our_logits(model, texts, "bidirectional"), strict=True):
        torch.testing.assert_close(row[: len(ours)], ours, rtol=1e-5, atol=1e-5)


def test_answers_that_do_not_stand_there(base_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"question 0: the answer is 'Lima', but at answer_start \(14\) the text has"):
        tune(base_model, tmp_path, "spans", squad(tmp_path, ("a?", "Lima"), shift=1))


def test_questions_with_misplaced_answers_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], real_data: Path
) -> None:
    found = list(read_squad(real_data / "tasks" / "cmrc2018" / "trial.json.gz", misplaced="leave_out"))
    assert all(question.context[begin:].startswith(text) for question in found for begin, text in question.answers)
    left_out = 1002 - len(found)
    assert 0 < left_out < 10
    assert f"{left_out:,} of 1,002 questions" in capsys.readouterr().err
    with pytest.raises(InputError, match="holds no question whose answer stands where it should"):
        list(read_squad(squad(tmp_path, ("a?", "Lima"), shift=1), misplaced="leave_out"))


@given(st.lists(st.sampled_from(["a", "b", "the", "c,", "B"])), st.lists(st.sampled_from(["a", "b", "c", "d"])))
def test_overlap_is_symmetric_and_one_for_equals(one: list[str], other: list[str]) -> None:
    first, second = " ".join(one), " ".join(other)
    assert overlap_f1(first, second, "words") == overlap_f1(second, first, "words")
    assert overlap_f1(first, first, "words") == 1.0
    assert 0.0 <= overlap_f1(first, second, "characters") <= 1.0


@pytest.mark.parametrize(("name", "unit"), [("xquad/xquad.en.json", "words"), ("xquad/xquad.zh.json", "characters")])
def test_published_questions(real_data: Path, name: str, unit: str) -> None:
    assert len(list(read_squad(real_data / "tasks" / name))) == 632


@pytest.mark.parametrize(("name", "count"), [("conll2003/eng.dev.txt.gz", 3250), ("weibo_ner/dev.txt", 270)])
def test_published_sentences(real_data: Path, name: str, count: int) -> None:
    sentences = Tagging().read(real_data / "tasks" / name)
    assert len(sentences) == count
    scheme = detect_scheme(sentences)
    assert scheme == ("BIO1" if "conll" in name else "BIO2")
    for sentence in sentences:
        found = entities(sentence, scheme)
        for learned in ("BIO2", "BIOES"):
            tags = to_tags(found, len(sentence.words), learned)
            assert entities(Sentence(sentence.words, tags, sentence.places), learned) == found


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.sampled_from("XY")), max_size=5))
def test_tags_and_entities_are_inverse(parts: list[tuple[int, int, str]]) -> None:
    found, at = [], 0
    for gap, length, kind in parts:
        found.append(Entity(at + gap, at + gap + length, kind))
        at += gap + length
    for scheme in ("BIO2", "BIOES"):
        tags = to_tags(found, at + 1, scheme)
        assert entities(Sentence(["w"] * (at + 1), tags, ["here"] * (at + 1)), scheme) == found
        # seqeval reads the same entities from them.
        theirs = Entities([tags], IOB2 if scheme == "BIO2" else IOBES)
        assert [Entity(each.start, each.end, each.tag) for each in theirs.entities[0]] == found


def test_a_published_mistake_is_named(real_data: Path) -> None:
    sentences = Tagging().read(real_data / "tasks" / "weibo_ner" / "train.txt")
    with pytest.raises(InputError, match=r"line 1266 begins one with I-, .* task.scheme=BIO1"):
        detect_scheme(sentences)
    assert sum(len(entities(sentence, "BIO1")) for sentence in sentences) > 1000
