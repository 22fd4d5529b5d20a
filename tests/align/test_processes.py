"""Preferences on two processes: what comes out is what one process comes to."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.align import learn
from puna.align.config import AlignConfig
from puna.align.main import main as align
from puna.align.reward import RewardConfig
from puna.align.reward import main as train_reward
from puna.batches.packing import IGNORE, PADDING
from puna.batches.preference_rows import PreferenceBatch
from puna.config import load_config
from puna.model.transformer import Transformer
from puna.peft.heads import load_head_model
from puna.peft.lora import LoRAConfig
from puna.runtime.errors import InputError
from puna.runtime.files import write_jsonl
from puna.runtime.manifest import Manifest
from puna.train.metrics import read_metrics
from puna.weights.load import load_model

SCRIPT = Path(__file__).with_name("ranks.py")


def settings_of(base_model: Path, data: Path, output: Path, *more: str) -> list[str]:
    train = ["steps=3", "batch_rows=8", "micro_batch_rows=2", "row_length=128", "log_every=1", "device=cpu"]
    train += ["num_threads=1", "tensorboard=false", "optimizer.learning_rate=3e-3", "schedule.warmup_steps=1"]
    files = [f"preferences={data / 'train.jsonl'}", f"held_out_preferences={data / 'held_out.jsonl'}"]
    return [f"model={base_model}", f"output={output}", *files, *(f"train.{each}" for each in train), *more]


@pytest.fixture(scope="module")
def outputs(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dpo-1, reward-1 by this process; dpo-2 by two that share rows, reward-2 by two that share parameters.

    The rows held out are no multiple of the batch, so one process has less of them than the other.
    """
    folder = tmp_path_factory.mktemp("processes")
    rows = [
        {"prompt": f"What is {n}?", "chosen": f"a good llama {n}{' walks' * (n % 3)}", "rejected": f"a bad city {n}"}
        for n in range(53)
    ]
    write_jsonl(folder / "train.jsonl", rows[:40])
    write_jsonl(folder / "held_out.jsonl", rows[40:])
    commands = [
        ("align", settings_of(base_model, folder, folder / "dpo-2", "train.parallel.data=2")),
        ("reward", settings_of(base_model, folder, folder / "reward-2", "train.parallel.shard=2")),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[1])
    command = [sys.executable, str(SCRIPT), json.dumps(commands)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as others:
        align(load_config(AlignConfig, None, settings_of(base_model, folder, folder / "dpo-1")))
        train_reward(load_config(RewardConfig, None, settings_of(base_model, folder, folder / "reward-1")))
        _, said = others.communicate()
    assert others.returncode == 0, said
    return folder


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_two_processes_come_to_what_one_comes_to(outputs: Path, kind: str) -> None:
    """Bounds as those of tests/parallel: what differs is the order of float32 sums, and the steps after it."""
    one, two = outputs / f"{kind}-1", outputs / f"{kind}-2"
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (two, one))
    assert len(ours) == len(theirs) == 3
    for our, their in zip(ours, theirs, strict=True):
        assert our["train/loss"] == pytest.approx(their["train/loss"], abs=1e-5)
        assert our["train/grad_norm"] == pytest.approx(their["train/grad_norm"], rel=2e-5)
    measured = {name for name in theirs[-1] if name.startswith("validation/")}
    assert len(measured) > 3
    for name in measured:
        assert ours[-1][name] == pytest.approx(theirs[-1][name], abs=5e-5)
    assert (two / "report.txt").read_text().splitlines()[0] == (one / "report.txt").read_text().splitlines()[0]
    assert Manifest.read(two / "model").results["validation/accuracy"] == ours[-1]["validation/accuracy"]

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        model: Transformer = load_model(folder) if kind == "dpo" else load_head_model(folder).model
        return dict(model.named_parameters())

    wanted = weights(one / "model")
    for name, weight in weights(two / "model").items():
        assert (weight - wanted[name]).abs().max().item() <= 5e-5, name


@pytest.mark.parametrize("change", [{"peft": LoRAConfig()}, {"tensor": 2}, {"context": 2}, {"pipeline": 2}])
def test_what_works_on_one_process_only_is_refused(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> None:
    monkeypatch.setattr(learn, "several_processes", lambda: True)
    config = AlignConfig(model=Path("m"), output=Path("o"), preferences=Path("p"))
    learn.check_processes(config)
    if "peft" in change:
        config = replace(config, **change)
    else:
        config = replace(config, train=replace(config.train, parallel=replace(config.train.parallel, **change)))
    with pytest.raises(InputError, match="leave out peft, tensor, context and pipeline"):
        learn.check_processes(config)


def test_rows_without_targets_count_nothing() -> None:
    columns = {name: torch.ones(2, 3, dtype=torch.int64) for name in PreferenceBatch.__dataclass_fields__}
    batch = PreferenceBatch(**columns).without_targets(torch.tensor([False, True]))
    assert batch.labels_BT.tolist() == [[1, 1, 1], [IGNORE] * 3]
    assert batch.documents_BT.tolist() == [[1, 1, 1], [PADDING] * 3]
    assert batch.ranks_BT.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert batch.groups_BT.tolist() == [[1, 1, 1]] * 2
