"""Preferences and reinforcement on two processes: what comes out is what one process comes to."""

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
from puna.align.reinforce.config import ReinforceConfig
from puna.align.reinforce.main import main as reinforce
from puna.align.reinforce.processes import check_processes as check_reinforcement
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


def reinforcement(base_model: Path, data: Path, kind: str, processes: int, *more: str) -> list[str]:
    """Two rollouts, of which each gives two steps."""
    train = ["steps=4", "batch_rows=8", "micro_batch_rows=2", "row_length=64", "device=cpu", "num_threads=1"]
    train += ["tensorboard=false", "optimizer.learning_rate=3e-3", "schedule.warmup_steps=1", "validate_every=2"]
    return [
        f"model={base_model}",
        f"output={data / f'{kind}-{processes}'}",
        f"prompts={data / 'train.jsonl'}",
        f"held_out_prompts={data / 'held_out.jsonl'}",
        'rewards=[{kind = "regex", pattern = "a"}, {kind = "regex", pattern = "e", weight = 0.5}]',
        "prompts_per_rollout=4",
        "sampling.max_tokens=6",
        f"method.kind={kind}",
        "method.samples=4",
        "method.epochs=1",
        "method.entropy_weight=0.01",
        *(f"train.{each}" for each in train),
        *more,
    ]


@pytest.fixture(scope="module")
def outputs(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dpo-1, reward-1, ppo-1 and grpo-1 by this process; dpo-2 and ppo-2 by two that share rows, reward-2 and grpo-2
    by two that share parameters.

    The rows held out are no multiple of the batch, so one process has less of them than the other; so are the prompts.
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
        ("reinforce", reinforcement(base_model, folder, "ppo", 2, "train.parallel.data=2")),
        ("reinforce", reinforcement(base_model, folder, "grpo", 2, "train.parallel.shard=2")),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[1])
    command = [sys.executable, str(SCRIPT), json.dumps(commands)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as others:
        align(load_config(AlignConfig, None, settings_of(base_model, folder, folder / "dpo-1")))
        train_reward(load_config(RewardConfig, None, settings_of(base_model, folder, folder / "reward-1")))
        for kind in ("ppo", "grpo"):
            reinforce(load_config(ReinforceConfig, None, reinforcement(base_model, folder, kind, 1)))
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


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_two_processes_reinforce_as_one(outputs: Path, kind: str) -> None:
    """The same answers are drawn, judged and learnt from; what differs is the order of float32 sums."""
    one, two = outputs / f"{kind}-1", outputs / f"{kind}-2"
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (two, one))
    assert [point["step"] for point in ours] == [point["step"] for point in theirs] == [0, 2, 4]
    for our, their in zip(ours, theirs, strict=True):
        measured = {name for name in their if not name.startswith("speed/")}
        assert measured == {name for name in our if not name.startswith("speed/")}
        for name in measured:
            assert our[name] == pytest.approx(their[name], rel=1e-4, abs=1e-5), name
    assert (two / "answers.jsonl").read_text() == (one / "answers.jsonl").read_text()
    assert (two / "dashboard.html").exists()
    wanted = dict(load_model(one / "model").named_parameters())
    for name, weight in load_model(two / "model").named_parameters():
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


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("peft.kind=lora",), "leave out peft"),
        (("prompts_per_rollout=3", "train.batch_rows=6"), "which 2 processes cannot take equal parts"),
        (("method.kind=ppo", "train.parallel.shard=2"), "which the critic is beside"),
    ],
)
def test_what_reinforces_on_one_process_only_is_refused(tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_reinforcement(load_config(ReinforceConfig, None, reinforcement(tmp_path, tmp_path, "grpo", 2, *more)), 2)


def test_rows_without_targets_count_nothing() -> None:
    columns = {name: torch.ones(2, 3, dtype=torch.int64) for name in PreferenceBatch.__dataclass_fields__}
    batch = PreferenceBatch(**columns).without_targets(torch.tensor([False, True]))
    assert batch.labels_BT.tolist() == [[1, 1, 1], [IGNORE] * 3]
    assert batch.documents_BT.tolist() == [[1, 1, 1], [PADDING] * 3]
    assert batch.ranks_BT.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert batch.groups_BT.tolist() == [[1, 1, 1]] * 2
