import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.curate.dedup.books import BookDuplicates

REASON = "more than 90% of it in a larger book"


def naive(books: list[list[str]], length: int, max_overlap: float) -> list[int]:
    """Numbers of the books to remove, comparing all pairs of sets."""
    sets = [{tuple(book[at : at + length]) for at in range(len(book) - length + 1)} for book in books]
    kept: list[int] = []
    for number in sorted(range(len(books)), key=lambda n: (-len(sets[n]), n)):
        if not any(len(sets[number] & sets[other]) > max_overlap * len(sets[number]) for other in kept):
            kept.append(number)
    return sorted(set(range(len(books))) - set(kept))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.lists(st.sampled_from("abc"), min_size=3, max_size=12), min_size=1, max_size=6), st.integers(1, 3))
def test_agrees_with_comparing_all_pairs(documents, run_global, books, batch_rows) -> None:
    step = BookDuplicates(max_overlap=0.6, shingle_words=2, sample=1)
    result = run_global(step, documents([" ".join(book) for book in books]), batch_rows)
    assert [int(name[1:]) for name in result.reasons] == naive(books, 2, 0.6)


def book(seed: int, count: int = 4000) -> list[str]:
    return [
        f"w{'abcdefghij'[n % 10]}{'abcdefghij'[n // 10 % 10]}"
        for n in np.random.default_rng(seed).integers(0, 100, count)
    ]


def test_editions_and_parts_go_and_the_largest_stays(documents, run_global) -> None:
    story, other = book(0), book(1)
    preface, half = book(2, 300), story[:2000]
    mixture = half + other[:1000]
    texts = [" ".join(text) for text in (story, other, preface + story, half, mixture, other)]
    result = run_global(BookDuplicates(), documents(texts), 2)
    # The first goes into the edition with the preface; the mixture is only two thirds of that edition.
    assert result.reasons == dict.fromkeys(["d0", "d3", "d5"], REASON)
    assert result.rejected["book_duplicates_cluster"].to_pylist() == [2, 2, 1]
    assert result.kept["book_duplicates_cluster"].to_pylist() == [1, 2, None]


def test_many_copies_of_one_book(documents, run_global) -> None:
    text = " ".join(book(0, 1500))
    result = run_global(BookDuplicates(sample=16), documents([text] * 100))
    assert result.ids == ["d0"]


def test_texts_without_a_shingle_are_kept(documents, run_global) -> None:
    assert len(run_global(BookDuplicates(), documents(["", "a b", "a b"])).kept) == 3


@pytest.mark.parametrize("settings", [{"max_overlap": 1.0}, {"max_overlap": 0.0}, {"sample": 0}, {"shingle_words": 0}])
def test_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        BookDuplicates(**settings)
