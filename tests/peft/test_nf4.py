"""Four-bit bases beside torchao's NF4 and the nearest of sixteen levels, and adapters trained around them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Linear, Transformer
from puna.peft.apply import adapted_maps, attach, merge, merged
from puna.peft.files import load_adapter, save_adapter
from puna.peft.lora import LoRAConfig
from puna.peft.nf4 import LEVELS, NF4Config, NF4Linear, quantize_nf4
from puna.runtime.errors import InputError

TINY = LlamaConfig(
    vocab_size=96, dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, hidden_dim=128, context_length=128
)  # fmt: skip
IDS = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(0))


def make(**flags):
    model = Transformer(TINY)
    initialize(model, seed=0)
    return model.eval()


def linear_of(weight):
    linear = Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data.copy_(weight)
    return linear


def test_equals_torchao():
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(1)) * 0.02
    theirs = nf4.NF4Tensor.from_tensor(weight, 64, 256).get_original_weight()
    ours = NF4Linear(linear_of(weight), 64).weight
    # There the levels are rounded to four digits, so that weights in the very middle between two can fall to the other
    # side; and the scales' spread, about 0.03, is stored in 128 steps, here in 127.
    blocks, levels = weight.view(-1, 64), torch.tensor(LEVELS)
    shares = blocks / blocks.abs().amax(1, keepdim=True)
    clear = ((shares[:, :, None] - (levels[1:] + levels[:-1]) / 2).abs() > 1e-4).all(2).view_as(weight)
    assert clear.float().mean() > 0.99
    torch.testing.assert_close(ours[clear], theirs[clear], rtol=0, atol=5e-4)
    assert (ours - weight).square().mean() < 1.01 * (theirs - weight).square().mean()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    block_size=st.sampled_from([2, 16, 64]),
    rows=st.integers(1, 40),
    size=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
)
def test_equals_the_nearest_level_of_each_block(seed, block_size, rows, size):
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed)) * size
    layer = NF4Linear(linear_of(weight), block_size)
    blocks = weight.view(-1, block_size)
    scales = blocks.abs().amax(1, keepdim=True)
    distance = (blocks[:, :, None] / scales.clamp(min=1e-30)[:, None] - torch.tensor(LEVELS)).abs()
    nearest = torch.tensor(LEVELS)[distance.argmin(2)] * scales
    # Only the scales' own rounding is between them: half a part in 127 of the widest spread of scales.
    bound = (scales - scales.mean()).abs().max().item() / 127 * 0.51 + 1e-6 * size
    assert (layer.weight.view_as(blocks) - nearest).abs().max() <= bound + 1e-12


def test_gradients_are_those_of_the_floats():
    layer = NF4Linear(linear_of(torch.randn(32, 64, generator=torch.Generator().manual_seed(2))), 64)
    x = torch.randn(3, 5, 64, requires_grad=True)
    expected = torch.nn.functional.linear(x, layer.weight)
    weights = torch.randn(expected.shape)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), x)
    mine = layer(x)
    assert torch.equal(mine, expected)
    (own,) = torch.autograd.grad((mine * weights).sum(), x)
    torch.testing.assert_close(own, gradient)


def test_adapters_are_trained_around_four_bits_and_used_with_or_without(tmp_path):
    method = LoRAConfig(rank=4, four_bits=NF4Config(), weight_decomposed=True)
    model = make()
    with torch.no_grad():
        plain = model(IDS)
    attach(model, method)
    assert all(isinstance(adapted.base, NF4Linear) for adapted in adapted_maps(model).values())
    assert type(model.output) is Linear
    assert (model(IDS) - plain).abs().max() > 1e-3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    with torch.no_grad():
        adapted = model(IDS)
    with pytest.raises(InputError, match="is quantised"), merged(model):
        pass
    save_adapter(model, method, tmp_path / "adapter")
    again = make()
    quantize_nf4(again, NF4Config())
    load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(IDS), adapted)
        merge(again)
        torch.testing.assert_close(again(IDS), adapted, rtol=1e-4, atol=1e-4)
    large = NF4Linear(Linear(512, 512, bias=False), 64)
    stored = sum(buffer.nbytes for buffer in large.state_dict().values())
    assert stored < 512 * 512 * 0.52  # 4.127 bits a weight (section 3), and a mean


def test_what_cannot_be_quantised_is_explained():
    with pytest.raises(InputError, match="not a whole number of blocks of 96"):
        quantize_nf4(make(), NF4Config(block_size=96))
    with pytest.raises(InputError, match="nothing to quantise"):
        quantize_nf4(make(), NF4Config(keep=("*",)))
    with pytest.raises(InputError, match="block_size is 3"):
        NF4Config(block_size=3)
