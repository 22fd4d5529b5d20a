"""Models with quantised maps: in memory, and through a model directory."""

import json
from dataclasses import replace

import pytest
import torch

from puna.compress.apply import fit, linear_names, quantize
from puna.compress.linear import QuantizedLinear
from puna.compress.quantization import Quantization
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Linear, Transformer
from puna.runtime.errors import InputError
from puna.weights.load import load_model, read_config, save_model
from puna.weights.names import to_hf

CONFIG = LlamaConfig(
    vocab_size=96, dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, hidden_dim=128, context_length=128
)  # fmt: skip
KINDS = [
    Quantization("int8"),
    Quantization("int8", activations="int8"),
    Quantization("int4", group_size=32),
    Quantization("int8", group_size=32),
    Quantization("int4", group_size=64, symmetric=False),
]
IDS = ["int8", "int8 activations", "int4 g32", "int8 g32", "int4 g64 zero points"]


def make(config=CONFIG, dtype=torch.float32):
    model = Transformer(config)
    initialize(model, seed=0)
    return model.to(dtype).eval()


def logits(model):
    ids = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(ids).float()


def save(model, directory, quantization):
    kept = tuple(to_hf(f"{name}.weight").removesuffix(".weight") for name in linear_names(model))
    save_model(model, directory, quantization=quantization.to_config(kept))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", KINDS, ids=IDS)
@pytest.mark.parametrize("flags", [{}, {"qkv_bias": True}, {"qk_norm": True}, {"tie_embeddings": True}], ids=str)
def test_through_a_model_directory(tmp_path, quantization, dtype, flags):
    model = make(replace(CONFIG, **flags), dtype)
    original = logits(model)
    replaced = quantize(model, quantization)
    assert len(replaced) == 14
    assert type(model.output) is Linear
    mine = logits(model)
    assert 0 < (mine - original).abs().max() < (0.15 if quantization.kind == "int8" else 1.0) * original.abs().max()
    save(model, tmp_path / "out", quantization)
    back = load_model(tmp_path / "out", fit=fit)
    assert back.config == model.config == read_config(tmp_path / "out")
    assert torch.equal(logits(back), mine)
    ours, theirs = model.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("quantization", KINDS[:4], ids=IDS[:4])
@pytest.mark.parametrize("keep", [("output",), ("layers.1.*", "output"), ()], ids=str)
def test_transformers_computes_the_same(tmp_path, quantization, keep):
    """Through the compressed-tensors library, another reader of the format."""
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = make()
    quantize(model, replace(quantization, keep=keep))
    save(model, tmp_path / "out", quantization)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = theirs(ids).logits
    # The library's step in rounding activations is the range over 255, ours and vLLM's the farthest over 127.
    tolerance = 0.06 if quantization.activations == "int8" else 1e-5
    ours = logits(model)
    assert (ours - found).square().mean().sqrt() < tolerance * ours.square().mean().sqrt()


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_reads_four_bits(symmetric):
    """With zero points as well, at whose shape transformers stumbles before the library sees them."""
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    scheme = pytest.importorskip("compressed_tensors.quantization").QuantizationScheme
    quantization = Quantization("int4", group_size=32, symmetric=symmetric)
    group = quantization.to_config(())["config_groups"]["group_0"]
    layer = QuantizedLinear.from_linear(make().layers[0].feed_forward.up, quantization)
    state = base.PackedQuantizationCompressor.decompress(layer.state_dict(), scheme.model_validate(group))
    torch.testing.assert_close(state["weight"], layer.weight)


def test_a_tied_output_is_separated(tmp_path):
    model = make(replace(CONFIG, tie_embeddings=True))
    before = model.embedding.weight.clone()
    quantize(model, Quantization("int8", keep=()))
    assert isinstance(model.output, QuantizedLinear)
    assert torch.equal(model.embedding.weight, before)
    save(model, tmp_path / "out", Quantization("int8"))
    assert not read_config(tmp_path / "out").tie_embeddings
    assert torch.equal(logits(load_model(tmp_path / "out", fit=fit)), logits(model))


def test_in_another_precision(tmp_path):
    model = make(dtype=torch.bfloat16)
    quantize(model, Quantization("int4"))
    save(model, tmp_path / "out", Quantization("int4"))
    wide = load_model(tmp_path / "out", dtype=torch.float32, fit=fit)
    assert wide.layers[0].attention.query.weight_scale.dtype == torch.float32
    assert wide.layers[0].attention.query.weight_packed.dtype == torch.int32
    torch.testing.assert_close(logits(wide), logits(model), rtol=0.05, atol=0.05)


def test_without_fit_it_is_refused(tmp_path):
    model = make()
    quantize(model, Quantization("int8"))
    save(model, tmp_path / "out", Quantization("int8"))
    with pytest.raises(InputError, match=r"holds quantised weights .* not trained or converted"):
        load_model(tmp_path / "out")


def test_a_broken_directory(tmp_path):
    model = make()
    quantize(model, Quantization("int8"))
    save(model, tmp_path / "out", Quantization("int4"))  # says something else than it holds
    with pytest.raises(InputError, match="do not fit its configuration"):
        load_model(tmp_path / "out", fit=fit)
    path = tmp_path / "out" / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 128
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="inputs, not a multiple of 128"):
        load_model(tmp_path / "out", fit=fit)
    del values["quantization_config"]
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="unexpected"):
        load_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (Quantization("int8", keep=("outptu",)), "'outptu', which fits no linear map"),
        (Quantization("int8", keep=("*",)), "nothing to quantise"),
    ],
)
def test_what_is_kept_is_checked(quantization, message):
    with pytest.raises(InputError, match=message):
        quantize(make(), quantization)


def test_maps_without_whole_groups_stay():
    model = make(replace(CONFIG, hidden_dim=96))
    quantize(model, Quantization("int4", group_size=64))
    assert type(model.layers[0].feed_forward.down) is Linear
    assert isinstance(model.layers[0].feed_forward.up, QuantizedLinear)
