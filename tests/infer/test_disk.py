"""Models on the disk: the same to the last bit as in memory, in little of it."""

import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch

from puna.compress.apply import fit, linear_names, quantize
from puna.compress.quantization import Quantization
from puna.infer.config import EngineConfig, SpeculationConfig
from puna.infer.disk import stream_model
from puna.infer.llm import LLM
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.weights.load import load_model, save_model
from puna.weights.names import to_hf

CPU = torch.device("cpu")
CONFIG = LlamaConfig(
    vocab_size=96, dim=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, hidden_dim=128, context_length=128
)  # fmt: skip
IDS = torch.randint(96, (2, 20), generator=torch.Generator().manual_seed(0))
KINDS = [
    None,
    Quantization("int8"),
    Quantization("int4", group_size=32, keep=("output", "layers.1.*")),
    Quantization("int4", group_size=64, symmetric=False, keep=("*.query",)),
]
NAMES = ["float", "int8", "int4 but the second layer", "int4 zero points but the queries"]


def save(directory, quantization=None, dtype=torch.float32, config=CONFIG):
    model = Transformer(config)
    initialize(model, seed=0)
    model = model.to(dtype).eval()
    values = None
    if quantization is not None:
        quantize(model, quantization)
        kept = tuple(to_hf(f"{name}.weight").removesuffix(".weight") for name in linear_names(model))
        values = quantization.to_config(kept)
    save_model(model, directory, quantization=values)
    return directory


@pytest.mark.parametrize("flags", [{}, {"tie_embeddings": True}, {"qkv_bias": True}, {"qk_norm": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", KINDS, ids=NAMES)
def test_the_same_to_the_last_bit(tmp_path, quantization, dtype, flags):
    save(tmp_path / "model", quantization, dtype, replace(CONFIG, **flags))
    streamed = stream_model(tmp_path / "model", device=CPU, fit=fit)
    loaded = load_model(tmp_path / "model", fit=fit)
    with torch.inference_mode():
        for ids in (IDS, IDS[:, :1]):
            expected = loaded(ids)
            assert expected.isfinite().all()
            for _ in range(2):
                assert torch.equal(streamed(ids), expected)


def test_another_dtype_than_the_files(tmp_path):
    save(tmp_path / "model", dtype=torch.bfloat16)
    streamed = stream_model(tmp_path / "model", device=CPU, dtype=torch.float32)
    with torch.inference_mode():
        expected = load_model(tmp_path / "model", dtype=torch.float32)(IDS)
        assert torch.equal(streamed(IDS), expected)


def test_a_forward_that_was_broken_off_spoils_nothing(tmp_path):
    streamed = stream_model(save(tmp_path / "model"), device=CPU)
    with torch.inference_mode():
        expected = streamed(IDS)

        def fails_late(layer, q, k, v):
            if layer == 1:
                raise FloatingPointError
            return v.repeat_interleave(2, dim=2)

        with pytest.raises(FloatingPointError):
            streamed(IDS, attend=fails_late)
        assert torch.equal(streamed(IDS), expected)


def test_the_engine_says_the_same(model_directory):
    prompts = ["Once upon a time", "Twice", "Once upon a midnight dreary"]
    settings = {"max_context": 64, "max_rows": 2, "step_tokens": 7}
    said = [
        [output.text for output in LLM(model_directory, weights=where, **settings).generate(prompts, temperature=0)]
        for where in ("memory", "disk")
    ]
    assert said[0] == said[1]
    assert len(set(said[0])) == 3


def test_memory_is_that_of_two_layers(tmp_path):
    config = LlamaConfig(
        vocab_size=8000, dim=384, num_layers=16, num_heads=6, num_kv_heads=6, head_dim=64, hidden_dim=1024
    )
    model = Transformer(config)
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    save_model(model, tmp_path / "model")
    del model
    script = """
        import sys, torch
        import torch._dynamo  # not counted: torch loads it with the first module on the meta device
        from pathlib import Path
        from puna.infer.disk import stream_model

        def anonymous_bytes():
            status = Path("/proc/self/status").read_text()
            return int(status.split("RssAnon:")[1].split()[0]) * 1024

        torch.set_num_threads(1)
        ids, most = torch.arange(8)[None], 0
        before = anonymous_bytes()

        def watch(module, inputs, output):
            global most
            most = max(most, anonymous_bytes() - before)

        model = stream_model(sys.argv[1], device=torch.device("cpu"))
        for part in model.modules():
            part.register_forward_hook(watch)
        with torch.inference_mode():
            model(ids)
        print(most)
    """

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "model")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    most_bytes = int(done.stdout)
    bytes_of_layer, bytes_of_output = 4 * (4 * 384 * 384 + 3 * 384 * 1024), 4 * 8000 * 384
    assert most_bytes > bytes_of_layer + bytes_of_output
    # Two layers, what is not streamed, and activations and libraries, which are small.
    assert most_bytes < 2 * bytes_of_layer + bytes_of_output + 15e6
    assert most_bytes < (16 * bytes_of_layer + 2 * bytes_of_output) / 2


def test_damaged_and_other_checkpoints_are_refused(tmp_path, real_data):
    path = save(tmp_path / "model") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        stream_model(tmp_path / "model", device=CPU)
    with pytest.raises(InputError, match="is not a Hugging Face directory"):
        stream_model(real_data / "weights" / "stories260K" / "stories260K.bin", device=CPU)


def test_what_does_not_go_together(tmp_path):
    with pytest.raises(InputError, match="does not go with adapters"):
        EngineConfig(weights="disk", adapters={"a": tmp_path})
    with pytest.raises(InputError, match="does not go with speculation by layers"):
        EngineConfig(weights="disk", speculation=SpeculationConfig(kind="layers", layers=1))
