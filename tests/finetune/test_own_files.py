"""A user's own files through the command line, with the shipped recipes: they work, or line and reason are named."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from puna.cli import main
from puna.config import Kinds, field_docs, render_kind
from puna.finetune.config import TASKS, FinetuneConfig
from puna.finetune.tasks.tagging import Tagging
from puna.runtime.errors import InputError
from puna.runtime.files import write_jsonl
from puna.runtime.manifest import Manifest

RECIPES = Path(__file__).parents[2] / "recipes" / "finetune"
QUICK = [
    "train.steps=1", "train.batch_rows=2", "train.micro_batch_rows=2", "train.row_length=96", "train.device=cpu",
    "train.num_threads=1", "train.tensorboard=false", "train.validate_every=1", "train.schedule.warmup_steps=0",
]  # fmt: skip


@pytest.fixture
def run(base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Run":
    return Run(base_model, tmp_path, monkeypatch, capsys)


class Run:
    """`puna finetune RECIPE` on a file, in this process."""

    def __init__(
        self, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.model, self.output, self.monkeypatch, self.capsys = model, folder / "out", monkeypatch, capsys

    def __call__(self, recipe: str, data: Path, *more: str) -> str:
        """What it says; "" for success."""
        settings = [f"model={self.model}", f"output={self.output}", f"data.train={data}", *QUICK, *more]
        flags = [word for setting in settings for word in ("--set", setting)]
        self.monkeypatch.setattr("sys.argv", ["puna", "finetune", str(RECIPES / f"{recipe}.toml"), *flags])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = self.capsys.readouterr().err
        if not stopped.value.code:
            assert (self.output / "model" / "config.json").exists() or (self.output / "tasks").exists()
            return ""
        assert stopped.value.code == 2, said
        assert not self.output.exists(), "nothing is half-written"
        return said


PAIRS = [{"sentence1": "a", "sentence2": "b", "label": "x"}, {"sentence1": "c", "sentence2": "d", "label": "y"}] * 5
TURNS = [{"dialogue": f"A: {n}\nB: hay\nA: good"} for n in range(10)]
FILES = {
    "classify": ("data.csv", "text,label\na good llama,good\n\"a bad, bad herd\",bad\n"),
    "several_labels": ("data.csv", "text,labels\na,x\nb,\"x,y\"\nc,\n" + "d,y\n" * 8),
    "pairs": ("data.jsonl", "".join(json.dumps(row) + "\n" for row in PAIRS)),
    "ner": ("data.conll", "the O\nLima B-LOC\n\nhay O\n"),
    "relations": ("data.csv", "text,label\n" + "<e1>a</e1> of <e2>b</e2>,R\n<e1>a</e1> or <e2>b</e2>,Other\n" * 5),
    "translation": ("data.csv", "en,de\n" + "hay,Heu\nllama,Lama\n" * 30),
    "summarisation": ("data.jsonl", '{"text": "a llama eats", "summary": "hay"}\n' * 10),
    "dialogue": ("data.jsonl", "".join(json.dumps(row) + "\n" for row in TURNS)),
    "code": ("data.jsonl", '{"description": "add", "code": "a + b"}\n' * 10),
    "control": ("data.csv", "label,text\n" + "good,the llama of Lima\nbad,the herd of Lima\n" * 5),
}  # fmt: skip


@pytest.mark.parametrize("recipe", FILES)
def test_recipes_work_on_a_file_of_ones_own(run: Run, tmp_path: Path, recipe: str) -> None:
    name, content = FILES[recipe]
    (tmp_path / name).write_text(content, encoding="utf-8")
    short = (
        ["task.target_tokens=24"] if recipe in ("translation", "summarisation", "dialogue", "code", "control") else []
    )
    selection = ["selection.patience=0"] if recipe == "pairs" else []
    assert run(recipe, tmp_path / name, *short, *selection) == ""
    assert Manifest.read(run.output / "model").stage == "finetune"


LATIN = "text,label\na,x\nb,y\ncafé,x\n".encode().replace("é".encode(), b"\xe9")


@pytest.mark.parametrize(
    ("recipe", "name", "content", "more", "message"),
    [
        ("classify", "d.csv", LATIN, [], "d.csv, line 4: byte 0xe9 is not UTF-8, as which the lines before could be"),
        ("classify", "d.csv", "text,label\na,x\n".encode("utf-16"), [], "line 1: byte 0xff is not UTF-8. The file"),
        ("classify", "d.csv", b"text,label\na,x\nb,c,y\n", [], "d.csv, line 3 has 3 fields, but there are 2 columns"),
        ("classify", "d.csv", b"text,label\na,x\nb\n", [], "d.csv, line 3 has 1 fields, but there are 2 columns"),
        ("classify", "d.csv", b'text,label\na,x\n"b,y\n', [], "d.csv, line 3: unexpected end of data"),
        ("classify", "d.csv", b"text;label\na;x\n", [], "d.csv, line 1: the columns of the header are parted by ';'"),
        ("classify", "d.csv", b"text,label\na,x\nb,y\n", ["task.labels=['x']"], "line 3: 'y' is not one of the 1"),
        ("classify", "d.csv", b"text,label\na,x\nb,y\n", ["task.labels=['x','y','z']"], "no example of 'z'"),
        ("classify", "d.csv", b"text,label\na,x\nb,\n", [], "d.csv, line 3 has no label in its column 'label'"),
        ("classify", "d.xls", b"", [], "d.xls ends in .xls; tables end in .jsonl"),
        ("classify", "d.jsonl", b'{"text": "a", "label": "x"}\n{"text": "b"\n', [], "d.jsonl, line 2: not valid JSON"),
        ("classify", "d.jsonl", b'{"text": "a", "label": ["x"]}\n', [], "line 1: the label is \\['x'\\]; with several"),
        ("several_labels", "d.csv", b'text,labels\na,"x,x"\n', [], "line 2 has a class twice: x, x"),
        ("ner", "d.conll", b"the O\nLima B-LOC\n\nhay\n", [], "d.conll, line 4 has a word and no tag"),
        ("ner", "d.conll", b"the O\nLima LOC\n", [], "d.conll, line 2: 'LOC' is not a tag"),
        ("ner", "d.conll", b"the O\nin B-LOC\nLima I-PER\n", ["task.scheme=BIO2"], "line 3: I-PER goes on with"),
        ("ner", "d.jsonl", b'{"tokens": ["a", "b"], "tags": ["O"]}\n', [], "d.jsonl, line 1 has 2 words, but 1 tags"),
        ("ner", "d.jsonl", b'{"tokens": "in Lima", "tags": [[3, 6, "LOC"]]}\n', [], "line 1: the entity 'Lim'"),
        ("pairs", "d.jsonl", b'{"sentence1": "a", "label": "x"}\n', [], "line 1 has no text in its column 'sentence2'"),
        ("translation", "d.csv", b"en,de\na,b\n", [], "d.csv holds 1 examples, of which data.held_out_share"),
        ("translation", "d.csv", b"en,fr\na,b\n", ["data.held_out_share=0"], "line 2 has no text in its column 'de'"),
        ("spans", "d.json", b'{"data": [{}]}', [], "is not in the form of SQuAD"),
    ],
)  # fmt: skip
def test_line_and_reason_are_named(
    run: Run, tmp_path: Path, recipe: str, name: str, content: bytes, more: list[str], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert re.search(message, run(recipe, tmp_path / name, *more))


@pytest.mark.parametrize("kind", TASKS)
def test_every_setting_of_a_task_is_explained(kind: str) -> None:
    loaded = Kinds("task", TASKS).load(kind)
    assert {field.name for field in fields(loaded)} == set(field_docs(loaded)), "each field needs a docstring below it"
    assert re.search(r"^# task \w+: .*[.]$", render_kind(FinetuneConfig, kind), re.M), "the first line is a sentence"


@pytest.mark.parametrize(
    ("row", "settings", "words", "tags"),
    [
        (
            {"text": "To Lima, Peru.", "label": [[3, 7, "city"], [9, 13, "land"]]},
            {},
            ["To", "Lima", ",", "Peru", "."],
            ["O", "B-city", "O", "B-land", "O"],
        ),
        (
            {"text": "在 利马市", "label": {"city": {"利马市": [[2, 4]]}}},
            {"separator": ""},
            ["在", "利", "马", "市"],
            ["O", "B-city", "I-city", "I-city"],
        ),
        ({"text": ["科0", "1"], "label": ["B-x", "O"]}, {"word_ending": "[0-9]"}, ["科", "1"], ["B-x", "O"]),
    ],
)
def test_entities_by_their_places(tmp_path: Path, row: dict, settings: dict, words: list[str], tags: list[str]) -> None:
    write_jsonl(tmp_path / "d.jsonl", [row])
    [sentence] = Tagging(words="text", tags="label", **settings).read(tmp_path / "d.jsonl")
    assert (sentence.words, sentence.tags) == (words, tags)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([[0, 2, "x"], [1, 3, "y"]], "line 1: the entity 'bc' .* goes over another"),
        ([[2, 9, "x"]], "line 1: the entity 'c' .* is not in"),
        ({"x": {"b": [[0, 0]]}}, "line 1: 'b' should stand at characters 0 to 0, but there the text has 'a'"),
        ({"x": [1]}, "line 1: entities are a list of"),
        (["x"], "line 1: entities are a list of"),
    ],
)
def test_places_that_do_not_fit(tmp_path: Path, label: object, message: str) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"text": "abc", "label": label}])
    with pytest.raises(InputError, match=message):
        Tagging(words="text", tags="label", separator="").read(tmp_path / "d.jsonl")


def test_the_longest_of_overlapping_entities_is_kept(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"text": "abcd", "label": [[0, 2, "x"], [1, 4, "y"]]}])
    [sentence] = Tagging(words="text", tags="label", separator="", overlapping="longest").read(tmp_path / "d.jsonl")
    assert sentence.tags == ["O", "B-y", "I-y", "I-y"]


def test_published_entities_by_their_places(real_data: Path) -> None:
    task = Tagging(words="text", tags="label", separator="", overlapping="longest")
    sentences = task.read(real_data / "tasks" / "cluener" / "train.jsonl.gz")
    assert len(sentences) == 10748
    assert len({tag[2:] for sentence in sentences for tag in sentence.tags if tag != "O"}) == 10
