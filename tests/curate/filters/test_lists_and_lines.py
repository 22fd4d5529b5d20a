"""Addresses, dirty words, lengths, repeated n-grams, pages of code and of reasoning."""

import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.curate.filters.dirty_words import DirtyWords
from puna.curate.filters.length import Length
from puna.curate.filters.pages import Pages
from puna.curate.filters.repeated_n_grams import RepeatedNGrams
from puna.curate.filters.urls import URLs
from puna.runtime.errors import InputError

Reasons = Callable[..., list[str | None]]


def test_urls(tmp_path: Path, reasons: Reasons) -> None:
    domains = tmp_path / "domains.txt"
    domains.write_text("bad.org  # for a reason\n\nEvil.com\n", encoding="utf-8")
    addresses = {
        "http://www.bad.org/x": "blocked domain",
        "HTTPS://user@evil.COM.:80/": "blocked domain",
        "bad.org": "blocked domain",
        "https://good.org/bad.org": None,
        "http://notbad.org/": None,
        "http://a.org/free-Sex?now": "blocked word in address",
        "http://essex.org/": None,
        "http://[2001:db8::1]/": None,
        "": None,
        None: None,
    }
    step = URLs(blocked_domains=(domains,), blocked_words=("sex",))
    assert reasons(step, ["text"] * len(addresses), url=list(addresses)) == list(addresses.values())
    assert reasons(step, ["no such column"]) == [None]


def test_lists_that_are_not_there_or_empty(tmp_path: Path, table: Callable[..., pa.Table]) -> None:
    with pytest.raises(InputError, match="does not exist"):
        URLs(blocked_domains=(tmp_path / "none.txt",))(table(["x"], url=["http://x.org"]))
    (tmp_path / "empty.txt").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(InputError, match="holds no entry"):
        DirtyWords(words=tmp_path / "empty.txt")(table(["x"]))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(InputError, match="not UTF-8"):
        DirtyWords(words=tmp_path / "latin.txt")(table(["x"]))
    with pytest.raises(ValueError, match="nothing to look for"):
        URLs()
    with pytest.raises(ValueError, match="letters and digits"):
        URLs(blocked_words=("a-b",))


@settings(deadline=None, max_examples=100)
@given(
    texts=st.lists(
        st.lists(st.sampled_from(["Bad", "worse", "word", "好", "人", "x", ", ", "\n"])).map(" ".join), max_size=5
    )
)
def test_dirty_words_are_counted_as_a_slow_search_does(
    texts: list[str], tmp_path_factory: pytest.TempPathFactory, table: Callable[..., pa.Table]
) -> None:
    words = tmp_path_factory.getbasetemp() / "dirty.txt"
    words.write_text("bad\nworse word\n好人\nbad x worse\n", encoding="utf-8")
    outcome = DirtyWords(words=words, max_count=1000, column="dirty")(table(texts))
    expected = []
    for text in texts:
        found = " ".join(re.findall(r"[a-z]+|[好人]", text.lower()))
        phrases = ("bad", "worse word", "好 人", "bad x worse")
        expected.append(sum(len(re.findall(rf"(?<!\S)(?={phrase}(?!\S))", found)) for phrase in phrases))
    assert outcome.kept["dirty"].to_pylist() == expected


def test_dirty_words(reasons: Reasons) -> None:
    texts = ["Free sex and PORN, porn, hentai.", "One porn joke.", "porn xxx milf " + "decent words " * 1000, ""]
    assert reasons(DirtyWords(), texts) == ["too many dirty words", None, None, None]


def test_length(reasons: Reasons) -> None:
    texts = ["", "ab", "日本語テキスト", "one two three four five"]
    step = Length(min_characters=3, max_characters=20, min_words=3)
    assert reasons(step, texts) == [
        "fewer than 3 characters",
        "fewer than 3 characters",
        None,
        "more than 20 characters",
    ]
    assert reasons(Length(max_words=4), texts)[1:] == [None, "more than 4 words", "more than 4 words"]
    assert reasons(Length(min_words=3), texts)[1] == "fewer than 3 words"
    with pytest.raises(ValueError, match="larger than max_words"):
        Length(min_words=5, max_words=4)


