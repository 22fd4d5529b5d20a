from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.batches.words import hash_words, split_words
from puna.curate.dedup.kmeans import find_centroids, find_repeated, nearest_centroids
from puna.curate.dedup.latent import NUM_FEATURES, count_words, latent_vectors
from puna.curate.dedup.minhash import NearDuplicates
from puna.curate.dedup.semantic import SemanticDuplicates

REASON = "says the same as another document"


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def name(number: int) -> str:
    return "".join("abcdefghij"[int(digit)] for digit in f"{number:04}")


@pytest.fixture(scope="module")
def planted() -> list[str]:
    """120 texts of 12 subjects and, from 120 on, each again: the words in another order, one in ten another."""
    generator = np.random.default_rng(0)
    texts = [generator.integers(0, 300, 80) + 300 * (number % 12) for number in range(120)]
    said_again = [np.where(generator.random(80) < 0.1, generator.integers(0, 4000, 80), text) for text in texts]
    return [" ".join(map(name, text)) for text in [*texts, *map(generator.permutation, said_again)]]


def test_reordered_texts_are_found_that_shingles_miss(documents, run_global, planted) -> None:
    table = documents(planted)
    assert len(run_global(NearDuplicates(), table).rejected) == 0
    result = run_global(SemanticDuplicates(max_similarity=0.75, keep="first"), table, 50)
    rejected = {int(name[1:]) for name in result.reasons}
    assert set(result.reasons.values()) == {REASON}
    assert rejected <= set(range(120, 240))
    assert len(rejected) > 110
    pairs = {(row["document"], row["cluster"]) for row in result.decisions.to_pylist() if not row["keep"]}
    assert all(document - 120 == cluster for document, cluster in pairs)


def test_any_batches_give_the_same_answer(documents, run_global, planted) -> None:
    step = SemanticDuplicates(max_similarity=0.75, clusters=5, latent_dim=32)
    one, other = (run_global(step, documents(planted), rows) for rows in (17, 240))
    assert one.decisions == other.decisions
    assert len(one.rejected) > 0


def test_which_one_stays(documents, run_global) -> None:
    texts = ["a b c d e f g h", "a b c d e f g i", "a b c d e f g", "p q r s", "", ""]
    ids = {}
    for keep in ("far", "near", "first"):
        result = run_global(SemanticDuplicates(max_similarity=0.6, clusters=1, keep=keep), documents(texts))
        [ids[keep]] = [[name for name in result.ids if name in ("d0", "d1", "d2")]]
        assert {"d3", "d4", "d5"} <= set(result.ids)
    # The texts without a word, and the one about something else, resemble none.
    assert ids["first"] == ["d0"]
    assert len(ids["far"]) == len(ids["near"]) == 1
    assert ids["far"] != ids["near"]


def test_vectors_of_a_model(documents, run_global, tmp_path: Path) -> None:
    from puna.curate.dedup.embed import embed_texts
    from puna.model.config import LlamaConfig
    from puna.model.initialize import initialize
    from puna.model.transformer import Transformer
    from puna.tokenizer.tiktoken_ranks import TiktokenTokenizer
    from puna.weights.load import save_model

    texts = ["the cat sat on the mat today", "the cat sat on the mat today!", "zebras eat 17 kinds of grass", ""]
    tokenizer = TiktokenTokenizer({bytes([byte]): byte for byte in range(256)}, "llama3", {"<|end_of_text|>": 256})
    shape = LlamaConfig(257, 32, 2, 4, 2, 8, 48, context_length=64)
    model = Transformer(shape)
    initialize(model, 0)
    save_model(model, tmp_path / "model", tokenizer=tokenizer)
    vectors = embed_texts(tmp_path / "model", texts, 64)
    alone = np.concatenate([embed_texts(tmp_path / "model", [text], 64) for text in texts])
    np.testing.assert_allclose(vectors, alone, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 1, 1, 0], rtol=1e-6)
    assert not np.array_equal(vectors[0], embed_texts(tmp_path / "model", texts, 2)[0])
    similarities = vectors @ vectors.T
    assert similarities[0, 1] > similarities[0, 2] + 0.1
    between = float(similarities[0, 1] + similarities[0, 2]) / 2
    step = SemanticDuplicates(model=tmp_path / "model", max_similarity=between, keep="first")
    result = run_global(step, documents(texts), 2)
    assert result.reasons == {"d1": REASON}
    assert run_global(step, documents(["", ""])).reasons == {}


