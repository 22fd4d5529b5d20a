"""Quantised maps against their readable twin."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.compress.linear import QuantizedLinear
from puna.compress.multiply import WAYS, dequantized, multiply, round_activations
from puna.compress.quantization import Quantization
from puna.kernels.loader import native_library
from puna.model.transformer import Linear
from puna.runtime.errors import InputError

KINDS = [
    Quantization("int8"),
    Quantization("int8", activations="int8"),
    Quantization("int4", group_size=32),
    Quantization("int4", group_size=64, symmetric=False),
    Quantization("int4", group_size=128),
    Quantization("int4", group_size=32, activations="int8"),
    Quantization("int4", group_size=64, activations="int8"),
    Quantization("int4", group_size=128, activations="int8"),
    Quantization("int4", group_size=64, activations="int8", symmetric=False),
    Quantization("int8", group_size=32),
    Quantization("int8", group_size=32, activations="int8"),
]
IDS = ["int8", "int8 activations", "int4 g32", "int4 g64 zero points", "int4 g128"]
IDS += ["int4 g32 activations", "int4 g64 activations", "int4 g128 activations", "int4 zero points activations"]
IDS += ["int8 g32", "int8 g32 activations"]


def linear(inputs, outputs, dtype=torch.float32, bias=False, seed=0):
    layer = Linear(inputs, outputs, bias=bias, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / inputs**0.5)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", KINDS, ids=IDS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_way_agrees_with_the_twin(quantization, dtype, data):
    inputs = 128 * data.draw(st.integers(1, 3))
    outputs = data.draw(st.sampled_from([1, 7, 16, 24, 48, 160]))
    rows = data.draw(st.integers(1, 40))
    layer = QuantizedLinear.from_linear(linear(inputs, outputs, dtype), quantization)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).to(dtype)
    expected = dequantized(x.float(), layer)
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
    for way in WAYS:
        if way.takes(x, layer):
            torch.testing.assert_close(way.multiply(x, layer).float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("quantization", KINDS, ids=IDS)
def test_a_map_of_any_shape_with_bias(quantization):
    original = linear(128, 32, bias=True)
    layer = QuantizedLinear.from_linear(original, quantization)
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(0))
    y = layer(x)
    assert y.shape == (2, 3, 32)
    torch.testing.assert_close(y, multiply(x, layer) + original.bias)
    noise = (y - original(x)).square().mean().sqrt() / original(x).square().mean().sqrt()
    assert noise < (0.02 if quantization.kind == "int8" else 0.15)
    assert torch.equal(layer.weight, layer.dequantize(torch.float32))


def test_which_way_is_taken():
    def way(rows, dtype, quantization, outputs=32):
        layer = QuantizedLinear.from_linear(linear(128, outputs, dtype), quantization)
        x = torch.zeros(rows, 128, dtype=dtype)
        return next(way for way in WAYS if way.takes(x, layer)).multiply.__name__

    if native_library() is not None:
        assert way(500, torch.float32, Quantization("int8", activations="int8")) == "_native_product"
        assert way(1, torch.bfloat16, Quantization("int4", activations="int8")) == "_native_product"
        assert way(9, torch.bfloat16, Quantization("int8", group_size=32, activations="int8")) == "_native_product"
    assert way(1, torch.bfloat16, Quantization("int8")) == "_int8_packed"
    assert way(1, torch.bfloat16, Quantization("int4")) == "_int4_packed"
    assert way(1, torch.bfloat16, Quantization("int4"), outputs=20) == "dequantized"
    assert way(500, torch.bfloat16, Quantization("int4")) == "dequantized"
    assert way(1, torch.float32, Quantization("int8")) == "dequantized"
    assert way(1, torch.bfloat16, Quantization("int8", group_size=32)) == "dequantized"


def test_activations_are_rounded_token_by_token():
    x = torch.tensor([[1.0, -0.5, 0.25], [0, 0, 0], [300.0, 1.0, 1.3]])
    quants, scales = round_activations(x)
    assert quants.tolist() == [[127, -64, 32], [0, 0, 0], [127, 0, 1]]
    torch.testing.assert_close(scales[:, 0], torch.tensor([1 / 127, 0, 300 / 127]))


def test_repacked_weights_are_not_kept_over_a_change():
    layer = QuantizedLinear.from_linear(linear(128, 32, torch.bfloat16), Quantization("int4"))
    layer(torch.zeros(1, 128, dtype=torch.bfloat16))
    assert layer.repacked
    assert not copy.deepcopy(layer).repacked
    assert not layer.to(torch.float32).repacked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "int8", "group_size": 64}, "with int8 it has to be 32, or absent"),
        ({"kind": "int4", "group_size": 48}, "with int4 it has to be 32 or 64 or 128, or absent"),
        ({"kind": "int8", "symmetric": False}, "symmetric = false is for int4"),
    ],
)
def test_settings_that_do_not_belong_together(options, message):
    with pytest.raises(ValueError, match=message):
        Quantization(**options)


@pytest.mark.parametrize("quantization", KINDS, ids=IDS)
def test_the_config_says_what_it_is(quantization):
    values = quantization.to_config(("lm_head",))
    back = Quantization.from_config(values, "here")
    assert (back.kind, back.inputs_per_scale, back.symmetric, back.activations) == (
        quantization.kind,
        quantization.inputs_per_scale,
        quantization.symmetric,
        quantization.activations,
    )
    theirs = pytest.importorskip("compressed_tensors.quantization").QuantizationConfig.model_validate(values)
    assert theirs.ignore == ["lm_head"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v | {"quant_method": "gptq"}, "quant_method 'gptq'"),
        (lambda v: v | {"config_groups": {}}, "several groups"),
        (lambda v: v | {"config_groups": {"a": 3}}, "not plain integers"),
        (lambda v: v | {"format": "marlin-24"}, "format 'marlin-24'"),
        (lambda v: v | {"kv_cache_scheme": {"num_bits": 8}}, "more than weights"),
    ],
)
def test_other_configs_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        Quantization.from_config(change(Quantization("int4").to_config(())), "here")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_bits", 3, "num_bits 3"),
        ("type", "float", "not plain integers"),
        ("strategy", "tensor", "strategy 'tensor'"),
        ("actorder", "group", "not plain integers"),
        ("group_size", 16, "has to be 32"),
    ],
)
def test_other_weights_are_refused(key, value, message):
    values = Quantization("int4").to_config(())
    values["config_groups"]["group_0"]["weights"][key] = value
    with pytest.raises(InputError, match=message):
        Quantization.from_config(values, "here")