def slow_coverage(words: list[str], n: int) -> float:
    grams = [tuple(words[first : first + n]) for first in range(len(words) - n + 1)]
    counts = Counter(grams)
    covered = {first + offset for first, gram in enumerate(grams) if counts[gram] > 1 for offset in range(n)}
    return len(covered) / len(words)


@settings(deadline=None, max_examples=150)
@given(
    texts=st.lists(
        st.lists(st.sampled_from(["a", "B", "c", "d1", "語", "\n", "e\u0301", "."])).map(" ".join), max_size=4
    ),
    n=st.integers(1, 3),
    coverage=st.sampled_from([0.0, 0.3, 0.5, 0.9]),
)
def test_repeated_n_grams_against_the_slow_twin(
    texts: list[str], n: int, coverage: float, table: Callable[..., pa.Table]
) -> None:
    outcome = RepeatedNGrams(n=n, max_coverage=coverage, min_words=4)(table(texts))
    expected = []
    for text in texts:
        lines = text.splitlines(keepends=True)
        words = [re.findall(r"[a-z0-9\u0301]+|語", re.sub(r"\d", "0", line.lower())) for line in lines]
        kept = [
            line
            for line, found in zip(lines, words, strict=True)
            if len(found) < 4 or slow_coverage(found, n) <= coverage
        ]
        if kept or not lines:
            expected.append("".join(kept))
    assert outcome.kept["text"].to_pylist() == expected
    assert outcome.rejected["reason"].to_pylist() == ["no lines left"] * (len(texts) - len(expected))


def test_repeated_n_grams_remove_a_log(table: Callable[..., pa.Table]) -> None:
    log = "ERROR 12:01 failed to open the file; " * 9
    outcome = RepeatedNGrams()(table([f"A sentence that is fine.\n{log}\nAnother one.", log, "語" * 30]))
    assert outcome.kept["text"].to_pylist() == ["A sentence that is fine.\nAnother one."]
    assert outcome.rejected["reason"].to_pylist() == ["no lines left"] * 2
    assert outcome.counts == {"lines of repeated n-grams": 3}
    with pytest.raises(ValueError, match="must be at least n"):
        RepeatedNGrams(n=5, min_words=4)


CODE = "import os\n\ndef main(path):\n    for name in os.listdir(path):\n        print(name)\n    return 0;\n"
PROOF = "Suppose that x + 1 = 3.\nTherefore x = 2. It follows that 2x = 4.\n因此 x^2 = 4。\nQED"
PROSE = "We went to the market on Sunday.\nIt was closed, so we went home.\nNobody minded much."


def test_pages(reasons: Reasons) -> None:
    texts = [CODE, PROSE, PROOF, ""]
    assert reasons(Pages(about="code", min_score=0.5), texts) == [None, *["code score under 0.5"] * 3]
    assert reasons(Pages(about="code", max_score=0.5), texts) == ["code score over 0.5", None, None, None]
    found = reasons(Pages(about="reasoning", min_score=0.5), texts)
    assert found == ["reasoning score under 0.5", "reasoning score under 0.5", None, "reasoning score under 0.5"]


def test_pages_add_their_share_of_lines(table: Callable[..., pa.Table]) -> None:
    documents = table(["", f"{PROSE}\n{PROSE}\nx = 1\n\n", "skipped"]).slice(1, 1)
    assert Pages()(documents).kept["code_score"].to_pylist() == [pytest.approx(1 / 7)]
    with pytest.raises(ValueError, match="every document has"):
        Pages(column="text")


@pytest.mark.parametrize(
    "step", [DirtyWords(), RepeatedNGrams(), Pages(), Length(min_words=5)], ids=lambda step: step.kind
)
def test_five_megabytes_on_one_line_take_bounded_time(
    step: Callable[[pa.Table], object], table: Callable[..., pa.Table]
) -> None:
    step(table([PROSE]))
    documents = table(["x" * 5_000_000, "word and " * 550_000, "語" * 1_600_000])
    start = time.process_time()
    step(documents)
    assert time.process_time() - start < 20