def test_words_are_counted(documents) -> None:
    texts = ["a b a", "", "c. A a"]
    table = count_words(documents(texts)["text"])
    hashes = hash_words(split_words(pa.array(["a b c"]))) % np.uint64(NUM_FEATURES)
    a, b, c = hashes.tolist()
    assert table["features"].to_pylist() == [[a, b], [], [c, a]]
    assert table["counts"].to_pylist() == [[2, 1], [], [1, 2]]


def test_latent_vectors_agree_with_a_full_decomposition(documents, planted) -> None:
    table = count_words(documents(planted[:60])["text"])
    rows = np.zeros((60, NUM_FEATURES))
    for row, (features, counts) in enumerate(
        zip(table["features"].to_pylist(), table["counts"].to_pylist(), strict=True)
    ):
        rows[row, features] = np.log1p(counts)
    rows *= np.log(61 / (1 + (rows > 0).sum(0))) + 1
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    left, scale, _ = np.linalg.svd(rows, full_matrices=False)
    expected = unit(left[:, :12] * scale[:12])
    [vectors] = latent_vectors(lambda: [table], 12, 0)
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=0.04)  # not quite converged
    [whole] = latent_vectors(lambda: [table], 80, 0)
    np.testing.assert_allclose(whole @ whole.T, rows @ rows.T, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 10**6), st.floats(0.3, 0.95), st.data())
def test_repeated_rows_agree_with_all_pairs(count: int, seed: int, limit: float, data: st.DataObject) -> None:
    vectors = unit(np.random.default_rng(seed).standard_normal((count, 3)))
    rows = np.array(data.draw(st.permutations(range(count))))[: data.draw(st.integers(1, count))]
    found = find_repeated(vectors, rows, limit)
    similarities = vectors[rows] @ vectors[rows].T
    for place in range(len(rows)):
        best = similarities[place, :place].argmax() if place else 0
        repeated = place and similarities[place, best] > np.float32(limit)
        assert found[place] == (best if repeated else place)


def test_repeated_rows_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit(np.random.default_rng(0).standard_normal((50, 3)))
    whole = find_repeated(vectors, np.arange(50), 0.9)
    monkeypatch.setattr("puna.curate.dedup.kmeans._BLOCK", 7)
    assert find_repeated(vectors, np.arange(50), 0.9).tolist() == whole.tolist()
    assert (whole != np.arange(50)).any()


def test_clusters_gather_around_their_centres() -> None:
    generator = np.random.default_rng(0)
    centres = np.eye(4, 8, dtype=np.float32)
    vectors = unit(np.repeat(centres, 30, axis=0) + generator.normal(0, 0.1, (120, 8)))
    centroids = find_centroids(vectors, 4, 3)
    labels, similarities = nearest_centroids(vectors, centroids)
    assert labels.tolist() == (vectors @ centroids.T).argmax(1).tolist()
    np.testing.assert_allclose(similarities, (vectors * centroids[labels]).sum(1), rtol=1e-5)
    for number in range(4):
        np.testing.assert_allclose(centroids[number], unit(vectors[labels == number].sum(0)[None])[0], atol=1e-6)
    started = vectors[np.random.default_rng(3).choice(120, 4, replace=False)]
    assert similarities.mean() > nearest_centroids(vectors, started)[1].mean() + 0.01


@pytest.mark.parametrize("settings", [{"max_similarity": 1.0}, {"clusters": -1}, {"max_tokens": 0}, {"latent_dim": 0}])
def test_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        SemanticDuplicates(**settings)
