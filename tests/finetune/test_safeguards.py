"""Whole trainings with safeguards: conversations and tasks, interrupted, with adapters; and forgetting measured."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from puna.batches.packing import PackedRows
from puna.batches.shards import TokenShards
from puna.batches.tokenize import TokenizeConfig
from puna.batches.tokenize import main as tokenize
from puna.config import load_config
from puna.finetune.config import FinetuneConfig
from puna.finetune.main import main as finetune
from puna.finetune.numbered import NumberedRows
from puna.finetune.regularize.earlier import loss_on, with_replayed_loss, with_replayed_rows
from puna.finetune.tasks.head import predict
from puna.finetune.tasks.task import TaskData
from puna.finetune.tasks.trained import trained_task
from puna.peft.heads import load_head_model
from puna.runtime.errors import InputError
from puna.runtime.files import write_jsonl
from puna.runtime.manifest import Manifest
from puna.train.loss import LossSum, causal_lm_loss
from puna.train.metrics import read_metrics
from puna.weights.load import load_model

TRAIN = [
    "train.steps=4",
    "train.batch_rows=4",
    "train.micro_batch_rows=2",
    "train.row_length=64",
    "train.log_every=1",
    "train.validate_every=2",
    "train.device=cpu",
    "train.num_threads=1",
    "train.tensorboard=false",
    "train.optimizer.learning_rate=1e-2",
    "train.schedule.warmup_steps=2",
]
EVERYTHING = [
    "regularization.residual_dropout=0.1",
    "regularization.embedding_dropout=0.1",
    "regularization.rdrop=1.0",
    "regularization.layer_decay=0.8",
    "regularization.adversary.epsilon=0.5",
    "regularization.ewc.rows=4",
    "earlier.replay_share=0.25",
]


@pytest.fixture(scope="module")
def data(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations, a table with classes, and token shards of what is to be held on to."""
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "chats.jsonl", ({"instruction": f"Where {n}?", "output": "Lima"} for n in range(12)))
    rows = [{"text": f"{'good' if n % 2 else 'bad'} llama {n}", "label": str(n % 2)} for n in range(12)]
    write_jsonl(folder / "classes.jsonl", rows)
    texts = [{"id": str(n), "text": f"the herd of {n} llamas walks to the city of Lima"} for n in range(30)]
    write_jsonl(folder / "docs.jsonl", texts)
    tokenize(TokenizeConfig(documents=folder / "docs.jsonl", tokenizer=base_model, output=folder / "tokens"))
    return folder


def tune(base_model: Path, output: Path, *more: str) -> list[dict[str, Any]]:
    """Run the stage as the command line does; returns its curves."""
    finetune(load_config(FinetuneConfig, None, [f"model={base_model}", f"output={output}", *TRAIN, *more]))
    return read_metrics(output / "metrics.jsonl")


def test_a_training_with_everything_goes_on_to_the_same_bits(base_model: Path, data: Path, tmp_path: Path) -> None:
    options = [
        f"conversations={data / 'chats.jsonl'}",
        f"held_out_conversations={data / 'chats.jsonl'}",
        "neftune_alpha=1",
        *EVERYTHING,
        f"earlier.train={data / 'tokens'}",
        f"earlier.held_out={data / 'tokens'}",
        "selection.metric=earlier/loss",
    ]
    whole = tune(base_model, tmp_path / "whole", *options)
    tune(base_model, tmp_path / "parts", *options, "train.checkpoint_every=2")
    for newest in sorted((tmp_path / "parts" / "checkpoints").glob("step-*"))[-1:]:
        newest.rename(newest.with_name("away"))  # as if killed after step 2
    parts = tune(base_model, tmp_path / "parts", *options, "train.checkpoint_every=2")
    assert [point["train/loss"] for point in parts] == [point["train/loss"] for point in whole]

    results = Manifest.read(tmp_path / "whole" / "model").results
    rows = PackedRows(TokenShards(data / "tokens"), 64, 0, "cut")
    assert results["earlier_loss_before"] == pytest.approx(loss_on(load_model(base_model), rows, 128), rel=1e-5)
    after = loss_on(load_model(tmp_path / "whole" / "model"), rows, 128)
    assert results["earlier_loss_after"] == pytest.approx(after, rel=1e-5)
    assert results["forgetting"] == pytest.approx(results["earlier_loss_after"] - results["earlier_loss_before"])
    tokens_per_byte = (rows.shards.num_tokens - 30) / rows.shards.num_bytes
    assert results["earlier_bits_per_byte_after"] == pytest.approx(after / 0.6931472 * tokens_per_byte, rel=1e-5)
    assert [point["earlier/loss"] for point in whole if "earlier/loss" in point][-1] > 0


