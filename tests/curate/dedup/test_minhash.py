from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.batches.shingles import hash_shingles
from puna.batches.words import hash_words, split_words
from puna.curate.dedup.clusters import find_roots, unite
from puna.curate.dedup.minhash import NearDuplicates, hash_bands, hash_functions, sign

REASON = "near-duplicate of an earlier document"
MASK = 2**64 - 1


def scramble(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def naive_shingles(hashes: list[int], length: int) -> list[int]:
    base = 0x5851F42D4C957F2D
    runs = [hashes[at : at + length] for at in range(len(hashes) - length + 1)]
    return [scramble(sum(h * base ** (length - 1 - i) for i, h in enumerate(run)) & MASK) for run in runs]


numbers = st.integers(0, MASK)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(numbers, max_size=12), min_size=1, max_size=4), st.integers(1, 6))
def test_shingles_agree_with_their_definition(texts: list[list[int]], length: int) -> None:
    hashes = np.array([value for text in texts for value in text], np.uint64)
    documents = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
    shingles, offsets = hash_shingles(hashes, documents, length)
    found = [shingles[offsets[d] : offsets[d + 1]].tolist() for d in range(len(texts))]
    assert found == [naive_shingles(text, length) for text in texts]


def test_shingles_depend_on_the_order_of_words() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 4, dtype=np.uint64)
    orders = np.array([[0, 1, 2, 3], [1, 0, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0], [2, 3, 0, 1]])
    shingles, _ = hash_shingles(hashes[orders.ravel()], np.arange(0, 21, 4), 4)
    assert len(set(shingles.tolist())) == 5


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(numbers, max_size=6), min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 4))
def test_signatures_and_bands_agree_with_plain_python(texts: list[list[int]], bands: int, band_hashes: int) -> None:
    shingles = np.array([value for text in texts for value in text], np.uint64)
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
    multipliers, summands = hash_functions(bands * band_hashes, 3)
    signatures = sign(shingles, offsets, multipliers, summands)
    functions = list(zip(multipliers.tolist(), summands.tolist(), strict=True))
    expected = [[min((m * x + a & MASK for x in text), default=MASK) for m, a in functions] for text in texts]
    assert signatures.tolist() == expected
    hashes = hash_bands(signatures, band_hashes)
    for document, signature in enumerate(expected):
        for band in range(bands):
            value = 0
            for number in signature[band * band_hashes : (band + 1) * band_hashes]:
                value = scramble(value ^ number)
            assert hashes[document, band] == value


def pair_of_sets(similarity: float, size: int, generator: np.random.Generator) -> np.ndarray:
    """Two sets of `size` shingles each, of Jaccard similarity as near as can be, one after the other."""
    common = round(2 * size * similarity / (1 + similarity))
    drawn = generator.integers(0, 2**64, 2 * size - common, dtype=np.uint64)
    return np.concatenate([drawn[:size], drawn[:common], drawn[size:]])


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9])
def test_collisions_follow_the_s_curve(similarity: float) -> None:
    pairs, size, bands, band_hashes = 2000, 200, 14, 8
    generator = np.random.default_rng(7)
    shingles = np.concatenate([pair_of_sets(similarity, size, generator) for _ in range(pairs)])
    signatures = sign(shingles, np.arange(0, len(shingles) + 1, size), *hash_functions(bands * band_hashes, 1))
    agreement = (signatures[::2] == signatures[1::2]).mean()
    assert agreement == pytest.approx(similarity, abs=0.01)
    hashes = hash_bands(signatures, band_hashes)
    found = (hashes[::2] == hashes[1::2]).any(axis=1).mean()
    expected = 1 - (1 - similarity**band_hashes) ** bands
    assert found == pytest.approx(expected, abs=4 * (expected * (1 - expected) / pairs) ** 0.5 + 0.01)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=25))
def test_components_are_those_of_a_search(pairs: list[tuple[int, int]]) -> None:
    parents = np.arange(20)
    unite(parents, *np.array(pairs, np.int64).reshape(-1, 2).T)
    neighbours = {node: {node} for node in range(20)}
    for a, b in pairs:
        neighbours[a].add(b)
        neighbours[b].add(a)
    for node, root in enumerate(find_roots(parents).tolist()):
        reached, frontier = set(), {node}
        while frontier:
            reached |= frontier
            frontier = set().union(*(neighbours[n] for n in frontier)) - reached
        assert root == min(reached)


def words(generator: np.random.Generator, count: int) -> list[str]:
    return [
        f"w{chr(97 + n // 26 % 26)}{chr(97 + n % 26)}{chr(97 + n // 676)}" for n in generator.integers(0, 5000, count)
    ]


