"""A run that was killed goes on to the same bits."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from puna.batches.packing import PackedRows
from puna.train.config import OptimizerConfig, ScheduleConfig, TrainConfig
from puna.train.ledger import read_goodput
from puna.train.loop import fit
from puna.train.loss import causal_lm_loss
from puna.train.metrics import MetricsWriter, read_metrics

CONFIG = TrainConfig(
    steps=40,
    batch_rows=4,
    micro_batch_rows=2,
    row_length=16,
    log_every=1,
    validate_every=10,
    checkpoint_every=5,
    device="cpu",
    num_threads=1,
    tensorboard=False,
    optimizer=OptimizerConfig(learning_rate=3e-3),
    schedule=ScheduleConfig(warmup_steps=5),
)
RUN = {"model": "tiny", "train": {"steps": 40, "log_every": 1}}

SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from puna.batches.packing import PackedRows
from puna.batches.shards import TokenShards
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.train.config import ScheduleConfig, TrainConfig
from puna.train import loop
from puna.train.loss import causal_lm_loss
import test_resume
step = loop.train_step

def killed_later(state, *arguments):
    if state.step == 22:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(state, *arguments)

loop.train_step = killed_later
model = Transformer(LlamaConfig(vocab_size=61, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
                                hidden_dim=48, context_length=32))
initialize(model, 0)
rows = PackedRows(TokenShards(Path(sys.argv[2])), 16, 0, "cut")
loop.fit(model, rows, causal_lm_loss, test_resume.CONFIG, Path(sys.argv[3]), test_resume.RUN, rows)
"""


def losses(output: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in read_metrics(output / "metrics.jsonl")]


def test_killed_run_ends_in_the_same_bits(tiny_model, tiny_rows: PackedRows, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    undisturbed = tiny_model(0)
    fit(undisturbed, tiny_rows, causal_lm_loss, CONFIG, tmp_path / "a", RUN, tiny_rows)

    here, tokens, output = Path(__file__).parent, tiny_rows.shards.directory, tmp_path / "b"
    command = [sys.executable, "-c", SCRIPT, str(here), str(tokens), str(output)]
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    # The checkpoint of step 20 may have been written or not.
    assert 20 <= losses(output)[-1][0] < 40

    resumed = tiny_model(1)  # other weights: all must come from the checkpoint
    result = fit(resumed, tiny_rows, causal_lm_loss, CONFIG, output, RUN, tiny_rows)
    assert losses(output) == losses(tmp_path / "a")
    assert result.validation_loss == read_metrics(tmp_path / "a" / "metrics.jsonl")[-1]["validation/loss"]
    for mine, theirs in zip(resumed.parameters(), undisturbed.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["step-00000035", "step-00000040"]
    assert read_goodput(output).restarts == 1


def test_a_finished_run_has_nothing_to_do(tiny_model, tiny_rows: PackedRows, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    first = fit(tiny_model(0), tiny_rows, causal_lm_loss, CONFIG, tmp_path, RUN)
    again = fit(tiny_model(1), tiny_rows, causal_lm_loss, CONFIG, tmp_path, RUN)
    measured = {"seconds": 0, "effective_training_share": 0}
    assert replace(again, **measured) == replace(first, **measured)
    assert first.train_loss < 3.5 < losses(tmp_path)[0][1]


def test_metrics_of_lost_steps_are_dropped(tmp_path: Path) -> None:
    settings = {"tensorboard": True, "wandb_project": "", "config": {}}
    with MetricsWriter(tmp_path, step=0, **settings) as metrics:  # type: ignore[arg-type]
        for step in (1, 2, 3):
            metrics.write(step, {"train/loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tr')
    with MetricsWriter(tmp_path, step=2, **settings) as metrics:  # type: ignore[arg-type]
        metrics.write(3, {"train/loss": 30.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_bfloat16_compute_trains(tiny_model, tiny_rows: PackedRows, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = tiny_model(0)
    result = fit(model, tiny_rows, causal_lm_loss, replace(CONFIG, precision="bf16"), tmp_path, RUN)
    assert result.train_loss < 3.5
    assert all(p.dtype == torch.float32 for p in model.parameters())
