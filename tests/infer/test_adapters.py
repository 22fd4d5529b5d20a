"""Adapters beside each other: a mixed batch gives what each adapter gives alone, merged into the model."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puna.compress.apply import quantize
from puna.compress.quantization import Quantization
from puna.infer.adapters import Adapters, Selection, Updates
from puna.infer.config import EngineConfig
from puna.infer.engine import Engine
from puna.infer.llm import LLM
from puna.infer.sampling import SamplingParams
from puna.model.transformer import Transformer
from puna.peft.apply import adapted_maps, attach, merge
from puna.peft.files import load_adapter, save_adapter
from puna.peft.lora import LoRAConfig
from puna.runtime.errors import InputError

CONFIGS = {
    "everywhere": LoRAConfig(rank=4, alpha=8),
    "queries": LoRAConfig(rank=2, alpha=8, rank_stabilized=True, targets=("layers.*.attention.query",)),
    "one layer": LoRAConfig(rank=3, alpha=9, targets=("layers.1.*",)),
}
NAMES = [None, *CONFIGS]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)


def copy_of(model):
    copy = Transformer(model.config).eval()
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.fixture(scope="module")
def directories(model, tmp_path_factory):
    """Adapters as training leaves them, large enough to change what is said."""
    directories = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        adapted = copy_of(model)
        attach(adapted, config, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for part in adapted_maps(adapted).values():
            part.lora_b.data.normal_(std=0.2, generator=generator)
        directories[name] = tmp_path_factory.mktemp("adapters") / name.replace(" ", "_")
        save_adapter(adapted, config, directories[name])
    return directories


@pytest.fixture(scope="module")
def merged_engines(model, tokenizer, directories):
    engines = {None: Engine(copy_of(model), tokenizer, EngineConfig(max_rows=1, max_context=64))}
    for name, directory in directories.items():
        copy = copy_of(model)
        load_adapter(copy, directory)
        merge(copy)
        engines[name] = Engine(copy, tokenizer, EngineConfig(max_rows=1, max_context=64))
    return engines


def open_engine(model, tokenizer, directories, **settings):
    config = EngineConfig(**{"max_rows": 4, "max_context": 64, "adapters": directories, **settings})
    return Engine(copy_of(model), tokenizer, config)


def assert_same(mixed, alone):
    assert mixed.ids == alone.ids
    for ours, other in zip(mixed.logprobs, alone.logprobs, strict=True):
        assert ours.logprob == pytest.approx(other.logprob, abs=1e-5)  # the same sums in another order


@pytest.mark.parametrize(
    "settings",
    [{}, {"step_tokens": 7, "block_size": 4}, {"cache_tokens": 64, "overcommit": 4.0}, {"batch_invariant": True}],
    ids=str,
)
def test_a_mixed_batch_equals_each_adapter_merged_alone(model, tokenizer, directories, merged_engines, settings):
    engine = open_engine(model, tokenizer, directories, **settings)
    prompts = [f"{start} goes on" for start in ("Once upon a time it", "Twice", "Now", "Once upon a time it")] * 4
    names = [NAMES[i % 4] if i < 8 else NAMES[(i + 1) % 4] for i in range(16)]
    ids = [engine.encode(prompt) for prompt in prompts]
    mixed = engine.generate(ids, [replace(GREEDY, adapter=name) for name in names])
    said = set()
    for name, prompt, completion in zip(names, ids, mixed, strict=True):
        [alone] = merged_engines[name].generate([prompt], GREEDY)
        assert_same(completion, alone)
        said.add((completion.ids, tuple(prompt)))
    assert len(said) == 7, "adapters that change nothing prove nothing"
    engine.scheduler.check_integrity()


def test_batch_invariant_to_the_last_bit(model, tokenizer, directories):
    prompts = [f"number {i}" for i in range(6)]
    params = [replace(GREEDY, adapter=NAMES[i % 4]) for i in range(6)]
    engine = open_engine(model, tokenizer, directories, batch_invariant=True)
    together = engine.generate([engine.encode(prompt) for prompt in prompts], params)
    for prompt, own, completion in zip(prompts, params, together, strict=True):
        [alone] = engine.generate([engine.encode(prompt)], own)
        assert alone.logprobs == completion.logprobs


def test_scores_and_prompt_logprobs_are_the_adapters(model, tokenizer, directories, merged_engines):
    engine = open_engine(model, tokenizer, directories)
    ids = engine.encode("a text to be scored")
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    for name in NAMES:
        [ours] = engine.generate([ids], replace(params, adapter=name))
        [other] = merged_engines[name].generate([ids], params)
        for one, two in zip(ours.prompt.logprobs, other.prompt.logprobs, strict=True):
            assert one.logprob == pytest.approx(two.logprob, abs=1e-5)


def test_the_cache_is_kept_apart(model, tokenizer, directories):
    engine = open_engine(model, tokenizer, directories, block_size=4)
    ids = engine.encode("a long prompt that would be shared")
    for name in NAMES:
        first, again = (engine.generate([ids], replace(GREEDY, adapter=name))[0] for _ in range(2))
        assert first.prompt.num_cached_tokens == 0
        assert again.prompt.num_cached_tokens >= 28
        assert first.ids == again.ids


def test_load_and_unload_while_texts_run(model, tokenizer, directories, merged_engines):
    engine = open_engine(model, tokenizer, {"one": directories["everywhere"]})
    ids = engine.encode("going on")
    request = engine.submit(ids, replace(GREEDY, adapter="one"))
    engine.step()
    engine.adapters.unload("one")
    with pytest.raises(InputError, match=r"no adapter 'one'. There are none"):
        engine.check(ids, replace(GREEDY, adapter="one"))
    engine.adapters.load("one", directories["queries"])
    second = engine.submit(ids, replace(GREEDY, adapter="one"))
    while not engine.idle:
        engine.step()
    assert_same(request.completion(), merged_engines["everywhere"].generate([ids], GREEDY)[0])
    assert_same(second.completion(), merged_engines["queries"].generate([ids], GREEDY)[0])
    engine.adapters.unload("one")
    engine.adapters.load("other", directories["one layer"])
    engine.cancel(engine.submit(ids, replace(GREEDY, adapter="other")))
    engine.adapters.unload("other")
    assert not any(module._forward_hooks for module in engine.model.modules())


def test_on_quantised_maps(model, tokenizer, directories):
    copy = copy_of(model)
    quantize(copy, Quantization("int8"))
    expected = Transformer(model.config).eval()
    for name, part in copy.state_dict().items():
        if not name.endswith(("weight_int8", "weight_scale")):
            expected.get_parameter(name).data.copy_(part)
    for name, part in copy.named_modules():
        if hasattr(part, "dequantize"):
            expected.get_submodule(name).weight.data.copy_(part.weight)
    load_adapter(expected, directories["everywhere"])
    merge(expected)
    engine = Engine(copy, tokenizer, EngineConfig(max_context=64, adapters={"a": directories["everywhere"]}))
    alone = Engine(expected, tokenizer, EngineConfig(max_context=64))
    ids = engine.encode("small")
    assert_same(
        engine.generate([ids], replace(GREEDY, adapter="a"))[0], alone.generate([ids], replace(GREEDY, adapter=None))[0]
    )


@given(st.data())
def test_both_ways_to_add_updates_agree(data):
    ranks = data.draw(st.dictionaries(st.integers(1, 9), st.integers(1, 5), min_size=1, max_size=4))
    numbers = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    updates = Updates()
    parts = {
        n: (torch.randn(r, 6, generator=generator), torch.randn(5, r, generator=generator)) for n, r in ranks.items()
    }
    for number, (a_RK, b_NR) in parts.items():
        updates.put(number, a_RK, b_NR)
    if len(ranks) > 1:
        dropped = data.draw(st.sampled_from(sorted(ranks)))
        updates.drop(dropped)
        del parts[dropped]
    x_MK, y_MN = torch.randn(len(numbers), 6, generator=generator), torch.randn(len(numbers), 5, generator=generator)
    owners = torch.tensor(numbers)
    groups = tuple((n, (owners == n).nonzero()[:, 0]) for n in set(numbers) - {0})
    expected = [
        y + (b @ a @ x if number in parts else 0)
        for number, x, y in zip(numbers, x_MK, y_MN, strict=True)
        for a, b in [parts.get(number, (torch.zeros(1, 6), torch.zeros(5, 1)))]
    ]
    for add in (updates.add_grouped, updates.add_masked):
        added = y_MN.clone()
        add(x_MK, added, Selection(owners, groups, decodes=True, alone=False))
        torch.testing.assert_close(added, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_llm_takes_adapters_by_name(model_directory, directories):
    llm = LLM(model_directory, adapters=directories, max_context=64)
    bare, other = (
        llm.generate("Hello", temperature=0, max_tokens=8, adapter=name).text for name in (None, "everywhere")
    )
    assert bare != other
    with pytest.raises(InputError, match=r"no adapter 'nowhere'. There are: everywhere, queries, one layer"):
        llm.generate("Hello", adapter="nowhere")


def test_adapters_that_cannot_be_served(model, tmp_path, directories):
    adapters = Adapters(copy_of(model))
    adapters.load("a", directories["queries"])
    with pytest.raises(InputError, match="an adapter 'a' already"):
        adapters.load("a", directories["queries"])
    config = LoRAConfig(rank=2, targets=("output",))
    adapted = copy_of(model)
    attach(adapted, config)
    save_adapter(adapted, config, tmp_path / "head")
    with pytest.raises(InputError, match="projection to the vocabulary"):
        adapters.load("b", tmp_path / "head")
    assert adapters.names == ["a"]
