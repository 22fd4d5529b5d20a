"""What the filters' tests share."""

from collections.abc import Callable, Sequence

import pyarrow as pa
import pytest
from hypothesis import strategies as st

from puna.batches.words import character_classes, text_buffers
from puna.curate.document import REQUIRED, Document, Outcome, table_of
from puna.curate.filters.tokens import mark_kinds, next_token
from puna.curate.step import Step

PIECES = (
    *("the", "be", "to", "of", "word", "It's", "don't", "Hello", "café", "e\u0301", "x1", "42", "3.14", "1,000", "a-b"),
    *(
        "日本語",
        "テスト",
        "한국어",
        "ไทย",
        "😀",
        "👩🏽‍💻",
        "...",
        "…",
        "#",
        "•",
        "- ",
        "--",
        ".",
        ". ",
        "! ",
        "? ",
        ",",
        '"',
        "'",
    ),
    *(
        "\n",
        "\n\n",
        " ",
        "  ",
        "\t",
        "\r\n",
        "\x0b",
        "\u2028",
        "\x85",
        "\xa0",
        "\u3000",
        "(",
        ")",
        "{",
        "[1]",
        "[edit]",
    ),
    *("http://a.b/c", "foo/Bar", "x=y", "a:b", "U.S.", "end.Next", "javascript", "Lorem Ipsum", "privacy Policy", "。"),
)


@pytest.fixture(scope="session")
def table() -> Callable[..., pa.Table]:
    """Texts, and metadata by name, to a table of documents."""

    def make(texts: Sequence[str], **metadata: Sequence[object]) -> pa.Table:
        documents = table_of((Document(text, str(number)) for number, text in enumerate(texts)), "test")
        for name, values in metadata.items():
            documents = documents.append_column(name, pa.array(values))
        return documents

    return make


@pytest.fixture(scope="session")
def reasons(table: Callable[..., pa.Table]) -> Callable[..., list[str | None]]:
    """Run a step over texts: the reason of each that is rejected, None for the others."""

    def run(step: Step, texts: Sequence[str], **metadata: Sequence[object]) -> list[str | None]:
        documents = table(texts, **metadata)
        outcome = step(documents)
        check(documents, outcome)
        found = dict(zip(outcome.rejected["id"].to_pylist(), outcome.rejected["reason"].to_pylist(), strict=True))
        return [found.get(str(number)) for number in range(len(texts))]

    return run


@pytest.fixture(scope="session")
def tokens_of() -> Callable[[str], list[str]]:
    """The kernel's tokens, which test_tokens.py holds against their own twin."""

    def split(text: str) -> list[str]:
        # Something before the text: what it ends with must not matter.
        data, offsets = text_buffers(pa.array(["before", text]))
        at, end, found = int(offsets[1]), int(offsets[2]), []
        while True:
            start, at = next_token(data, int(offsets[1]), at, end, character_classes(), mark_kinds())
            if start == end:
                return found
            found.append(bytes(data[start:at]).decode())

    return split


@pytest.fixture(scope="session")
def random_texts() -> st.SearchStrategy[list[str]]:
    """Texts of pieces that the rules are about, among anything."""
    piece = st.one_of(st.sampled_from(PIECES), st.sampled_from(PIECES), st.text(max_size=3))
    return st.lists(st.lists(piece, max_size=60).map("".join), min_size=1, max_size=4)


def check(documents: pa.Table, outcome: Outcome) -> None:
    """What holds of every outcome: nothing lost, order kept, rejected ones as they came in, the schema kept."""
    kept, rejected = outcome.kept["id"].to_pylist(), outcome.rejected["id"].to_pylist()
    everything = documents["id"].to_pylist()
    assert sorted(kept + rejected, key=int) == everything
    assert kept == sorted(kept, key=int)
    assert rejected == sorted(rejected, key=int)
    came_in = dict(zip(everything, documents["text"].to_pylist(), strict=True))
    assert outcome.rejected["text"].to_pylist() == [came_in[name] for name in rejected]
    for field in REQUIRED:
        assert outcome.kept.schema.field(field.name).equals(field)
        assert outcome.rejected.schema.field(field.name).equals(field)
