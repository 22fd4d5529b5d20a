"""Tasks whose answers are texts: they are learnt, cut where the row ends, scored by the field's libraries, refused."""

import csv
import gzip
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.batches.tables import Row, parallel_files, read_parallel
from puna.config import load_config
from puna.finetune.config import FinetuneConfig
from puna.finetune.main import main as finetune
from puna.finetune.tasks.task import TaskData, read_both
from puna.finetune.text.code import Code
from puna.finetune.text.control import Control
from puna.finetune.text.dialogue import Dialogue
from puna.finetune.text.scores import bleu, chrf, exact_match, rouge
from puna.finetune.text.summarisation import Summarisation
from puna.finetune.text.task import TextTask
from puna.finetune.text.translation import Translation
from puna.runtime.errors import InputError
from puna.runtime.files import read_jsonl, write_jsonl
from puna.runtime.manifest import Manifest
from puna.tokenizer.load import load_tokenizer

TRAIN = [
    "train.steps=60",
    "train.batch_rows=4",
    "train.micro_batch_rows=4",
    "train.row_length=64",
    "train.log_every=20",
    "train.device=cpu",
    "train.num_threads=1",
    "train.tensorboard=false",
    "train.optimizer.learning_rate=1e-2",
    "train.schedule.warmup_steps=2",
    "task.target_tokens=24",
]


def tune(base_model: Path, folder: Path, kind: str, data: Path, *more: str) -> Path:
    """Run the stage as the command line does; returns its output folder."""
    pairs = [f"model={base_model}", f"output={folder / 'out'}", f"task.kind={kind}", f"data.train={data}"]
    finetune(load_config(FinetuneConfig, None, [*pairs, *TRAIN, *more]))
    return folder / "out"


