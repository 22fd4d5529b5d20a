"""Several tasks on one trunk: shares, losses, metrics, and a directory for each that transformers loads."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.batches.packing import IGNORE
from puna.config import load_config
from puna.finetune.config import FinetuneConfig
from puna.finetune.main import main as finetune
from puna.finetune.tasks.classification import Classification
from puna.finetune.tasks.several import OpenSeveral, SeveralRows
from puna.finetune.tasks.spans import Spans
from puna.finetune.tasks.tagging import Tagging
from puna.finetune.tasks.task import Example, ExampleBatch, ExampleRows, OpenTask, TaskData, collate
from puna.peft.heads import load_head_model
from puna.runtime.errors import InputError
from puna.runtime.files import write_json, write_jsonl
from puna.runtime.manifest import Manifest
from puna.tokenizer.load import load_tokenizer

TRAIN = [
    "train.steps=60", "train.batch_rows=8", "train.micro_batch_rows=4", "train.row_length=64", "train.log_every=20",
    "train.device=cpu", "train.num_threads=1", "train.tensorboard=false", "train.optimizer.learning_rate=1e-2",
    "train.schedule.warmup_steps=2", "train.validate_every=30",
]  # fmt: skip
TEXTS = [("the good llama sleeps", "good"), ("a bad herd eats", "bad"), ("good hay", "good"), ("bad city", "bad")]
CONLL = "the O\nherd O\nof O\nLima B-LOC\n\nin O\nPeru B-LOC\n\ngood O\nhay O\n"


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    """A file for each kind of task."""
    write_jsonl(tmp_path / "tones.jsonl", [{"text": text, "label": label} for text, label in TEXTS])
    (tmp_path / "places.conll").write_text(CONLL)
    context = "the llama of Lima sleeps"
    asked = [{"id": "0", "question": "who?", "answers": [{"text": "llama", "answer_start": 4}]}]
    write_json(tmp_path / "squad.json", {"data": [{"paragraphs": [{"context": context, "qas": asked}]}]})
    return {name: tmp_path / name for name in ("tones.jsonl", "places.conll", "squad.json")}


def tasks(data: dict[str, Path], attention: str = "causal", **more: dict[str, object]) -> str:
    """The setting `tasks`."""
    kinds = {"tone": ("classification", "tones.jsonl"), "place": ("tagging", "places.conll")}
    listed = []
    for name, (kind, file) in kinds.items():
        files = {"train": str(data[file]), "held_out": str(data[file])}
        listed.append(
            {"name": name, "task": {"kind": kind, "attention": attention}, "data": files} | more.get(name, {})
        )
    return "tasks=[" + ", ".join(_toml(each) for each in listed) + "]"


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(part)}" for key, part in value.items()) + "}"
    return json.dumps(value)


def run(base_model: Path, folder: Path, *settings: str) -> Path:
    finetune(load_config(FinetuneConfig, None, [f"model={base_model}", f"output={folder / 'out'}", *TRAIN, *settings]))
    return folder / "out"


@pytest.mark.parametrize("peft", [[], ['peft={kind="lora", rank=4}']])
def test_tasks_are_learnt_together_and_load_apart(
    base_model: Path, tmp_path: Path, data: dict[str, Path], peft: list[str]
) -> None:
    output = run(
        base_model, tmp_path, tasks(data), *peft, "selection.metric=validation/place/f1", "selection.goal=highest"
    )
    results = Manifest.read(output / "model" / "tone").results
    assert (results["validation/tone/accuracy"], results["validation/place/f1"]) == (1.0, 1.0)
    assert (output / "report.txt").read_text().startswith("tone\n")

    from transformers import LlamaForSequenceClassification, LlamaForTokenClassification

    tone = LlamaForSequenceClassification.from_pretrained(output / "model" / "tone").eval()
    place = LlamaForTokenClassification.from_pretrained(output / "model" / "place").eval()
    tokenizer = load_tokenizer(output / "model" / "tone")
    with torch.no_grad():
        for text, label in TEXTS:
            logits = tone(torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)]])).logits[0]
            assert tone.config.id2label[int(logits.argmax())] == label
        ids = [tokenizer.bos_id, *tokenizer.encode("in"), *tokenizer.encode(" Peru", continuation=True)]
        assert place.config.id2label[int(place(torch.tensor([ids])).logits[0, -1].argmax())] == "B-LOC"
    # One trunk: all but the heads is the same in both.
    for name, value in tone.model.state_dict().items():
        assert torch.equal(value, place.model.state_dict()[name])
    assert load_head_model(output / "model" / "place").spec.labels == ("O", "B-LOC", "I-LOC")


def test_adapters_that_cannot_be_merged(base_model: Path, tmp_path: Path, data: dict[str, Path]) -> None:
    output = run(base_model, tmp_path, tasks(data), 'peft={kind="prefix"}', "train.steps=2")
    assert load_head_model(output / "adapter" / "tone").spec.labels == ("bad", "good")
    assert load_head_model(output / "adapter" / "place").spec.labels == ("O", "B-LOC", "I-LOC")


def opened(base_model: Path, data: dict[str, Path]) -> dict[str, OpenTask]:
    tokenizer = load_tokenizer(base_model)
    return {
        "tone": Classification(attention="bidirectional").open(TaskData(data["tones.jsonl"]), tokenizer, 64),
        "place": Tagging().open(TaskData(data["places.conll"]), tokenizer, 64),
        "span": Spans(overlap=2).open(TaskData(data["squad.json"]), tokenizer, 64),
    }


@pytest.mark.parametrize("what", ["loss", "divergence"])
def test_the_loss_is_the_sum_of_the_tasks_own(base_model: Path, data: dict[str, Path], what: str) -> None:
    """The twin goes example by example, with logits of that task alone."""
    apart = opened(base_model, data)
    weights = {"tone": 1.0, "place": 0.5, "span": 2.0}
    together = OpenSeveral(apart, weights, 1.0)
    batch = together.rows(0, seed=1).batch(range(16))
    torch.manual_seed(0)
    logits_BTC = torch.randn(*batch.ids_BT.shape, len(together.head.labels))
    copies = 1
    if what == "divergence":
        copies = 2
        batch = ExampleBatch(*(torch.cat([getattr(batch, name)] * 2) for name in ExampleBatch.__dataclass_fields__))
        logits_BTC = torch.randn(*batch.ids_BT.shape, len(together.head.labels))
    total, first = 0.0, 0
    shares = [len(task.train) / len(together.train) for task in apart.values()]
    units = [
        sum(label != IGNORE for e in task.train for label in e.labels) / len(task.train) for task in apart.values()
    ]
    mean = sum(share * each for share, each in zip(shares, units, strict=True))
    for number, (name, task) in enumerate(apart.items()):
        for row in range(16):
            if batch.targets_BC[row, 0] != number:
                continue
            rows = [row, row + 16][:copies]
            length = int((batch.documents_BT[row] == 0).sum())
            targets = batch.targets_BC[row, 1 : 1 + len(task.train[0].targets)].tolist()
            labels = batch.labels_BT[row, :length].tolist()
            own = collate([Example(batch.ids_BT[row, :length].tolist(), labels, tuple(targets))] * copies, 0)
            logits = logits_BTC[rows, :length, first : first + len(task.head.labels)]
            total += weights[name] / units[number] * mean * float(getattr(task, what)(logits, own))
        first += len(task.head.labels)
    assert float(getattr(together, what)(logits_BTC, batch)) == pytest.approx(total, rel=1e-5)  # float32 sums


@settings(max_examples=6)  # each lays out a period of 100,000 rows
@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.floats(0.5, 10), st.integers(1, 200))
def test_rows_have_their_shares_and_go_over_everything(sizes: list[int], temperature: float, count: int) -> None:
    examples = [[Example([n], [0], (float(task),)) for n in range(size)] for task, size in enumerate(sizes)]
    weights = [size ** (1 / temperature) for size in sizes]
    rows = SeveralRows([ExampleRows(own, 0, 7) for own in examples], [each / sum(weights) for each in weights])
    batch = rows.batch(range(count))
    for task, size in enumerate(sizes):
        own = batch.ids_BT[batch.targets_BC[:, 0] == task, 0].tolist()
        # Shares are exact to a row, but for their rounding to 1 / 100,000.
        assert abs(len(own) - count * weights[task] / sum(weights)) < 1.1
        assert all(sorted(own[at : at + size]) == list(range(size)) for at in range(0, len(own) - size + 1, size))
    assert torch.equal(rows.batch([count - 1]).ids_BT[0], batch.ids_BT[-1])


@pytest.mark.parametrize(
    ("more", "settings", "message"),
    [
        ({"place": {"name": "tone"}}, [], "Two of the tasks have the same name"),
        ({"place": {"name": "a/b"}}, [], "A task is called 'a/b'"),
        ({"place": {"weight": 0.0}}, [], "The weight of place is 0.0"),
        ({"place": {"task": {"kind": "tagging"}}}, [], "tone causal, place bidirectional; set task.attention"),
        ({"place": {"task": {"kind": "translation"}}}, [], "no such task"),
        ({"place": {"data": {"train": "absent.conll"}}}, [], "Task place: absent.conll does not exist"),
        ({}, ["tasks_temperature=0"], "tasks_temperature is 0"),
        ({}, ["selection.metric=validation/f1"], "validation/tone/accuracy"),
        ({}, ["conversations=x.jsonl"], "Set one of conversations"),
    ],
)
def test_tasks_that_do_not_go_together(
    base_model: Path, tmp_path: Path, data: dict[str, Path], more: dict[str, dict], settings: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(base_model, tmp_path, tasks(data, **more), *settings)
    assert not (tmp_path / "out").exists()
