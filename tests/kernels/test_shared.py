"""Attention that shares prompts: the same as by a mask over whole rows, with its gradients."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.kernels.shared import NaiveSharedPromptAttend, SharedPromptAttend

# A group is (tokens of the shared prompt, tokens of each answer); without a shared prompt the first is 0.
GROUPS = st.lists(
    st.tuples(st.integers(0, 7), st.lists(st.integers(1, 6), min_size=1, max_size=3)), min_size=1, max_size=3
)
# Rows may be padding altogether, but not all of them.
ROWS = st.tuples(st.lists(GROUPS, min_size=1, max_size=3), st.integers(0, 1)).map(lambda both: both[0] + [[]] * both[1])


def columns(rows: list[list[tuple[int, list[int]]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Documents, groups and whether a token is a prompt's; two more tokens of padding in the longest row."""
    length = max(sum(prompt + sum(answers) for prompt, answers in row) for row in rows) + 2
    documents, groups = torch.full((len(rows), length), -1), torch.full((len(rows), length), -1)
    is_prompt = torch.zeros(len(rows), length, dtype=torch.bool)
    for r, row in enumerate(rows):
        at = document = 0
        for g, (prompt, answers) in enumerate(row):
            for n, size in enumerate([prompt, *answers]):
                if size:
                    documents[r, at : at + size], groups[r, at : at + size] = document, g
                    is_prompt[r, at : at + size] = n == 0
                    at, document = at + size, document + 1
    return documents, groups, is_prompt


@given(ROWS, st.sampled_from([(4, 2, 16), (2, 1, 8)]))
@settings(max_examples=40)
def test_it_is_attention_by_a_mask(rows: list[list[tuple[int, list[int]]]], shape: tuple[int, int, int]) -> None:
    documents, groups, is_prompt = columns(rows)
    num_heads, num_kv_heads, size = shape
    generator = torch.Generator().manual_seed(0)
    real = documents >= 0
    results = []
    for kind in (SharedPromptAttend, NaiveSharedPromptAttend):
        generator.manual_seed(0)
        q, k, v = (
            torch.randn(*documents.shape, heads, size, generator=generator, requires_grad=True)
            for heads in (num_heads, num_kv_heads, num_kv_heads)
        )
        o = kind(documents, groups, is_prompt)(0, q, k, v)
        weights = torch.randn(o.shape, generator=generator)
        (o * weights)[real].sum().backward()
        results.append([o[real], *(x.grad for x in (q, k, v))])
    for ours, expected in zip(*results, strict=True):
        assert ours is not None
        assert expected is not None
        # float32 sums of at most 20 terms, in another order.
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
