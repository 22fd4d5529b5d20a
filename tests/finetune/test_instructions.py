"""Instruction tuning: mixtures, noise, samples, adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.batches.packing import PADDING
from puna.config import load_config
from puna.finetune.config import FinetuneConfig
from puna.finetune.main import main as finetune
from puna.finetune.neftune import embedding_noise
from puna.finetune.selection import SelectionConfig
from puna.peft.files import load_adapter
from puna.runtime.errors import InputError
from puna.runtime.files import read_jsonl, write_jsonl
from puna.train.metrics import read_metrics
from puna.weights.load import load_model

TRAIN = [
    "train.steps=6",
    "train.batch_rows=4",
    "train.micro_batch_rows=2",
    "train.row_length=96",
    "train.log_every=1",
    "train.validate_every=3",
    "train.device=cpu",
    "train.num_threads=1",
    "train.tensorboard=false",
    "train.optimizer.learning_rate=1e-2",
    "train.schedule.warmup_steps=2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "alpaca.jsonl", ({"instruction": f"Where {n}?", "output": "Lima"} for n in range(12)))
    write_jsonl(folder / "prompts.jsonl", ({"prompt": f"Who {n}?", "completion": "the herd"} for n in range(4)))
    return folder


def tune(base_model: Path, output: Path, *more: str) -> list[dict[str, Any]]:
    """Run the stage as the command line does; returns its curves."""
    finetune(load_config(FinetuneConfig, None, [f"model={base_model}", f"output={output}", *TRAIN, *more]))
    return read_metrics(output / "metrics.jsonl")


def test_a_mixture_with_noise_and_samples_goes_on_to_the_same_bits(
    base_model: Path, data: Path, tmp_path: Path
) -> None:
    mixture = ", ".join(
        f'{{name = "{name}", conversations = "{data / name}.jsonl", weight = {weight}}}'
        for name, weight in (("alpaca", 3), ("prompts", 1))
    )
    options = [
        f"mixture=[{mixture}]",
        "neftune_alpha=5",
        f"held_out_conversations={data / 'prompts.jsonl'}",
        'sample_prompts=["Where 3?"]',
        "sample_tokens=4",
    ]
    whole = tune(base_model, tmp_path / "whole", *options)
    tune(base_model, tmp_path / "parts", *options, "train.checkpoint_every=2")
    for newest in sorted((tmp_path / "parts" / "checkpoints").glob("step-*"))[-1:]:
        newest.rename(newest.with_name("away"))  # as if killed after step 4
    parts = tune(base_model, tmp_path / "parts", *options, "train.checkpoint_every=2")
    assert [point["train/loss"] for point in parts] == [point["train/loss"] for point in whole]
    plain = tune(base_model, tmp_path / "plain", options[0])
    assert [point["train/loss"] for point in plain] != [point["train/loss"] for point in whole]
    [sample] = read_jsonl(tmp_path / "whole" / "samples" / "step-00000006.jsonl")
    assert sample["prompt"] == "Where 3?"
    assert isinstance(sample["answer"], str)


def test_adapters_are_trained_and_written(base_model: Path, data: Path, tmp_path: Path) -> None:
    points = tune(
        base_model,
        tmp_path,
        f"conversations={data / 'alpaca.jsonl'}",
        f"held_out_conversations={data / 'alpaca.jsonl'}",
        "peft.kind=lora",
        "peft.rank=4",
        "selection.patience=5",
    )
    losses = [point["validation/loss"] for point in points if "validation/loss" in point]
    assert losses[-1] < losses[0]
    model = load_model(base_model)
    load_adapter(model, tmp_path / "adapter")
    base = load_model(base_model)
    ids_BT = torch.arange(20)[None]
    with torch.no_grad():
        assert not torch.equal(model(ids_BT), base(ids_BT))
    assert not (tmp_path / "model").exists()


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), padding=st.integers(0, 4), alpha=st.floats(0.1, 20))
def test_noise_is_that_of_the_paper(lengths: list[int], padding: int, alpha: float) -> None:
    documents = [number for number, length in enumerate(lengths) for _ in range(length)] + [PADDING] * padding
    documents_BT = torch.tensor([documents])
    noise_TD = embedding_noise(documents_BT, [7], 8, alpha, seed=1)[0]
    start = 0
    for length in lengths:
        limit = alpha / (length * 8) ** 0.5
        part = noise_TD[start : start + length]
        assert part.abs().max() <= limit * (1 + 1e-6)
        assert part.abs().max() > limit * 0.3  # of eight numbers at least, uniform in +-limit
        start += length
    assert not noise_TD[start:].any()


@given(values=st.lists(st.integers(0, 5), min_size=1, max_size=12), patience=st.integers(0, 4))
def test_patience_runs_out_after_so_many_without_a_better(values: list[int], patience: int) -> None:
    points = [{"step": n, "validation/loss": float(value)} for n, value in enumerate(values)]
    best, without = float("inf"), 0
    for value in values:
        without = 0 if value < best else without + 1
        best = min(best, value)
    assert SelectionConfig(patience=patience).is_over(points) == (patience > 0 and without >= patience)
    highest = SelectionConfig(goal="highest")
    assert highest.best(points) == values.index(max(values))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Set one of conversations, mixture"),
        (["conversations=a", "task.kind=tagging", "data.train=b"], "Set one of conversations, mixture"),
        (["task.kind=tagging"], "A task needs data"),
        (["conversations=a", "selection.patience=1"], "no held-out data is given"),
        (["conversations=a", "selection.patience=1", "train.validate_every=0"], "set train.validate_every"),
        (["conversations=a", 'sample_prompts=["x"]'], "set held_out_conversations too"),
        (["task.kind=tagging", "data.train=b", "neftune_alpha=1"], "are for conversations"),
    ],
)
def test_settings_that_contradict(base_model: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tune(base_model, tmp_path / "out", *options)
