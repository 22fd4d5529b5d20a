"""Every fault is seen, named in a line, and survived; the run ends as if it had never met it."""

import json
import pickle
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from puna.batches.packing import PackedRows
from puna.model.transformer import Transformer
from puna.parallel.config import ParallelConfig
from puna.runtime.errors import InputError
from puna.train.config import FaultConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from puna.train.corruption import compute_twice
from puna.train.inject import Fault, Saboteur, full_disk
from puna.train.ledger import read_goodput
from puna.train.loop import fit
from puna.train.loss import causal_lm_loss
from puna.train.metrics import read_metrics
from puna.train.straggler import covered, slow_rank
from puna.train.watchdog import Sign, Watchdog, missing_ranks

Build = Callable[[int], Transformer]
Survive = Callable[[Any], Any]
RUN = {"model": "tiny", "train": {"steps": 12}}
CONFIG = TrainConfig(
    steps=12,
    batch_rows=4,
    micro_batch_rows=2,
    row_length=16,
    log_every=2,
    checkpoint_every=4,
    device="cpu",
    num_threads=1,
    tensorboard=False,
    optimizer=OptimizerConfig(learning_rate=3e-3),
    schedule=ScheduleConfig(warmup_steps=5),
    faults=FaultConfig(spike_settle_steps=5),
)


def run(
    model: Transformer, rows: PackedRows, output: Path, *faults: Fault, config: TrainConfig = CONFIG
) -> dict[str, torch.Tensor]:
    """Train in this process, with faults; return the final weights."""
    saboteur = Saboteur(faults, output / "marks", model, config.batch_rows)
    fit(model, saboteur.rows(rows), saboteur.loss(causal_lm_loss), config, output, RUN)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def leave_out(output: Path, *batches: int) -> Path:
    """A run that was told beforehand which batches to leave out."""
    (output / "quarantine").mkdir(parents=True)
    for batch in batches:
        (output / "quarantine" / f"batch-{batch:08}.json").write_text("{}")
    return output


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())


@pytest.mark.parametrize(("kind", "reason"), [("nan", "the loss is not finite"), ("spike", "the loss spikes")])
def test_bad_data_is_left_out_as_if_it_had_never_been_there(
    tiny_model: Build, tiny_rows: PackedRows, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: Any, reason: str
) -> None:
    met = run(tiny_model(0), tiny_rows, tmp_path / "a", Fault(kind, batch=6, times=99))
    said = capsys.readouterr().err
    assert re.search(rf"In step 7 {reason} .*batch-00000006.json names its documents", said)
    assert "Going back to the checkpoint of step 4." in said
    never_met = run(tiny_model(0), tiny_rows, leave_out(tmp_path / "b", 6))
    assert equal(met, never_met)
    curves = [[(row["step"], row["train/loss"]) for row in read_metrics(tmp_path / x / "metrics.jsonl")] for x in "ab"]
    assert curves[0] == curves[1]

    record = json.loads((tmp_path / "a" / "quarantine" / "batch-00000006.json").read_text())
    assert (record["step"], record["rows"], record["reason"]) == (7, [24, 27], reason)
    documents = [(row, document) for row in range(24, 28) for document in tiny_rows.documents(row)]
    assert [(entry["row"], entry["document"]) for entry in record["documents"]] == documents
    assert all(entry["id"] == str(entry["document"]) for entry in record["documents"])
    goodput = read_goodput(tmp_path / "a")
    assert goodput.lost > 0
    assert goodput.wall == pytest.approx(sum(v for k, v in asdict(goodput).items() if k not in ("wall", "restarts")))


