"""Model directories to and from `transformers`, and every way in which one can be wrong."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from puna.model.config import LlamaConfig, RopeScaling
from puna.model.presets import PRESETS
from puna.runtime.errors import InputError
from puna.weights.huggingface import hf_config, load_hf_weights, read_hf_config, save_hf_weights
from puna.weights.load import load_model, save_model

FAMILIES = {
    "llama": {},
    "llama-tied": {"tie_embeddings": True},
    "llama3.1": {"rope_theta": 500_000.0, "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 32)},
    "linear": {"rope_scaling": RopeScaling("linear", 4.0)},
    "head-dim": {"head_dim": 16},
    "qwen2": {"qkv_bias": True, "norm_eps": 1e-6, "tie_embeddings": True},
    "qwen3": {"qk_norm": True, "head_dim": 16, "num_kv_heads": 1},
}
families = pytest.mark.parametrize("flags", FAMILIES.values(), ids=FAMILIES.keys())


@families
@pytest.mark.parametrize("max_shard_bytes", [30_000, 10**9], ids=["sharded", "single"])
def test_transformers_loads_what_we_write(flags, max_shard_bytes, tmp_path, tiny, make_model):
    import transformers

    model = make_model(replace(tiny, **flags))
    save_model(model, tmp_path / "model", max_shard_bytes=max_shard_bytes)
    shards = list((tmp_path / "model").glob("*.safetensors"))
    assert (len(shards) > 1) == (tmp_path / "model" / "model.safetensors.index.json").exists()
    assert (len(shards) > 1) == (max_shard_bytes == 30_000)

    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True, dtype="auto"
    )
    assert theirs.dtype == torch.float32
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    family = "Qwen2" if "qkv_bias" in flags else "Qwen3" if "qk_norm" in flags else "Llama"
    assert type(theirs).__name__ == f"{family}ForCausalLM"
    ids_BT = torch.arange(90)[None]
    with torch.no_grad():
        expected = theirs(ids_BT).logits
        assert ((model(ids_BT) - expected).abs().max() / expected.abs().max()).item() < 1e-5


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_we_load_what_transformers_writes(flags, dtype, tmp_path, tiny, make_model, assert_same_model):
    import transformers

    model = make_model(replace(tiny, **flags), dtype)
    save_model(model, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=30_000)
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert_same_model(load_model(tmp_path / "theirs"), model)


@families
def test_there_and_back_is_bitwise(flags, tmp_path, tiny, make_model, assert_same_model):
    model = make_model(replace(tiny, **flags), torch.float16)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert_same_model(loaded, model)
    assert not loaded.training
    assert (loaded.output.weight is loaded.embedding.weight) == model.config.tie_embeddings


@pytest.mark.parametrize("name", PRESETS)
def test_config_of_every_preset_survives(name, tmp_path):
    import transformers

    written = hf_config(PRESETS[name], torch.bfloat16, bos_id=1, eos_id=2)
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_hf_config(tmp_path) == PRESETS[name]
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)  # transformers 5's keys
    rewritten = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in rewritten
    assert "rope_theta" not in rewritten
    assert read_hf_config(tmp_path) == PRESETS[name]


def test_an_old_and_sparse_config(tmp_path):
    """Llama 1's published config.json has neither head_dim, nor key/value heads, nor rotary keys."""
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 100,
        "rms_norm_eps": 1e-06,
        "num_key_value_heads": None,
        "sliding_window": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_hf_config(tmp_path) == LlamaConfig(
        vocab_size=100,
        dim=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        hidden_dim=172,
        context_length=2048,
        norm_eps=1e-6,
    )


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "mixtral"}, "model_type = 'mixtral'"),
        ({"model_type": None}, "model_type = None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures = .*a model ForCausalLM is wanted here"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config = "),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"sliding_window": 512}, "sliding_window = 512"),
        ({"model_type": "qwen2", "sliding_window": 512, "use_sliding_window": True}, "sliding_window = 512"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types = "),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling has rope_type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling has rope_type 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor is 0; it has to be positive"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_parameters has rope_type 'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters has to be one flat table"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters has a partial_rotary_factor"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": 48.0}, "hidden_size has to be a whole number, not 48.0"),
        ({"hidden_size": "48"}, "hidden_size has to be a number, not '48'"),
        ({"num_key_value_heads": 3}, r"num_heads \(4\) has to be a multiple of num_kv_heads \(3\)"),
        ({"num_attention_heads": 0}, "num_heads is 0"),
    ],
)
def test_an_unsupported_config_names_the_key(changes, complaint, tmp_path, tiny):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(hf_config(tiny, torch.float32) | changes))
    with pytest.raises(InputError, match=complaint) as caught:
        read_hf_config(tmp_path)
    assert str(path) in str(caught.value)


def test_a_switched_off_sliding_window_is_no_obstacle(tmp_path, tiny):
    values = hf_config(replace(tiny, qkv_bias=True), torch.float32)
    values |= {"sliding_window": 4096, "use_sliding_window": False}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_hf_config(tmp_path) == replace(tiny, qkv_bias=True)


