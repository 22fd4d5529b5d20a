"""Every method beside the `peft` library: outputs, gradients, merging, files both ways; and what all have in common."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from puna.config import load_config, parse_config, render_defaults, to_plain
from puna.infer.adapters import Adapters
from puna.model.attend import DocumentAttend, bidirectional
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.peft.adalora import AdaLoRAConfig
from puna.peft.apply import adapted_maps, apply, attach, detach, merge, merged
from puna.peft.bitfit import BitFitConfig
from puna.peft.bottleneck import BottleneckConfig
from puna.peft.files import CONFIG_FILE, WEIGHTS_FILE, load_adapter, save_adapter, stored_parameters
from puna.peft.ia3 import IA3Config
from puna.peft.lora import LoRAConfig
from puna.peft.methods import METHODS, AnyMethod
from puna.peft.nf4 import NF4Config
from puna.peft.partial import PartialConfig
from puna.peft.prefix import PrefixConfig
from puna.peft.prompt import PromptConfig
from puna.runtime.errors import InputError
from puna.train.config import OptimizerConfig
from puna.train.optimizer import build_optimizers
from puna.weights.load import load_model, save_model

TINY = LlamaConfig(
    vocab_size=96, dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, hidden_dim=128, context_length=128
)  # fmt: skip
QUERIES = ("layers.*.attention.query", "layers.*.feed_forward.down")
IN_PEFT = {
    "dora": LoRAConfig(rank=4, alpha=6, weight_decomposed=True, targets=QUERIES),
    "patterns": LoRAConfig(
        rank=4, alpha=6, targets=QUERIES, ranks={"*.query": 3}, alphas={"layers.1.*": 9}, whole=("output", "norm")
    ),
    "adalora": AdaLoRAConfig(initial_rank=4, target_rank=2, alpha=6, targets=QUERIES),
    "ia3": IA3Config(),
    "prefix": PrefixConfig(num_virtual_tokens=5),
    "prompt": PromptConfig(num_virtual_tokens=5),
}
OURS_ALONE = {
    "bitfit": BitFitConfig(),
    "houlsby": BottleneckConfig(size=8, whole=("*norm",)),
    "pfeiffer": BottleneckConfig(size=8, places="pfeiffer", activation="relu"),
    "partial": PartialConfig(whole=("*norm", "output"), top_layers=1),
}
ALL = IN_PEFT | OURS_ALONE
VIRTUAL = ("prefix", "prompt")
UNMERGED = (*VIRTUAL, "houlsby", "pfeiffer")
IDS = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(0))
from_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def make(**flags):
    model = Transformer(replace(TINY, **flags))
    initialize(model, seed=0)
    return model.eval()


def trained(model, method):
    """As if it had been trained: no part of it is as it was."""
    attach(model, method, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in stored_parameters(model, method).values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


@torch.no_grad()
def logits(model, *arguments):
    return model(IDS, *arguments)


def close(mine, theirs, scale=1):
    # Two float32 implementations of the same sums in different orders; gradients are sums over all tokens, `scale`.
    torch.testing.assert_close(mine, theirs, rtol=1e-5 * scale, atol=1e-5 * scale)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    save_model(make(), directory)
    return directory


def their_base(base):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()


def their_names(model):
    return {
        name.replace(".default", "").replace(".modules_to_save", "").replace("_vector.weight", "_vector"): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }


@from_peft
@pytest.mark.parametrize("name", IN_PEFT)
def test_peft_reads_ours_and_computes_the_same(base, tmp_path, name):
    peft, method = pytest.importorskip("peft"), IN_PEFT[name]
    model = trained(make(), method)
    save_adapter(model, method, tmp_path / "adapter", base_model=str(base))
    theirs = peft.PeftModel.from_pretrained(their_base(base), tmp_path / "adapter", is_trainable=name not in VIRTUAL)
    if name in VIRTUAL:
        vectors = theirs.prompt_encoder["default"].embedding.weight.requires_grad_()
    expected = theirs(IDS).logits[:, -IDS.shape[1] :]  # those of virtual tokens left out
    mine = model(IDS)
    close(mine, expected)
    assert (mine - logits(make())).abs().max() > 1e-3

    weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(3))
    (mine * weights).sum().backward()
    (expected * weights).sum().backward()
    own = {key: parameter.grad for key, parameter in stored_parameters(model, method).items()}
    other = {"prompt_embeddings": vectors.grad} if name in VIRTUAL else None
    if other is None:
        other = {key: parameter.grad for key, parameter in their_names(theirs).items()}
    assert own.keys() == other.keys()
    for key in own:
        close(own[key], other[key], scale=10)
    if name not in VIRTUAL:
        merge(model)
        with torch.no_grad():
            close(logits(model), theirs.merge_and_unload()(IDS).logits)


@from_peft
@pytest.mark.parametrize("name", IN_PEFT)
def test_we_read_theirs_and_compute_the_same(base, tmp_path, name):
    peft = pytest.importorskip("peft")
    kind = {"task_type": "CAUSAL_LM"}
    maps = {"target_modules": ["q_proj", "down_proj"], **kind}
    config = {
        "dora": lambda: peft.LoraConfig(r=4, use_dora=True, init_lora_weights=False, **maps),
        "patterns": lambda: peft.LoraConfig(
            r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.down_proj": 3.5}, init_lora_weights=False,
            modules_to_save=["lm_head"], **maps,
        ),
        "adalora": lambda: peft.AdaLoraConfig(
            init_r=4, target_r=2, total_step=10, init_lora_weights=False, **maps
        ),
        "ia3": lambda: peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False, **kind
        ),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, **kind),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, **kind),
    }[name]()  # fmt: skip
    torch.manual_seed(4)
    theirs = peft.get_peft_model(their_base(base), config).eval()
    if name == "patterns":
        theirs.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(1.5)
    if name == "adalora":
        pattern = {}
        for module, layer in theirs.named_modules():
            if hasattr(layer, "lora_E") and "q_proj" in module:
                layer.lora_E["default"].data[1] = 0
                pattern[f"{module.removeprefix('base_model.model.')}.lora_E"] = [True, False, True, True]
        theirs.peft_config["default"].rank_pattern = pattern
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_model(base)
    method = load_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        close(logits(model), theirs(IDS).logits[:, -IDS.shape[1] :])
    assert (logits(model) - logits(make())).abs().max() > 1e-3
    if name == "patterns":
        assert (method.rank_of("layers.0.attention.query"), method.scale_of("layers.1.feed_forward.down")) == (2, 0.875)
    if name == "adalora":
        assert len(model.layers[1].attention.query.lora_a) == 3


@pytest.mark.parametrize("name", ALL)
def test_file_again_is_the_same_file_and_model(tmp_path, name):
    method = ALL[name]
    model = trained(make(), method)
    save_adapter(model, method, tmp_path / "one")
    again = make()
    save_adapter(again, load_adapter(again, tmp_path / "one"), tmp_path / "two")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert torch.equal(logits(model), logits(again))


@pytest.mark.parametrize("name", ALL)
def test_only_the_method_is_trained_and_nothing_else_changes(name):
    method, model, original = ALL[name], make(), make()
    before = logits(model)
    trainable = apply(model, method)
    if name not in VIRTUAL:
        # DoRA divides each output by a length and multiplies it again; all others add zero or multiply by one.
        torch.testing.assert_close(before, logits(model), rtol=0, atol=1e-5 if name == "dora" else 0)
    model(IDS).square().sum().backward()
    with_gradient = {key for key, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(trainable.names)
    own = stored_parameters(model, method)
    assert len(own) == len(trainable.names)
    assert trainable.num_trained == sum(p.numel() for p in own.values())
    detach(model)
    assert torch.equal(before, logits(model))
    for one, other in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ALL)
def test_merging_computes_the_same_or_is_refused(name):
    model = trained(make(), ALL[name])
    adapted = logits(model)
    if name in UNMERGED:
        for attempt in (lambda: merge(model), lambda: merged(model).__enter__()):
            with pytest.raises(InputError, match="cannot be merged"):
                attempt()
        assert torch.equal(adapted, logits(model))
        return
    with merged(model):
        close(logits(model), adapted)
    assert torch.equal(logits(model), adapted)
    merge(model)
    close(logits(model), adapted)
    assert model.config.qkv_bias == (name == "bitfit")


def test_a_merged_bitfit_is_a_model_directory_with_biases(tmp_path):
    model = trained(make(), BitFitConfig())
    adapted = logits(model)
    merge(model)
    save_model(model, tmp_path)
    close(logits(load_model(tmp_path)), adapted)
    model = trained(make(), BitFitConfig(targets=("layers.*",)))
    adapted = logits(model)
    with pytest.raises(InputError, match="Choose exactly these as targets"):
        merge(model)
    assert torch.equal(adapted, logits(model))


def test_factors_scale_biases_too():
    model = trained(make(qkv_bias=True), IA3Config())
    model.layers[0].attention.key.base.bias.data.normal_()
    adapted = logits(model)
    merge(model)
    close(logits(model), adapted)


@pytest.mark.parametrize("name", VIRTUAL)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_packed_documents_have_their_own_virtual_tokens(name, data):
    model = trained(make(), replace(ALL[name], num_virtual_tokens=data.draw(st.integers(1, 4))))
    rows = [data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)) for _ in range(2)]
    is_causal = data.draw(st.booleans())
    width = max(map(sum, rows))
    rows = [lengths if sum(lengths) == width else [*lengths, width - sum(lengths)] for lengths in rows]
    documents = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])
    ids = torch.randint(96, (2, width), generator=torch.Generator().manual_seed(width))
    with torch.no_grad():
        packed = model(ids, positions, DocumentAttend(documents, causal=is_causal))
        for number, row in enumerate(rows):
            begin = 0
            for length in row:
                alone = ids[number : number + 1, begin : begin + length]
                expected = model(alone) if is_causal else model(alone, attend=bidirectional)
                # Sums over other shapes.
                torch.testing.assert_close(packed[number, begin : begin + length], expected[0], rtol=1e-4, atol=1e-4)
                begin += length


@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_tokens_mix_with_rows_and_heads_and_refuse_a_cache(name):
    model = trained(make(), ALL[name])
    documents = torch.zeros_like(IDS)
    mixed = logits(model, None, DocumentAttend(documents, causal=torch.tensor([True, False])))
    close(mixed[0], logits(model)[0])
    close(mixed[1], logits(model, None, bidirectional)[1])
    with torch.no_grad():
        assert model(IDS, head=lambda h, output: h).shape == (*IDS.shape, TINY.dim)
    with pytest.raises(InputError, match="no place for their virtual tokens"):
        model(IDS, attend=lambda layer, q, k, v: q)


def test_a_recipe_names_a_method(tmp_path):
    @dataclass(frozen=True)
    class Recipe:
        """One."""

        method: AnyMethod = None
        """Which."""

    (tmp_path / "recipe.toml").write_text(
        'method = { kind = "lora", rank = 8, ranks = { "*.key" = 2 }, four_bits = { block_size = 32 } }'
    )
    found = load_config(Recipe, tmp_path / "recipe.toml").method
    assert found == LoRAConfig(rank=8, ranks={"*.key": 2}, four_bits=NF4Config(block_size=32))
    (tmp_path / "recipe.toml").write_text('method = { kind = "partial", whole = ["*norm", "output"] }')
    assert load_config(Recipe, tmp_path / "recipe.toml").method == PartialConfig(whole=("*norm", "output"))
    with pytest.raises(InputError, match="Did you mean 'adalora'"):
        load_config(Recipe, None, ['method.kind="adalra"'])
    assert load_config(Recipe, None).method is None
    assert to_plain(parse_config(Recipe, {}, "here")) == {"method": None}
    assert parse_config(Recipe, to_plain(found_recipe := Recipe(found)), "here") == found_recipe
    for kind in METHODS:
        assert f"{kind} " in render_defaults(Recipe)
    for kind in METHODS.values():
        assert "kind" in render_defaults(kind)


@from_peft
def test_lora_plus_has_the_groups_of_peft(base):
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    method = LoRAConfig(rank=2, targets=QUERIES, weight_decomposed=True, b_rate=8)
    model = make()
    attach(model, method)
    rates = method.training(model, steps=1).rates
    [optimizer] = build_optimizers(model, OptimizerConfig(learning_rate=1e-3, weight_decay=0.1), rates)
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "down_proj"])
    theirs = create_loraplus_optimizer(
        peft.get_peft_model(their_base(base), config), torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8,
        loraplus_weight_decay=0.1,
    )  # fmt: skip

    def by_shape(groups):
        return sorted((group["lr"], tuple(p.shape)) for group in groups for p in group["params"])

    assert by_shape(optimizer.param_groups) == by_shape(theirs.param_groups)
    decays = {(p.ndim, group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert decays == {(1, 0), (2, 0.1)}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: PartialConfig(), "needs whole"),
        (lambda: attach(make(), PartialConfig(whole=("nrom",))), "'nrom', which fits no parameter"),
        (lambda: attach(make(), PartialConfig(top_layers=3)), "has 2 layers"),
        (lambda: attach(make(tie_embeddings=True), PartialConfig(whole=("output",))), "share their values"),
        (lambda: attach(make(), LoRAConfig(whole=("layers.0.*",))), "take it out of targets or of whole"),
        (lambda: attach(trained(make(), PromptConfig()), LoRAConfig()), "has adapters already"),
        (lambda: PrefixConfig(num_virtual_tokens=0), "num_virtual_tokens is 0"),
        (lambda: BottleneckConfig(size=0), "size is 0"),
        (lambda: AdaLoRAConfig(target_rank=13), "from 1 to initial_rank"),
    ],
)
def test_wrong_uses_are_explained(method, message):
    with pytest.raises(InputError, match=message):
        method()


@torch.no_grad()
def test_serving_scales_each_map_and_refuses_what_is_no_plain_lora(tmp_path):
    method = replace(IN_PEFT["patterns"], whole=())
    model = trained(make(), method)
    save_adapter(model, method, tmp_path / "lora")
    served = make()
    adapters = Adapters(served)
    adapters.load("lora", tmp_path / "lora")
    with adapters.selected([adapters.acquire("lora")], [IDS.shape[1]]):
        close(served(IDS[:1]), logits(model)[:1])
    for name in ("dora", "patterns", "ia3", "prefix"):
        save_adapter(trained(make(), ALL[name]), ALL[name], tmp_path / name)
        with pytest.raises(InputError, match="is no plain LoRA"):
            adapters.load(name, tmp_path / name)
    assert adapters.names == ["lora"]


def test_a_file_that_lacks_a_map_of_its_method_is_refused(tmp_path):
    method = BottleneckConfig(size=2)
    save_adapter(trained(make(), method), method, tmp_path / "adapter")
    path = tmp_path / "adapter" / WEIGHTS_FILE
    save_file({key: tensor for key, tensor in load_file(path).items() if "layers.0.mlp" not in key}, path)
    model = make()
    with pytest.raises(InputError, match=r"incomplete: it lacks layers.0.feed_forward.down"):
        load_adapter(model, tmp_path / "adapter")
    assert not adapted_maps(model)


def test_a_prompt_of_another_model_is_refused(tmp_path):
    save_adapter(trained(make(), PromptConfig()), PromptConfig(), tmp_path / "adapter")
    with pytest.raises(InputError, match=r"prompt_embeddings has \(20, 64\), but should have \(20, 32\)"):
        load_adapter(make(dim=32), tmp_path / "adapter")
    save_adapter(trained(make(), PartialConfig(whole=("norm",))), PartialConfig(whole=("norm",)), tmp_path / "norm")
    config = tmp_path / "norm" / CONFIG_FILE
    config.write_text(config.read_text().replace("PARTIAL", "PROMPT_TUNING"))
    with pytest.raises(InputError, match=r"has no place for: base_model\.model\.model\.norm\.weight"):
        load_adapter(make(), tmp_path / "norm")
    config = tmp_path / "adapter" / CONFIG_FILE
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_virtual_tokens": "a"}))
    with pytest.raises(InputError, match="has to be a whole number"):
        load_adapter(make(), tmp_path / "adapter")
