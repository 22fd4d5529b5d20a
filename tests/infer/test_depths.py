"""A mixture of depths in the engine: its cache against a plain one with a mask, and what goes with it.

That log-probabilities are those of the forward of evaluation is among the properties of `test_parity.py`.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.infer.cache import KVPool, PagedAttend, dequantize, quantize
from puna.infer.config import EngineConfig, SpeculationConfig
from puna.infer.disk import stream_model
from puna.infer.engine import Engine
from puna.infer.llm import LLM
from puna.infer.sampling import SamplingParams
from puna.model.attend import scaled_dot_product
from puna.model.config import LlamaConfig
from puna.model.depths import GatedLayer
from puna.model.transformer import Transformer
from puna.peft.apply import adapted_maps, attach, merge
from puna.peft.files import load_adapter, save_adapter
from puna.peft.lora import LoRAConfig
from puna.tokenizer.base import Tokenizer
from puna.weights.load import load_model, save_model

CPU = torch.device("cpu")
PROMPTS = [[1, 2, 3], list(range(40, 77)), [1, 2, 3, 4, 1, 2, 3], [200], list(range(40, 70))]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
SHAPE = LlamaConfig(
    vocab_size=8, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=8, context_length=64
)


@pytest.fixture(scope="module")
def directory(gated_model: Transformer, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gated") / "model"
    save_model(gated_model, path, tokenizer=tokenizer)
    return path


@given(
    pieces=st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2), min_size=1, max_size=6),
    padding=st.integers(0, 3),
    keeps_shape=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float32, torch.int8)),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_narrowed_cache_against_a_mask(
    pieces: list[list[int]], padding: int, keeps_shape: bool, dtype: torch.dtype, seed: int
) -> None:
    """Two texts come piece by piece. A token that passes sees those of its text that passed before, and itself; slots
    of earlier texts are used again, so a flag that is not taken back would show."""
    generator = torch.Generator().manual_seed(seed)
    pool = KVPool(SHAPE, num_blocks=20, block_size=4, device=CPU, dtype=dtype, activations=torch.float32)
    tables = torch.randperm(20, generator=generator).view(2, 10).numpy()
    pool.write(1, torch.arange(80), *torch.randn(2, 80, 2, 8, generator=generator))
    pool.passed[1] = torch.ones(21 * 4, dtype=torch.bool)
    known: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = [([], []), ([], [])]
    computed = [0, 0]
    for counts in pieces:
        rows = [row for row in range(2) if counts[row]]
        if not rows:
            continue
        num_tokens = sum(counts) + padding
        attend = PagedAttend(
            pool,
            tables[rows],
            [computed[row] for row in rows],
            [counts[row] for row in rows],
            num_padding=padding,
            keeps_shape=keeps_shape,
        )
        passes_N = torch.rand(num_tokens, generator=generator) < 0.5
        chosen_C = torch.arange(num_tokens) if keeps_shape else passes_N.nonzero()[:, 0]
        q, k, v = (torch.randn(1, num_tokens, heads, 8, generator=generator) for heads in (4, 2, 2))
        if len(chosen_C):
            context = attend.narrow(chosen_C[None], passes_N[chosen_C][None])
            o_CHK = context(1, q[:, chosen_C], k[:, chosen_C], v[:, chosen_C])[0]
        place = 0
        for row in rows:
            for _ in range(counts[row]):
                if passes_N[place]:
                    for part, x in zip(known[row], (k, v), strict=True):
                        x_GK = x[0, place]
                        part.append(x_GK if dtype is torch.float32 else dequantize(*quantize(x_GK, dtype), x.dtype))
                    keys, values = (torch.stack(part)[None] for part in known[row])
                    expected_HK = scaled_dot_product(q[:, place : place + 1], keys, values)[0, 0]
                    ours_HK = o_CHK[chosen_C.tolist().index(place)]
                    assert torch.allclose(ours_HK, expected_HK, atol=1e-6)  # float32 sums in another order
                place += 1
            computed[row] += counts[row]


@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 4, "step_tokens": 7},
        {"speculation": SpeculationConfig("lookup", shortest_match=1)},
        {"speculation": SpeculationConfig("layers", layers=1)},
    ],
    ids=["pieces", "lookup", "layers"],
)
def test_texts_are_those_of_whole_forwards(
    gated_model: Transformer, tokenizer: Tokenizer, settings: dict[str, object]
) -> None:
    """Twice, so that the second time beginnings are found in the cache."""
    engine = Engine(gated_model, tokenizer, EngineConfig(max_rows=3, max_context=64, **settings))  # type: ignore[arg-type]
    engine.generate(PROMPTS, GREEDY)
    for prompt, done in zip(PROMPTS, engine.generate(PROMPTS, GREEDY), strict=True):
        with torch.inference_mode():
            logprobs_TV = gated_model(torch.tensor([[*prompt, *done.ids]]))[0].log_softmax(-1)
        expected = [logprobs_TV[len(prompt) - 1 + i, token_id].item() for i, token_id in enumerate(done.ids)]
        assert [entry.logprob for entry in done.logprobs] == pytest.approx(expected, abs=1e-5)  # float32 sums
    assert set(engine.pool.passed) == {0, 2}


def test_what_passes_by_leaves_nothing_in_the_cache(gated_model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(gated_model, tokenizer, EngineConfig(max_rows=1, max_context=64))
    [done] = engine.generate([PROMPTS[1]], GREEDY)
    ids = [*PROMPTS[1], *done.ids][:-1]  # the last one is not computed
    with torch.inference_mode():
        gated_model(torch.tensor([ids]))
    for number in (0, 2):
        layer = gated_model.layers[number]
        assert isinstance(layer, GatedLayer)
        assert 0 < layer.passed_share < 1
        num_written = int(engine.pool.keys[number].flatten(2).any(2).sum())
        assert num_written == int(engine.pool.passed[number].sum()) == round(layer.passed_share * len(ids))


def test_batch_invariant_to_the_last_bit(gated_model: Transformer, tokenizer: Tokenizer) -> None:
    engine = Engine(gated_model, tokenizer, EngineConfig(max_rows=4, max_context=64, batch_invariant=True))
    together = engine.generate(PROMPTS, GREEDY)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        assert engine.generate([prompt], GREEDY)[0].logprobs == completion.logprobs


def test_adapters_beside_each_other(directory: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    adapted = load_model(directory)
    attach(adapted, LoRAConfig(rank=4, alpha=8), seed=0)
    for part in adapted_maps(adapted).values():
        part.lora_b.data.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    save_adapter(adapted, LoRAConfig(rank=4, alpha=8), tmp_path / "adapter")
    merged = load_model(directory)
    load_adapter(merged, tmp_path / "adapter")
    merge(merged)
    config = EngineConfig(max_rows=4, max_context=64, adapters={"one": tmp_path / "adapter"})
    mixed = Engine(load_model(directory), tokenizer, config)
    params = [SamplingParams(**{**vars(GREEDY), "adapter": name}) for name in (None, "one", "one", None, "one")]
    for i, completion in enumerate(mixed.generate(PROMPTS, params)):
        model = load_model(directory) if params[i].adapter is None else merged
        [alone] = Engine(model, tokenizer, EngineConfig(max_rows=1, max_context=64)).generate([PROMPTS[i]], GREEDY)
        assert completion.ids == alone.ids


def test_from_the_disk_and_as_a_program_sees_it(directory: Path) -> None:
    texts = ["some words", "and more"]
    from_memory, from_disk = (LLM(directory, max_rows=2, weights=where) for where in ("memory", "disk"))
    assert from_disk.generate(texts, GREEDY) == from_memory.generate(texts, GREEDY)
    ids_BT = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(stream_model(directory, device=CPU)(ids_BT), load_model(directory)(ids_BT))