def test_a_config_that_is_no_table_or_no_json(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        read_hf_config(tmp_path)
    path.write_text("[]")
    with pytest.raises(InputError, match="has to hold a JSON object"):
        read_hf_config(tmp_path)
    path.write_text('{"model_type": ')
    with pytest.raises(InputError, match="is not valid JSON"):
        read_hf_config(tmp_path)


def test_flags_of_two_families_have_no_form(tiny):
    with pytest.raises(InputError, match="both qkv_bias and qk_norm has no Hugging Face form"):
        hf_config(replace(tiny, qkv_bias=True, qk_norm=True), torch.float32)


@pytest.fixture
def saved(tmp_path, make_model):
    """A saved tiny model, and a function that changes its tensors."""
    directory = tmp_path / "saved"
    save_model(make_model(), directory)

    def change(**tensors):
        path = directory / "model.safetensors"
        values = load_file(path)
        for name, value in tensors.items():
            if value is None:
                del values[name]
            else:
                values[name] = value
        save_file(values, path)

    return directory, change


def test_all_problems_are_in_one_message(saved):
    directory, change = saved
    change(
        **{
            "model.norm.weight": None,
            "model.layers.1.self_attn.k_proj.weight": torch.zeros(24, 49),
            "model.layers.0.self_attn.q_proj.bias": torch.zeros(48),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6),
        }
    )
    with pytest.raises(InputError) as caught:
        load_model(directory)
    message = str(caught.value)
    assert f"The weights in {directory} do not fit its configuration." in message
    assert "1 missing: model.norm.weight;" in message
    assert "1 unexpected: model.layers.0.self_attn.q_proj.bias;" in message
    assert "1 of the wrong shape: model.layers.1.self_attn.k_proj.weight (24x49, expected 24x48)." in message
    assert "inv_freq" not in message


def test_a_long_list_is_cut(saved, tiny):
    directory, _ = saved
    deeper = hf_config(replace(tiny, num_layers=6), torch.float32)
    (directory / "config.json").write_text(json.dumps(deeper))
    with pytest.raises(InputError, match=r"36 missing: model.layers.2.\S+, .* and 28 more\.") as caught:
        load_model(directory)
    assert len(str(caught.value)) < 800


def test_nothing_is_copied_from_a_wrong_checkpoint(saved, make_model):
    directory, change = saved
    change(**{"lm_head.weight": None})
    model = make_model(seed=5)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(InputError, match=r"1 missing: lm_head.weight\."):
        load_hf_weights(model, directory)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


def test_a_tied_model_may_store_its_output_if_it_is_the_embedding(saved, tiny):
    directory, change = saved
    tied = replace(tiny, tie_embeddings=True)
    (directory / "config.json").write_text(json.dumps(hf_config(tied, torch.float32)))
    with pytest.raises(InputError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ"):
        load_model(directory)
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    change(**{"lm_head.weight": embedding})
    assert torch.equal(load_model(directory).output.weight, embedding)


def test_quantised_tensors_are_refused(saved):
    directory, change = saved
    change(**{"model.norm.weight": torch.zeros(48, dtype=torch.int8)})
    with pytest.raises(InputError, match=r"not plain floating point: model.norm.weight \(torch.int8\)"):
        load_model(directory)


def test_mixed_dtypes_become_the_one_that_holds_all(saved):
    directory, change = saved
    assert load_model(directory).norm.weight.dtype == torch.float32
    change(**{name: t.half() for name, t in load_file(directory / "model.safetensors").items()})
    change(**{"model.norm.weight": torch.ones(48, dtype=torch.bfloat16)})
    model = load_model(directory)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in load_model(directory, dtype=torch.bfloat16).parameters()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_a_truncated_file_is_named(keep, saved):
    directory, _ = saved
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="is not a whole safetensors file") as caught:
        load_model(directory)
    assert str(path) in str(caught.value)


def test_an_empty_file_lacks_everything(saved):
    directory, _ = saved
    save_file({}, directory / "model.safetensors")
    with pytest.raises(InputError, match=r"21 missing: model\.embed_tokens\.weight, .* and 13 more"):
        load_model(directory)


def test_an_lfs_pointer_is_recognised(saved):
    directory, _ = saved
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(InputError, match="Git LFS pointers look like this"):
        load_model(directory)


def test_absent_weights(saved, tmp_path, make_model):
    directory, _ = saved
    (directory / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds neither model.safetensors nor model.safetensors.index.json\.$"):
        load_model(directory)
    (directory / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match=r"Save pytorch_model.bin as safetensors first"):
        load_model(directory)
    (directory / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(InputError, match="has no weight_map"):
        load_model(directory)
    shutil.rmtree(directory)
    save_model(make_model(), directory, max_shard_bytes=30_000)
    lost = sorted(directory.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(InputError, match=rf"index.json names {lost.name}, which the directory does not hold"):
        load_model(directory)


def test_shards_respect_their_size_and_the_index_is_right(tmp_path, make_model):
    model = make_model()
    save_hf_weights(model, tmp_path, dtype=torch.bfloat16, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * sum(parameter.numel() for parameter in model.parameters())
    for path in tmp_path.glob("*.safetensors"):
        tensors = load_file(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 20_000
        assert set(tensors) == {name for name, file in index["weight_map"].items() if file == path.name}
