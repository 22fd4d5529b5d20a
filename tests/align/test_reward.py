"""Reward models: the loss by hand and beside transformers, what is learnt, measured and written."""

import math
from pathlib import Path

import pytest
import torch

from puna.align.reward import RewardConfig
from puna.align.reward import main as train_reward
from puna.align.reward_loss import reward_loss, rewards
from puna.align.reward_watch import calibration_error, reliability
from puna.align.rows import open_rows
from puna.batches.packing import PADDING
from puna.batches.preference_rows import PreferenceRows
from puna.config import load_config
from puna.model.transformer import Transformer
from puna.peft.heads import load_head_model
from puna.runtime.errors import InputError
from puna.runtime.files import write_jsonl
from puna.runtime.manifest import Manifest
from puna.tokenizer.load import load_tokenizer
from puna.train.metrics import read_metrics

STRENGTHS = ["negligibly better", "significantly better", None, "better"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    rows = [
        {
            "prompt": f"What is {n}?",
            "chosen": f"a good llama {n}{' walks' * (n % 3)}",
            "rejected": f"a bad city {n}",
            "strength": STRENGTHS[n % 4],
        }
        for n in range(24)
    ]
    write_jsonl(folder / "train.jsonl", rows[:16])
    write_jsonl(folder / "held_out.jsonl", rows[16:])
    return folder


def train(base_model: Path, data: Path, output: Path, *settings: str) -> Path:
    given = [
        f"model={base_model}",
        f"output={output}",
        f"preferences={data / 'train.jsonl'}",
        f"held_out_preferences={data / 'held_out.jsonl'}",
        "train.steps=30",
        "train.batch_rows=4",
        "train.micro_batch_rows=2",
        "train.row_length=128",
        "train.validate_every=15",
        "train.device=cpu",
        "train.num_threads=1",
        "train.tensorboard=false",
        "train.optimizer.learning_rate=3e-3",
        "train.schedule.warmup_steps=2",
    ]
    train_reward(load_config(RewardConfig, None, [*given, *settings]))
    return output


def rows_of(base_model: Path, source: Path, folder: Path) -> PreferenceRows:
    tokenizer = load_tokenizer(base_model)
    return open_rows(
        source, folder, tokenizer=tokenizer, row_length=256, seed=0, judged=False, formatting=True, leave_out=False
    )


@pytest.mark.parametrize("method", ["", 'peft={kind="lora",rank=4}', 'peft={kind="prefix",num_virtual_tokens=2}'])
def test_it_agrees_with_people_and_with_transformers(base_model: Path, data: Path, tmp_path: Path, method: str) -> None:
    output = train(base_model, data, tmp_path / "out", *([method] if method else []))
    written = output / ("adapter" if "prefix" in method else "model")
    measured = [point for point in read_metrics(output / "metrics.jsonl") if "validation/accuracy" in point]
    assert measured[-1]["validation/accuracy"] == Manifest.read(written).results["validation/accuracy"] == 1.0
    assert measured[-1]["validation/margin"] > max(0.0, measured[0]["validation/margin"])
    report = (output / "report.txt").read_text()
    assert "accuracy, significantly better" in report
    assert "better answer longer" in report
    assert (output / "reliability.svg").read_text().startswith("<svg")

    found = load_head_model(written)
    rows = rows_of(base_model, data / "held_out.jsonl", tmp_path / "shards")
    batch = rows.batch(range(rows.rows_per_epoch))
    with torch.no_grad():
        rewards_N = rewards(found.model, batch)
    assert len(rewards_N) == 16
    if method:
        return
    from transformers import LlamaForSequenceClassification

    theirs = LlamaForSequenceClassification.from_pretrained(written).eval()
    assert theirs.config.num_labels == 1
    expected = []
    for row in range(rows.rows_per_epoch):
        for document in range(int(batch.documents_BT[row].max()) + 1):
            ids = batch.ids_BT[row][batch.documents_BT[row] == document]
            with torch.no_grad():
                expected.append(theirs(input_ids=ids[None]).logits[0, 0])
    torch.testing.assert_close(rewards_N, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_the_paper(base_model: Path, data: Path, tmp_path: Path) -> None:
    """By hand, from the rewards: margins by strength, and the weight that keeps rewards around zero."""
    output = train(base_model, data, tmp_path / "out", "train.steps=4")
    model: Transformer = load_head_model(output / "model").model
    rows = rows_of(base_model, data / "train.jsonl", tmp_path / "shards")
    batch = rows.batch(range(rows.rows_per_epoch))
    margins = (0.0, 0.25, 0.5, 2.0)
    with torch.no_grad():
        rewards_N = rewards(model, batch).tolist()
        part = reward_loss(margins, 0.1)(model, batch)
    expected, first = 0.0, 0
    for row in range(rows.rows_per_epoch):
        documents = [document for _, document in rows.origins(row)]
        for at in range(0, len(documents), 2):
            number = documents[at] // 2
            margin = {"better": 0.5, "significantly better": 2.0}.get(STRENGTHS[number % 4] or "", 0.0)
            better, worse = rewards_N[first + at : first + at + 2]
            expected += math.log(1 + math.exp(-(better - worse - margin))) + 0.1 * (better + worse) ** 2
        first += len(documents)
    assert part.count == 16
    assert part.total.item() == pytest.approx(expected, rel=1e-4)
    assert (batch.documents_BT == PADDING).any()


def test_calibration_by_hand() -> None:
    """Two pairs at 0.9 of which one is right: 0.4 apart; two at 0.56, of which both are: 0.44 apart."""
    probabilities = torch.tensor([0.9, 0.1, 0.56, 0.56])
    bins = reliability(probabilities)
    assert [(each.share_right, each.count) for each in bins] == [(1.0, 2), (0.5, 2)]
    assert [each.confidence for each in bins] == pytest.approx([0.56, 0.9])
    assert all(each.low < each.share_right <= each.high for each in bins)
    assert calibration_error(probabilities) == pytest.approx((abs(1 - 1.8) + abs(2 - 1.12)) / 4)


def test_wrong_settings_are_explained(base_model: Path, data: Path, tmp_path: Path) -> None:
    for setting, message in [
        ("margins=[1.0,0.5,0.2,0.0]", "have to rise"),
        ("center_weight=-1", "cannot be negative"),
        ("train.row_length=20", "more than a row"),
    ]:
        with pytest.raises(InputError, match=message):
            train(base_model, data, tmp_path / "out", setting)
    assert not (tmp_path / "out" / "model").exists()