def write_csv(path: Path, rows: list[tuple[Any, ...]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


ENGLISH = ["the llama sleeps", "the herd eats hay", "a city in Peru"]
GERMAN = ["das Lama ruht", "die Herde frisst Heu", "eine Stadt"]


def test_translations_are_learnt_and_transformers_gives_the_same(base_model: Path, tmp_path: Path) -> None:
    (tmp_path / "both.en").write_text("".join(f"{line}\n" for line in ENGLISH))
    with gzip.open(tmp_path / "both.de.gz", "wt") as file:
        file.write("\n".join(GERMAN))
    output = tune(
        base_model, tmp_path, "translation", tmp_path / "both", 'task.prompt="{en}\\nde:"', "task.target=de",
        f"data.held_out={tmp_path / 'both'}", "train.validate_every=30", "selection.metric=validation/chrf",
        "selection.goal=highest",
    )  # fmt: skip
    answers = list(read_jsonl(output / "answers.jsonl"))
    assert [each["answer"] for each in answers] == [each["reference"] for each in answers] == GERMAN
    results = Manifest.read(output / "model").results
    assert results["validation/chrf"] == pytest.approx(100)
    assert results["validation/perplexity"] < 1.2
    assert "answer     'eine Stadt'" in (output / "report.txt").read_text()
    assert set(Manifest.read(output / "model").inputs) >= {str(tmp_path / "both.en"), str(tmp_path / "both.de.gz")}

    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(output / "model").eval()
    tokenizer = load_tokenizer(output / "model")
    prompt = [tokenizer.bos_id, *tokenizer.encode(f"{ENGLISH[0]}\nde:")]
    with torch.no_grad():
        ids = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)[0, len(prompt) :].tolist()
    assert ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(ids[:-1]) == GERMAN[0]
    # What perplexity says is what transformers' loss on the targets is.
    nats = count = 0.0
    for english, german in zip(ENGLISH, GERMAN, strict=True):
        prompt = [tokenizer.bos_id, *tokenizer.encode(f"{english}\nde:")]
        target = [*tokenizer.encode(german, continuation=True), tokenizer.eos_id]
        labels = torch.tensor([[-100] * len(prompt) + target])
        with torch.no_grad():
            nats += theirs(torch.tensor([prompt + target]), labels=labels).loss.item() * len(target)
        count += len(target)
    # Both in float32; losses near zero differ by rounding in the logits, about 1e-6 nats.
    assert results["validation/perplexity"] == pytest.approx(math.exp(nats / count), abs=1e-4)


def test_adapters_write_texts_too(base_model: Path, tmp_path: Path) -> None:
    rows = [("source", "target"), *zip(ENGLISH, GERMAN, strict=True)]
    data = write_csv(tmp_path / "data.csv", rows)
    settings = ["peft.kind=lora", "peft.rank=2", "train.steps=2", "data.held_out_share=0.4"]
    output = tune(base_model, tmp_path, "translation", data, *settings)
    assert (output / "adapter" / "adapter_config.json").exists()
    assert len(list(read_jsonl(output / "answers.jsonl"))) == 1


def test_dialogues_give_an_example_for_each_turn(base_model: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "talk.jsonl", [{"talk": "A: hay?\nB: hay!\nA: and Lima?"}, {"talk": ["A: a", "B: b"]}])
    task = Dialogue(turns="talk", target_tokens=8)
    opened = task.open(TaskData(tmp_path / "talk.jsonl"), load_tokenizer(base_model), 64)
    assert [(each.prompt, each.target) for each in opened.train] == [
        ("A: hay?\n", "B: hay!"),
        ("A: hay?\nB: hay!\n", "A: and Lima?"),
        ("A: a\n", "B: b"),
    ]
    short = task.open(TaskData(tmp_path / "talk.jsonl"), load_tokenizer(base_model), 16).train[1]
    assert "A: hay?\nB: hay!\n".endswith(short.prompt)
    assert len(short.prompt_ids) <= 8 < len(opened.train[1].prompt_ids)
    write_jsonl(tmp_path / "talk.jsonl", [{"talk": "A: hay?"}])
    with pytest.raises(InputError, match=r"talk.jsonl, line 1: the dialogue has 1 turn"):
        task.open(TaskData(tmp_path / "talk.jsonl"), load_tokenizer(base_model), 64)


def test_control_decides_what_is_written(base_model: Path, tmp_path: Path) -> None:
    texts = [(tone, f"the llama of Lima is {tone} today") for tone in ("good", "bad")]
    data = write_csv(tmp_path / "data.csv", [("label", "text"), *texts])
    rules = 'task.rules={good="is good", bad="is bad"}'
    output = tune(base_model, tmp_path, "control", data, rules, "task.opening=2", f"data.held_out={data}")
    assert Manifest.read(output / "model").results["validation/obedience"] == 1.0
    prompts = [each["prompt"] for each in read_jsonl(output / "answers.jsonl")]
    assert prompts == ["<good>\nthe llama", "<bad>\nthe llama"]
    # Were the labels exchanged, no text would obey.
    task = Control(rules={"good": "is bad", "bad": "is good"}, target_tokens=24)
    examples = task.open(TaskData(data), load_tokenizer(base_model), 64).train
    assert task.scores(examples, [text for _, text in texts]) == {"validation/obedience": 0.0}


@settings(max_examples=40)
@given(st.lists(st.text("ab \n\t。", min_size=1).filter(str.strip), min_size=1, max_size=3), st.integers(0, 5))
def test_an_opening_and_its_rest_are_the_text(texts: list[str], opening: int) -> None:
    for unit in ("words", "characters"):
        task = Control(opening=opening, unit=unit)
        for text in texts:
            [values] = task.expand(Row("here", {"label": "x", "text": text}))
            assert values["opening"] + values["text"] == text
            assert values["text"].strip() or not text[-1].strip()
            assert len(values["opening"].split() if unit == "words" else values["opening"]) <= opening


@pytest.mark.parametrize("length", [20, 33, 64])
@pytest.mark.parametrize("kind", [Translation, Code, Summarisation])
def test_long_texts_are_cut_to_fit(base_model: Path, tmp_path: Path, kind: type[TextTask], length: int) -> None:
    column = {Translation: "source", Code: "prompt", Summarisation: "text"}[kind]
    task = kind(target_tokens=6)
    text = "a llama eats hay; " * 20
    write_jsonl(tmp_path / "d.jsonl", [{column: text, task.target: "good city " * 9}, {column: "a", task.target: "b"}])
    tokenizer = load_tokenizer(base_model)
    long, short = task.open(TaskData(tmp_path / "d.jsonl"), tokenizer, length).train
    assert length - 12 < len(long.prompt_ids) <= length - 6
    assert long.prompt_ids == [tokenizer.bos_id, *tokenizer.encode(long.prompt)]
    assert long.prompt.startswith("a llama")
    assert long.prompt.endswith(task.prompt.rpartition("}")[2])
    assert len(long.target_ids) == 6
    assert tokenizer.eos_id not in long.target_ids
    assert short.target_ids == [*tokenizer.encode("b", continuation=True), tokenizer.eos_id]


def test_scores_are_the_libraries() -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    answers, references = ["the cat sat on a mat today", "hay"], ["the cat sat on the mat today", "good hay"]
    assert chrf(answers, references) == CHRF().corpus_score(answers, [references]).score
    assert bleu(answers, references, "13a") == BLEU(tokenize="13a").corpus_score(answers, [references]).score
    theirs = RougeScorer(["rouge2"], use_stemmer=True)
    wanted = [theirs.score(*pair)["rouge2"].fmeasure for pair in zip(references, answers, strict=True)]
    assert rouge(answers, references, "words")["rouge2"] == sum(wanted) / 2
    # Two characters of three are common, in both: 2/3 by hand.
    assert rouge(["天气好"], ["天气坏"], "characters")["rouge1"] == pytest.approx(2 / 3)
    assert rouge(["天气好"], ["天气坏"], "characters")["rouge2"] == pytest.approx(1 / 2)
    assert bleu(["今天天气很好"], ["今天天气很好"], "zh") == pytest.approx(100)
    assert exact_match(["def f():  \n  pass\n", "x"], ["def f():\n  pass", "y"]) == 0.5


@pytest.mark.parametrize(
    ("kind", "settings", "rows", "message"),
    [
        ("translation", [], [("source", "target")], "holds no example"),
        ("translation", [], [("a", "target"), ("x", "y")], "line 2 has no text in its column 'source'. It has a,"),
        ("translation", [], [("source", "target"), ("x", "")], "line 2 has no text in its column 'target'"),
        ("translation", [], [("source", "target"), ("x", "y", "z")], "line 2 has 3 fields, but there are 2 columns"),
        ("translation", ["task.target_tokens=64"], [("source", "target"), ("x", "y")], "leaves no room for a prompt"),
        ("translation", ['task.prompt="{source} "'], [("source", "target")], "ends in a blank"),
        ("translation", ['task.prompt="{source"'], [("source", "target")], "cannot be read"),
        ("translation", ['task.prompt="source"'], [("source", "target")], "names no column"),
        ("translation", ['task.prompt="{}"'], [("source", "target")], "names no column"),
        ("translation", ['task.prompt="{source:>9}"'], [("source", "target")], "has a : or ! inside braces"),
        ("translation", [f'task.prompt="{"hay " * 60}{{source}}"'], [("source", "target"), ("x", "y")], "alone, with"),
        ("control", ['task.rules={x="("}'], [("label", "text")], "is no regular expression"),
        ("control", ['task.rules={x="a"}'], [("label", "text"), ("y", "b")], "line 2: task.rules has no rule for 'y'"),
        ("control", ["task.control=tone"], [("tone", "text"), ("y", "b")], "has no {tone}"),
        ("control", ["selection.metric=validation/obedience", "train.validate_every=5", "data.held_out_share=0.5"],
         [("label", "text"), ("y", "b"), ("y", "c")], "what is measured is validation/loss, validation/perplexity"),
    ],
)  # fmt: skip
def test_texts_that_cannot_be_learnt(
    base_model: Path, tmp_path: Path, kind: str, settings: list[str], rows: list[tuple[str, ...]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tune(base_model, tmp_path, kind, write_csv(tmp_path / "data.csv", rows), *settings)
    assert not (tmp_path / "out").exists()


def test_files_beside_each_other_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "c.en").write_text("a\nb\n")
    (tmp_path / "c.de").write_text("x\n")
    with pytest.raises(InputError, match=r"c.de ends before line 2"):
        list(read_parallel(parallel_files(tmp_path / "c", ["en", "de"])))
    with pytest.raises(InputError, match=r"c.fr does not exist, while .* has files of other columns"):
        parallel_files(tmp_path / "c", ["en", "fr"])
    assert parallel_files(tmp_path / "d", ["en", "de"]) == {}


@given(st.integers(0, 40), st.floats(0, 0.99))
def test_held_out_is_a_share_and_nothing_is_lost(size: int, share: float) -> None:
    data = TaskData(Path("x"), held_out_share=share)
    if not size or (share and not 0 < round(share * size) < size):
        with pytest.raises(InputError, match="x holds"):
            read_both(data, lambda path: range(size))
        return
    train, held_out = read_both(data, lambda path: range(size))
    assert sorted(train + held_out) == list(range(size))
    assert len(held_out) == round(share * size)
    assert read_both(data, lambda path: range(size)) == (train, held_out)


@pytest.mark.parametrize(
    ("task", "file", "columns", "count"),
    [
        (Translation(prompt="{en}\n", target="de"), "multi30k/val", (), 1014),
        (Translation(prompt="{en}\n", target="zh"), "tatoeba_en_zh/train.tsv.gz", ("en", "zh", "licence"), 25572),
        (Summarisation(prompt="{dialogue}\n"), "dialogsum/dev.jsonl", (), 500),
        (Dialogue(turns="dialogue"), "dialogsum/dev.jsonl", (), None),
        (Summarisation(prompt="{abstract}\n", target="title"), "csl_title/dev.tsv", ("to", "abstract", "title"), 1000),
        (Summarisation(prompt="{prompt}\n", target="completion"), "cnn_dailymail_t0/tldr_summary.jsonl", (), 200),
    ],
)  # fmt: skip
def test_published_texts(
    real_data: Path, task: TextTask, file: str, columns: tuple[str, ...], count: int | None
) -> None:
    path = real_data / "tasks" / file
    values = [each for row in task.rows(path, columns) for each in task.expand(row)]
    assert len(values) == count or (count is None and len(values) > 2000)
