"""The chunked loss against its readable twin."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.train import cross_entropy
from puna.train.cross_entropy import (
    linear_cross_entropy,
    linear_logprobs,
    naive_linear_cross_entropy,
    naive_linear_logprobs,
)

IGNORE = -100


def run(  # type: ignore[no-untyped-def]
    function, h: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    h, weight = h.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(h, weight, labels, IGNORE, z_loss)
    (3 * loss).backward()
    assert h.grad is not None
    assert weight.grad is not None
    return loss.detach(), h.grad, weight.grad


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 40),
    vocab=st.integers(2, 50),
    slice_bytes=st.sampled_from([1, 700, 2**20]),
    ignored=st.floats(0, 0.9),
    z_loss=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 99),
)
def test_equals_the_naive_twin(
    tokens: int, vocab: int, slice_bytes: int, ignored: float, z_loss: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = IGNORE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "_SLICE_BYTES", slice_bytes)
        ours = run(linear_cross_entropy, h, weight, labels, z_loss)
    theirs = run(naive_linear_cross_entropy, h, weight, labels, z_loss)
    # Both take the softmax in float32, whose rounding is 6e-8; sums of up to 40 terms of size 10.
    for mine, twin in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), twin.double(), rtol=1e-5, atol=1e-5)


def test_bfloat16_products_and_float32_weights() -> None:
    h = torch.randn(50, 16).bfloat16()
    weight, labels = torch.randn(30, 16), torch.randint(30, (50,))
    ours = run(linear_cross_entropy, h, weight, labels)
    exact = run(naive_linear_cross_entropy, h.float(), weight, labels)
    assert [part.dtype for part in ours] == [torch.float32, torch.bfloat16, torch.float32]
    for mine, twin in zip(ours, exact, strict=True):
        # bfloat16 has 8 bits of mantissa: 2^-8 relative to the largest value.
        assert (mine.float() - twin).abs().max() < 2**-6 * twin.abs().max()


def test_equals_torch_own_fused_loss() -> None:
    h, weight, labels = torch.randn(50, 16), torch.randn(30, 16), torch.randint(30, (50,))
    labels[::3] = IGNORE
    theirs = torch.nn.functional.cross_entropy(h @ weight.T, labels, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(h, weight, labels, IGNORE), theirs)


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    h, weight, labels = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4), torch.randint(6, (5,))
    with torch.no_grad():
        assert not linear_cross_entropy(h, weight, labels, IGNORE).requires_grad


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 40),
    vocab=st.integers(2, 50),
    slice_bytes=st.sampled_from([1, 700, 2**20]),
    ignored=st.floats(0, 0.9),
    frozen=st.sampled_from(["neither", "h", "weight"]),
    seed=st.integers(0, 99),
)
def test_logprobs_equal_the_naive_twin(
    tokens: int, vocab: int, slice_bytes: int, ignored: float, frozen: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = IGNORE
    factors = torch.randn(tokens, generator=generator)
    found = []
    for function in (linear_logprobs, naive_linear_logprobs):
        inputs = [h.clone().requires_grad_(frozen != "h"), weight.clone().requires_grad_(frozen != "weight")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cross_entropy, "_SLICE_BYTES", slice_bytes)
            logprobs = function(*inputs, labels, IGNORE)
            (logprobs.sigmoid() * factors).sum().backward()
        found.append([logprobs.detach(), *(each.grad for each in inputs)])
    for mine, twin in zip(*found, strict=True):
        # The softmax is in float32; see above.
        assert (mine is None) == (twin is None)
        if mine is not None and twin is not None:
            torch.testing.assert_close(mine.double(), twin.double(), rtol=1e-5, atol=1e-5)
    assert not found[0][0][labels == IGNORE].any()


def test_a_frozen_projection_costs_no_gradient() -> None:
    h, weight, labels = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4), torch.randint(6, (5,))
    linear_cross_entropy(h, weight, labels, IGNORE).backward()
    expected = torch.autograd.grad(naive_linear_cross_entropy(h, weight, labels, IGNORE), h)[0]
    assert h.grad is not None
    torch.testing.assert_close(h.grad, expected)
