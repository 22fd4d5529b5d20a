"""Our model against the reference implementation, on random tiny weights of every family."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from puna.model.attend import DocumentAttend
from puna.model.config import LlamaConfig, RopeScaling

TINY = LlamaConfig(
    vocab_size=96, dim=48, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=12, hidden_dim=80, context_length=128
)  # fmt: skip
GROUPED = replace(TINY, num_kv_heads=2, rope_theta=500_000.0)
SCALED = RopeScaling(kind="llama3", factor=8.0, original_context_length=32)

FAMILIES = {
    "llama2": TINY,
    "llama2-tied": replace(TINY, tie_embeddings=True),
    "llama3": GROUPED,
    "llama3.1": replace(GROUPED, rope_scaling=SCALED),
    "llama3.2": replace(GROUPED, rope_scaling=replace(SCALED, factor=32.0), tie_embeddings=True),
    "llama3.1-other-bands": replace(GROUPED, rope_scaling=replace(SCALED, low_freq_factor=2.0, high_freq_factor=9.0)),
    "linear": replace(TINY, rope_scaling=RopeScaling(kind="linear", factor=4.0)),
    "code-llama": replace(TINY, rope_theta=1_000_000.0),
    "multi-query": replace(TINY, num_kv_heads=1),
    "head-dim": replace(TINY, head_dim=16),
    "qwen2": replace(GROUPED, qkv_bias=True, norm_eps=1e-6),
    "qwen2-tied": replace(GROUPED, qkv_bias=True, norm_eps=1e-6, tie_embeddings=True),
    "qwen3": replace(GROUPED, qk_norm=True, head_dim=16, norm_eps=1e-6),
    "qwen3-tied": replace(GROUPED, qk_norm=True, head_dim=16, norm_eps=1e-6, tie_embeddings=True),
}
families = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@families
def test_logits(config, make_twins):
    ours, theirs = make_twins(config)
    ids_BT = random_ids(2, 100)  # beyond the 32 tokens of the scaled models' original context
    with torch.no_grad():
        assert relative(ours(ids_BT), theirs(ids_BT).logits) < 1e-5


@pytest.mark.parametrize("name", ["llama3", "llama3.1", "linear"])
def test_logits_at_far_positions(name, make_twins):
    """Position 100,000 is beyond every original context; float32 angles are equal there all the same."""
    ours, theirs = make_twins(FAMILIES[name])
    ids_BT = random_ids(1, 24)
    positions_BT = 100_000 + torch.arange(24)[None]
    with torch.no_grad():
        assert relative(ours(ids_BT, positions_BT), theirs(ids_BT, position_ids=positions_BT).logits) < 1e-5


@families
def test_gradients(config, make_twins):
    from puna.weights.names import to_hf

    ours, theirs = make_twins(config)
    ids_BT = random_ids(2, 40)
    for logits in (ours(ids_BT), theirs(ids_BT).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, expected[to_hf(name)]) < 1e-4, name


@families
def test_greedy_continuation(config, make_twins):
    ours, theirs = make_twins(config)
    ids_BT = random_ids(1, 8)
    expected = theirs.generate(
        ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=24, do_sample=False, pad_token_id=0
    )
    with torch.no_grad():
        while ids_BT.shape[1] < expected.shape[1]:
            ids_BT = torch.cat((ids_BT, ours(ids_BT)[:, -1:].argmax(-1)), dim=1)
    assert ids_BT.tolist() == expected.tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama3.1", "qwen3"])
def test_padded_batch(name, side, make_twins):
    ours, theirs = make_twins(FAMILIES[name])
    ids_BT = random_ids(3, 20)
    real_BT = torch.arange(20)[None] < torch.tensor([20, 13, 5])[:, None]
    if side == "left":
        real_BT = real_BT.flip(1)
    positions_BT = (real_BT.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(ids_BT, attention_mask=real_BT.long(), position_ids=positions_BT).logits
        logits = ours(ids_BT, positions_BT, DocumentAttend(real_BT.long()))
    assert logits.isfinite().all()
    assert relative(logits[real_BT], expected[real_BT]) < 1e-5


def test_bfloat16_is_close_to_float32_and_to_transformers(make_twins):
    ours, theirs = make_twins(FAMILIES["llama3.1"])
    ids_BT = random_ids(2, 64)
    with torch.no_grad():
        exact = ours(ids_BT)
        ours.compute_dtype = torch.bfloat16
        mixed = ours(ids_BT)
        ours.compute_dtype = None
        pure = ours.to(torch.bfloat16)(ids_BT)
        reference = theirs.to(torch.bfloat16)(ids_BT).logits
    assert mixed.dtype == pure.dtype == torch.bfloat16
    typical = exact.square().mean().sqrt()
    for logits in (mixed, pure, reference):
        assert (logits.float() - exact).square().mean().sqrt() / typical < 0.02
