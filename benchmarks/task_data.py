"""The data sets of `tasks.py`: slices of public files, written in the forms that `puna finetune` reads.

Each data set is a function from the folder of public files to (examples to learn from, examples held out). Where a
set has no held-out file of its own, both come from one file, shuffled with a fixed seed.
"""

import csv
import gzip
import io
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Rows = list[dict[str, Any]]
Sides = tuple[Rows, Rows]
"""What is learnt from, and what is held out."""
Form = Literal["classification", "pairs", "relations", "tagging", "spans", "translation", "summarisation"]


@dataclass(frozen=True)
class DataSet:
    """One column of the table."""

    name: str
    form: Form
    """Chooses the baseline, and how the rows are written."""
    task: dict[str, Any]
    """Settings of the task of `puna finetune`."""
    metric: str
    """The figure of the table, by its name in the manifest of the fine-tuned model."""
    metric_title: str
    row_length: int
    read: Callable[[Path], Sides] = field(repr=False)
    rows: int = 16
    """In a step."""
    chinese: bool = False
    """Characters are the words of the baseline."""
    full_marks: float = 1.0
    """The best that the metric can be."""


def write_slices(data_set: DataSet, source: Path, folder: Path, num_train: int, num_held_out: int) -> dict[str, Path]:
    """The first examples of each side in files of `folder`, by the name of the setting that takes each."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for side, rows, count in zip(("train", "held_out"), data_set.read(source), (num_train, num_held_out), strict=True):
        if data_set.form == "spans":
            path, text = folder / f"{side}.json", json.dumps({"data": _squad(rows[:count])}, ensure_ascii=False)
        else:
            path = folder / f"{side}.jsonl"
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[:count])
        path.write_text(text, encoding="utf-8")
        files[side] = path
    return files


def read_slice(path: Path) -> Rows:
    """What `write_slices` wrote."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return list(_questions(json.loads(text)))


def _open(path: Path) -> io.TextIOBase:
    return gzip.open(path, "rt", encoding="utf-8-sig") if path.suffix == ".gz" else path.open(encoding="utf-8-sig")  # type: ignore[return-value]


def _shuffled(rows: Rows) -> Rows:
    random.Random(0).shuffle(rows)
    return rows


def _halves(rows: Rows) -> Sides:
    """Four fifths and one fifth, after a shuffle."""
    rows = _shuffled(rows)
    split = len(rows) * 4 // 5
    return rows[:split], rows[split:]


def _table(path: Path, delimiter: str = ",", quotes: bool = True, columns: list[str] | None = None) -> Rows:
    with _open(path) as file:
        quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
        return list(csv.DictReader(file, fieldnames=columns, delimiter=delimiter, quoting=quoting))


def _sst2(source: Path) -> Sides:
    train, held_out = (
        _table(source / "sst2" / name, "\t", quotes=False, columns=["text", "label"])
        for name in ("train.tsv.gz", "dev.tsv")
    )
    return _shuffled(train), _shuffled(held_out)


def _ag_news(source: Path) -> Sides:
    rows = _table(source / "ag_news/train.csv.gz")
    return _halves([{"text": f"{row['title']}. {row['description']}", "label": row["label"]} for row in rows])


def _banking77(source: Path) -> Sides:
    rows = _table(source / "banking77/train.csv.gz")
    train, held_out = _halves([{"text": row["text"], "label": row["category"]} for row in rows])
    # In turn one of each intent, so that the beginning of the file has all of them.
    by_label: dict[str, Rows] = {}
    for row in train:
        by_label.setdefault(row["label"], []).append(row)
    return [row for turn in itertools.zip_longest(*by_label.values()) for row in turn if row is not None], held_out


def _chnsenticorp(source: Path) -> Sides:
    rows = _table(source / "chnsenticorp/train.csv.gz")
    return _halves([{"text": row["review"], "label": row["label"]} for row in rows if row["review"].strip()])


def _mrpc(source: Path) -> Sides:
    rows = _table(source / "mrpc/msr_paraphrase_train.txt.gz", "\t", quotes=False)
    named = [{"text": row["#1 String"], "other": row["#2 String"], "label": row["Quality"]} for row in rows]
    return _halves(named)


def _conll(source: Path) -> Sides:
    return tuple(_shuffled(list(_sentences(source / f"conll2003/eng.{side}.txt.gz"))) for side in ("train", "dev"))  # type: ignore[return-value]


def _sentences(path: Path) -> Iterator[dict[str, Any]]:
    with _open(path) as file:
        for blank, lines in itertools.groupby(file, key=lambda line: not line.strip() or line.startswith("-DOCSTART-")):
            if not blank:
                fields = [line.split() for line in lines]
                yield {"tokens": [each[0] for each in fields], "tags": [each[-1] for each in fields]}


