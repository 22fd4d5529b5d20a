"""`puna compress` from end to end, and the comparison of two models."""

import json
import math

import pytest
import torch

from puna.compress.quantization import Quantization
from puna.config import load_config
from puna.evaluate.compress import CompressConfig, main
from puna.evaluate.variants import compare
from puna.infer.config import EngineConfig
from puna.infer.load import load_engine
from puna.infer.sampling import SamplingParams
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.runtime.manifest import Manifest
from puna.tokenizer.tiktoken_ranks import TiktokenTokenizer
from puna.weights.load import save_model

CONFIG = LlamaConfig(
    vocab_size=260, dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, hidden_dim=128, context_length=128
)  # fmt: skip
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")


def make(seed=0, dtype=torch.float32):
    model = Transformer(CONFIG)
    initialize(model, seed)
    return model.to(dtype).eval()


@pytest.fixture
def source(tmp_path):
    ranks = {bytes([i]): i for i in range(256)}
    tokenizer = TiktokenTokenizer(ranks, "llama3", {name: 256 + i for i, name in enumerate(SPECIAL)})
    save_model(make(dtype=torch.bfloat16), tmp_path / "source", tokenizer=tokenizer)
    return tmp_path / "source"


@pytest.fixture
def documents(tmp_path):
    path = tmp_path / "text.jsonl"
    rows = ["the llama grazes on the high puna " * 20, "", "thin air and cold nights"]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def test_the_comparison_against_plain_sums():
    one, other = make(0), make(1)
    documents = [[256, *range(40)], [256, 7, 8, 9, 10]]
    found = compare(one, other, documents, window=16)
    nats = {one: 0.0, other: 0.0}
    kl = agreed = count = 0
    for ids in documents:
        for start in range(0, len(ids) - 1, 16):
            piece = ids[start : start + 17]
            with torch.inference_mode():
                p, q = (model(torch.tensor([piece[:-1]]))[0].softmax(-1).double() for model in (one, other))
            for at, label in enumerate(piece[1:]):
                nats[one] -= math.log(p[at, label])
                nats[other] -= math.log(q[at, label])
                kl += sum(a * math.log(a / b) for a, b in zip(p[at].tolist(), q[at].tolist(), strict=True))
                agreed += int(p[at].argmax() == q[at].argmax())
                count += 1
    assert found.num_tokens == count == 44
    assert found.perplexity_of_original == pytest.approx(math.exp(nats[one] / count), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(nats[other] / count), rel=1e-4)
    assert found.mean_kl_nats == pytest.approx(kl / count, rel=1e-3)
    assert found.greedy_agreement == agreed / count
    assert found.size_bytes == found.size_bytes_of_original == sum(p.nbytes for p in one.parameters())


@pytest.mark.parametrize(
    ("weights", "most", "largest_kl"),
    [
        (Quantization("int8"), 0.8, 1e-3),
        (Quantization("int8", activations="int8"), 0.8, 1e-3),
        (Quantization("int4", group_size=32), 0.6, 0.05),
        (Quantization("int4", group_size=32, symmetric=False, keep=()), 0.5, 0.05),
    ],
    ids=["int8", "int8 activations", "int4", "int4 zero points, with the output"],
)
def test_compress_measures_and_the_result_runs(source, documents, tmp_path, capsys, weights, most, largest_kl):
    main(CompressConfig(model=str(source), output=tmp_path / "out", weights=weights, documents=documents, window=64))
    results = Manifest.read(tmp_path / "out").results
    assert results["num_tokens"] == 680 + 24
    assert results["size_bytes"] < most * results["size_bytes_of_original"]
    assert 0 < results["mean_kl_nats"] < largest_kl
    assert results["perplexity"] == pytest.approx(results["perplexity_of_original"], rel=0.05)
    assert 0.5 < results["greedy_agreement"] <= 1
    printed = capsys.readouterr().err
    assert "same likeliest token" in printed
    assert "perplexity" in printed
    engine = load_engine(tmp_path / "out", EngineConfig(device="cpu", num_threads=1))
    [completion] = engine.generate([engine.encode("the llama")], SamplingParams(temperature=0, max_tokens=5))
    assert 1 <= len(completion.ids) <= 5


def test_without_documents_the_original_writes_them(source, tmp_path):
    main(CompressConfig(model=str(source), output=tmp_path / "out", max_tokens=160, num_threads=1))
    assert Manifest.read(tmp_path / "out").results["num_tokens"] == 160
    main(CompressConfig(model=str(source), output=tmp_path / "out", max_tokens=0, num_threads=1))
    assert Manifest.read(tmp_path / "out").results == {}


def test_what_is_there_is_not_overwritten(source, tmp_path, documents):
    with pytest.raises(InputError, match="not an earlier result"):
        main(CompressConfig(model=str(source), output=documents))
    with pytest.raises(InputError, match="holds the model"):
        main(CompressConfig(model=str(source), output=tmp_path))


def test_documents_without_text(source, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(InputError, match="holds no text"):
        main(CompressConfig(model=str(source), output=tmp_path / "out", documents=tmp_path / "empty.jsonl"))
    assert not (tmp_path / "out").exists()


def test_settings_from_the_command_line():
    config = load_config(
        CompressConfig,
        None,
        ["model=m", "output=o", "weights.kind=int4", "weights.group_size=32", 'weights.keep=["a"]'],
    )
    assert config.weights == Quantization("int4", 32, keep=("a",))
