"""The step: how rows are split and packed cannot change the answer."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from puna.batches.packing import IGNORE, PADDING, PackedRows, TokenBatch
from puna.model.attend import causal
from puna.model.transformer import Transformer
from puna.train.anomaly import VERDICTS
from puna.train.config import OptimizerConfig, ScheduleConfig, TrainConfig
from puna.train.loss import LossSum, causal_lm_loss
from puna.train.optimizer import build_optimizers
from puna.train.schedule import learning_rate_ratio
from puna.train.state import TrainState
from puna.train.step import train_step

Build = Callable[[int], Transformer]
CONFIG = TrainConfig(steps=10, batch_rows=8, micro_batch_rows=8, row_length=16, schedule=ScheduleConfig(warmup_steps=0))


def fresh(tiny_model: Build, config: TrainConfig = CONFIG) -> TrainState:
    model = tiny_model(0)
    return TrainState(model, build_optimizers(model, config.optimizer))


def weights(state: TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


@pytest.mark.parametrize("micro_rows", [1, 3, 8])
def test_micro_batches_do_not_change_the_step(tiny_model: Build, tiny_rows: PackedRows, micro_rows: int) -> None:
    whole, split = fresh(tiny_model), fresh(tiny_model)
    for n in range(3):
        batch = tiny_rows.batch(range(8 * n, 8 * n + 8))
        one = train_step(whole, [batch], causal_lm_loss, CONFIG)
        many = train_step(split, batch.split(micro_rows), causal_lm_loss, CONFIG)
        assert one.num_units == many.num_units
        # float32 sums in another order: a few units in the last place of sums of about 100 terms.
        assert many.loss == pytest.approx(one.loss, rel=2e-6)
        assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)


def test_packing_does_not_change_the_step(tiny_model: Build) -> None:
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(61, (length,), generator=generator) for length in (5, 9, 2, 12, 4)]

    def rows(layout: list[list[int]], length: int) -> TokenBatch:
        shape = (len(layout), length)
        ids, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        labels, numbers = torch.full(shape, IGNORE), torch.full(shape, PADDING)
        for r, members in enumerate(layout):
            at = 0
            for n, member in enumerate(members):
                document = documents[member]
                span = slice(at, at + len(document))
                ids[r, span], positions[r, span], numbers[r, span] = document, torch.arange(len(document)), n
                labels[r, at : at + len(document) - 1] = document[1:]
                at = span.stop
        return TokenBatch(ids, labels, positions, numbers)

    alone, packed = fresh(tiny_model), fresh(tiny_model)
    one = train_step(alone, [rows([[0], [1], [2], [3], [4]], 12)], causal_lm_loss, CONFIG)
    two = train_step(packed, [rows([[3, 0], [1, 2, 4]], 20)], causal_lm_loss, CONFIG)
    assert one.num_units == two.num_units == 32 - 5
    assert two.loss == pytest.approx(one.loss, rel=2e-6)
    assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)


def test_a_token_sees_nothing_of_other_documents(tiny_model: Build, tiny_rows: PackedRows) -> None:
    model = tiny_model(0)
    row = next(n for n in range(tiny_rows.rows_per_epoch) if len(tiny_rows.documents(n)) > 1)
    batch = tiny_rows.batch([row])
    second = int((batch.documents_BT[0] == 1).nonzero()[0])
    changed = batch.ids_BT.clone()
    changed[0, :second] = (changed[0, :second] + 1) % 61
    before = causal_lm_loss(model, replace(batch, labels_BT=_from(batch.labels_BT, second)))
    after = causal_lm_loss(model, replace(batch, ids_BT=changed, labels_BT=_from(batch.labels_BT, second)))
    assert torch.equal(before.total, after.total)


def _from(labels: torch.Tensor, position: int) -> torch.Tensor:
    labels = labels.clone()
    labels[:, :position] = IGNORE
    return labels


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_bad_step_changes_nothing(tiny_model: Build, tiny_rows: PackedRows, kind: str) -> None:
    """Its batch might as well not have been there: the steps after it end in the same bits without it."""
    config = replace(CONFIG, optimizer=OptimizerConfig(kind=kind), schedule=ScheduleConfig("constant", 0))  # type: ignore[arg-type]
    with_it, without = fresh(tiny_model, config), fresh(tiny_model, config)

    def broken(model: Transformer, batch: TokenBatch) -> LossSum:
        part = causal_lm_loss(model, batch)
        return LossSum(part.total * math.nan, part.count)

    for n in range(4):
        batch = tiny_rows.batch(range(8 * n, 8 * n + 8))
        if n == 2:
            bad = train_step(with_it, batch.split(4), broken, config)
            assert VERDICTS[bad.verdict] == "the loss is not finite"
            continue
        ours, theirs = (train_step(s, batch.split(4), causal_lm_loss, config) for s in (with_it, without))
        assert VERDICTS[ours.verdict] == "good"
        assert ours.loss == theirs.loss
    assert torch.equal(weights(with_it), weights(without))
    assert torch.equal(with_it.statistics, without.statistics)
    assert with_it.step == 4


def test_a_step_does_not_wait_for_the_device(tiny_model: Build, tiny_rows: PackedRows) -> None:
    """No value is read by the host: on a GPU that is where it waits. The loss here counts its units beforehand."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        operations: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero):
                self.operations.append(str(func))
            return func(*args, **(kwargs or {}))

    def loss(model: Transformer, batch: TokenBatch) -> LossSum:
        logits = model(batch.ids_BT, batch.positions_BT, causal, lambda h_BTD, output: output(h_BTD))
        return LossSum(logits.logsumexp(-1).sum(), batch.ids_BT.numel())

    state, batch = fresh(tiny_model), tiny_rows.batch(range(8))
    with Reads() as reads:
        result = train_step(state, batch.split(4), loss, CONFIG)
    assert reads.operations == []
    with Reads() as reads:
        assert result.loss > 0
    assert len(reads.operations) == 1


