"""The parts of layouts that need no processes: who gets what, and what is refused."""

from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puna.model.attend import DocumentAttend
from puna.model.transformer import Transformer
from puna.parallel.apply import Layout, StepShape, check, compile_layers
from puna.parallel.config import ParallelConfig
from puna.parallel.context import own_chunks, own_positions
from puna.parallel.float8 import use_float8
from puna.parallel.mesh import Mesh, build_mesh
from puna.parallel.pipeline import layers_of_stage, num_stages, own_stages
from puna.runtime.errors import InputError
from puna.train.config import TrainConfig
from puna.train.loop import prepare


@given(layers=st.integers(1, 130), stages=st.integers(1, 20))
def test_each_layer_has_one_stage(layers: int, stages: int) -> None:
    parts = [layers_of_stage(layers, stage, stages) for stage in range(stages)]
    assert [n for part in parts for n in part] == list(range(layers))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert {sizes[0], sizes[-1]} == {min(sizes)} or layers % stages >= stages - 1


@given(
    pipeline=st.integers(1, 16),
    per_rank=st.integers(1, 4),
    schedule=st.sampled_from(["gpipe", "1f1b", "interleaved", "zero-bubble", "zbv", "dualpipev"]),
)
def test_each_stage_has_one_process(pipeline: int, per_rank: int, schedule: Any) -> None:
    config = ParallelConfig(pipeline=pipeline, stages_per_rank=per_rank, schedule=schedule)
    held = [stage for rank in range(pipeline) for stage in own_stages(config, rank)]
    assert sorted(held) == list(range(num_stages(config)))


@given(size=st.integers(1, 8), length=st.integers(1, 4))
def test_each_position_has_one_process_and_causal_work_is_even(workers: ModuleType, size: int, length: int) -> None:
    batch = workers.SyntheticRows(64, 2 * size * length + (length == 0), 5).batch(range(2))
    parts = [own_positions(batch, rank, size) for rank in range(size)]
    for field in fields(batch):
        whole = getattr(batch, field.name)
        chunks: list[torch.Tensor] = [whole[:, :0]] * (2 * size)
        for rank, part in enumerate(parts):
            for chunk, piece in zip(own_chunks(rank, size), getattr(part, field.name).chunk(2, 1), strict=True):
                chunks[chunk] = piece
        assert torch.equal(torch.cat(chunks, 1), whole)
    assert len({sum(own_chunks(rank, size)) for rank in range(size)}) == 1


class FakeMesh(Mesh):
    """Of any size, without processes."""

    def __init__(self, **sizes: int) -> None:
        object.__setattr__(self, "sizes", sizes)

    def size(self, axis: str) -> int:
        return self.sizes.get(axis, 1)  # type: ignore[attr-defined,no-any-return]

    def rank(self, axis: str) -> int:
        return self.size(axis) - 1


def test_rows_of_a_step_are_shared_without_gap() -> None:
    assert Layout().own_rows(40, 8) == range(40, 48)
    assert Layout(FakeMesh(rows=4)).own_rows(40, 8) == range(46, 48)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"rows": 3}, r"train\.batch_rows is 8, which 3 does not divide"),
        ({"context": 3}, r"train\.row_length is 16, which 6 does not divide"),
        ({"tensor": 3}, "num_heads is 4, which 3 does not divide"),
        ({"tensor": 4, "context": 8}, r"train\.row_length / 8 is 2, which 4 does not divide"),
        ({"rows": 2, "pipeline": 2}, "number of rows for each pipeline is 4, which 3 does not divide"),
    ],
)
def test_what_does_not_divide_is_named(workers: ModuleType, sizes: dict[str, int], message: str) -> None:
    with torch.device("meta"):
        model = Transformer(workers.MODEL)
    shape = StepShape(batch_rows=8, micro_batch_rows=3, row_length=16)
    with pytest.raises(InputError, match=message):
        check(model, ParallelConfig(), FakeMesh(**sizes), shape)


