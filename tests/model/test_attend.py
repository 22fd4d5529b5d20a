"""The attention contexts against their definition, and no leak between packed documents."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.model.attend import DocumentAttend, bidirectional, causal
from puna.model.config import LlamaConfig
from puna.model.transformer import Linear, project

CONFIG = LlamaConfig(
    vocab_size=64, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48, context_length=64
)  # fmt: skip


def naive(q_BTHK, k_BTGK, v_BTGK, may_look):
    """softmax(q k^T / sqrt(K)) v, one query at a time; may_look(b, t, s) says which keys it sees."""
    out = torch.zeros_like(q_BTHK)
    B, T, H, K = q_BTHK.shape
    group = H // k_BTGK.shape[2]
    for b in range(B):
        for t in range(T):
            seen = [s for s in range(T) if may_look(b, t, s)]
            for h in range(H):
                scores = torch.stack([q_BTHK[b, t, h] @ k_BTGK[b, s, h // group] for s in seen]) / math.sqrt(K)
                weights = torch.exp(scores - scores.max())
                weights = weights / weights.sum()
                values = torch.stack([v_BTGK[b, s, h // group] for s in seen])
                out[b, t, h] = weights @ values
    return out


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    seed=st.integers(0, 2**31),
)
def test_every_context_is_its_definition(lengths, heads, seed):
    torch.manual_seed(seed)
    T, (H, G) = sum(lengths), heads
    q_BTHK, k_BTGK, v_BTGK = (torch.randn(2, T, n, 8, dtype=torch.float64) for n in (H, G, G))
    documents_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    documents_BT = torch.stack([documents_T, documents_T.flip(0)])

    def same(b, t, s):
        return bool(documents_BT[b, t] == documents_BT[b, s])

    contexts = [
        (causal, lambda b, t, s: s <= t),
        (bidirectional, lambda b, t, s: True),
        (DocumentAttend(documents_BT), lambda b, t, s: s <= t and same(b, t, s)),
        (DocumentAttend(documents_BT, causal=False), same),
    ]
    for attend, may_look in contexts:
        expected = naive(q_BTHK, k_BTGK, v_BTGK, may_look)
        torch.testing.assert_close(attend(0, q_BTHK, k_BTGK, v_BTGK), expected)


def packed_row(lengths):
    """Ids (each document draws from its own eight), positions and document numbers of documents side by side."""
    generator = torch.Generator().manual_seed(3)
    documents = [8 * number + torch.randint(8, (n,), generator=generator) for number, n in enumerate(lengths)]
    positions = torch.cat([torch.arange(n) for n in lengths])
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return documents, torch.cat(documents)[None], positions[None], numbers[None]


@pytest.mark.parametrize("is_causal", [True, False])
def test_packed_documents_equal_documents_alone(is_causal, make_model):
    model = make_model(CONFIG)
    documents, ids_BT, positions_BT, numbers_BT = packed_row([5, 1, 9, 3])
    logits = model(ids_BT, positions_BT, DocumentAttend(numbers_BT, causal=is_causal))[0]
    F.cross_entropy(logits[:-1], ids_BT[0, 1:], reduction="sum").backward()
    packed_gradients = [parameter.grad.clone() for parameter in model.parameters()]

    model.zero_grad()
    alone = [model(ids[None], attend=causal if is_causal else bidirectional)[0] for ids in documents]
    F.cross_entropy(torch.cat(alone)[:-1], ids_BT[0, 1:], reduction="sum").backward()
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-5, atol=1e-5)
    for parameter, packed in zip(model.parameters(), packed_gradients, strict=True):
        torch.testing.assert_close(packed, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_causal", [True, False])
def test_another_document_changes_nothing_at_all(is_causal, make_model):
    model = make_model(CONFIG)
    _, ids_BT, positions_BT, numbers_BT = packed_row([6, 7, 5])
    attend = DocumentAttend(numbers_BT, causal=is_causal)
    logits = model(ids_BT, positions_BT, attend)[0]
    other = ids_BT.clone()
    other[0, :6] = (other[0, :6] + 1) % 8
    changed = model(other, positions_BT, attend)[0]
    assert not torch.equal(logits[:6], changed[:6])
    assert torch.equal(logits[6:], changed[6:])

    logits[6:13].sum().backward()  # of the second document alone: the embeddings of the others get no gradient
    rows = model.embedding.weight.grad.abs().sum(1).view(8, 8).sum(1)
    assert rows[1] > 0
    assert rows[0] == rows[2] == 0


def test_the_future_is_not_seen(make_model):
    model = make_model(CONFIG)
    ids_BT = torch.randint(64, (1, 12), generator=torch.Generator().manual_seed(0))
    other = ids_BT.clone()
    other[0, 7] = (other[0, 7] + 1) % 64
    before, after = model(ids_BT)[0], model(other)[0]
    assert torch.equal(before[:7], after[:7])
    assert not torch.equal(before[7:], after[7:])


def test_head_sees_hidden_states_and_decides_what_forward_returns(make_model):
    model = make_model(CONFIG)
    ids_BT = torch.arange(6)[None]
    hidden, width = model(ids_BT, head=lambda h_BTD, output: (h_BTD, output.out_features))
    assert (hidden.shape, width) == ((1, 6, 32), 64)
    torch.testing.assert_close(model.output(hidden), model(ids_BT))


@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (True, False, True)])
def test_joint_projection_equals_single_ones(biases: tuple[bool, ...]) -> None:
    """Fused in training, one by one without gradients, or where a module has a hook."""
    torch.manual_seed(0)
    maps = [Linear(8, size, bias=bias) for size, bias in zip((5, 3, 5), biases, strict=True)]
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        single = project(x, *maps)
    joint = project(x, *maps)
    for one, other in zip(joint, single, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    seen: list[int] = []
    maps[1].register_forward_hook(lambda *_: seen.append(1))
    project(x, *maps)
    assert seen == [1]
