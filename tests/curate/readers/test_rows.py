"""JSON lines, CSV and Parquet, and the text that comes out of them."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.curate.document import Document, Rejected, table_of
from puna.curate.readers import rows
from puna.curate.readers.bounds import Bounds
from puna.curate.readers.rows import CsvReader, JsonlReader, ParquetReader
from puna.curate.readers.text import MetadataOf, decode, to_document
from puna.runtime.errors import InputError


def read(reader: JsonlReader | CsvReader | ParquetReader) -> list[Document | Rejected]:
    return [item for unit in reader.units() for item in reader.read(unit)]


@pytest.mark.parametrize("pack", [None, gzip.compress, zstandard.ZstdCompressor().compress])
def test_jsonl(pack, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    lines = [
        b'{"id": 7, "text": "one\\r\\ntwo", "score": 1.5, "url": "u"}',
        b"",
        b'{"text": "no name"}',
        b'{"id": "x", "text": " "}',
        b'{"id": "y", "body": "a"}',
        b"{broken",
        b"[1]",
        b'{"id": "n", "text": "a\\u0000b"}',
        b'{"id": "s", "text": "lone \\ud800 and pair \\ud83d\\ude00"}',
        b"[" * 100_000,
        b'{"id": "w", "text": "\xff"}',
        b'{"id": "last", "text": "no line end", "score": "high", "url": 3}',
    ]
    content = b"\n".join(lines)
    name = "a.jsonl" if pack is None else "a.jsonl.gz" if pack is gzip.compress else "a.jsonl.zst"
    (tmp_path / name).write_bytes(pack(content) if pack else content)
    (tmp_path / "other.txt").write_text("not read")
    offset = len(lines[0]) + 2
    items = read(JsonlReader(path=tmp_path, metadata=("score", "url")))
    assert items == [
        Document("one\ntwo", "7", {"score": 1.5, "url": "u"}),
        Document("no name", f"{name}:{offset}", {}),
        Rejected("x", "empty"),
        Rejected("y", "no text"),
        *[
            Rejected(item.id, reason)
            for item, reason in zip(items[4:6], ["not JSON", "not a JSON object"], strict=True)
        ],
        Rejected("n", "binary"),
        Document("lone \ufffd and pair \U0001f600", "s"),
        Rejected(items[8].id, "not JSON"),
        Rejected(items[9].id, "not JSON"),
        Document("no line end", "last"),
    ]
    table_of([item for item in items if isinstance(item, Document)], "s")


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 60), max_size=40), size=st.integers(1, 200))
def test_ranges_of_a_file_together_give_every_line_once(lengths: list[int], size: int, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("ranges") / "a.jsonl"
    path.write_bytes(b"".join(b'{"text": "%s"}\n' % (b"x" * length or b"-") for length in lengths))
    reader = JsonlReader(path=path)
    total = path.stat().st_size
    parts = [f"a.jsonl//{start}-{min(start + size, total)}" for start in range(0, total, size)]
    assert [item for part in parts for item in reader.read(part)] == list(reader.read("a.jsonl"))


def test_large_files_have_several_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "BYTES_PER_UNIT", 1000)
    documents = [{"id": str(n), "text": f"text {n} " * 20} for n in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    pq.write_table(pa.Table.from_pylist(documents), tmp_path / "a.parquet", row_group_size=10)
    for reader in (JsonlReader(path=tmp_path), ParquetReader(path=tmp_path)):
        assert len(reader.units()) > 5
        assert reader.files(reader.units()[1]) == reader.files(reader.units()[0])
        assert [item.id for item in read(reader)] == [str(n) for n in range(100)]


def test_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes('id,text,lang\n1,"two\nlines",de\n,Ärger,de\n3\n'.encode("cp1252"))
    assert read(CsvReader(path=tmp_path, metadata=("lang",))) == [
        Document("two\nlines", "1", {"lang": "de"}),
        Document("Ärger", "a.csv:2", {"lang": "de"}),
        Rejected("3", "no text"),
    ]
    (tmp_path / "a.csv").unlink()
    (tmp_path / "b.tsv").write_text("name\tbody\nx\ta, b\n")
    reader = CsvReader(path=tmp_path, delimiter="\t", text_field="body", id_field="name")
    assert read(reader) == [Document("a, b", "x")]
    with pytest.raises(ValueError, match="one character"):
        CsvReader(path=tmp_path, delimiter="::")


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None, "c" * 50], "url": ["u", "v", None], "n": [1, 2, 3]}), path)
    bounds = Bounds(max_document_bytes=20)
    assert read(ParquetReader(path=path, metadata=("url", "n"), bounds=bounds)) == [
        Document("a", "a.parquet:0", {"url": "u", "n": 1}),
        Rejected("a.parquet:1", "no text"),
        Rejected("a.parquet:2", "larger than max_document_bytes"),
    ]
    with pytest.raises(InputError, match=r"no column 'body'.*text, url, n"):
        read(ParquetReader(path=path, text_field="body"))
    path.write_bytes(path.read_bytes()[:-20])
    assert read(ParquetReader(path=path)) == [Rejected("a.parquet", "damaged Parquet file")]


def test_nothing_there_is_a_readable_mistake(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no file that ends in \.jsonl"):
        JsonlReader(path=tmp_path).units()
    with pytest.raises(InputError, match="There is nothing at"):
        JsonlReader(path=tmp_path / "absent").units()


def test_decode() -> None:
    german = "Grüße aus Österreich, schöne Straße. " * 5
    japanese = "日本語の文章です。とても長い文章になります。" * 5
    assert decode(german.encode()) == german
    assert decode(german.encode("utf-8-sig")) == german
    assert decode(german.encode("utf-16")) == german
    assert decode(german.encode("latin-1"), "iso-8859-1") == german
    assert decode(german.encode("latin-1")) == german
    assert decode(german.encode(), "iso-8859-1") == german, "a wrong declaration"
    assert decode(japanese.encode("shift_jis"), "x-sjis") == japanese
    assert decode(japanese.encode("iso-2022-jp"), "iso-2022-jp") == japanese
    assert decode(japanese.encode("euc-jp"), "no-such-charset") == japanese
    assert decode(f'<meta charset="gbk">{"汉字" * 20}'.encode("gbk"), html=True).endswith("汉字")
    assert decode(b"caf\xe9 \x81\x8d", "zip") != ""


@settings(deadline=None)
@given(st.text(), st.integers(1, 50))
def test_documents_fit_into_columns(text: str, max_bytes: int) -> None:
    made = to_document(text, "d", max_bytes, {})
    if isinstance(made, Document):
        assert len(made.text.encode()) <= max_bytes
        assert not {"\0", "\r"} & set(made.text)
        assert made.text.strip()
        table_of([made], "s")
    else:
        assert made.reason in {"empty", "binary", "larger than max_document_bytes"}


def test_metadata_has_one_type_for_each_name() -> None:
    of = MetadataOf(("a", "b"))
    assert of({"a": 1, "b": "x", "c": 2}) == {"a": 1, "b": "x"}
    assert of({"a": "1", "b": None}) == {}
    assert of({"a": 2**63, "b": ["x"]}) == {}
    assert of({"a": True, "b": "\ud800"}) == {"b": "\ufffd"}
