"""Keys and values in eight bits: what is lost, and that nothing else is."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.infer.cache import KVPool, dequantize, quantize
from puna.infer.config import EngineConfig, SpeculationConfig
from puna.infer.engine import Engine
from puna.infer.request import Completion
from puna.infer.sampling import SamplingParams
from puna.model.attend import causal
from puna.model.config import LlamaConfig
from puna.model.transformer import Transformer
from puna.tokenizer.base import Tokenizer

DTYPES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=0)
PROMPTS = [[1, 2, 3], list(range(40, 77)), [1, 2, 3, 4, 1, 2, 3], [200], list(range(40, 70))]


def naive_int8(x_NGK: Tensor) -> Tensor:
    """What is read back, number by number."""
    read_NGK = torch.zeros_like(x_NGK)
    for n, head_GK in enumerate(x_NGK):
        for g, x_K in enumerate(head_GK):
            scale = float((x_K.abs().max() / 127).bfloat16())
            for i, x in enumerate(x_K.tolist()):
                if scale:
                    read_NGK[n, g, i] = max(-127, min(127, round(x / scale))) * scale
    return read_NGK


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), magnitude=st.sampled_from((0.0, 1e-30, 1e-3, 1.0, 300.0, 1e5)))
def test_codes_are_near(seed: int, magnitude: float) -> None:
    """int8 within half a unit of the head's scale; e4m3 has three bits behind the point, and 2**-9 as smallest step."""
    x_NGK = torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(seed)) * magnitude
    x_NGK[2, 1] = 0
    for dtype in DTYPES.values():
        codes_NGK, scales_NG = quantize(x_NGK, dtype)
        assert (codes_NGK.dtype, scales_NG.dtype) == (dtype, torch.bfloat16)
        read_NGK = dequantize(codes_NGK, scales_NG, torch.float32)
        unit_NG1 = scales_NG.float()[..., None]
        bound = 0.5001 * unit_NG1 if dtype is torch.int8 else 2**-4 * x_NGK.abs() + 2**-10 * unit_NG1
        assert ((read_NGK - x_NGK).abs() <= bound).all()
    torch.testing.assert_close(dequantize(*quantize(x_NGK, torch.int8), torch.float32), naive_int8(x_NGK))


def test_memory_is_halved() -> None:
    """For heads of 64: a code of one byte each, and a scale of two for all, against two bytes each."""
    config = LlamaConfig(vocab_size=8, dim=128, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64, hidden_dim=8)

    def num_bytes(dtype: torch.dtype) -> int:
        pool = KVPool(config, num_blocks=9, block_size=16, device=torch.device("cpu"), dtype=dtype)
        return pool.num_bytes

    assert num_bytes(torch.bfloat16) == 2 * 3 * 160 * 2 * 64 * 2
    for dtype in DTYPES.values():
        assert num_bytes(dtype) / num_bytes(torch.bfloat16) == (64 + 2) / (64 * 2)


@torch.inference_mode()
def twin(model: Transformer, ids: list[int]) -> Tensor:
    """Log-probabilities of a whole forward that sees every key and value as an int8 cache gives it back."""

    def attend(layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        return causal(layer, q_BTHK, naive_int8(k_BTGK[0])[None], naive_int8(v_BTGK[0])[None])

    return model(torch.tensor([ids]), attend=attend)[0].log_softmax(-1)  # type: ignore[no-any-return]


def worst(completions: list[Completion], expected: list[Tensor]) -> float:
    """Greatest difference of a log-probability that was reported."""
    return max(
        abs(entry.logprob - float(logprobs_TV[completion.num_prompt_tokens - 1 + i, entry.id]))
        for completion, logprobs_TV in zip(completions, expected, strict=True)
        for i, entry in enumerate(completion.logprobs)
    )


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(max_rows=1),
        EngineConfig(max_rows=5, step_tokens=7, block_size=4),
        EngineConfig(max_rows=3, max_context=96, cache_tokens=100, overcommit=4.0, block_size=4),
        EngineConfig(max_rows=2, batch_invariant=True),
        EngineConfig(max_rows=4, speculation=SpeculationConfig("lookup", shortest_match=1)),
        EngineConfig(max_rows=4, speculation=SpeculationConfig("layers", layers=1)),
    ],
    ids=["alone", "pieces", "preempted", "invariant", "lookup", "layers"],
)
def test_an_int8_cache_gives_what_its_twin_gives(
    model: Transformer, tokenizer: Tokenizer, config: EngineConfig
) -> None:
    """However a text is computed, twice so that the second time finds its beginning in the cache; and log-probabilities
    are within 0.1 of those without rounding, for a model whose logits are four times as large as usual.

    The twin agrees within 5e-3: one float32 rounding in thousands turns a code into its neighbour.
    """
    engine = Engine(model, tokenizer, replace(config, cache_dtype="int8"))
    engine.generate(PROMPTS, GREEDY)
    completions = engine.generate(PROMPTS, GREEDY)
    texts = [[*prompt, *done.ids] for prompt, done in zip(PROMPTS, completions, strict=True)]
    assert worst(completions, [twin(model, ids) for ids in texts]) < 5e-3
    with torch.inference_mode():
        exact = [model(torch.tensor([ids]))[0].log_softmax(-1) for ids in texts]
    assert 1e-3 < worst(completions, exact) < 0.1


def test_the_default_is_the_models_own_and_others_can_be_asked_for(model: Transformer, tokenizer: Tokenizer) -> None:
    half = Transformer(model.config)
    half.load_state_dict(model.state_dict())
    half.bfloat16()

    def stored(model: Transformer, **settings: object) -> torch.dtype:
        engine = Engine(model, tokenizer, EngineConfig(**settings))  # type: ignore[arg-type]
        [done] = engine.generate([[1, 2, 3]], GREEDY)
        assert len(done.ids) == 40
        return engine.pool.keys[0].dtype

    assert stored(model) == torch.float32
    assert stored(half) == torch.bfloat16
    assert stored(model, cache_dtype="bfloat16") == torch.bfloat16
    for name, dtype in DTYPES.items():
        assert stored(half, cache_dtype=name) == dtype


def test_float8_is_coarser_but_near(model: Transformer, tokenizer: Tokenizer) -> None:
    completions = Engine(model, tokenizer, EngineConfig(cache_dtype="float8")).generate(PROMPTS, GREEDY)
    check_float8(completions, model)


def check_float8(completions: list[Completion], model: Transformer) -> None:
    texts = [[*prompt, *done.ids] for prompt, done in zip(PROMPTS, completions, strict=True)]
    with torch.inference_mode():
        exact = [model(torch.tensor([ids]))[0].log_softmax(-1) for ids in texts]
    assert 1e-3 < worst(completions, exact) < 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", DTYPES)
def test_a_gpu_stores_the_same(model: Transformer, tokenizer: Tokenizer, name: str) -> None:
    on_gpu = Transformer(model.config)
    on_gpu.load_state_dict(model.state_dict())
    engine = Engine(on_gpu.cuda(), tokenizer, EngineConfig(cache_dtype=name))  # type: ignore[arg-type]
    assert engine.pool.keys[0].is_cuda
    check_float8(engine.generate(PROMPTS, GREEDY), model)
