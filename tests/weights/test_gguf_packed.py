"""4-bit and 8-bit integers of a GGUF file, multiplied as they are."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from puna.compress.apply import fit
from puna.compress.linear import QuantizedLinear
from puna.compress.multiply import round_activations
from puna.infer.config import EngineConfig
from puna.infer.load import load_engine
from puna.infer.sampling import SamplingParams
from puna.kernels.loader import native_library
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Linear, Transformer
from puna.runtime.gguf_file import read_gguf
from puna.tokenizer.train import train_byte_level_bpe
from puna.weights.gguf import save_gguf
from puna.weights.load import load_model

pytestmark = pytest.mark.skipif(native_library() is None, reason="needs the native kernels")

SHAPE = LlamaConfig(
    vocab_size=320, dim=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, hidden_dim=256, context_length=64
)  # fmt: skip
FLAGS = [{}, {"tie_embeddings": True}, {"qkv_bias": True}, {"qk_norm": True}]


@pytest.fixture(params=["q4_0", "q8_0"])
def type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=FLAGS, ids=str)
def file(request: pytest.FixtureRequest, type: str, tmp_path: Path) -> Path:
    model = Transformer(LlamaConfig(**{**vars(SHAPE), **request.param}))
    initialize(model, seed=0)
    tokenizer = train_byte_level_bpe(["the llama grazes on the high puna"] * 20, 280, tmp_path / "tokenizer")
    save_gguf(model, tmp_path / "model.gguf", type=type, pure=True, tokenizer=tokenizer)
    return tmp_path / "model.gguf"


def rounding(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    x = inputs[0]
    quants_MK, scale_M1 = round_activations(x.reshape(-1, x.shape[-1]))
    return (quants_MK * scale_M1).view(x.shape)


@torch.inference_mode()
def test_integers_are_those_of_the_file(file: Path) -> None:
    floats, integers = load_model(file), load_model(file, fit=fit)
    maps = {name: module for name, module in integers.named_modules() if isinstance(module, QuantizedLinear)}
    assert maps.keys() == {name for name, module in floats.named_modules() if isinstance(module, Linear)}
    for name, module in maps.items():
        assert torch.equal(module.weight, floats.get_submodule(name).weight), name
        floats.get_submodule(name).register_forward_pre_hook(rounding)
        x_MK = torch.randn(9, module.in_features, generator=torch.Generator().manual_seed(0))
        expected, found = floats.get_submodule(name)(x_MK), module(x_MK)
        assert (found - expected).norm() < 1e-6 * expected.norm(), name  # sums of integers, and of float32
    # Sums in another order now and then round an activation to the neighbouring integer, 1/127 of the row's largest,
    # and seven maps in each of two layers add such steps up: to 9e-3 at most in four draws of ids, and 3e-7 in draws
    # without such a step. Without `rounding` the logits differ by 2.3e-2 to 2.6e-2.
    ids = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
    expected, found = floats(ids), integers(ids)
    assert (found - expected).norm() < 1.5e-2 * expected.norm()


def test_memory_is_nearly_that_of_the_file(file: Path, type: str) -> None:
    """Two bytes more for 32 weights, as scales are float32 in place of float16."""
    integers, stored = load_model(file, fit=fit), read_gguf(file).tensors
    for name, own in (("layers.0.attention.query", "blk.0.attn_q"), ("layers.1.feed_forward.down", "blk.1.ffn_down")):
        encoding = stored[f"{own}.weight"].encoding
        assert encoding.name == type.upper()
        module = integers.get_submodule(name)
        held = module.weight_int8 if type == "q8_0" else module.weight_packed
        found = held.nbytes + module.weight_scale.nbytes
        assert found == module.in_features * module.out_features // 32 * (encoding.block_bytes + 2)


@torch.inference_mode()
def test_both_in_one_file(tmp_path: Path) -> None:
    """As llama.cpp stores 4 bits by default: the embedding and the output projection keep 8."""
    model = Transformer(SHAPE)
    initialize(model, seed=0)
    save_gguf(model, tmp_path / "model.gguf", type="q4_0")
    floats, integers = load_model(tmp_path / "model.gguf"), load_model(tmp_path / "model.gguf", fit=fit)
    kinds = {name: module.quantization.kind for name, module in integers.named_modules() if hasattr(module, "repacked")}
    assert kinds.pop("output") == "int8"
    assert set(kinds.values()) == {"int4"}
    for name in ("output", *kinds):
        assert torch.equal(integers.get_submodule(name).weight, floats.get_submodule(name).weight), name


def test_floats_where_they_are_asked_for(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = lambda model: {module.__class__ for module in model.modules()}  # noqa: E731
    assert QuantizedLinear in kinds(load_model(file, fit=fit))
    assert QuantizedLinear not in kinds(load_model(file))
    assert QuantizedLinear not in kinds(load_model(file, fit=fit, dtype=torch.float32))
    monkeypatch.setenv("PUNA_NATIVE", "0")
    native_library.cache_clear()
    try:
        assert QuantizedLinear not in kinds(load_model(file, fit=fit))
    finally:
        monkeypatch.undo()
        native_library.cache_clear()


def test_the_engine_runs_them(file: Path) -> None:
    """Its native forward, or adapters over the model, say the same as the model alone."""
    engine = load_engine(file, EngineConfig(device="cpu", max_rows=2))
    assert any(isinstance(module, QuantizedLinear) for module in engine.model.modules())
    prompt = engine.encode("the llama")
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
    [completion] = engine.generate([prompt], params)
    ids = [*prompt, *completion.ids]
    with torch.inference_mode():
        logprobs_TV = load_model(file, fit=fit)(torch.tensor([ids]))[0].log_softmax(-1)
    for place, entry in enumerate(completion.logprobs, start=len(prompt)):
        # As above: sums in another order, which may round an activation the other way.
        assert entry.logprob == pytest.approx(logprobs_TV[place - 1, entry.id].item(), abs=2e-2)
    engine.load_weights(file)
    assert engine.generate([prompt], params)[0].ids == completion.ids
