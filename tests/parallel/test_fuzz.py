"""Any layout of any small model comes to what one process comes to."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from puna.model.config import LlamaConfig

SCHEDULES = ["gpipe", "1f1b", "interleaved", "zero-bubble", "zbv", "dualpipev"]


@st.composite
def cases(draw: st.DrawFn, workers: ModuleType) -> Any:
    """A model, a step and a layout that divide, and nothing else that they have in common."""
    ranks = draw(st.sampled_from([2, 2, 4]))
    degrees = dict.fromkeys(("data", "shard", "tensor", "context", "pipeline"), 1)
    while ranks > 1:
        axis = draw(st.sampled_from(sorted(degrees)))
        degrees[axis] *= 2
        ranks //= 2
    tensor, pipeline = degrees["tensor"], degrees["pipeline"]
    groups = tensor * draw(st.sampled_from([1, 2]))
    heads = groups * draw(st.sampled_from([1, 2]))
    head_dim = draw(st.sampled_from([6, 16]))
    model = LlamaConfig(
        vocab_size=draw(st.integers(11, 70)),
        dim=heads
        * draw(st.sampled_from([15, 16, 20])),  # narrower ones have gradients of a thousand, and amplify rounding
        num_layers=2 * pipeline + draw(st.integers(0, 2)),
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=head_dim,
        hidden_dim=tensor * draw(st.integers(3, 17)),
        context_length=256,
        tie_embeddings=pipeline == 1 and draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
    )
    rows = degrees["data"] * degrees["shard"]
    micro_rows = draw(st.integers(1, 3))
    micro_batches = draw(st.integers(1, 3)) if pipeline == 1 else 2 * pipeline * draw(st.integers(1, 2))
    train = replace(
        workers.TRAIN,
        steps=2,
        batch_rows=rows * micro_batches * micro_rows,
        micro_batch_rows=micro_rows,
        row_length=2 * degrees["context"] * tensor * draw(st.integers(2, 9)),
        z_loss=draw(st.sampled_from([0.0, 1e-2])),
    )
    options = {"sequence_parallel": draw(st.booleans()), "loss_parallel": draw(st.booleans())}
    schedule = draw(st.sampled_from(SCHEDULES if pipeline > 1 else ["1f1b"]))
    case = workers.Case(model, train, document_length=draw(st.integers(1, 12)))
    return case.on(**degrees, **options, schedule=schedule)


@pytest.mark.parametrize("examples", [2, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_any_layout_equals_one_process(agrees: Callable[..., Any], workers: ModuleType, examples: int) -> None:
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(workers))
    def check(case: Any) -> None:
        agrees(case)

    check()
