"""A model over two processes: the same texts as from one."""

import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puna.compress.apply import fit, linear_names, quantize
from puna.compress.quantization import Quantization
from puna.infer.config import EngineConfig
from puna.infer.engine import Engine
from puna.infer.llm import LLM
from puna.infer.parallel import Piece, Team, split
from puna.infer.parallel_weights import Place, load_part
from puna.infer.sampling import SamplingParams
from puna.model.config import LlamaConfig
from puna.model.depths import Depths, gate_layers
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.weights.load import load_model, save_model
from puna.weights.names import to_hf

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    vocab_size=260, dim=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, hidden_dim=128, context_length=512
)  # fmt: skip
LAYOUTS = [(2, 1), (1, 2)]
CASES = [
    ({}, None),
    ({"tie_embeddings": True}, None),
    ({"qkv_bias": True}, Quantization("int8")),
    ({"qk_norm": True}, Quantization("int4", group_size=32, symmetric=False)),
]
GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=0, ignore_eos=True)


def save(directory, quantization=None, **flags):
    model = Transformer(replace(CONFIG, **flags))
    initialize(model, seed=0)
    model.output.weight.data *= 4
    values = None
    if quantization is not None:
        quantize(model, quantization)
        kept = tuple(to_hf(f"{name}.weight").removesuffix(".weight") for name in linear_names(model))
        values = quantization.to_config(kept)
    save_model(model, directory, quantization=values)
    return directory


@pytest.fixture(scope="module")
def team():
    """Started once, for all layouts and models."""
    team = Team(2, CPU, 1)
    yield team
    team.close()


def open_engine(team, tokenizer, path, layout, **settings):
    num_parts, num_stages = layout
    model = team.load(path, num_parts=num_parts, num_stages=num_stages, dtype=None)
    engine = Engine(model, tokenizer, EngineConfig(**{"max_rows": 3, **settings}))
    model.layers[0].open_cache(engine.pool)
    return engine


@pytest.mark.parametrize("layout", LAYOUTS, ids=["tensor", "pipeline"])
@pytest.mark.parametrize(("flags", "quantization"), CASES, ids=["plain", "tied", "int8 bias", "int4 norm"])
def test_the_same_as_one_process(team, tokenizer, tmp_path, monkeypatch, layout, flags, quantization):
    cut_into = []

    def spy(whole, num_pieces):
        cut_into.append(num_pieces)
        return split(whole, num_pieces)

    monkeypatch.setattr("puna.infer.parallel.split", spy)
    path = save(tmp_path / "model", quantization, **flags)
    alone = Engine(load_model(path, fit=fit), tokenizer, EngineConfig(max_rows=3))
    engine = open_engine(team, tokenizer, path, layout)
    long = "many words that go on and on. " * 10  # long enough for several pieces
    prompts = [alone.encode(text) for text in (long, "Once", "upon a time", long[:77], "x" * 130)]
    ours, theirs = (each.generate(prompts, replace(GREEDY, prompt_logprobs=0)) for each in (engine, alone))
    assert bool(cut_into) == (layout == (1, 2))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.ids == other.ids
        for one, two in zip(mine.logprobs + mine.prompt.logprobs, other.logprobs + other.prompt.logprobs, strict=True):
            # float32 sums in another order; with quantised weights through other kernels.
            assert one.logprob == pytest.approx(two.logprob, abs=1e-4 if quantization else 2e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["tensor", "pipeline"])
def test_a_mixture_of_depths(team, tokenizer, tmp_path, layout):
    """Every process decides for itself who passes, and they agree."""
    model = Transformer(CONFIG)
    initialize(model, seed=0)
    gate_layers(model, Depths((0, 2), 0.5), seed=0)
    save_model(model.eval(), tmp_path / "model")
    prompts = [list(range(n, n + 50)) for n in (0, 70, 90)] + [[5]]
    engine = open_engine(team, tokenizer, tmp_path / "model", layout)
    for prompt, done in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
        with torch.inference_mode():
            logprobs_TV = model(torch.tensor([[*prompt, *done.ids]]))[0].log_softmax(-1)
        expected = [logprobs_TV[len(prompt) - 1 + i, token_id].item() for i, token_id in enumerate(done.ids)]
        assert [entry.logprob for entry in done.logprobs] == pytest.approx(expected, abs=2e-5)  # as above


@pytest.mark.parametrize("layout", LAYOUTS, ids=["tensor", "pipeline"])
def test_caches_of_other_kinds_and_batch_invariance(team, tokenizer, tmp_path, layout):
    path = save(tmp_path / "model")
    engine = open_engine(team, tokenizer, path, layout, batch_invariant=True, cache_dtype="int8", block_size=4)
    prompts = [engine.encode(text) for text in ("a prompt of some length", "another", "a prompt of some other length")]
    together = engine.generate(prompts, GREEDY)
    for prompt, completion in zip(prompts, together, strict=True):
        assert engine.generate([prompt], GREEDY)[0].logprobs == completion.logprobs
    assert engine.generate(prompts[:1], GREEDY)[0].prompt.num_cached_tokens > 0


