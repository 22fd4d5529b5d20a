import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.batches.words import split_words, text_buffers
from puna.curate.dedup.cut import cut_words
from puna.curate.dedup.substrings import SubstringDuplicates

EMPTY = "empty after substring deduplication"


def naive(texts: list[list[str]], length: int) -> list[list[str]]:
    """Quadratic: compare every run with all earlier ones."""
    runs = [
        (d, at, tuple(text[at : at + length])) for d, text in enumerate(texts) for at in range(len(text) - length + 1)
    ]
    removed, protected = set(), set()
    for number, (document, at, run) in enumerate(runs):
        places = {(document, word) for word in range(at, at + length)}
        if any(run == other for _, _, other in runs[:number]):
            removed |= places
        elif any(run == other for _, _, other in runs[number + 1 :]):
            protected |= places
    removed -= protected
    return [[word for at, word in enumerate(text) if (d, at) not in removed] for d, text in enumerate(texts)]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=14), min_size=1, max_size=5),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_agrees_with_comparing_everything(documents, run_global, texts, length, batch_rows) -> None:
    result = run_global(
        SubstringDuplicates(min_words=length), documents([" ".join(text) for text in texts]), batch_rows
    )
    expected = naive(texts, length)
    gone = {f"d{number}" for number, text in enumerate(expected) if texts[number] and not text}
    assert result.reasons == dict.fromkeys(gone, EMPTY)
    assert [text.split() for text in result.texts] == [
        t for number, t in enumerate(expected) if f"d{number}" not in gone
    ]
    # What was removed anywhere still stands somewhere.
    runs = {tuple(text[at : at + length]) for text in texts for at in range(len(text) - length + 1)}
    repeated = {run for run in runs if sum(run == tuple(t[a : a + length]) for t in texts for a in range(len(t))) > 1}
    left = {tuple(text[at : at + length]) for text in expected for at in range(len(text) - length + 1)}
    assert repeated <= left


def test_a_passage_goes_with_exact_ends_and_separators_stay_tidy(documents, run_global) -> None:
    passage = "this very passage of eight words is repeated"
    texts = [
        f"Intro. {passage.title()}! End.",  # Case counts.
        f"One.\n\n{passage}\n\nTwo.",
        f"Three — {passage}; four, 世界!",
        passage + ".",
        f"Un autre texte: {passage}.",
    ]
    result = run_global(SubstringDuplicates(min_words=8), documents(texts), 2)
    assert result.texts == [texts[0], texts[1], "Three — four, 世界!", "Un autre texte: "]
    assert result.reasons == {"d3": EMPTY}
    assert result.counts == {"repeated words removed": 24}


def test_shorter_passages_and_texts_are_left_alone(documents, run_global) -> None:
    texts = ["a b c d e", "a b c d x", "a b c", "", "..."]
    assert run_global(SubstringDuplicates(min_words=5), documents(texts)).texts == texts


def test_repetition_inside_a_document_leaves_one_copy(documents, run_global) -> None:
    result = run_global(SubstringDuplicates(min_words=3), documents(["a b c d a b c d a b c d", "x " * 10]))
    assert [text.split() for text in result.texts] == [list("abcdab"), ["x"] * 3]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("a, é世\n", max_size=12), min_size=1, max_size=4), st.data())
def test_cutting_agrees_with_slicing(texts: list[str], data: st.DataObject) -> None:
    column = pa.array(["skipped", *texts])[1:]
    words = split_words(column)
    removed = np.array(data.draw(st.lists(st.booleans(), min_size=len(words.starts), max_size=len(words.starts))), bool)
    expected = []
    _, offsets = text_buffers(column)
    for number, text in enumerate(texts):
        raw = text.encode()
        inside = range(words.documents[number], words.documents[number + 1])
        starts = [words.starts[word] - offsets[number] for word in inside]
        left = raw[: starts[0]] if starts else raw
        for word, start, stop in zip(inside, starts, [*starts[1:], len(raw)], strict=False):
            left += b"" if removed[word] else raw[start:stop]
        expected.append(left.decode())
    assert cut_words(words, offsets, removed).to_pylist() == expected


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="min_words must be at least 1"):
        SubstringDuplicates(min_words=0)
