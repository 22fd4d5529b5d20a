"""The native parts of a layer against the classes that they extend, outputs and gradients."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.kernels import layers, loader
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer

pytestmark = pytest.mark.skipif(loader.native_library() is None, reason="installed without a C++ compiler")

CONFIG = LlamaConfig(
    vocab_size=32,
    dim=42,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=14,
    hidden_dim=37,
    context_length=64,
    qk_norm=True,
)
"""No size is a multiple of a vector's, so that every kernel has a remainder."""


def step(model: Transformer, ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, and the gradient of every parameter for a loss that weighs them unevenly."""
    logits = model(ids_BT)
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"logits": logits.detach(), **gradients}


def models(seed: int) -> tuple[Transformer, Transformer]:
    """The same weights, natively and as written down, with norms that are not all ones."""
    plain = Transformer(CONFIG)
    initialize(plain, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in plain.named_parameters():
        if "norm" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) / 4
    native = copy.deepcopy(plain)
    layers.use_native_layers(native)
    return native, plain


@pytest.mark.parametrize("level", range(loader.level() + 1 if loader.native_library() else 0))
@given(rows=st.integers(1, 3), tokens=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_equals_the_readable_twin(level: int, rows: int, tokens: int, seed: int) -> None:
    ids_BT = torch.randint(CONFIG.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    native, plain = models(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "level", lambda: level)
        ours = step(native, ids_BT)
    twin = step(plain.double(), ids_BT)
    assert ours.keys() == twin.keys()
    largest = max(float(value.abs().max()) for value in twin.values())
    for name, value in ours.items():
        # Against float64: float32 sums through two layers, whose terms may be as large as the largest gradient.
        torch.testing.assert_close(
            value.double(),
            twin[name],
            rtol=1e-5,
            atol=2e-6 * largest,
            msg=lambda message, name=name: f"{name}: {message}",
        )


def test_does_not_depend_on_the_number_of_threads() -> None:
    found, before = [], torch.get_num_threads()
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            native, _ = models(0)
            norm, x = native.norm, torch.randn(60, CONFIG.dim, generator=torch.Generator().manual_seed(1))
            norm(x).square().sum().backward()
            found.append(norm.weight.grad)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_large_gates_neither_overflow_nor_vanish() -> None:
    joint = torch.tensor([[-200.0, -30.0, 0.0, 30.0, 200.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    h, gradient = torch.empty(1, 5), torch.empty(1, 10)
    layers._call("puna_swiglu_forward", joint, 1, 5, h)
    layers._call("puna_swiglu_backward", joint, torch.ones(1, 5), 1, 5, gradient)
    gate, up = (part.double().requires_grad_() for part in joint.chunk(2, 1))
    expected = torch.nn.functional.silu(gate) * up
    expected.sum().backward()
    torch.testing.assert_close(h.double(), expected.detach(), rtol=1e-6, atol=1e-30)
    assert gate.grad is not None
    assert up.grad is not None
    torch.testing.assert_close(gradient.double(), torch.cat([gate.grad, up.grad], 1), rtol=1e-5, atol=1e-10)


def test_frozen_weights_get_no_gradient() -> None:
    native, plain = models(0)
    for model in (native, plain):
        model.requires_grad_(False)
        model.layers[0].feed_forward.down.weight.requires_grad_(True)
    ids_BT = torch.arange(8)[None]
    ours, twin = step(native, ids_BT), step(plain, ids_BT)
    assert ours.keys() == twin.keys() == {"logits", "layers.0.feed_forward.down.weight"}
    for name, value in ours.items():
        torch.testing.assert_close(value, twin[name], rtol=1e-4, atol=1e-5)


def test_without_gradients_and_in_other_dtypes_it_is_the_class_that_it_extends() -> None:
    native, plain = models(0)
    ids_BT = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(native(ids_BT), plain(ids_BT))
    native.compute_dtype = plain.compute_dtype = torch.bfloat16
    assert torch.equal(native(ids_BT), plain(ids_BT))