def test_rdrop_by_the_dropout_of_adapters(base_model: Path, data: Path, tmp_path: Path) -> None:
    chats = [f"conversations={data / 'chats.jsonl'}", "peft.kind=lora", "peft.rank=2", "peft.dropout=0.3"]
    found = [
        tune(base_model, tmp_path / str(factor), *chats, f"regularization.rdrop={factor}", "train.steps=3")
        for factor in (0.1, 10.0)
    ]
    mild, strong = ([point["train/loss"] for point in points] for points in found)
    assert mild[0] == strong[0]  # B of LoRA is 0 at first, so that dropout changes nothing
    assert mild[2] != strong[2]


@pytest.mark.parametrize("more", [[], ["peft.kind=lora", "peft.rank=2", "peft.dropout=0.1"]])
def test_a_task_with_everything(base_model: Path, data: Path, tmp_path: Path, more: list[str]) -> None:
    options = [
        "task.kind=classification",
        f"data.train={data / 'classes.jsonl'}",
        f"data.held_out={data / 'classes.jsonl'}",
        *EVERYTHING,
        f"earlier.train={data / 'tokens'}",
        f"earlier.held_out={data / 'chats.jsonl'}",
        *more,
    ]
    whole = tune(base_model, tmp_path / "whole", *options)
    assert all(point["train/loss"] > 0 for point in whole)
    results = Manifest.read(tmp_path / "whole" / "model").results
    assert results["forgetting"] == results["earlier_loss_after"] - results["earlier_loss_before"]


def test_what_a_training_needs_is_kept_for_the_next(base_model: Path, data: Path, tmp_path: Path) -> None:
    first = [f"conversations={data / 'chats.jsonl'}", "regularization.fisher_rows=4"]
    tune(base_model, tmp_path / "one", *first)
    fisher = f"regularization.ewc.fisher={tmp_path / 'one' / 'fisher.safetensors'}"
    chats = f"conversations={data / 'chats.jsonl'}"
    free = tune(tmp_path / "one" / "model", tmp_path / "free", chats)
    held = tune(tmp_path / "one" / "model", tmp_path / "held", chats, fisher, "regularization.ewc.strength=1000")
    assert held[0]["train/loss"] == free[0]["train/loss"]

    information = load_file(tmp_path / "one" / "fisher.safetensors")
    start = load_model(tmp_path / "one" / "model")

    def moved(name: str) -> float:
        end = load_model(tmp_path / name / "model")
        return sum(
            (value * (end.get_parameter(key) - start.get_parameter(key)).square()).sum().item()
            for key, value in information.items()
        )

    assert moved("held") < 0.7 * moved("free")
    with pytest.raises(InputError, match="estimated at other parameters"):
        tune(base_model, tmp_path / "other", chats, fisher)
    with pytest.raises(InputError, match=r"nothing of .*lora.*, which is trained"):
        tune(tmp_path / "one" / "model", tmp_path / "lora", chats, fisher, "peft.kind=lora", "peft.rank=2")
    with pytest.raises(InputError, match="does not exist"):
        tune(base_model, tmp_path / "none", chats, "regularization.ewc.fisher=nowhere")


def test_one_task_after_another(base_model: Path, data: Path, tmp_path: Path) -> None:
    classes, task = data / "classes.jsonl", ["task.kind=classification", "train.steps=12", "train.validate_every=12"]
    tune(base_model, tmp_path / "one", *task, f"data.train={classes}", "regularization.fisher_rows=4")
    first = tmp_path / "one" / "model"
    write_jsonl(tmp_path / "tags.jsonl", [{"tokens": ["herd", "of", "Lima"], "tags": ["O", "O", "B-LOC"]}])
    tags = ["task.kind=tagging", f"data.train={tmp_path / 'tags.jsonl'}", f"data.held_out={tmp_path / 'tags.jsonl'}"]
    earlier = [f"earlier.task_model={first}", f"earlier.task_data={classes}"]
    fisher = f"regularization.ewc.fisher={tmp_path / 'one' / 'fisher.safetensors'}"
    points = tune(first, tmp_path / "two", *tags, *earlier, fisher, "selection.metric=validation/f1")
    results = Manifest.read(tmp_path / "two" / "model").results
    kept = load_head_model(first)
    task_of_first, _ = trained_task(kept, first)
    opened = task_of_first.open(TaskData(classes, classes), kept.tokenizer, 64)
    logits = predict(kept.model, opened.held_out, "score", "causal", kept.tokenizer.pad_id)
    assert results["earlier_accuracy_before"] == opened.measure(logits)[0]["validation/accuracy"]
    assert 0 <= results["earlier_accuracy_after"] <= 1
    assert [point["earlier/accuracy"] for point in points if "earlier/accuracy" in point]
    assert load_head_model(tmp_path / "two" / "model").spec.labels == ("O", "B-LOC", "I-LOC")

    with pytest.raises(InputError, match="has a head and no projection to the vocabulary"):
        tune(first, tmp_path / "no", *tags, f"earlier.held_out={data / 'tokens'}")
    write_jsonl(tmp_path / "few.jsonl", [{"text": "a", "label": "2"}, {"text": "b", "label": "1"}])
    with pytest.raises(InputError, match=r"was trained on 0, 1\. Give examples of exactly these"):
        tune(first, tmp_path / "no", *tags, earlier[0], f"earlier.task_data={tmp_path / 'few.jsonl'}")


