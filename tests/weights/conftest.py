"""Tiny models and folders of them."""

from collections.abc import Callable

import pytest
import torch

from puna.model.config import LlamaConfig
from puna.model.transformer import Transformer

TINY = LlamaConfig(
    vocab_size=96, dim=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12, hidden_dim=80, context_length=128
)  # fmt: skip


@pytest.fixture
def tiny() -> LlamaConfig:
    return TINY


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Transformer]:
    """A model with no two equal weights, tied ones apart."""

    def make(config: LlamaConfig = TINY, dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
        model = Transformer(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.1, generator=generator)
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def assert_same_model() -> Callable[[Transformer, Transformer], None]:
    def check(one: Transformer, other: Transformer) -> None:
        assert one.config == other.config
        ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
        assert ours.keys() == theirs.keys()
        for name, parameter in ours.items():
            assert parameter.dtype == theirs[name].dtype
            assert torch.equal(parameter, theirs[name]), name

    return check
