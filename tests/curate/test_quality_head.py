"""The head on a small Llama: it learns what can be learnt, says how well, and filters by it."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from puna.curate.document import Document, table_of
from puna.curate.quality_head import (
    LlamaQuality,
    QualityHeadConfig,
    fit_logistic,
    load_head,
    main,
    pooled_states,
    roc_auc,
)
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.runtime.files import write_jsonl
from puna.runtime.manifest import Manifest
from puna.tokenizer.load import load_tokenizer
from puna.tokenizer.train import TokenizerConfig
from puna.tokenizer.train import main as train_tokenizer
from puna.weights.load import load_model, save_model

GOOD = ["theorem", "lemma", "proof", "vertex", "graph", "matrix", "kernel"]
BAD = ["click", "here", "buy", "cheap", "pills", "now", "free"]


def sentence(words: list[str], number: int) -> str:
    generator = random.Random(number)
    return " ".join(generator.choices(words, k=generator.randint(5, 40)))


def make_model(folder: Path, texts: list[str], vocab_size: int, dim: int = 32) -> Path:
    """A Llama with random weights and a tokenizer of these texts."""
    write_jsonl(folder / "texts.jsonl", [{"id": str(n), "text": text} for n, text in enumerate(texts)])
    tokenizer_folder = folder / "tokenizer"
    train_tokenizer(TokenizerConfig(documents=folder / "texts.jsonl", output=tokenizer_folder, vocab_size=vocab_size))
    model = Transformer(
        LlamaConfig(
            vocab_size=vocab_size,
            dim=dim,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=dim // 2,
            hidden_dim=2 * dim,
            context_length=128,
        )
    )
    initialize(model, 0)
    save_model(model, folder / "model", tokenizer=load_tokenizer(tokenizer_folder), dtype=torch.float32)
    return folder / "model"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and labelled documents of two kinds."""
    folder = tmp_path_factory.mktemp("quality")
    rows = [
        {"id": str(n), "text": sentence(GOOD if n % 3 else BAD, n), "label": bool(n % 3), "stars": 4 if n % 3 else 1}
        for n in range(200)
    ]
    make_model(folder, [row["text"] for row in rows], 300)
    write_jsonl(folder / "labelled.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def head(labelled: Path) -> Path:
    main(
        QualityHeadConfig(
            model=labelled / "model", documents=labelled / "labelled.jsonl", output=labelled / "head", device="cpu"
        )
    )
    return labelled / "head"


def test_what_can_be_told_apart_is(head: Path) -> None:
    results = Manifest.read(head).results
    assert results["accuracy"] > 0.95
    assert results["roc_auc"] > 0.98
    assert 0.5 < results["accuracy_of_the_commoner_label"] < 0.8
    assert results["num_documents"] == 200
    assert 20 < results["num_held_out_documents"] < 70


def test_the_step_scores_and_rejects(head: Path) -> None:
    texts = [sentence(GOOD, 1000), sentence(BAD, 1001), "", sentence(GOOD, 1002) * 200]
    documents = table_of([Document(text, str(n)) for n, text in enumerate(texts)], "web")
    outcome = LlamaQuality(head=head, threshold=0.5)(documents)
    assert outcome.rejected["reason"].to_pylist()[0] == "llama quality score too low"
    assert outcome.rejected["id"].to_pylist()[0] == "1"
    assert {"0", "3"} <= set(outcome.kept["id"].to_pylist())
    every = LlamaQuality(head=head, threshold=0)(documents)
    assert every.rejected.num_rows == 0
    scores = every.kept["llama_quality_score"].to_pylist()
    assert scores[0] > 0.9 > 0.1 > scores[1]
    again = LlamaQuality(head=head, threshold=0)(every.kept)
    assert again.kept.equals(every.kept)
    nothing = LlamaQuality(head=head)(documents.slice(0, 0))
    assert nothing.kept.num_rows == nothing.rejected.num_rows == 0
    assert nothing.kept.schema.field("llama_quality_score").type == pa.float32()


def test_stars_are_labels_too(labelled: Path) -> None:
    main(
        QualityHeadConfig(
            model=labelled / "model",
            documents=labelled / "labelled.jsonl",
            output=labelled / "stars",
            label="stars",
            max_label=5,
            device="cpu",
        )
    )
    scores = load_head(labelled / "stars", "cpu").score([sentence(GOOD, 1), sentence(BAD, 2)])
    assert scores == pytest.approx([0.8, 0.2], abs=0.15)


def test_pooling_does_not_depend_on_the_company(labelled: Path) -> None:
    """Alone, without padding, is the readable twin."""
    loaded = load_tokenizer(labelled / "model")
    model = load_model(labelled / "model")
    texts = [sentence(GOOD, n) for n in range(20)] + [sentence(BAD, 3) * 30]
    together = pooled_states(model, loaded, texts, 64)
    for number, text in enumerate(texts):
        ids = [loaded.bos_id, *loaded.encode(text)][:64]
        with torch.inference_mode():
            states = model(torch.tensor([ids]), head=lambda h, _: h)
        assert torch.allclose(together[number], states[0].double().mean(0), atol=1e-5)


def test_logistic_regression_against_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    generator = np.random.default_rng(0)
    features = generator.normal(size=(300, 5)) * [1, 10, 0.1, 3, 1] + 7
    labels = (features @ [1, 0.2, -5, 0, 0.5] + generator.normal(size=300) > -23).astype(float)
    weight, bias = fit_logistic(torch.tensor(features), torch.tensor(labels), 1e-3)
    standard = (features - features.mean(0)) / features.std(0, ddof=1)
    reference = linear_model.LogisticRegression(C=1 / (300 * 1e-3), tol=1e-10, max_iter=10_000).fit(standard, labels)
    assert weight.numpy() * features.std(0, ddof=1) == pytest.approx(reference.coef_[0], abs=1e-4)
    assert bias + weight.numpy() @ features.mean(0) == pytest.approx(reference.intercept_[0], abs=1e-4)


def test_roc_auc_counts_pairs() -> None:
    generator = np.random.default_rng(1)
    scores, truth = generator.integers(0, 6, 50) / 5, generator.random(50) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[truth] for b in scores[~truth]]
    assert roc_auc(scores, truth) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a", "text": "x"}], "'label' of document 'a' is None"),
        ([{"id": "a", "text": "x", "label": 3}], "a number from 0 to 1"),
        ([{"id": str(n), "text": "x", "label": 1} for n in range(50)], "there have to be some of both"),
        ([{"id": "a", "label": 1}], 'needs a string "text"'),
    ],
)
def test_bad_labels_are_named(labelled: Path, tmp_path: Path, rows: list[dict[str, object]], message: str) -> None:
    write_jsonl(tmp_path / "rows.jsonl", rows)
    config = QualityHeadConfig(
        model=labelled / "model", documents=tmp_path / "rows.jsonl", output=tmp_path / "head", device="cpu"
    )
    with pytest.raises(InputError, match=message):
        main(config)
    assert not (tmp_path / "head").exists()