def test_replayed_rows_have_their_share(data: Path) -> None:
    rows = PackedRows(TokenShards(data / "tokens"), 16, 0, "cut")
    mixed = with_replayed_rows(rows, PackedRows(TokenShards(data / "tokens"), 16, 1, "cut"), 0.25)
    assert [mixed.count(1, number) for number in (4, 40)] == [1, 10]
    assert mixed.count(0, 40) == 30


def test_replay_beside_a_task_is_a_weighted_mean(base_model: Path, data: Path) -> None:
    """share / (1 - share) = 0.25 rows of earlier data a row: of four rows, one."""
    model = load_model(base_model).train()
    earlier = PackedRows(TokenShards(data / "tokens"), 32, 0, "cut")
    rows = NumberedRows(PackedRows(TokenShards(data / "tokens"), 16, 1, "cut"))

    def task(model: Any, batch: Any) -> LossSum:
        return LossSum(model.norm.weight.sum() * 3 * len(batch.ids_BT), 3 * len(batch.ids_BT))

    loss = with_replayed_loss(task, causal_lm_loss, earlier, share=0.2, units_per_row=3)
    batch = rows.batch(range(4))
    part = loss(model, batch)
    nats = causal_lm_loss(model, earlier.batch([0])).total / (earlier.shards.num_targets / earlier.rows_per_epoch)
    torch.testing.assert_close(part.total / part.count, model.norm.weight.sum() + 0.25 * nats)
    halves = [loss(model, half) for half in batch.split(1)]
    torch.testing.assert_close(torch.stack([half.total for half in halves]).sum(), part.total)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["regularization.rdrop=1"], "set residual_dropout, embedding_dropout, or"),
        (["regularization.residual_dropout=1"], "at least 0 and less than 1"),
        (["regularization.layer_decay=0"], "above 0 and at most 1"),
        (["regularization.adversary.steps=0"], "at least 1"),
        (["regularization.ewc.strength=1"], r"needs ewc.fisher, or earlier.train"),
        (["regularization.embedding_dropout=0.1", "train.compile=true"], "cannot compile"),
        (["regularization.fisher_rows=1", "peft.kind=lora", "peft.rank=2"], "model's own parameters"),
        (["earlier.replay_share=0.1"], "needs earlier.train"),
        (["earlier.train=nowhere", "earlier.replay_share=1"], "less than 1"),
        (["earlier.train=nowhere"], "nowhere does not exist"),
        (["earlier.task_model=nowhere"], "go together"),
    ],
)
def test_settings_that_contradict(
    base_model: Path, data: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        tune(base_model, tmp_path / "out", f"conversations={data / 'chats.jsonl'}", *options)


@pytest.mark.slow
def test_ewc_and_replay_make_a_model_forget_less(base_model: Path, tmp_path: Path) -> None:
    """Answers about numbers are learnt, then answers about animals, with and without what holds on to the first."""
    numbers = [{"instruction": f"What is {n} and {n}?", "output": f"It is {2 * n}, a number."} for n in range(40)]
    animals = [{"instruction": f"Who eats hay {n}?", "output": "the herd of llamas in Peru"} for n in range(40)]
    write_jsonl(tmp_path / "numbers.jsonl", numbers)
    write_jsonl(tmp_path / "animals.jsonl", animals)
    long = ["train.steps=80", "train.batch_rows=8", "train.micro_batch_rows=8", "train.optimizer.learning_rate=3e-3"]
    tune(base_model, tmp_path / "first", f"conversations={tmp_path / 'numbers.jsonl'}", *long)
    earlier = [f"earlier.train={tmp_path / 'numbers.jsonl'}", f"earlier.held_out={tmp_path / 'numbers.jsonl'}"]
    found = {}
    for name, more in {
        "nothing": [],
        "ewc": ["regularization.ewc.strength=10"],
        "replay": ["earlier.replay_share=0.2"],
    }.items():
        tune(
            tmp_path / "first" / "model",
            tmp_path / name,
            f"conversations={tmp_path / 'animals.jsonl'}",
            f"held_out_conversations={tmp_path / 'animals.jsonl'}",
            *long,
            *earlier,
            *more,
        )
        results = Manifest.read(tmp_path / name / "model").results
        found[name] = results["forgetting"], results["validation_loss"]
    for name in ("ewc", "replay"):
        assert found[name][0] < 0.5 * found["nothing"][0]
        assert found[name][1] < 0.3