def test_what_cannot_be_cut_is_explained_and_the_team_lives_on(team, tokenizer, tmp_path):
    path = save(tmp_path / "model", num_kv_heads=1)
    with pytest.raises(InputError, match="num_kv_heads is 1"):
        team.load(path, num_parts=2, num_stages=1, dtype=None)
    (path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        team.load(path, num_parts=1, num_stages=2, dtype=None)
    engine = open_engine(team, tokenizer, save(tmp_path / "whole"), (1, 2))
    assert len(engine.generate([engine.encode("Still")], GREEDY)[0].ids) == 12
    with pytest.raises(InputError, match="generates and scores texts"):
        engine.model(torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize(("num_parts", "num_stages"), [(2, 3), (1, 2), (2, 1), (2, 2)])
def test_parts_are_the_whole(tmp_path, num_parts, num_stages):
    path = save(tmp_path / "model", qkv_bias=True)
    whole = dict(load_model(path).named_parameters())
    parts = [
        load_part(path, Place.of(rank, num_parts, num_stages), device=CPU) for rank in range(num_parts * num_stages)
    ]
    assert sum(len(part.layers) for part in parts) == 3 * num_parts
    num_weights = sum(p.numel() for part in parts for name, p in part.named_parameters() if ".attention." in name)
    assert num_weights == sum(p.numel() for name, p in whole.items() if ".attention." in name)
    assert sum(hasattr(part.embedding, "weight") for part in parts) == 1
    for name in ("attention.query.weight", "attention.key.bias", "feed_forward.up.weight"):
        stages = [
            [
                layer.get_parameter(name)
                for part in parts[s * num_parts : (s + 1) * num_parts]
                for layer in [part.layers[0]]
            ]
            for s in range(num_stages)
        ]
        for s, pieces in enumerate(stages):
            number = 3 * s // num_stages
            assert torch.equal(torch.cat(pieces), whole[f"layers.{number}.{name}"])


@given(st.data())
def test_pieces_hold_every_token_once_and_in_order(data):
    sequences = data.draw(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 40)), min_size=1, max_size=6))
    starts, counts = map(list, zip(*sequences, strict=True))
    num_tokens = sum(counts)
    tables = np.arange(len(starts) * 3).reshape(-1, 3)
    pieces = split(Piece(tables, starts, counts, 0, False), data.draw(st.integers(1, num_tokens)))

    def tokens(piece):
        return [
            (table[0] // 3, start + i)
            for table, start, count in zip(piece.tables, piece.starts, piece.counts, strict=True)
            for i in range(count)
        ]

    whole = [(row, start + i) for row, (start, count) in enumerate(sequences) for i in range(count)]
    assert [token for piece in pieces for token in tokens(piece)] == whole
    sizes = [piece.num_tokens for piece in pieces]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_settings_that_do_not_go_together(tmp_path):
    with pytest.raises(InputError, match="go neither with adapters"):
        EngineConfig(tensor_parallel=2, adapters={"a": tmp_path})
    with pytest.raises(InputError, match="pipeline_parallel is 0"):
        EngineConfig(pipeline_parallel=0)


def test_one_team_in_a_process(team, model_directory):
    with pytest.raises(InputError, match="works together with others already"):
        LLM(model_directory, tensor_parallel=2, device="cpu")


@pytest.mark.slow
def test_from_a_script_to_the_end_of_it(tokenizer, tmp_path, wait_until, all_ended):
    """Four processes; then the death of a follower, and of the first process."""
    path = save(tmp_path / "model")
    tokenizer.save(path)
    script = """
        import os, signal, sys
        from puna.infer.llm import LLM

        def text(llm):
            return llm.generate("Hello", temperature=0, max_tokens=8, ignore_eos=True).text

        expected = text(LLM(sys.argv[1], device="cpu", num_threads=1))
        llm = LLM(sys.argv[1], device="cpu", num_threads=1, tensor_parallel=2, pipeline_parallel=2)
        assert text(llm) == expected
        processes = llm.engine.model.layers[0]._team._processes
        print(*(process.pid for process in processes), flush=True)
        if sys.argv[2] == "follower dies":
            processes[1].kill()
            for message in ("", "lost each other"):
                try:
                    text(llm)
                except RuntimeError as error:
                    assert message in str(error), error
                else:
                    raise AssertionError("it noticed nothing")
        elif sys.argv[2] == "first dies":
            os.kill(os.getpid(), signal.SIGKILL)
    """
    for end in ("regular", "follower dies", "first dies"):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), str(path), end],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == (-9 if end == "first dies" else 0), done.stderr
        pids = done.stdout.split()
        assert len(pids) == 3
        wait_until(lambda pids=pids: all_ended(pids))
