from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.curate.dedup.lines import LineDuplicates

EMPTY = "empty after line deduplication"


def naive(texts: list[str], max_copies: int, keep: str, bucket: int) -> list[str]:
    """The same in plain Python, without normalisation."""
    size = bucket or max(len(texts), 1)
    out = []
    for start in range(0, len(texts), size):
        group = [text.split("\n") for text in texts[start : start + size]]
        total = Counter(line for lines in group for line in lines if line)
        seen: Counter[str] = Counter()
        for lines in group:
            left = []
            for line in lines:
                seen[line] += 1
                spared = seen[line] <= max_copies and keep == "first"
                if not line or total[line] <= max_copies or spared:
                    left.append(line)
            out.append("\n".join(left))
    return out


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b", "c", "", "é x"]), min_size=1, max_size=5).map("\n".join),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 3),
    st.sampled_from(["first", "none"]),
    st.integers(0, 3),
    st.integers(1, 4),
)
def test_agrees_with_plain_python(documents, run_global, texts, max_copies, keep, bucket, batch_rows) -> None:
    step = LineDuplicates(max_copies=max_copies, keep=keep, bucket_documents=bucket, ignore=())
    result = run_global(step, documents(texts), batch_rows)
    expected = naive(texts, max_copies, keep, bucket)
    gone = {f"d{n}" for n, text in enumerate(expected) if not text.strip() and texts[n] != text}
    assert result.reasons == dict.fromkeys(gone, EMPTY)
    assert result.texts == [text for n, text in enumerate(expected) if f"d{n}" not in gone]


def test_ccnet_compares_without_case_digits_accents_and_punctuation(documents, run_global) -> None:
    texts = ["Page 12: Café!\nbody one", "page 99 cafe\nbody two", "...\n---\nbody three"]
    result = run_global(LineDuplicates(), documents(texts))
    assert result.texts == ["Page 12: Café!\nbody one", "body two", "...\n---\nbody three"]
    assert result.counts == {"repeated lines removed": 1}


def test_llama3_removes_all_copies_of_frequent_lines_of_a_bucket(documents, run_global) -> None:
    texts = [f"menu\ntext {chr(97 + number)}" for number in range(14)]
    step = LineDuplicates(max_copies=6, keep="none", bucket_documents=7)
    assert run_global(step, documents(texts), 4).texts == [text.split("\n")[1] for text in texts]
    assert run_global(step, documents(texts[:13]), 4).texts[7:] == texts[7:13]


def test_short_lines_are_left_alone(documents, run_global) -> None:
    result = run_global(LineDuplicates(min_characters=3), documents(["}\nabc", "}\nabc\nd"]))
    assert result.texts == ["}\nabc", "}\nd"]


def test_published_fixture(documents, run_global, real_data: Path) -> None:
    folder = real_data / "curation" / "cs336_dedup"
    before = [path.read_text() for path in sorted((folder / "documents_with_line_duplicates").iterdir())]
    after = [path.read_text() for path in sorted((folder / "documents_line_deduplicated").iterdir())]
    result = run_global(LineDuplicates(max_copies=1, keep="none", ignore=()), documents(before))
    texts = dict(zip(result.ids, result.texts, strict=True))
    assert [texts.get(f"d{number}", "") for number in range(len(before))] == after
    assert result.reasons == {"d0": EMPTY, "d1": EMPTY}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_copies": 0}, "max_copies"),
        ({"bucket_documents": -1}, "bucket_documents"),
        ({"min_characters": 0}, "min_"),
    ],
)
def test_settings_are_checked(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LineDuplicates(**settings)