def test_a_batch_without_targets_is_left_out(tiny_model: Build, tiny_rows: PackedRows) -> None:
    state, batch = fresh(tiny_model), tiny_rows.batch(range(2))
    before = weights(state).clone()
    empty = replace(batch, labels_BT=torch.full_like(batch.labels_BT, IGNORE))
    result = train_step(state, [empty], causal_lm_loss, CONFIG)
    assert VERDICTS[result.verdict] == "no token is a training target"
    assert torch.equal(weights(state), before)


def test_gradients_are_clipped_to_the_norm(tiny_model: Build, tiny_rows: PackedRows) -> None:
    config = replace(CONFIG, optimizer=OptimizerConfig(max_grad_norm=0.01, learning_rate=1.0))
    state = fresh(tiny_model, config)
    seen = []
    state.optimizers[0].register_step_pre_hook(
        lambda *_: seen.append(torch.cat([p.grad.flatten() for p in state.model.parameters()]).norm().item())  # type: ignore[union-attr]
    )
    result = train_step(state, [tiny_rows.batch(range(8))], causal_lm_loss, config)
    assert result.grad_norm > 0.01
    assert seen[0] == pytest.approx(0.01, rel=1e-3)


def test_decay_belongs_to_linear_weights_only(tiny_model: Build) -> None:
    model = tiny_model(0)
    [optimizer] = build_optimizers(model, OptimizerConfig(weight_decay=0.3))
    decayed, free = optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.3
    assert free["weight_decay"] == 0.0
    assert {names[id(p)].split(".")[-2] for p in decayed["params"]} == {
        *("query", "key", "value", "output", "gate", "up", "down")
    }
    assert all("norm" in names[id(p)] or names[id(p)] == "embedding.weight" for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def test_muon_takes_the_matrices_of_layers_and_adamw_the_rest(tiny_model: Build, tiny_rows: PackedRows) -> None:
    config = replace(CONFIG, optimizer=OptimizerConfig(kind="muon", learning_rate=1e-2))
    state = fresh(tiny_model, config)
    muon, adamw = state.optimizers
    names = {id(p): name for name, p in state.model.named_parameters()}
    by_muon = [names[id(p)] for group in muon.param_groups for p in group["params"]]
    by_adamw = [names[id(p)] for group in adamw.param_groups for p in group["params"]]
    assert all(name.startswith("layers.") and "norm" not in name for name in by_muon)
    assert {"embedding.weight", "output.weight", "norm.weight"} <= set(by_adamw)
    assert sorted(by_muon + by_adamw) == sorted(names.values())
    losses = [
        train_step(state, [tiny_rows.batch(range(8 * n, 8 * n + 8))], causal_lm_loss, config).loss for n in range(10)
    ]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_equal_transformers(warmup: int) -> None:
    from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

    steps, decay, ratio = 50, 20, 0.1
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, steps, min_lr_rate=ratio)
    wsd = get_wsd_schedule(optimizer, warmup, decay, num_training_steps=steps, min_lr_ratio=ratio, decay_type="linear")
    for step in range(steps + 1):
        for kind, theirs in (("cosine", cosine), ("wsd", wsd)):
            config = ScheduleConfig(kind, warmup, decay, ratio)
            ours = learning_rate_ratio(step, steps, config)
            if kind == "wsd" and step < warmup:
                continue  # theirs warms up from min_lr_ratio, ours from zero as in every other schedule
            assert ours == pytest.approx(theirs.lr_lambdas[0](step), abs=1e-12), (kind, step)
    assert learning_rate_ratio(30, steps, ScheduleConfig("constant", warmup)) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_rows": 6, "micro_batch_rows": 4}, "multiple of micro_batch_rows"),
        ({"steps": 5, "schedule": ScheduleConfig(warmup_steps=6)}, "more than the 5 steps"),
        ({"steps": 5, "schedule": ScheduleConfig("wsd", 2, 4)}, "more than the 5 steps"),
    ],
)
def test_impossible_runs_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)  # type: ignore[arg-type]
