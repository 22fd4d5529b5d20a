"""Meta's checkpoints: against an independent forward pass in Meta's layout, split over ranks, and broken."""

import json
import math
import os
import resource
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from puna.model.config import LlamaConfig, RopeScaling
from puna.model.presets import PRESETS
from puna.runtime.errors import InputError
from puna.runtime.manifest import Manifest
from puna.weights.load import load_model, save_model
from puna.weights.meta import (
    deinterleave,
    feed_forward_params,
    interleave,
    meta_hidden_dim,
    meta_params,
    read_meta_config,
    save_meta,
)
from puna.weights.names import to_meta

MANIFEST = Manifest(stage="convert", config={}, inputs={})

LLAMA2 = LlamaConfig(
    vocab_size=96, dim=48, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=12, hidden_dim=80, context_length=100
)  # fmt: skip
LLAMA3 = replace(LLAMA2, rope_theta=500_000.0, num_kv_heads=4)
SHAPES = {
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "llama3.1": replace(LLAMA3, rope_scaling=RopeScaling("llama3", 8.0), vocab_size=128),
    "llama3.2": replace(LLAMA3, rope_scaling=RopeScaling("llama3", 32.0), tie_embeddings=True),
    "grouped": replace(LLAMA2, num_kv_heads=2, hidden_dim=1000),
    "multi-query": replace(LLAMA3, num_kv_heads=1, num_layers=11, dim=32, num_heads=4, head_dim=8),
}
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())