def test_mistakes_are_explained(labelled: Path, head: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs head"):
        LlamaQuality()
    with pytest.raises(ValueError, match="between 0 and 1"):
        LlamaQuality(head=head, threshold=2)
    with pytest.raises(InputError, match="does not exist"):
        load_head(tmp_path, "cpu")
    Manifest("tokenize", {}, {}).write(tmp_path)
    with pytest.raises(InputError, match="output of `puna tokenize`"):
        load_head(tmp_path, "cpu")
    with pytest.raises(ValueError, match="held_out_share is 1"):
        QualityHeadConfig(model=labelled, documents=labelled, output=tmp_path, held_out_share=1)


def test_reviews_by_a_random_llama(real_data: Path, tmp_path: Path) -> None:
    """Wikipedia paragraphs and C4 pages: even hidden states of random weights tell them apart better than chance."""
    with gzip.open(real_data / "corpora" / "c4_demo.jsonl.gz", "rt") as file:
        web = [json.loads(line)["text"] for line in file][:200]
    with gzip.open(real_data / "corpora" / "wiki_demo.txt.gz", "rt") as file:
        text = file.read().replace("\n", " ")
    wiki = [text[start : start + 1500] for start in range(0, 1500 * 200, 1500)]
    rows = [{"id": f"web{n}", "text": text, "label": False} for n, text in enumerate(web)]
    rows += [{"id": f"wiki{n}", "text": text, "label": True} for n, text in enumerate(wiki)]
    model = make_model(tmp_path, web, 2048, dim=256)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    main(
        QualityHeadConfig(
            model=model, documents=tmp_path / "rows.jsonl", output=tmp_path / "head", weight_decay=1e-1, device="cpu"
        )
    )
    results = Manifest.read(tmp_path / "head").results
    print(results)
    assert results["roc_auc"] > 0.8
