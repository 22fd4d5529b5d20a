"""Published sizes against tables made by others, and counts against what is counted."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from puna.model.accounting import (
    count_parameters,
    forward_flops_per_token,
    kv_bytes_per_token,
    training_flops_per_token,
)
from puna.model.attend import bidirectional
from puna.model.config import LlamaConfig, RopeScaling
from puna.model.initialize import initialize
from puna.model.presets import PRESETS, preset
from puna.model.transformer import Transformer

LITGPT_NAMES = {
    "llama-2-7b": "Llama-2-7b-hf",
    "llama-2-13b": "Llama-2-13b-hf",
    "llama-2-70b": "Llama-2-70b-hf",
    "code-llama-7b": "CodeLlama-7b-hf",
    "code-llama-13b": "CodeLlama-13b-hf",
    "code-llama-34b": "CodeLlama-34b-hf",
    "code-llama-70b": "CodeLlama-70b-hf",
    "llama-3-8b": "Llama-3-8B",
    "llama-3-70b": "Llama-3-70B",
    "llama-3.1-8b": "Llama-3.1-8B",
    "llama-3.1-70b": "Llama-3.1-70B",
    "llama-3.1-405b": "Llama-3.1-405B",
    "llama-3.2-1b": "Llama-3.2-1B",
    "llama-3.2-3b": "Llama-3.2-3B",
    "llama-3.3-70b": "Llama-3.3-70B-Instruct",
    "qwen2.5-0.5b": "Qwen2.5-0.5B",
    "qwen2.5-1.5b": "Qwen2.5-1.5B",
    "qwen2.5-3b": "Qwen2.5-3B",
    "qwen2.5-7b": "Qwen2.5-7B",
    "qwen2.5-14b": "Qwen2.5-14B",
    "qwen2.5-32b": "Qwen2.5-32B",
    "qwen2.5-72b": "Qwen2.5-72B",
    "qwen3-0.6b": "Qwen3-0.6B",
    "qwen3-1.7b": "Qwen3-1.7B",
    "qwen3-4b": "Qwen3-4B",
    "qwen3-8b": "Qwen3-8B",
    "qwen3-14b": "Qwen3-14B",
    "qwen3-32b": "Qwen3-32B",
}  # Llama 1, Llama 2 34B and Qwen2 are not in that table.

# In billions, as the papers and model cards print them.
PUBLISHED_SIZES = {
    "llama-1-7b": 6.7,
    "llama-1-13b": 13.0,
    "llama-1-33b": 32.5,
    "llama-1-65b": 65.2,
    "llama-2-7b": 6.74,
    "llama-2-13b": 13.0,
    "llama-2-34b": 33.7,
    "llama-2-70b": 69.0,
    "code-llama-7b": 6.74,
    "code-llama-13b": 13.0,
    "code-llama-34b": 33.7,
    "code-llama-70b": 69.0,
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.6,
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.6,
    "llama-3.1-405b": 406,
    "llama-3.2-1b": 1.23,
    "llama-3.2-3b": 3.21,
    "llama-3.3-70b": 70.6,
    "qwen2-0.5b": 0.49,
    "qwen2-1.5b": 1.54,
    "qwen2-7b": 7.62,
    "qwen2-72b": 72.7,
    "qwen2.5-0.5b": 0.49,
    "qwen2.5-1.5b": 1.54,
    "qwen2.5-3b": 3.09,
    "qwen2.5-7b": 7.61,
    "qwen2.5-14b": 14.7,
    "qwen2.5-32b": 32.5,
    "qwen2.5-72b": 72.7,
    "qwen3-0.6b": 0.6,
    "qwen3-1.7b": 1.7,
    "qwen3-4b": 4.0,
    "qwen3-8b": 8.2,
    "qwen3-14b": 14.8,
    "qwen3-32b": 32.8,
}

GROUPED = LlamaConfig(
    vocab_size=90, dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48
)  # fmt: skip
TINY = {
    "grouped": GROUPED,
    "multi-head": replace(GROUPED, num_kv_heads=4, num_layers=1),
    "tied": replace(GROUPED, tie_embeddings=True),
    "bias": replace(GROUPED, qkv_bias=True),
    "qk-norm": replace(GROUPED, qk_norm=True, head_dim=16),
}


@pytest.fixture
def litgpt(real_data):
    table = json.loads((real_data / "reference" / "model_configs_litgpt.json").read_text())
    return {row["name"]: row for row in table}


@pytest.mark.parametrize("name", LITGPT_NAMES)
def test_against_litgpt(name, litgpt):
    row, config = litgpt[LITGPT_NAMES[name]], preset(name)
    adjustments = row["rope_adjustments"]
    scaling = adjustments and RopeScaling(
        kind="llama3",
        factor=adjustments["factor"],
        low_freq_factor=adjustments["low_freq_factor"],
        high_freq_factor=adjustments["high_freq_factor"],
        original_context_length=adjustments["original_max_seq_len"],
    )
    theirs = {
        "vocab_size": row["padded_vocab_size"],
        "dim": row["n_embd"],
        "num_layers": row["n_layer"],
        "num_heads": row["n_head"],
        "num_kv_heads": row["n_query_groups"],
        "head_dim": row["head_size"],
        "hidden_dim": row["intermediate_size"],
        "context_length": row["block_size"],
        "norm_eps": row["norm_eps"],
        "rope_theta": row["rope_base"],
        "rope_scaling": scaling,
        "qkv_bias": row["attn_bias"],
        "qk_norm": row["norm_qk"],
    }
    assert {field: getattr(config, field) for field in theirs} == theirs


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name):
    config = preset(name)
    assert abs(count_parameters(config) / 1e9 / PUBLISHED_SIZES[name] - 1) < 0.013
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config)


def test_llama1_table(real_data):
    table = json.loads((real_data / "reference" / "llama1_paper_tables.json").read_text())["models"]
    ours = [preset(name) for name in ("llama-1-7b", "llama-1-13b", "llama-1-33b", "llama-1-65b")]
    assert [(c.dim, c.num_heads, c.num_layers) for c in ours] == [
        (row["dim"], row["n_heads"], row["n_layers"]) for row in table
    ]


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match=r"no published model 'llama3.1-8b'; did you mean 'llama-3.1-8b'\?"):
        preset("llama3.1-8b")


def by_matrix_products(layer, q_BTHK, k_BTGK, v_BTGK):
    """Bidirectional attention in operations that torch's counter knows on every device."""
    q_BHTK, k_BHTK, v_BHTK = (
        x.repeat_interleave(q_BTHK.shape[2] // x.shape[2], dim=2).transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK)
    )
    weights_BHTS = (q_BHTK @ k_BHTK.transpose(2, 3) * q_BTHK.shape[3] ** -0.5).softmax(-1)
    return (weights_BHTS @ v_BHTK).transpose(1, 2)


@pytest.mark.parametrize("config", TINY.values(), ids=TINY.keys())
def test_flops_are_those_that_torch_counts(config):
    model = Transformer(config)
    initialize(model, 0)
    ids_BT = torch.zeros(2, 24, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        logits = model(ids_BT, attend=by_matrix_products)
    assert counter.get_total_flops() == ids_BT.numel() * forward_flops_per_token(config, mean_context=24)
    with FlopCounterMode(display=False) as counter:
        model(ids_BT, attend=by_matrix_products).sum().backward()
    assert counter.get_total_flops() == ids_BT.numel() * training_flops_per_token(config, mean_context=24)
    torch.testing.assert_close(logits, model(ids_BT, attend=bidirectional))


def test_cache_bytes():
    assert kv_bytes_per_token(preset("llama-3-8b")) == 128 * 1024
    assert kv_bytes_per_token(preset("llama-2-7b")) == 512 * 1024


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"dim": 0}, "dim is 0; it has to be at least 1"),
        ({"context_length": 0}, "context_length is 0"),
        ({"num_heads": 4, "num_kv_heads": 3}, r"num_heads \(4\) has to be a multiple of num_kv_heads \(3\)"),
        ({"head_dim": 7}, "head_dim is 7; rotary positions need an even number"),
    ],
)
def test_impossible_shapes_are_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        LlamaConfig(**changes)


def test_impossible_scalings_are_refused():
    with pytest.raises(ValueError, match="factor is 0"):
        RopeScaling(kind="linear", factor=0)
    with pytest.raises(ValueError, match=r"low_freq_factor \(4.0\) has to be below high_freq_factor \(4.0\)"):
        RopeScaling(kind="llama3", factor=8, low_freq_factor=4.0)
