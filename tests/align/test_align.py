"""Alignment from the recipe to the model: the loss that is minimised, what is measured, what is written."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from puna.align.config import AlignConfig
from puna.align.learn import open_data
from puna.align.losses import DPO, KTO, Answers
from puna.align.main import main as align
from puna.align.main import reference_logprobs
from puna.align.preference import judge, preference_loss, token_logprobs
from puna.batches.packing import IGNORE
from puna.batches.preference_rows import PreferenceBatch, PreferenceRows, write_preference_shards
from puna.batches.preferences import GOOD, MISMATCHED, read_preferences, with_mismatched
from puna.batches.shards import TokenShards
from puna.config import load_config
from puna.model.transformer import Transformer
from puna.peft.files import load_adapter
from puna.runtime.errors import InputError
from puna.runtime.files import read_json, write_jsonl
from puna.runtime.manifest import Manifest
from puna.tokenizer.load import load_tokenizer
from puna.train.metrics import read_metrics
from puna.weights.load import load_model

TRAIN = [
    "train.steps=30",
    "train.batch_rows=4",
    "train.micro_batch_rows=2",
    "train.row_length=128",
    "train.log_every=1",
    "train.validate_every=15",
    "train.device=cpu",
    "train.num_threads=1",
    "train.tensorboard=false",
    "train.optimizer.learning_rate=3e-3",
    "train.schedule.warmup_steps=2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """People prefer the llama to the city, whatever is asked; comparisons, rankings of three, and judgements."""
    folder = tmp_path_factory.mktemp("preferences")
    pairs = [
        {"prompt": f"What is {n}?", "chosen": f"a good llama {n}", "rejected": f"a bad city {n}"} for n in range(24)
    ]
    write_jsonl(folder / "train.jsonl", pairs[:16])
    write_jsonl(folder / "held_out.jsonl", pairs[16:])
    ranked = [{"prompt": f"What is {n}?", "answers": ["a llama", "hay", "a city"]} for n in range(4)]
    write_jsonl(folder / "mixed.jsonl", [*ranked, *pairs[:6]])
    labels = [{"prompt": each["prompt"], "completion": each["chosen"], "label": True} for each in pairs[:8]]
    labels += [{"prompt": each["prompt"], "completion": each["rejected"], "label": False} for each in pairs[8:16]]
    write_jsonl(folder / "judged.jsonl", labels)
    return folder


def run(base_model: Path, data: Path, output: Path, *settings: str) -> list[dict[str, Any]]:
    given = [f"model={base_model}", f"output={output}", f"preferences={data / 'train.jsonl'}", *TRAIN, *settings]
    align(load_config(AlignConfig, None, given))
    return read_metrics(output / "metrics.jsonl")


def rows_of(base_model: Path, source: Path, folder: Path, *, judged: bool = False) -> PreferenceRows:
    tokenizer = load_tokenizer(base_model)
    preferences = read_preferences(source)
    write_preference_shards(
        with_mismatched(preferences) if judged else preferences,
        tokenizer, folder, 256, judged=judged, formatting=True, leave_out=False,
    )  # fmt: skip
    return PreferenceRows(TokenShards(folder, tokenizer.hash), 256, 0, tokenizer.pad_id)


def answers_one_by_one(model: Transformer, reference: Transformer, rows: PreferenceRows) -> list[Answers]:
    """The slow twin: every answer alone, all logits at once."""
    found = []
    for document in range(len(rows.shards)):
        ids = torch.from_numpy(rows.shards.ids(document).astype(np.int64))[None]
        mask = torch.from_numpy(np.array(rows.shards.mask(document)))[None, 1:].bool()
        sums = []
        for each in (model, reference):
            logprobs = each(ids)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
            sums.append(logprobs[mask].sum())
        found.append(Answers(*sums, mask.sum()))
    return found


def moved(base_model: Path, seed: int) -> Transformer:
    model = load_model(base_model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def test_the_packed_loss_is_that_of_answers_one_by_one(base_model: Path, data: Path, tmp_path: Path) -> None:
    """Rankings and pairs, packed; the loss and its gradient, however rows are split."""
    model, reference = moved(base_model, 1), load_model(base_model)
    rows = rows_of(base_model, data / "mixed.jsonl", tmp_path / "shards")
    rows.reference = reference_logprobs(reference, rows)
    each = answers_one_by_one(model, reference, rows)
    settings, weight = DPO(beta=0.5), 0.3
    expected = torch.zeros(())
    groups = [range(3 * n, 3 * n + 3) for n in range(4)] + [range(12 + 2 * n, 14 + 2 * n) for n in range(6)]
    for group in groups:
        pairs = [(i, j) for i in group for j in group if i < j]
        expected = expected + sum(settings(each[i], each[j]) for i, j in pairs) / len(pairs)
        expected = expected - weight * each[group[0]].mean_N
    expected.backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    for split in (1, 99):
        model.zero_grad()
        batch = rows.batch(range(rows.rows_per_epoch))
        parts = [preference_loss(settings, weight)(model, part) for part in batch.split(split)]
        assert sum(part.count for part in parts) == 10
        total = sum(part.total for part in parts)
        assert isinstance(total, torch.Tensor)
        total.backward()
        # float32 sums of a hundred terms in another order.
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
        for mine, other in zip((p.grad for p in model.parameters() if p.grad is not None), wanted, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def test_kto_measures_the_divergence_on_answers_to_other_prompts(base_model: Path, data: Path, tmp_path: Path) -> None:
    model, reference = moved(base_model, 2), load_model(base_model)
    rows = rows_of(base_model, data / "judged.jsonl", tmp_path / "shards", judged=True)
    rows.reference = reference_logprobs(reference, rows)
    each = answers_one_by_one(model, reference, rows)
    own, others = each[::2], each[1::2]
    divergence = torch.stack([answer.log_ratio_N for answer in others]).mean().clamp(min=0).detach()
    settings = KTO(beta=0.5, bad_weight=2)
    expected = sum(settings(answer, torch.tensor(n < 8), divergence) for n, answer in enumerate(own))
    with torch.no_grad():
        part = preference_loss(settings)(model, rows.batch(range(rows.rows_per_epoch)))
    assert part.count == 16
    torch.testing.assert_close(part.total, expected.detach(), rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]
    batch = rows.batch(range(rows.rows_per_epoch))
    judged = judge(batch, token_logprobs(model, batch))
    assert sorted(judged.ranks_N.unique().tolist()) == [MISMATCHED, GOOD, 1]


@pytest.mark.parametrize("loss", ["dpo", "ipo", "hinge", "simpo", "orpo"])
def test_the_model_learns_to_prefer(base_model: Path, data: Path, tmp_path: Path, loss: str) -> None:
    points = run(
        base_model, data, tmp_path, f'loss={{kind="{loss}"}}', f"held_out_preferences={data / 'held_out.jsonl'}"
    )
    measured = [point for point in points if "validation/accuracy" in point]
    assert measured[-1]["validation/accuracy"] == 1.0
    assert measured[-1]["validation/margin"] > 0
    assert points[-1]["train/loss"] < points[0]["train/loss"]
    if loss == "dpo":
        assert points[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-4)
    results = Manifest.read(tmp_path / "model").results
    assert results["validation/accuracy"] == 1.0
    tokenizer = load_tokenizer(tmp_path / "model")
    trained, before = load_model(tmp_path / "model"), load_model(base_model)
    good, bad = (torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)]]) for text in ("a good llama", "a bad city"))

    def logprob(model: Transformer, ids: torch.Tensor) -> float:
        with torch.no_grad():
            logprobs = model(ids)[:, :-1].log_softmax(-1)
        return float(logprobs.gather(2, ids[:, 1:, None]).sum())

    assert logprob(trained, good) - logprob(trained, bad) > logprob(before, good) - logprob(before, bad)


def test_judgements_and_adapters(base_model: Path, data: Path, tmp_path: Path) -> None:
    """The reference of a model with adapters is the model without."""
    judged = data / "judged.jsonl"
    points = run(
        base_model, data, tmp_path, 'loss={kind="kto"}', f"preferences={judged}", f"held_out_preferences={judged}",
        'peft={kind="lora",rank=4}',
    )  # fmt: skip
    last = [point for point in points if "validation/reward_of_good" in point][-1]
    assert last["validation/reward_of_good"] > last["validation/reward_of_bad"]
    model = load_model(base_model)
    load_adapter(model, tmp_path / "adapter")


def test_interrupted_alignment_ends_in_the_same_bits(base_model: Path, data: Path, tmp_path: Path) -> None:
    """The second part takes the reference's log-probabilities from where the first has written them."""
    run(base_model, data, tmp_path / "whole")
    run(base_model, data, tmp_path / "parts", "train.checkpoint_every=10")
    reference = tmp_path / "parts" / "tokens" / "train-reference.npy"
    written = reference.stat().st_mtime_ns
    (tmp_path / "parts" / "checkpoints" / "step-00000030").rename(tmp_path / "away")
    run(base_model, data, tmp_path / "parts", "train.checkpoint_every=10")
    assert reference.stat().st_mtime_ns == written
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    facts = read_json(reference.with_suffix(".json"))
    run(base_model, data, tmp_path / "other", f"reference={tmp_path / 'whole' / 'model'}", "train.steps=3")
    assert read_json(tmp_path / "other" / "tokens" / "train-reference.json")["model"] != facts["model"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (['mixture=[{ name = "a", preferences = "b" }]'], "Set preferences or mixture, one of them"),
        (['loss={kind="dop"}'], "Did you mean 'dpo'"),
        (['loss={kind="dpo",beta=0}'], "beta is 0"),
        (['loss={kind="kto"}', "nll_weight=0.2"], "nll_weight is for losses of pairs"),
        (['loss={kind="simpo"}', "reference=x"], "simpo has no reference model"),
        (['loss={kind="kto"}'], "it has several, but the method needs one judged"),
        (["train.row_length=20"], r"tokens together, more than a row \(20\)"),
        (["train.row_length=4096"], "longer than the model's context"),
    ],
)
def test_wrong_settings_are_explained(
    base_model: Path, data: Path, tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(base_model, data, tmp_path / "out", *settings)
    assert not (tmp_path / "out" / "model").exists()


def test_labels_are_the_answers_alone(base_model: Path, data: Path, tmp_path: Path) -> None:
    rows = rows_of(base_model, data / "train.jsonl", tmp_path / "shards")
    tokenizer = load_tokenizer(base_model)
    batch = rows.batch([0])
    text = tokenizer.decode(batch.labels_BT[batch.labels_BT != IGNORE].tolist())
    assert "What" not in text
    assert text.count("llama") == text.count("city") == text.count("<|eot_id|>") / 2


def test_sources_are_mixed_in_the_proportions_that_were_asked_for(base_model: Path, data: Path, tmp_path: Path) -> None:
    """Every row is a row of its source, the reference's log-probabilities with it; three in four are of the first."""
    safe = tmp_path / "safe.jsonl"
    write_jsonl(safe, [{"prompt": f"Is {n} bad?", "chosen": "no", "rejected": f"yes {n}"} for n in range(9)])
    sources = [
        {"name": "helpful", "preferences": str(data / "train.jsonl"), "weight": 3.0},
        {"name": "safe", "preferences": str(safe)},
    ]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "".join("[[mixture]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in each.items()) for each in sources)
    )
    settings = [f"model={base_model}", f"output={tmp_path / 'out'}", f"held_out_preferences={data / 'held_out.jsonl'}"]
    align(load_config(AlignConfig, recipe, [*settings, *TRAIN, "train.steps=3", "train.validate_every=3"]))
    manifest = Manifest.read(tmp_path / "out" / "model")
    assert set(manifest.inputs) == {
        str(path) for path in (base_model, data / "train.jsonl", safe, data / "held_out.jsonl")
    }
    [first] = [line["train/loss"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl") if line["step"] == 1]
    assert first == pytest.approx(math.log(2), abs=1e-5)

    tokenizer = load_tokenizer(base_model)
    config = load_config(AlignConfig, recipe, [*settings, *TRAIN, "train.steps=3", "train.validate_every=3"])
    opened = open_data(config, load_model(base_model), tokenizer, judged=False, formatting=False)
    for number, rows in enumerate(opened.sources):
        rows.reference = np.full(rows.shards.num_tokens, number + 1, dtype=np.float32)
    batch = opened.rows.batch(range(40))
    assert isinstance(batch, PreferenceBatch)
    source_B = batch.reference_BT.amax(1).long() - 1
    assert source_B.bincount().tolist() == [30, 10]
    for number, rows in enumerate(opened.sources):
        mixed = [row for row in range(40) if source_B[row] == number]
        alone = rows.batch(range(len(mixed)))
        for field in fields(PreferenceBatch):
            assert torch.equal(getattr(batch, field.name)[mixed], getattr(alone, field.name))