def _cluener(source: Path) -> Sides:
    """A tag for each character, BIO."""
    rows = []
    with _open(source / "cluener/train.jsonl.gz") as file:
        for line in file:
            row = json.loads(line)
            tags = ["O"] * len(row["text"])
            for kind, entities in row["label"].items():
                for first, last in itertools.chain.from_iterable(entities.values()):
                    tags[first : last + 1] = [f"B-{kind}"] + [f"I-{kind}"] * (last - first)
            kept = [(letter, tag) for letter, tag in zip(row["text"], tags, strict=True) if not letter.isspace()]
            rows.append({"tokens": [letter for letter, _ in kept], "tags": [tag for _, tag in kept]})
    return _halves(rows)


def _xquad(source: Path) -> Sides:
    return _of_squad(source / "xquad/xquad.en.json")


def _cmrc(source: Path) -> Sides:
    return _of_squad(source / "cmrc2018/trial.json.gz")


def _of_squad(path: Path) -> Sides:
    """Texts stay whole: no text of the held-out side is learnt from."""
    with _open(path) as file:
        questions = list(_questions(json.load(file)))
    texts = sorted({question["context"] for question in questions})
    random.Random(0).shuffle(texts)
    held_out = set(texts[: len(texts) // 4])
    sides = [q for q in questions if q["context"] not in held_out], [q for q in questions if q["context"] in held_out]
    return _shuffled(sides[0]), _shuffled(sides[1])


def _questions(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                # Some files mark answers that do not stand in the text with -1, or count other characters.
                answers = [
                    answer
                    for answer in asked["answers"]
                    if paragraph["context"][answer["answer_start"] :].startswith(answer["text"])
                ]
                if answers:
                    row = {"context": paragraph["context"], "id": asked["id"], "question": asked["question"]}
                    yield row | {"answers": answers}


def _squad(rows: Rows) -> list[dict[str, Any]]:
    return [
        {"paragraphs": [{"context": row["context"], "qas": [{k: v for k, v in row.items() if k != "context"}]}]}
        for row in rows
    ]


def _semeval(source: Path) -> Sides:
    """Sentences with <e1> and <e2> around the entities, and the relation with its direction."""
    with _open(source / "semeval2010_task8/TRAIN_FILE.TXT.gz") as file:
        found = re.findall(r'^\d+\t"(.*)"\s*\n(\S+)\s*\n', file.read(), flags=re.MULTILINE)
    return _halves([{"text": text, "label": label} for text, label in found])


def _multi30k(source: Path) -> Sides:
    def side(name: str) -> Rows:
        lines = (_open(source / f"multi30k/{name}.{language}.gz").read().splitlines() for language in ("en", "de"))
        return [{"en": en, "de": de} for en, de in zip(*lines, strict=True) if en.strip() and de.strip()]

    return _shuffled(side("train")), _shuffled(side("val"))


def _dialogsum(source: Path) -> Sides:
    with _open(source / "dialogsum/dev.jsonl") as file:
        rows = [json.loads(line) for line in file]
    return _halves([{"text": row["dialogue"], "summary": row["summary"]} for row in rows])


_TEXTS: dict[str, Any] = {"kind": "classification", "attention": "bidirectional"}
_PAIRS = _TEXTS | {"second_text": "other"}
_TRANSLATION = {"kind": "translation", "prompt": "English: {en}\nGerman:\n", "target": "de", "target_tokens": 48}
_ACCURACY = ("validation/accuracy", "accuracy")
DATA_SETS = (
    DataSet("SST-2", "classification", _TEXTS, *_ACCURACY, 64, _sst2),
    DataSet("AG News", "classification", _TEXTS, *_ACCURACY, 96, _ag_news),
    DataSet("Banking77", "classification", _TEXTS, *_ACCURACY, 64, _banking77),
    DataSet("ChnSentiCorp", "classification", _TEXTS, *_ACCURACY, 128, _chnsenticorp, chinese=True),
    DataSet("MRPC", "pairs", _PAIRS, "validation/macro_f1", "macro F1", 128, _mrpc),
    DataSet("SemEval-2010 8", "relations", {"kind": "relations"}, "validation/f1", "macro F1", 96, _semeval),
    DataSet("CoNLL-2003", "tagging", {"kind": "tagging"}, "validation/f1", "entity F1", 96, _conll),
    DataSet(
        "CLUENER",
        "tagging",
        {"kind": "tagging", "separator": ""},
        "validation/f1",
        "entity F1",
        96,
        _cluener,
        chinese=True,
    ),
    DataSet("XQuAD en", "spans", {"kind": "spans"}, "validation/f1", "word F1", 256, _xquad, 8),
    DataSet(
        "CMRC 2018",
        "spans",
        {"kind": "spans", "unit": "characters"},
        "validation/f1",
        "character F1",
        256,
        _cmrc,
        8,
        chinese=True,
    ),
    DataSet(
        "Multi30k en-de", "translation", _TRANSLATION, "validation/chrf", "chrF", 256, _multi30k, 4, full_marks=100.0
    ),
    DataSet(
        "DialogSum", "summarisation", {"kind": "summarisation"}, "validation/rougeL", "ROUGE-L", 384, _dialogsum, 4
    ),
)