def edit(generator: np.random.Generator, text: list[str], share: float) -> list[str]:
    changed = generator.random(len(text)) < share
    return [word if not change else "edited" + word for word, change in zip(text, changed, strict=True)]


def jaccard(left: list[str], right: list[str], length: int = 5) -> float:
    a, b = ({tuple(text[at : at + length]) for at in range(len(text) - length + 1)} for text in (left, right))
    return len(a & b) / len(a | b)


@pytest.fixture(scope="module")
def planted() -> list[list[str]]:
    """Originals 0..59 and, from 60 on, an edited copy of each; from 120 on, unrelated texts."""
    generator = np.random.default_rng(0)
    originals = [words(generator, int(generator.integers(100, 400))) for _ in range(60)]
    copies = [edit(generator, text, 0.01 if number % 2 else 0.12) for number, text in enumerate(originals)]
    return originals + copies + [words(generator, 200) for _ in range(100)]


def test_recall_and_precision_against_exact_jaccard(documents, run_global, planted) -> None:
    similarity = [jaccard(planted[number], planted[60 + number]) for number in range(60)]
    alike = {60 + number for number in range(60) if similarity[number] > 0.85}
    unlike = {60 + number for number in range(60) if similarity[number] < 0.5}
    assert len(alike) > 20
    assert len(unlike) > 25
    result = run_global(NearDuplicates(), documents([" ".join(text) for text in planted]), 37)
    rejected = {int(name[1:]) for name in result.reasons}
    assert set(result.reasons.values()) == {REASON}
    assert len(alike - rejected) <= 1
    assert len(rejected & unlike) <= 1
    assert rejected <= set(range(60, 120))
    clusters = result.decisions.to_pylist()
    assert {row["document"] - 60 for row in clusters if not row["keep"]} == {
        r["document"] for r in clusters if r["keep"]
    }


def test_any_batches_give_the_same_answer(documents, run_global, planted) -> None:
    table = documents([" ".join(text) for text in planted[:110]])
    step = NearDuplicates(min_similarity=0.6)
    assert run_global(step, table, 9).ids == run_global(step, table, 110).ids


def test_case_digits_and_punctuation_do_not_count(documents, run_global) -> None:
    text = "The quick brown fox, number 17, jumps over the lazy dog and runs away."
    other = "the quick brown fox number 23 jumps over the lazy dog (and runs away)"
    result = run_global(NearDuplicates(), documents([text, "a wholly different text of more than five words", other]))
    assert result.reasons == {"d2": REASON}
    assert result.kept["near_duplicates_cluster"].to_pylist() == [0, None]


def test_texts_shorter_than_a_shingle_are_kept(documents, run_global) -> None:
    assert len(run_global(NearDuplicates(), documents(["one two three four"] * 3 + [""] * 2)).kept) == 5


def test_verification_drops_unlike_candidates(documents, run_global) -> None:
    generator = np.random.default_rng(5)
    text = words(generator, 300)
    near, far = edit(generator, text, 0.01), edit(generator, text, 0.1)
    assert jaccard(text, near) > 0.85
    assert 0.3 < jaccard(text, far) < 0.6
    table = documents([" ".join(part) for part in (text, near, far)])
    loose = {"bands": 64, "band_hashes": 1}
    assert run_global(NearDuplicates(**loose), table).ids == ["d0"]
    assert run_global(NearDuplicates(**loose, min_similarity=0.7), table).ids == ["d0", "d2"]


def test_published_fixture(documents, run_global, real_data: Path) -> None:
    folder = real_data / "curation" / "cs336_dedup" / "documents_with_fuzzy_duplicates"
    texts = {path.stem: path.read_text() for path in sorted(folder.iterdir())}
    assert list(texts) == ["pytorch_license", "rails_mit_license", "react_mit_license"]
    shingled = []
    for text in texts.values():
        split = split_words(documents([text])["text"])
        shingled.append(set(hash_shingles(hash_words(split), split.documents, 5)[0].tolist()))
    assert len(shingled[1] & shingled[2]) / len(shingled[1] | shingled[2]) > 0.8
    assert len(shingled[0] & shingled[1]) / len(shingled[0] | shingled[1]) < 0.2
    result = run_global(NearDuplicates(bands=50, band_hashes=10), documents(list(texts.values())))
    assert result.reasons == {"d2": REASON}


@pytest.mark.parametrize("name", ["shingle_words", "bands", "band_hashes"])
def test_settings_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        NearDuplicates(**{name: 0})
    with pytest.raises(ValueError, match="min_similarity"):
        NearDuplicates(min_similarity=1.5)
