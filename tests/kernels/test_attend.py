"""The native attention against its readable twin, outputs and gradients, at every instruction set of this machine."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.kernels import attend, loader
from puna.model.attend import DocumentAttend

pytestmark = pytest.mark.skipif(loader.native_library() is None, reason="installed without a C++ compiler")


def both(
    monkeypatch: pytest.MonkeyPatch, level: int, lengths: list[int], heads: int, groups: int, size: int, seed: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Output and gradients of the kernels and of the twin in float64, for one row of documents."""
    monkeypatch.setattr(attend, "level", lambda: level)
    generator = torch.Generator().manual_seed(seed)
    documents_BT = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    tokens = documents_BT.shape[1]
    # Queries, keys and values as views of one projection: their tokens' stride is not their size.
    joint = torch.randn(1, tokens, heads + 2 * groups, size, generator=generator)
    weight = torch.randn(1, tokens, heads, size, generator=generator)
    results = []
    for context, dtype in ((attend.NativeDocumentAttend, torch.float32), (DocumentAttend, torch.float64)):
        x = joint.detach().to(dtype, copy=True).requires_grad_()
        o = context(documents_BT)(0, x[:, :, :heads], x[:, :, heads : heads + groups], x[:, :, heads + groups :])
        (o * weight).sum().backward()
        assert x.grad is not None
        results.append([o.detach(), x.grad])
    return results[0], results[1]


@pytest.mark.parametrize("level", range(loader.level() + 1 if loader.native_library() else 0))
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    shape=st.sampled_from([(1, 1, 16), (4, 2, 32), (6, 3, 48), (4, 1, 64), (2, 2, 80), (3, 3, 128)]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25, deadline=None)
def test_equals_the_readable_twin(level: int, lengths: list[int], shape: tuple[int, int, int], seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        ours, twin = both(patch, level, lengths, *shape, seed)
    for mine, theirs in zip(ours, twin, strict=True):
        # Against float64: sums of up to 70 products of order one in float32.
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=2e-5)


def test_long_document(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, twin = both(monkeypatch, loader.level(), [1500, 3], 2, 1, 32, 0)
    for mine, theirs in zip(ours, twin, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=5e-5, atol=5e-5)


def test_large_scores_neither_overflow_nor_vanish() -> None:
    documents_BT = torch.zeros(1, 40, dtype=torch.int64)
    q = torch.full((1, 40, 1, 16), 30.0)
    k = torch.linspace(-30, 30, 40).view(1, 40, 1, 1).expand(1, 40, 1, 16)
    v = torch.randn(1, 40, 1, 16, generator=torch.Generator().manual_seed(0))
    o = attend.NativeDocumentAttend(documents_BT)(0, q, k, v)
    torch.testing.assert_close(o, v, rtol=1e-5, atol=1e-5)  # the newest key has by far the highest score


def test_other_types_go_to_the_twin() -> None:
    documents_BT = torch.tensor([[0, 0, 0, 1, 1]])
    q, k, v = torch.randn(3, 1, 5, 2, 24, generator=torch.Generator().manual_seed(0))
    expected = DocumentAttend(documents_BT)(0, q, k, v)
    assert torch.equal(attend.NativeDocumentAttend(documents_BT)(0, q, k, v), expected)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend, "native_library", lambda: None)
    assert isinstance(attend.document_attend(torch.zeros(1, 4, dtype=torch.int64)), DocumentAttend)
