import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.curate.dedup.exact import ExactDuplicates
from puna.curate.dedup.fingerprints import hash_texts, normalize_texts

REASON = "same text as an earlier document"


def test_the_first_of_equal_texts_is_kept(documents, run_global) -> None:
    table = documents(["a", "b", "a", "", "b ", "a", ""])
    result = run_global(ExactDuplicates(), table)
    assert result.ids == ["d0", "d1", "d3", "d4"]
    assert result.reasons == {"d2": REASON, "d5": REASON, "d6": REASON}
    assert result.kept["exact_duplicates_cluster"].to_pylist() == [0, None, 3, None]
    assert result.rejected["exact_duplicates_cluster"].to_pylist() == [0, 0, 3]
    assert result.kept.schema.field("text") == table.schema.field("text")


@pytest.mark.parametrize(
    ("ignore", "left", "right", "equal"),
    [
        (("case",), "STRASSE Ä", "strasse ä", True),
        (("case",), "a b", "a  b", False),
        (("whitespace",), " a\n\tb\u3000c ", "a b c", True),
        (("whitespace",), "ab", "a b", False),
        (("punctuation",), "«a», b! 5 €", "a b 5 ", True),
        (("digits",), "in 1999 und ٣", "in 2024 und ٤", True),
        (("digits",), "in 99", "in 999", False),
        (("accents",), "Ãé", "Ae", True),
        ((), "Ãé", "Ae", False),
    ],
)
def test_differences_that_do_not_count(documents, run_global, ignore, left, right, equal) -> None:
    result = run_global(ExactDuplicates(ignore=ignore), documents([left, right]))
    assert len(result.kept) == (1 if equal else 2)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.sampled_from(["a", "b", "A", "ä", "", "a b"]), max_size=12), st.integers(1, 5))
def test_any_sharding_decides_as_a_set_does(documents, run_global, texts, batch_rows) -> None:
    seen: set[str] = set()
    expected = [f"d{number}" for number, text in enumerate(texts) if not (text in seen or seen.add(text))]
    if texts:
        assert run_global(ExactDuplicates(), documents(texts), batch_rows).ids == expected


def test_hash_is_md5_and_normalising_keeps_rows() -> None:
    texts = pa.chunked_array([["", "é"], ["x" * 100_000]])
    table = hash_texts(texts)
    digests = [hashlib.md5(text.encode()).digest() for text in texts.to_pylist()]
    assert table["high"].to_pylist() == [int.from_bytes(digest[:8], "little") for digest in digests]
    assert table["low"].to_pylist() == [int.from_bytes(digest[8:], "little") for digest in digests]
    everything = ("case", "digits", "accents", "punctuation", "whitespace")
    assert normalize_texts(texts, everything).to_pylist() == ["", "e", "x" * 100_000]


def test_no_keys_at_all_decide_nothing(tmp_path: Path) -> None:
    ExactDuplicates().decide([], tmp_path, 2**28)
    assert len(pq.read_table(tmp_path / "decisions.parquet")) == 0
