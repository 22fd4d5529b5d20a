"""Optimiser state in less than float32."""

import copy
from collections.abc import Callable

import pytest
import torch

from puna.model.transformer import Transformer
from puna.train.config import OptimizerConfig
from puna.train.optimizer import build_optimizers


def steps(model: Transformer, optimizer: torch.optim.Optimizer, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_bf16_state_stays_bf16_when_it_is_loaded(tiny_model: Callable[[int], Transformer]) -> None:
    model = tiny_model(0)
    config = OptimizerConfig(state_precision="bf16")
    [optimizer] = build_optimizers(model, config)
    steps(model, optimizer, 3)
    again = copy.deepcopy(model)
    [loaded] = build_optimizers(again, config)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for state in (*optimizer.state.values(), *loaded.state.values()):
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        assert state["step"].item() == 3
    steps(model, optimizer, 2)
    steps(again, loaded, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_bf16_state_follows_float32_state(tiny_model: Callable[[int], Transformer]) -> None:
    weights = {}
    for precision in ("fp32", "bf16"):
        model = tiny_model(0)
        [optimizer] = build_optimizers(model, OptimizerConfig(state_precision=precision, learning_rate=1e-2))  # type: ignore[arg-type]
        steps(model, optimizer, 20)
        weights[precision] = torch.cat([p.detach().flatten() for p in model.parameters()])
    moved = (weights["fp32"] - torch.cat([p.detach().flatten() for p in tiny_model(0).parameters()])).norm()
    # Rounding to 8 bits is 2^-9 of a mean, new in each step.
    assert 0 < (weights["bf16"] - weights["fp32"]).norm() / moved < 1e-2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torchao and the compiler
def test_int8_state_follows_float32_state(tiny_model: Callable[[int], Transformer]) -> None:
    pytest.importorskip("torchao")
    model = tiny_model(0)
    [optimizer] = build_optimizers(model, OptimizerConfig(state_precision="int8", learning_rate=1e-2))
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    steps(model, optimizer, 3)
    assert not torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), before)