def meta_forward(weights, config, ids_T):
    """The model as Meta's code computes it: complex rotations of neighbouring pairs. No cache, no scaling."""
    H, K, T = config.num_heads, config.head_dim, len(ids_T)
    angles = torch.outer(torch.arange(T).float(), 1.0 / config.rope_theta ** (torch.arange(0, K, 2).float() / K))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * weights[name]

    def rotate(x):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(2)

    x = weights["tok_embeddings.weight"][ids_T]
    mask = torch.full((T, T), -math.inf).triu(1)
    for layer in range(config.num_layers):
        at = f"layers.{layer}."
        h = norm(x, at + "attention_norm.weight")
        q, k, v = ((h @ weights[f"{at}attention.{w}.weight"].T).view(T, -1, K) for w in ("wq", "wk", "wv"))
        q, k = rotate(q), rotate(k)
        k, v = (part.repeat_interleave(H // config.num_kv_heads, 1) for part in (k, v))
        scores = torch.einsum("thk,shk->hts", q, k) / math.sqrt(K) + mask
        o = torch.einsum("hts,shk->thk", scores.softmax(-1), v).flatten(1)
        x = x + o @ weights[at + "attention.wo.weight"].T
        h = norm(x, at + "ffn_norm.weight")
        w1, w2, w3 = (weights[f"{at}feed_forward.w{n}.weight"] for n in (1, 2, 3))
        x = x + (F.silu(h @ w1.T) * (h @ w3.T)) @ w2.T
    return norm(x, "norm.weight") @ weights["output.weight"].T


@pytest.mark.parametrize("name", ["llama2", "llama3", "grouped", "multi-query"])
def test_written_weights_compute_the_same_by_meta_s_equations(name, tmp_path, make_model):
    model = make_model(SHAPES[name])
    save_meta(model, tmp_path, manifest=MANIFEST)
    weights = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    ids_T = torch.randint(90, (40,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = meta_forward(weights, model.config, ids_T)
        assert ((model(ids_T[None])[0] - expected).abs().max() / expected.abs().max()).item() < 1e-5


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hf_to_meta_to_hf_is_bitwise(config, dtype, tmp_path, make_model, assert_same_model):
    model = make_model(config, dtype)
    save_model(model, tmp_path / "hf")
    (tmp_path / "meta").mkdir()
    save_meta(load_model(tmp_path / "hf"), tmp_path / "meta", manifest=MANIFEST)
    save_model(load_model(tmp_path / "meta"), tmp_path / "back")
    assert_same_model(load_model(tmp_path / "back"), model)
    before, after = ((tmp_path / side / "model.safetensors").read_bytes() for side in ("hf", "back"))
    assert before == after


@pytest.mark.parametrize("num_shards", [1, 2, 4])
@pytest.mark.parametrize("name", ["llama2", "llama3", "llama3.2"])
def test_model_parallel_shards(name, num_shards, tmp_path, make_model, assert_same_model):
    model = make_model(SHAPES[name])
    config = model.config
    save_meta(model, tmp_path, manifest=MANIFEST, num_shards=num_shards)
    files = sorted(tmp_path.glob("consolidated.*.pth"))
    assert [file.name for file in files] == [f"consolidated.{rank:02}.pth" for rank in range(num_shards)]
    first = torch.load(files[0], weights_only=True)
    whole = {to_meta(name): parameter for name, parameter in model.named_parameters()}
    whole["layers.1.attention.wk.weight"] = interleave(whole["layers.1.attention.wk.weight"], config.num_kv_heads)
    split = {"wk": 0, "wv": 0, "wo": 1}, {"w1": 0, "w2": 1, "w3": 0}
    dims = {f"layers.1.attention.{name}.weight": dim for name, dim in split[0].items()}
    dims |= {f"layers.1.feed_forward.{name}.weight": dim for name, dim in split[1].items()}
    dims |= {"tok_embeddings.weight": 1 if name == "llama2" else 0}
    for tensor, dim in dims.items():
        width = whole[tensor].shape[dim] // num_shards
        assert torch.equal(first[tensor], whole[tensor].narrow(dim, 0, width)), tensor
    assert torch.equal(first["norm.weight"], model.norm.weight)
    assert torch.equal(first["output.weight"], model.output.weight[: 96 // num_shards])
    # Each file holds its own part only.
    num_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert sum(file.stat().st_size for file in files) < 1.5 * num_bytes + 20_000 * num_shards
    assert_same_model(load_model(tmp_path), model)

    # As Meta ships it: no manifest, no vocabulary size, and a table of rotary frequencies.
    (tmp_path / "puna.json").unlink()
    params = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    for file in files:
        torch.save(torch.load(file, weights_only=True) | {"rope.freqs": torch.zeros(6)}, file)
    known = replace(config, context_length={"llama2": 4096, "llama3": 8192, "llama3.2": 131_072}[name])
    tied = config.tie_embeddings and num_shards == 1
    assert read_meta_config(tmp_path) == replace(known, tie_embeddings=tied)
    loaded = load_model(tmp_path)
    assert torch.equal(loaded.output.weight, model.output.weight)
    assert torch.equal(loaded.layers[1].attention.query.weight, model.layers[1].attention.query.weight)


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06}, "llama-1-7b"),
        ({"dim": 6656, "multiple_of": 256, "n_heads": 52, "n_layers": 60, "norm_eps": 1e-06}, "llama-1-33b"),
        ({"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-05}, "llama-2-13b"),
        (
            {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
             "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1},
            "llama-2-70b",
        ),
        (
            {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "ffn_dim_multiplier": 1.0,
             "norm_eps": 1e-5, "rope_theta": 1000000},
            "code-llama-7b",
        ),
        (
            {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
             "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0},
            "llama-3-8b",
        ),
        (
            {"dim": 16384, "n_layers": 126, "n_heads": 128, "n_kv_heads": 8, "vocab_size": 128256,
             "ffn_dim_multiplier": 1.2, "multiple_of": 4096, "norm_eps": 1e-05, "rope_theta": 500000.0,
             "use_scaled_rope": True},
            "llama-3.1-405b",
        ),
        (
            {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
             "ffn_dim_multiplier": 1.5, "multiple_of": 256, "norm_eps": 1e-05, "rope_theta": 500000.0,
             "use_scaled_rope": True},
            "llama-3.2-1b",
        ),
        (
            {"dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8, "vocab_size": 128256,
             "ffn_dim_multiplier": 1.0, "multiple_of": 256, "norm_eps": 1e-05, "rope_theta": 500000.0,
             "use_scaled_rope": True},
            "llama-3.2-3b",
        ),
    ],
)  # fmt: skip
def test_published_params_are_the_published_models(params, name, tmp_path):
    """The params.json that Meta ships, beside an embedding of the right shape without its memory."""
    (tmp_path / "params.json").write_text(json.dumps(params))
    config = PRESETS[name]
    weights = {"tok_embeddings.weight": torch.zeros(1).expand(config.vocab_size, config.dim)}
    if not config.tie_embeddings:
        weights["output.weight"] = torch.ones(1).expand(config.vocab_size, config.dim)
    torch.save(weights, tmp_path / "consolidated.00.pth")
    assert read_meta_config(tmp_path) == config


@given(num_heads=st.integers(1, 4), half=st.integers(1, 5), dim=st.integers(1, 3))
def test_permutation_and_its_inverse(num_heads, half, dim):
    weight = torch.arange(num_heads * 2 * half * dim).view(-1, dim)
    assert torch.equal(deinterleave(interleave(weight, num_heads), num_heads), weight)
    assert torch.equal(interleave(deinterleave(weight, num_heads), num_heads), weight)
    for head in range(num_heads):
        for i in range(half):
            row = interleave(weight, num_heads)[head * 2 * half + 2 * i : head * 2 * half + 2 * i + 2]
            assert torch.equal(row[0], weight[head * 2 * half + i])
            assert torch.equal(row[1], weight[head * 2 * half + i + half])


@given(dim=st.integers(2, 20_000), hidden_dim=st.integers(2, 100_000))
def test_any_feed_forward_width_can_be_written(dim, hidden_dim):
    params = feed_forward_params(dim, hidden_dim)
    assert meta_hidden_dim(dim, params["multiple_of"], params.get("ffn_dim_multiplier")) == hidden_dim


@pytest.mark.parametrize(("dim", "hidden_dim"), [(4096, 11_008), (4096, 14_336), (8192, 28_672), (16_384, 53_248)])
def test_published_widths_get_round_numbers(dim, hidden_dim):
    params = feed_forward_params(dim, hidden_dim)
    assert params["multiple_of"] <= 4096
    assert len(str(params.get("ffn_dim_multiplier", ""))) <= 3


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        ({"qkv_bias": True}, "qkv_bias"),
        ({"qk_norm": True}, "qk_norm"),
        ({"head_dim": 16}, "a head_dim other than dim / num_heads"),
        ({"rope_scaling": RopeScaling("linear", 2.0)}, "linear rope_scaling"),
        ({"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 4096)}, "original_context_length"),
        ({"qkv_bias": True, "rope_scaling": RopeScaling("linear", 2.0)}, "qkv_bias and linear rope_scaling"),
    ],
)
def test_what_meta_s_format_cannot_hold(changes, obstacle):
    with pytest.raises(InputError, match=f"This model has .*{obstacle}.* which Meta's format and code do not have"):
        meta_params(replace(LLAMA3, **changes))


@pytest.mark.parametrize(
    ("num_shards", "what"), [(3, r"num_kv_heads \(4\), hidden_dim \(80\)"), (0, "shards is 0"), (5, "dim")]
)
def test_uneven_splits_are_refused(num_shards, what, tmp_path, make_model):
    with pytest.raises(InputError, match=what):
        save_meta(make_model(LLAMA2), tmp_path, manifest=MANIFEST, num_shards=num_shards)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_os_error(tmp_path, make_model):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"consolidated\.00\.pth could not be written"):
            save_meta(make_model(LLAMA2), tmp_path, manifest=MANIFEST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def saved(tmp_path, make_model):
    """A checkpoint in two shards as Meta would ship it, and functions that change its parts."""
    directory = tmp_path / "saved"
    directory.mkdir()
    save_meta(make_model(LLAMA2), directory, manifest=MANIFEST, num_shards=2)
    (directory / "puna.json").unlink()

    def change(rank, **tensors):
        path = directory / f"consolidated.{rank:02}.pth"
        weights = torch.load(path, weights_only=True) | tensors
        torch.save({name: value for name, value in weights.items() if value is not None}, path)

    def change_params(**values):
        params = json.loads((directory / "params.json").read_text()) | values
        (directory / "params.json").write_text(json.dumps({k: v for k, v in params.items() if v is not None}))

    return directory, change, change_params


def test_a_lost_params_file_is_explained(saved):
    directory, _, _ = saved
    (directory / "params.json").unlink()
    with pytest.raises(InputError, match=r"has no params.json beside it. The number of heads"):
        load_model(directory)


def test_a_single_file_of_another_name(saved, real_data, tmp_path):
    source = real_data / "weights" / "tiny_meta_checkpoint" / "tiny_fair_checkpoint.pt"
    with pytest.raises(InputError, match=r"tiny_fair_checkpoint.pt has no params.json beside it.*\"n_heads\""):
        load_model(source)
    shutil.copy(source, tmp_path)
    with pytest.raises(InputError, match=r"tiny_fair_checkpoint.pt has no params.json beside it"):
        load_model(tmp_path)
    (tmp_path / "params.json").write_text('{"dim": 32, "n_layers": 2, "n_heads": 4, "multiple_of": 256}')
    for path in (tmp_path, tmp_path / source.name):
        model = load_model(path)
        assert (model.config.vocab_size, model.config.hidden_dim) == (500, 256)
        assert {parameter.unique().numel() for parameter in model.parameters()} == {1}
    (tmp_path / "other.pth").touch()
    with pytest.raises(InputError, match=r"one \*.pth or \*.pt; it holds 2 files"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"dim": None}, r"params.json lacks dim\."),
        ({"n_heads": 0}, "params.json"),
        ({"n_layers": "two"}, "params.json"),
        ({"n_layers": 2.0}, "params.json: num_layers: input should be a valid integer, not 2.0"),
        ({"n_kv_heads": 3}, r"num_heads \(4\) has to be a multiple of num_kv_heads \(3\)"),
        ({"quantization_args": {"scheme": "int4"}}, "params.json has quantization_args, which Puna does not support"),
        ({"vision_chunk_size": 560, "vision_args": {"dim": 8}}, "params.json has vision_args"),
        ({"multiple_of": 256}, r"2 of the wrong shape|layers.0.feed_forward.w1.weight \(80x48, expected 256x48\)"),
    ],
)
def test_wrong_params(values, complaint, saved):
    directory, _, change_params = saved
    change_params(**values)
    with pytest.raises(InputError, match=complaint):
        load_model(directory)


def test_params_that_are_no_table(saved):
    directory, _, _ = saved
    (directory / "params.json").write_text("3")
    with pytest.raises(InputError, match="has to hold a JSON object"):
        load_model(directory)


def test_a_lost_shard(saved):
    directory, _, _ = saved
    (directory / "consolidated.00.pth").unlink()
    with pytest.raises(InputError, match=r"lacks consolidated.00.pth: the model is split over 2 files"):
        load_model(directory)


def test_the_last_shard_lost_shows_in_the_shapes(saved):
    directory, _, _ = saved
    (directory / "consolidated.01.pth").unlink()
    with pytest.raises(
        InputError, match=r"layers.0.attention.wq.weight \(24x48, expected 48x48\).*or a file is missing"
    ):
        load_model(directory)


def test_shards_of_different_models(saved):
    directory, change, _ = saved
    change(1, **{"norm.weight": torch.zeros(48)})
    with pytest.raises(InputError, match=r"norm\.weight differs between the shards"):
        load_model(directory)
    change(1, **{"norm.weight": None})
    with pytest.raises(
        InputError, match=r"consolidated.01.pth and consolidated.00.pth do not hold the same .*norm.weight"
    ):
        load_model(directory)


def test_missing_and_unexpected_tensors(saved):
    directory, change, _ = saved
    for rank in range(2):
        change(rank, **{"layers.0.attention.wq.weight": None, "layers.0.attention.wq.bias": torch.zeros(24)})
    with pytest.raises(InputError) as caught:
        load_model(directory)
    assert "1 missing: layers.0.attention.wq.weight;" in str(caught.value)
    assert "1 unexpected: layers.0.attention.wq.bias." in str(caught.value)


def test_weights_that_are_not_a_llama_s(saved):
    directory, _, _ = saved
    for rank in range(2):
        torch.save({"weight": torch.zeros(2)}, directory / f"consolidated.{rank:02}.pth")
    with pytest.raises(InputError, match=r"has no tok_embeddings.weight: these are not the weights of a Llama"):
        load_model(directory)
    torch.save([torch.zeros(2)], directory / "consolidated.00.pth")
    with pytest.raises(InputError, match="has to hold a dictionary of tensors"):
        load_model(directory)


@pytest.mark.parametrize("keep", [0, 10, 1000, 30_000])
def test_a_truncated_shard_is_named(keep, saved):
    directory, _, _ = saved
    path = directory / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"consolidated.01.pth is (broken|not a whole PyTorch file)"):
        load_model(directory)


class Hostile:
    def __init__(self, trap):
        self.trap = trap

    def __reduce__(self):
        return os.mkdir, (str(self.trap),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_refused_and_does_nothing(zipped, saved, tmp_path):
    directory, _, _ = saved
    trap = tmp_path / "trap"
    torch.save(
        {"tok_embeddings.weight": Hostile(trap)},
        directory / "consolidated.00.pth",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(InputError, match="holds more than tensors, which could run code when it is read"):
        load_model(directory)
    assert not trap.exists()
