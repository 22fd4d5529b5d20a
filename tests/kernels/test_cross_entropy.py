"""The native cross-entropy of rows of logits against torch's, at every instruction set of this machine."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.kernels import cross_entropy, loader

needs_native = pytest.mark.skipif(loader.native_library() is None, reason="installed without a C++ compiler")


def reference(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = logits_NV.double().requires_grad_()
    loss = F.cross_entropy(wide, labels_N, reduction="sum")
    loss.backward()
    assert wide.grad is not None
    return loss.detach(), wide.grad


@needs_native
@pytest.mark.parametrize("level", range(loader.level() + 1 if loader.native_library() else 0))
@given(
    rows=st.integers(1, 5),
    vocabulary=st.integers(1, 200),
    spread=st.sampled_from([0.0, 1.0, 50.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_native_equals_torch(level: int, rows: int, vocabulary: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_NV = spread * torch.randn(rows, vocabulary, generator=generator) + 100
    labels_N = torch.randint(vocabulary, (rows,), generator=generator)
    loss, error_NV = reference(logits_NV, labels_N)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "level", lambda: level)
        ours, gradient_NV = cross_entropy.cross_entropy_and_error(logits_NV.clone(), labels_N)
    # float32 sums of up to 200 exponentials; logits near 100 carry an error of 1e-5 each
    torch.testing.assert_close(ours.double(), loss, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient_NV.double(), error_NV, rtol=1e-4, atol=1e-5)


def test_plain_twin_equals_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "native_library", lambda: None)
    generator = torch.Generator().manual_seed(0)
    logits_NV, labels_N = torch.randn(7, 50, generator=generator), torch.randint(50, (7,), generator=generator)
    loss, error_NV = reference(logits_NV, labels_N)
    ours, gradient_NV = cross_entropy.cross_entropy_and_error(logits_NV.clone(), labels_N)
    torch.testing.assert_close(ours.double(), loss, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient_NV.double(), error_NV, rtol=1e-5, atol=1e-6)
