"""Whole runs on several processes: files, optimisers, `puna pretrain` under torchrun."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from puna.batches.shards import ShardWriter
from puna.pretrain.main import PretrainConfig
from puna.pretrain.masking import Masking
from puna.pretrain.objectives import CausalObjective, MaskedObjective, PairObjective
from puna.runtime.files import write_jsonl
from puna.runtime.manifest import Manifest
from puna.tokenizer.load import load_tokenizer
from puna.tokenizer.train import TokenizerConfig
from puna.tokenizer.train import main as train_tokenizer
from puna.train.config import OptimizerConfig

Run = Callable[[Any], Any]


def test_a_run_on_two_processes_writes_what_one_does(on_ranks: Run, workers: ModuleType, tmp_path: Path) -> None:
    """Metrics once, validation over all rows, the whole model on the first process."""
    alone = on_ranks(workers.Case(output=tmp_path / "one"))
    both = on_ranks(workers.Case(output=tmp_path / "two").on(shard=2))
    assert isinstance(both, workers.Outcome), both
    assert both.losses == pytest.approx(alone.losses, abs=1e-5)
    assert both.held_out == pytest.approx(alone.held_out, abs=1e-5)
    assert len(both.losses) == workers.TRAIN.steps
    for name, weight in alone.weights.items():
        assert (both.weights[name] - weight).abs().max() <= 5e-5, name


@pytest.mark.parametrize("degrees", [{"pipeline": 2}, pytest.param({"shard": 2}, marks=pytest.mark.slow)])
def test_muon_under_a_layout(on_ranks: Run, workers: ModuleType, degrees: dict[str, int]) -> None:
    """Bitwise where matrices are whole. Where they are split, torch's Muon orthogonalises in bfloat16 over processes.

    Its iteration lifts directions that are only rounding error to the size of the others: seen 3e-4 in a loss, 5e-4 in
    weights of about 0.1.
    """
    optimizer = OptimizerConfig(kind="muon", learning_rate=1e-2, epsilon=1e-3, max_grad_norm=1e9)
    case = workers.Case(train=replace(workers.TRAIN, optimizer=optimizer))
    one, many = on_ranks(case), on_ranks(case.on(**degrees))
    assert isinstance(many, workers.Outcome), many
    if "pipeline" in degrees:
        assert many.losses == one.losses
    assert many.losses == pytest.approx(one.losses, abs=5e-3)
    for name, weight in one.weights.items():
        assert (many.weights[name] - weight).abs().max() <= 5e-3, name


def test_bf16_state_is_near_float32_state(agrees: Callable[..., Any], on_ranks: Run, workers: ModuleType) -> None:
    optimizer = replace(workers.TRAIN.optimizer, state_precision="bf16")
    case = workers.Case(train=replace(workers.TRAIN, optimizer=optimizer))
    half, full = on_ranks(case), on_ranks(workers.Case())
    assert half.losses != full.losses
    # Each step's update is off by the 2^-9 that bfloat16 rounds a running mean by.
    assert half.losses == pytest.approx(full.losses, abs=2e-3)
    # A mean that is rounded to the other side on one rank moves a weight by 2^-8 of an update.
    many = on_ranks(case.on(shard=2))
    assert many.losses == pytest.approx(half.losses, abs=1e-4)


@pytest.mark.slow
def test_bf16_activations_agree_within_their_rounding(on_ranks: Run, workers: ModuleType) -> None:
    case = workers.Case(train=replace(workers.TRAIN, precision="bf16"))
    one = on_ranks(case)
    for degrees in ({"shard": 2}, {"tensor": 2}, {"context": 2}, {"pipeline": 2}):
        many = on_ranks(case.on(**degrees))
        assert isinstance(many, workers.Outcome), many
        # bfloat16 has 8 bits: 4e-3 of each activation; over some hundred targets most of it cancels.
        assert many.losses == pytest.approx(one.losses, abs=2e-2), degrees


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"data": 3}, "train.batch_rows is 8, which 3 does not divide"),
        ({"pipeline": 2, "schedule": "zbv", "stages_per_rank": 3}, None),
        ({"pipeline": 8}, "fewer than the 8 stages"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_on_every_process(
    on_ranks: Run, workers: ModuleType, degrees: dict[str, Any], message: str | None
) -> None:
    outcome = on_ranks(workers.Case().on(**degrees))
    if message is None:
        assert isinstance(outcome, workers.Outcome), outcome
    else:
        kind, text, _ = outcome
        assert kind == "InputError"
        assert message in text


def make_tokens(folder: Path) -> None:
    """Write `tokenizer` and, with documents that a model can learn, `tokens` into a folder."""
    write_jsonl(folder / "docs.jsonl", [{"text": "llama " * 2000 + "".join(map(chr, range(32, 127)))}])
    train_tokenizer(TokenizerConfig(documents=folder / "docs.jsonl", output=folder / "tokenizer", vocab_size=269))
    tokenizer = load_tokenizer(folder / "tokenizer")
    tokens = folder / "tokens"
    tokens.mkdir()
    generator = np.random.default_rng(0)
    with ShardWriter(tokens, 320) as writer:
        for number in range(60):
            ids = [int((generator.integers(60) + t) % 60) for t in range(30)]
            writer.add(ids, str(number), len(ids))
    Manifest("tokenize", {}, {}, writer.results(tokenizer.hash)).write(tokens)


@pytest.mark.parametrize(
    ("degrees", "pairs"),
    [({"shard": 2}, True), pytest.param({"data": 2}, True, marks=pytest.mark.slow), ({"tensor": 2}, False)],
)
def test_several_objectives_under_a_layout(
    agrees: Callable[..., Any], workers: ModuleType, tmp_path: Path, degrees: dict[str, int], pairs: bool
) -> None:
    """Copies of the trunk have rows of different objectives in each forward pass: one has a pair, the other none."""
    make_tokens(tmp_path)
    pair = (PairObjective(masking=Masking(), weight=5),) if pairs else ()
    config = PretrainConfig(
        tokens=tmp_path / "tokens",
        tokenizer=tmp_path / "tokenizer",
        held_out_tokens=tmp_path / "tokens",
        output=tmp_path / "out",
        model=replace(workers.MODEL, vocab_size=320),
        objectives=(CausalObjective(), MaskedObjective(weight=2), *pair),
        train=replace(workers.TRAIN, micro_batch_rows=1, row_length=32, validate_every=3),
    )
    outcome = agrees(workers.Case(pretrain=config).on(**degrees))
    assert ("weight" in outcome.weights) == pairs, "the classifier of pairs"


def puna(arguments: list[str], processes: int) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launcher = torchrun if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "puna.cli", *arguments], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_pretrain_under_torchrun_writes_the_same_model(tmp_path: Path) -> None:
    make_tokens(tmp_path)
    settings = {
        "tokens": f'"{tmp_path / "tokens"}"',
        "tokenizer": f'"{tmp_path / "tokenizer"}"',
        "held_out_tokens": f'"{tmp_path / "tokens"}"',
        "model": "{vocab_size=320, dim=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, hidden_dim=48}",
        "train.steps": "3",
        "train.batch_rows": "8",
        "train.micro_batch_rows": "4",
        "train.row_length": "32",
        "train.device": '"cpu"',
        "train.num_threads": "1",
        "train.schedule.warmup_steps": "0",
        "train.optimizer.epsilon": "1e-3",
        "train.tensorboard": "false",
    }
    models_by_processes = {}
    for processes, layout in ((1, {}), (2, {}), (2, {"train.parallel.tensor": "2"})):
        output = tmp_path / f"out{len(models_by_processes)}"
        chosen = settings | layout | {"output": f'"{output}"'}
        puna(["pretrain", *(part for key, value in chosen.items() for part in ("--set", f"{key}={value}"))], processes)
        models_by_processes[len(models_by_processes)] = load_file(output / "model" / "model.safetensors")
        assert json.loads((output / "model" / "puna.json").read_text())["results"]["steps"] == 3
    one, *others = models_by_processes.values()
    for other in others:
        assert other.keys() == one.keys()
        for name, weight in one.items():
            assert (other[name] - weight).abs().max() <= 5e-5, name