def test_without_a_checkpoint_training_goes_on_past_bad_data(
    tiny_model: Build, tiny_rows: PackedRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(CONFIG, checkpoint_every=0)
    run(tiny_model(0), tiny_rows, tmp_path, Fault("nan", batch=6), config=config)
    said = capsys.readouterr().err
    assert "In step 7 the loss is not finite" in said
    assert "Going back" not in said
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 12


def test_too_much_bad_data_is_divergence(tiny_model: Build, tiny_rows: PackedRows, tmp_path: Path) -> None:
    faults = [Fault("nan", batch=batch, times=99) for batch in range(5, 30)]
    with pytest.raises(InputError, match=r"4 batches had to be left out .* training has diverged.*learning_rate"):
        run(tiny_model(0), tiny_rows, tmp_path, *faults)
    assert len(list((tmp_path / "quarantine").iterdir())) == 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000004"]


def test_a_miscalculation_is_found_by_computing_twice(
    tiny_model: Build, tiny_rows: PackedRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fault strikes in both micro-batches of the step, and in the first of the two computations that compare."""
    config = replace(CONFIG, faults=FaultConfig(check_every=6))
    met = run(tiny_model(0), tiny_rows, tmp_path / "a", Fault("miscalculate", batch=5, times=3), config=config)
    said = capsys.readouterr().err
    assert "rank 0 computed the same micro-batch twice and got another loss: a value has changed by itself." in said
    assert "Going back to the checkpoint of step 4." in said
    assert equal(met, run(tiny_model(0), tiny_rows, tmp_path / "b"))


def test_a_gradient_that_is_not_the_same_twice_is_found() -> None:
    weight, factors = torch.nn.Parameter(torch.ones(3)), iter([1.0, 1 + 1e-6])

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0] * next(factors)

    def compute() -> torch.Tensor:
        loss = Off.apply(weight).sum()  # type: ignore[no-untyped-call]
        loss.backward()
        return loss.detach()

    assert compute_twice(compute, [weight]) == ["rank 0 computed the same micro-batch twice and got another gradient"]
    assert weight.grad is None


def test_a_disk_that_fills_up_costs_checkpoints_and_at_the_end_an_error(
    tiny_model: Build, tiny_rows: PackedRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with full_disk(room_bytes=20_000), pytest.raises(InputError, match=r"last checkpoint .*File too large.*Make room"):
        run(tiny_model(0), tiny_rows, tmp_path / "a")
    assert capsys.readouterr().err.count("A checkpoint could not be written") == 3
    again = run(tiny_model(0), tiny_rows, tmp_path / "a")
    assert equal(again, run(tiny_model(0), tiny_rows, tmp_path / "b"))


def test_one_run_on_two_ranks_survives_kills_bad_data_and_a_flipped_bit(
    elastic: ModuleType, survive: Survive, tiny_rows: PackedRows, tmp_path: Path
) -> None:
    train = replace(elastic.TRAIN, steps=16)
    job = elastic.Job(tiny_rows.shards.directory, tmp_path / "a", 2, ParallelConfig(data=2), train, max_restarts=3)
    # Checkpoints of steps 4, 8, 12 are written beside training; the one of step 4 is there when step 8 is done.
    kills = (Fault("kill", 3, rank=1), Fault("kill", 9, rank=0))
    faults = (*kills, Fault("nan", 6, rank=1, times=99), Fault("bit-flip", 13, rank=1))
    met = survive(replace(job, faults=faults))
    assert met.error == ""
    assert met.restarts == 2
    assert re.search(r"Going on from step [48] of 16", met.said)
    assert "In step 7 the loss is not finite (loss nan" in met.said
    assert "Going back to the checkpoint of step 4." in met.said
    assert "is not the same on ranks 0, 1: a value has changed by itself." in met.said
    assert "Going back to the checkpoint of step 12." in met.said
    undisturbed = survive(replace(job, output=leave_out(tmp_path / "b", 6)))
    assert undisturbed.restarts == 0
    assert equal(met.weights, undisturbed.weights)
    goodput = read_goodput(tmp_path / "a")
    assert goodput.restarts == 2
    assert goodput.effective_share == met.share
    assert goodput.wall == pytest.approx(sum(v for k, v in asdict(goodput).items() if k not in ("wall", "restarts")))
    # From outside: all but the first start of the processes and their end.
    assert met.seconds / 2 < goodput.wall < met.seconds


def test_who_is_missing() -> None:
    def sign(breaths: int, beats: int = 7, waits: bool = True) -> Sign:
        return Sign(breaths, beats, "computing step 3", waits)

    before = [sign(1), sign(1), sign(1)]
    assert missing_ranks(before, [sign(2), sign(2), sign(1)]) == ([2], "gives no sign of life")
    assert missing_ranks([sign(1), None, None], [sign(2), sign(1), None]) == ([2], "gives no sign of life")
    behind = missing_ranks(before, [sign(2), sign(2, beats=6), sign(2)])
    assert behind == ([1], "is behind the others (computing step 3)")
    busy = missing_ranks(before, [sign(2, waits=False), sign(2), sign(2)])
    assert busy == ([0], "keeps the others waiting (computing step 3)")
    assert missing_ranks(before, [sign(2)] * 3) == ([0, 1, 2], "stands still (computing step 3)")


def test_a_hang_is_reported_with_stacks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In a process that nobody would start again: it goes on."""
    stacks, said, pause = tmp_path / "rank-0.txt", "", threading.Event()
    with Watchdog(0.2, tmp_path) as watchdog:
        watchdog.beat("reading batch 6")
        while not (stacks.exists() and "test_a_hang" in stacks.read_text() and said.endswith("\n")):
            pause.wait(0.05)
            said += capfd.readouterr().err
    assert "Training has stood still for 0 s (reading batch 6)." in said
    assert "test_a_hang_is_reported_with_stacks" in stacks.read_text()


def test_who_is_slow() -> None:
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert slow_rank([1.0]) is None
    assert slow_rank([1.0, 1.1, 1.4, 1.0]) is None
    assert slow_rank([0.01, 0.05, 0.01]) is None
    assert slow_rank([1.0, 1.1, 2.0]) == (
        "Rank 2 is slow: its own part of a step took 2.00 s, that of the others 1.05 s. All wait for it."
    )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_hanging_rank_is_named_and_the_run_starts_again(
    elastic: ModuleType, survive: Survive, tiny_rows: PackedRows, tmp_path: Path, rank: int
) -> None:
    train = replace(elastic.TRAIN, faults=FaultConfig(hang_timeout_seconds=6))
    job = elastic.Job(tiny_rows.shards.directory, tmp_path / "a", 2, ParallelConfig(data=2), train, max_restarts=1)
    met = survive(replace(job, faults=(Fault("hang", 10, rank),)))
    assert f"rank {rank} is behind the others (reading batch 10). Stacks are in" in met.said
    assert met.said.count("Training has stood still") == 1
    assert (met.error, met.restarts) == ("", 1)
    assert "inject.py" in (tmp_path / "a" / "stacks" / f"rank-{rank}.txt").read_text()
    assert equal(met.weights, survive(replace(job, output=tmp_path / "b")).weights)


@pytest.mark.slow
def test_odd_copies_and_slow_ranks_are_named_among_four(
    elastic: ModuleType, survive: Survive, tiny_rows: PackedRows, tmp_path: Path
) -> None:
    train = replace(elastic.TRAIN, faults=FaultConfig(check_every=5))
    faults = (Fault("bit-flip", 8, rank=2), Fault("slow", 14, rank=3, seconds=3))
    job = elastic.Job(tiny_rows.shards.directory, tmp_path / "a", 4, ParallelConfig(data=4), train)
    met = survive(replace(job, faults=faults))
    assert "embedding.weight on rank 2 is not the same as on the other 3: a value has changed" in met.said
    assert "Rank 3 is slow: its own part of a step took 3." in met.said
    assert equal(met.weights, survive(replace(job, output=tmp_path / "b")).weights)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_checkpoint_of_four_ranks_goes_on_on_any_other_number(
    elastic: ModuleType, survive: Survive, tiny_rows: PackedRows, tmp_path: Path
) -> None:
    """Equal up to the order of sums in float32: losses of about 3.5, weights of about 0.1."""
    train = replace(elastic.TRAIN, steps=12, micro_batch_rows=2, log_every=1)
    whole = ParallelConfig(shard=2, tensor=2)
    job = elastic.Job(tiny_rows.shards.directory, tmp_path / "a", 4, whole, train)
    undisturbed = survive(job)
    layouts = [
        (1, ParallelConfig()),
        (2, ParallelConfig(shard=2)),
        (2, ParallelConfig(pipeline=2)),
        (8, ParallelConfig(data=2, shard=2, tensor=2)),
    ]
    for number, (ranks, parallel) in enumerate(layouts):
        output = tmp_path / str(number)
        shutil.copytree(tmp_path / "a", output)
        shutil.rmtree(output / "checkpoints" / "step-00000012")
        resumed = survive(replace(job, output=output, ranks=ranks, parallel=parallel))
        assert "Going on from step 8 of 12." in resumed.said
        for name, weight in undisturbed.weights.items():
            torch.testing.assert_close(resumed.weights[name], weight, rtol=0, atol=1e-6)
        curves = [
            [row["train/loss"] for row in read_metrics(folder / "metrics.jsonl")] for folder in (tmp_path / "a", output)
        ]
        assert curves[1] == pytest.approx(curves[0], rel=2e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_of_random_ranks(
    elastic: ModuleType, survive: Survive, tiny_rows: PackedRows, tmp_path: Path
) -> None:
    generator = random.Random(0)
    train = replace(elastic.TRAIN, steps=60)
    faults = tuple(Fault("kill", batch, generator.randrange(4)) for batch in generator.sample(range(60), 20))
    parallel = ParallelConfig(shard=2, tensor=2)
    job = elastic.Job(tiny_rows.shards.directory, tmp_path / "a", 4, parallel, train, max_restarts=20)
    met = survive(replace(job, faults=faults))
    assert (met.error, met.restarts) == ("", 20)
    assert equal(met.weights, survive(replace(job, output=tmp_path / "b")).weights)
    goodput = read_goodput(tmp_path / "a")
    assert goodput.restarts == 20
    assert goodput.wall == pytest.approx(sum(v for k, v in asdict(goodput).items() if k not in ("wall", "restarts")))
    assert met.seconds / 2 < goodput.wall < met.seconds


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_torchrun_starts_again(elastic: ModuleType, tiny_rows: PackedRows, tmp_path: Path) -> None:
    job = elastic.Job(
        tiny_rows.shards.directory,
        tmp_path / "a",
        2,
        ParallelConfig(data=2),
        replace(elastic.TRAIN, faults=FaultConfig(hang_timeout_seconds=8)),
        (Fault("kill", 9, rank=1), Fault("hang", 14, rank=0)),
    )
    script = tmp_path / "job.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(elastic.__file__).parent)!r})\n"
        "import pickle, torch, elastic; torch.set_num_threads(1)\n"
        f"elastic.train(pickle.load(open({str(tmp_path / 'job')!r}, 'rb')))\n"
    )

    (tmp_path / "job").write_bytes(pickle.dumps(job))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    done = subprocess.run([*command, script], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "rank 0 is behind the others (reading batch 14)" in done.stderr
    assert done.stderr.count("Going on from step") == 2
    assert read_goodput(tmp_path / "a").restarts == 2
