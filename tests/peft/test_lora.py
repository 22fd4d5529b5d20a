"""LoRA beside the `peft` library: outputs, gradients, merging, and files both ways."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from puna.compress.apply import quantize
from puna.compress.quantization import Quantization
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Linear, Transformer
from puna.peft.apply import adapted_maps, attach, detach, merge, merged
from puna.peft.files import CONFIG_FILE, WEIGHTS_FILE, load_adapter, read_adapter, save_adapter
from puna.peft.lora import LoRAConfig
from puna.runtime.errors import InputError
from puna.weights.load import load_model, save_model

TINY = LlamaConfig(
    vocab_size=96, dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, hidden_dim=128, context_length=128
)  # fmt: skip
TARGETS = ("layers.*.attention.query", "layers.*.attention.value", "layers.*.feed_forward.*", "output")
CONFIGS = [
    LoRAConfig(rank=4, alpha=6, targets=TARGETS),
    LoRAConfig(rank=3, alpha=6, rank_stabilized=True, targets=("layers.*",)),
]
# peft asks transformers for something by its old name.
from_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
IDS = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(0))


def make(**flags):
    model = Transformer(replace(TINY, **flags))
    initialize(model, seed=0)
    return model.eval()


def trained(model, config):
    """As if it had been trained: no part of it is zero."""
    attach(model, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    for adapted in adapted_maps(model).values():
        adapted.lora_b.data.normal_(std=0.05, generator=generator)
    return model


@torch.no_grad()
def logits(model):
    return model(IDS)


@from_peft
@pytest.mark.parametrize("config", CONFIGS, ids=["plain", "rank stabilized"])
def test_peft_reads_ours_and_computes_the_same(tmp_path, config):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = make()
    save_model(model, tmp_path / "base")
    trained(model, config)
    save_adapter(model, config, tmp_path / "adapter")

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True)
    expected = theirs(IDS).logits
    mine = model(IDS)
    # Two float32 implementations of the same sums in different orders.
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)

    weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(3))
    (mine * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    own = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(own) == len(gradients) == 2 * len(adapted_maps(model))
    for ours, other in zip(own.values(), gradients.values(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)

    merge(model)
    with torch.no_grad():
        torch.testing.assert_close(logits(model), theirs.merge_and_unload()(IDS).logits, rtol=1e-5, atol=1e-5)


@from_peft
@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "down_proj"]}, {"target_modules": "all-linear"}])
def test_we_read_theirs_and_compute_the_same(tmp_path, settings):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    save_model(make(), tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, use_rslora=True, **settings)
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")

    model = load_model(tmp_path / "base")
    method = load_adapter(model, tmp_path / "adapter")
    assert method.rank_stabilized
    assert method.scale_of("layers.0.attention.query") == 4
    with torch.no_grad():
        torch.testing.assert_close(logits(model), theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_file_again_is_the_same_file(tmp_path):
    config = CONFIGS[0]
    save_adapter(trained(make(), config), config, tmp_path / "one", base_model="somewhere")
    assert json.loads((tmp_path / "one" / CONFIG_FILE).read_text())["target_modules"] == [
        "down_proj", "gate_proj", "lm_head", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip
    model = make()
    method = load_adapter(model, tmp_path / "one")
    save_adapter(model, method, tmp_path / "two", base_model="somewhere")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_part_of_the_layers_is_named_in_full(tmp_path):
    config = LoRAConfig(rank=2, targets=("layers.1.attention.query",))
    save_adapter(trained(make(), config), config, tmp_path / "adapter")
    values = json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())
    assert values["target_modules"] == ["model.layers.1.self_attn.q_proj"]


def test_untrained_adapters_change_nothing_and_only_they_are_trained():
    model = make()
    before = logits(model)
    names = attach(model, LoRAConfig(rank=4))
    assert len(names) == 14
    assert torch.equal(before, logits(model))
    model(IDS).sum().backward()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.{part}" for name in names for part in ("lora_a", "lora_b")}
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trainable)


def test_dropout_only_in_training():
    model = trained(make(), LoRAConfig(rank=4, dropout=0.5))
    evaluated = logits(model)
    assert torch.equal(evaluated, logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("flags", [{}, {"qkv_bias": True}, {"tie_embeddings": True}], ids=str)
def test_merge_and_detach(flags):
    model = make(**flags)
    original = logits(model)
    trained(model, CONFIGS[0])
    adapted = logits(model)
    assert (adapted - original).abs().max() > 0.01
    with merged(model):
        torch.testing.assert_close(logits(model), adapted, rtol=1e-5, atol=1e-5)
        assert not torch.equal(logits(model), original)
    assert torch.equal(logits(model), adapted)
    detach(model)
    assert torch.equal(logits(model), original)

    trained(model, CONFIGS[0])
    merge(model)
    assert not adapted_maps(model)
    assert all(type(part) is Linear for part in (model.output, model.layers[0].attention.query))
    assert not model.config.tie_embeddings
    torch.testing.assert_close(logits(model), adapted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantization", [Quantization("int8"), Quantization("int4", group_size=32)], ids=str)
def test_around_quantised_maps(quantization):
    model = make()
    quantize(model, quantization)
    base = logits(model)
    trained(model, CONFIGS[1])
    adapted = logits(model)
    assert (adapted - base).abs().max() > 0.01
    model(IDS).sum().backward()
    assert model.layers[0].attention.query.lora_b.grad.abs().max() > 0
    with pytest.raises(InputError, match="is quantised"), merged(model):
        pass
    merge(model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)


def test_wrong_uses_are_explained(tmp_path):
    with pytest.raises(InputError, match=r"'layers.\*.q_proj'.*attention.query"):
        attach(make(), LoRAConfig(targets=("layers.*.q_proj",)))
    model = make()
    attach(model, LoRAConfig())
    with pytest.raises(InputError, match="has adapters already"):
        attach(model, LoRAConfig())
    with pytest.raises(InputError, match="rank is 0"):
        LoRAConfig(rank=0)
    with pytest.raises(InputError, match="dropout is 1"):
        LoRAConfig(dropout=1)
    with pytest.raises(InputError, match=r"lacks adapter_config\.json"):
        read_adapter(tmp_path)


@pytest.fixture
def directory(tmp_path):
    config = LoRAConfig(rank=2, targets=("layers.*.attention.query",))
    save_adapter(trained(make(), config), config, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "BOFT"}, "peft_type 'BOFT'; Puna reads LORA, ADALORA"),
        ({"peft_type": "IA3"}, "no place for"),
        ({"use_dora": True}, "is incomplete"),
        ({"use_qalora": True}, "use_qalora = True"),
        ({"rank_pattern": {"q_proj": 3}}, r"should have \{'lora_a': \(3, 64\)"),
        ({"rank_pattern": {"(q_proj": 3}}, "broken regular expression"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"modules_to_save": ["lm_head"]}, "lacks lm_head"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2}, "no place for"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the model below"),
        ({"r": "2"}, "r \\('2'\\) has to be a whole number"),
        ({"r": 3}, r"has \{'lora_a': \(2, 64\).*should have \{'lora_a': \(3, 64\)"),
    ],
    ids=str,
)
def test_configurations_that_we_do_not_compute(directory, change, message):
    values = json.loads((directory / CONFIG_FILE).read_text())
    (directory / CONFIG_FILE).write_text(json.dumps(values | change))
    with pytest.raises(InputError, match=message):
        load_adapter(make(), directory)


def test_files_that_are_broken_or_belong_to_another_model(directory):
    path = directory / WEIGHTS_FILE
    tensors = load_file(path)
    model = make(num_layers=1)
    with pytest.raises(InputError, match=r"has no layers.1.attention.query"):
        load_adapter(model, directory)
    assert not adapted_maps(model)
    for change, message in [
        (lambda key: key.replace("q_proj", "qkv"), "no place for"),
        (lambda key: key.replace("lora_A", "lora_magnitude_vector"), "no place for"),
        (lambda key: "prompt_embeddings" if "layers.0" in key and "lora_A" in key else key, "no place for"),
        (lambda key: key.replace("lora_A.weight", "lora_A.default.weight"), "no place for"),
    ]:
        save_file({change(key): tensor for key, tensor in tensors.items()}, path)
        with pytest.raises(InputError, match=message):
            read_adapter(directory)
    save_file({key: tensor for key, tensor in tensors.items() if "lora_A" in key}, path)
    with pytest.raises(InputError, match="is incomplete"):
        read_adapter(directory)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        read_adapter(directory)
