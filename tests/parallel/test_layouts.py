"""Every layout comes to what one process comes to."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

Check = Callable[..., Any]
slow = pytest.mark.slow

ALONE = [
    {"data": 2},
    {"shard": 2},
    {"tensor": 2},
    {"context": 2},
    {"pipeline": 2},
    {"pipeline": 2, "schedule": "zero-bubble"},
]
FURTHER = [
    {"data": 4},
    {"shard": 4},
    {"tensor": 4},
    {"context": 4},
    {"pipeline": 4},
    {"tensor": 2, "sequence_parallel": False},
    {"tensor": 2, "loss_parallel": False},
    {"tensor": 2, "sequence_parallel": False, "loss_parallel": False},
    {"pipeline": 2, "schedule": "gpipe"},
    {"pipeline": 2, "schedule": "interleaved"},
    {"pipeline": 2, "schedule": "zbv"},
    {"pipeline": 2, "schedule": "dualpipev"},
    {"pipeline": 4, "schedule": "gpipe"},
]
PAIRS = [
    {"shard": 2, "tensor": 2},
    {"data": 2, "shard": 2},
    {"tensor": 2, "pipeline": 2},
    {"shard": 2, "context": 2},
]
FURTHER_PAIRS = [
    {"data": 2, "tensor": 2},
    {"data": 2, "context": 2},
    {"data": 2, "pipeline": 2},
    {"shard": 2, "pipeline": 2},
    {"shard": 2, "pipeline": 2, "schedule": "interleaved"},
    {"shard": 2, "pipeline": 2, "schedule": "zero-bubble"},
    {"shard": 2, "pipeline": 2, "schedule": "zbv"},
    {"tensor": 2, "context": 2},
    {"context": 2, "pipeline": 2},
]
TRIPLES = [
    {"data": 2, "shard": 2, "tensor": 2},
    {"data": 2, "shard": 2, "context": 2},
    {"shard": 2, "tensor": 2, "pipeline": 2},
    {"shard": 2, "tensor": 2, "context": 2},
    {"shard": 2, "context": 2, "pipeline": 2},
    {"tensor": 2, "context": 2, "pipeline": 2},
]
FOUR = [{"shard": 2, "tensor": 2, "context": 2, "pipeline": 2}]


def name(degrees: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in degrees.items())


@pytest.mark.parametrize(
    "degrees", [*ALONE, PAIRS[0], *(pytest.param(d, marks=slow) for d in [*FURTHER, *PAIRS[1:]])], ids=name
)
def test_a_layout_equals_one_process(agrees: Check, workers: ModuleType, degrees: dict[str, Any]) -> None:
    agrees(workers.Case().on(**degrees))


@slow
def test_copies_of_a_sharded_pipeline_equal_one_process(agrees: Check, workers: ModuleType) -> None:
    case = workers.Case(train=replace(workers.TRAIN, micro_batch_rows=1))
    agrees(case.on(data=2, shard=2, pipeline=2))


@slow
@pytest.mark.parametrize("degrees", [*FURTHER_PAIRS, *TRIPLES, *FOUR], ids=name)
def test_a_combination_equals_one_process(agrees: Check, workers: ModuleType, degrees: dict[str, Any]) -> None:
    agrees(workers.Case().on(**degrees))


@pytest.mark.parametrize("schedule", ["1f1b", *(pytest.param(s, marks=slow) for s in ("gpipe", "interleaved"))])
def test_a_pipeline_adds_up_the_same_numbers_in_the_same_order(
    agrees: Check, workers: ModuleType, schedule: str
) -> None:
    """Without clipping, which takes one norm over all processes, everything is bitwise equal. Zero-bubble schedules add
    up gradients in another order."""
    case = workers.Case().on(pipeline=2, schedule=schedule)
    optimizer = replace(case.train.optimizer, max_grad_norm=1e9)
    agrees(replace(case, train=replace(case.train, optimizer=optimizer)), bitwise=True)