def test_additions_to_the_model_are_for_data_layouts(workers: ModuleType) -> None:
    with torch.device("meta"):
        model = Transformer(workers.MODEL)
        model.add_module("pair_head", torch.nn.Linear(2, 2))
    shape = StepShape(batch_rows=8, micro_batch_rows=4, row_length=16)
    check(model, ParallelConfig(), FakeMesh(rows=2, shard=2), shape)
    with pytest.raises(InputError, match="adds pair_head to the model"):
        check(model, ParallelConfig(), FakeMesh(tensor=2), shape)


def test_too_few_processes_are_refused() -> None:
    with pytest.raises(InputError, match=r"There are 1 processes, but train\.parallel .* is for a multiple of 4"):
        build_mesh(ParallelConfig(shard=2, tensor=2), torch.device("cpu"))


@pytest.mark.parametrize("changes", [{"shard": 0}, {"data": -1}, {"activation_budget": 1.5}])
def test_impossible_degrees_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"parallel.{next(iter(changes))}"):
        ParallelConfig(**changes)


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_activation_checkpointing_changes_nothing(workers: ModuleType, kind: Any) -> None:
    case = workers.Case()
    kept = workers.run(case)
    recomputed = workers.run(case.on(activation_checkpointing=kind))
    assert recomputed.losses == kept.losses
    assert all(torch.equal(recomputed.weights[name], weight) for name, weight in kept.weights.items())


def test_full_activation_checkpointing_keeps_less(workers: ModuleType) -> None:
    def kept_bytes(kind: Any) -> int:
        model = Transformer(workers.MODEL)
        workers.initialize(model, 0)
        prepare(model, replace(workers.TRAIN, parallel=ParallelConfig(activation_checkpointing=kind)), CPU)
        total = 0

        def count(x: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += x.numel() * x.element_size()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            model(torch.zeros(4, 16, dtype=torch.int64))
        return total

    assert kept_bytes("full") < 0.5 * kept_bytes("none")


CPU = torch.device("cpu")


def test_the_compiler_takes_all_layers_for_one(workers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        frames.append(graph)
        return graph.forward

    compile_with = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_with(module, backend=backend))
    monkeypatch.setattr(torch._dynamo.config, "allow_unspec_int_on_nn_module", False)
    torch._dynamo.reset()
    model = Transformer(replace(workers.MODEL, num_layers=12))
    workers.initialize(model, 0)
    ids_BT = torch.zeros(2, 16, dtype=torch.int64)
    attend = DocumentAttend(ids_BT)  # opaque to the compiler, which has to hand it the layer's number
    with torch.no_grad():
        expected = model(ids_BT, attend=attend)
        compile_layers(model)
        torch.testing.assert_close(model(ids_BT, attend=attend), expected)
    # The layer, its attention and what comes after, each at most twice: for the first, and with the number left open.
    assert len(frames) <= 6
    torch._dynamo.reset()


def test_settings_that_need_more_than_this_machine_are_refused(workers: ModuleType) -> None:
    model = Transformer(workers.MODEL)
    budget = ParallelConfig(activation_checkpointing="budget")
    with pytest.raises(InputError, match=r"train\.compile = true"):
        prepare(model, TrainConfig(parallel=budget), CPU)
    with pytest.raises(InputError, match="does not multiply in float8"):
        prepare(model, TrainConfig(precision="fp8"), CPU)


@pytest.mark.slow
def test_emulated_float8_keeps_parameters_and_rounds_products(workers: ModuleType) -> None:
    pytest.importorskip("torchao")
    model = Transformer(workers.MODEL)
    workers.initialize(model, 0)
    model.compute_dtype = torch.bfloat16
    ids = torch.arange(32).view(2, 16)
    exact = model(ids).detach()
    names = {name: value.data_ptr() for name, value in model.named_parameters()}
    use_float8(model, CPU, emulate=True)
    rounded = model(ids)
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == names
    # Float8 (e4m3) has 3 bits of mantissa: 2^-4 of each factor, and four layers of products.
    error = (rounded - exact).float().norm() / exact.float().norm()
    assert 0.01 < error < 0.3
    rounded.float().sum().backward()
    assert all(value.grad is not None for value in model.parameters())
