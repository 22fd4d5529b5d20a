"""Wikipedia and Stack Exchange dumps."""

import bz2
import contextlib
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.curate.document import Document, Rejected
from puna.curate.readers import dumps
from puna.curate.readers.bounds import Unreadable
from puna.curate.readers.dumps import WikipediaReader, read_elements
from puna.curate.readers.stackexchange import StackExchangeReader
from puna.runtime.errors import InputError

HEAD = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/" xml:lang="de"><siteinfo/>'


def page(number: int, text: str = "Text &amp; mehr", space: int = 0, more: str = "") -> str:
    return (
        f"<page><title>Seite {number}</title><ns>{space}</ns><id>{number}</id>{more}<revision><id>9</id>"
        f'<timestamp>2020-01-01T00:00:00Z</timestamp><text xml:space="preserve">{text}</text></revision></page>\n'
    )


def test_pages(tmp_path: Path) -> None:
    pages = [
        page(1),
        page(2, space=1),
        page(3, more='<redirect title="x" />'),
        page(4, "a & b"),
        page(5, ""),
        page(6)[:-30],
    ]
    (tmp_path / "dewiki.xml.bz2").write_bytes(bz2.compress((HEAD + "".join(pages)).encode()))
    (tmp_path / "frwiki.xml").write_text(page(1))
    reader = WikipediaReader(path=tmp_path, languages=("de", "en"))
    assert reader.units() == ["dewiki.xml.bz2"]
    with pytest.raises(InputError, match=r"none of the languages.*It holds de, fr"):
        WikipediaReader(path=tmp_path, languages=("en",)).units()
    items = list(reader.read("dewiki.xml.bz2"))
    assert items[0] == Document(
        "Text & mehr",
        "de/1",
        {
            "title": "Seite 1",
            "language": "de",
            "url": "https://de.wikipedia.org/wiki/Seite_1",
            "date": "2020-01-01T00:00:00Z",
        },
    )
    assert [item.reason for item in items[1:] if isinstance(item, Rejected)] == [
        "not an article",
        "redirect",
        "malformed XML",
        "empty",
        "cut-off file",
    ]


def test_the_streams_of_a_multistream_dump_are_read_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = [HEAD, *("".join(page(10 * n + m) for m in range(10)) for n in range(30)), "</mediawiki>"]
    (tmp_path / "dewiki-multistream.xml.bz2").write_bytes(b"".join(bz2.compress(part.encode()) for part in streams))
    whole = list(WikipediaReader(path=tmp_path).read("dewiki-multistream.xml.bz2"))
    monkeypatch.setattr(dumps, "BYTES_PER_UNIT", 777)
    reader = WikipediaReader(path=tmp_path)
    units = reader.units()
    assert len(units) > 5
    assert [item for unit in units for item in reader.read(unit)] == whole
    assert [item.id for item in whole] == [f"de/{n}" for n in range(300)]


@settings(deadline=None)
@given(st.lists(st.sampled_from([b"<a>", b"</a>", b"x", b"<", b"yy", b"long"]), max_size=12))
def test_elements_equal_a_plain_search(parts: list[bytes]) -> None:
    content = b"".join(parts).replace(b"long", b"z" * 70_000)
    expected: list[bytes] = []
    position = 0
    while (start := content.find(b"<a>", position)) >= 0 and (end := content.find(b"</a>", start)) >= 0:
        expected.append(content[start : end + 4])
        position = end + 4
    found: list[bytes | None] = []
    cut_off = content.find(b"<a>", position) >= 0
    with pytest.raises(Unreadable, match="cut-off file") if cut_off else contextlib.nullcontext():
        found.extend(read_elements(io.BytesIO(content), b"<a>", b"</a>", 10**6))
    assert found == expected


def test_real_wikipedia(real_data: Path) -> None:
    reader = WikipediaReader(path=real_data / "corpora" / "enwiki_pages_articles_shortened.xml.bz2")
    items = [item for unit in reader.units() for item in reader.read(unit)]
    reasons = [item.reason for item in items if isinstance(item, Rejected)]
    assert len(items) == 206
    assert (reasons.count("redirect"), reasons.count("not an article")) == (99, 1)
    assert items[-1].id.startswith("en/")


POSTS = """<?xml version="1.0" encoding="utf-8"?>
<posts>
  <row Id="2" PostTypeId="2" ParentId="1" Score="3" Body="&lt;p&gt;worse&lt;/p&gt;" />
  <row Id="1" PostTypeId="1" Score="5" CreationDate="2020" Title="Why?" Tags="&lt;hay&gt;&lt;wool&gt;"
    Body="&lt;p&gt;Tell me &lt;b&gt;why&lt;/b&gt;.&lt;/p&gt;" />
  <row Id="3" PostTypeId="2" ParentId="1" Score="30"
    Body="&lt;p&gt;So:&lt;/p&gt;&lt;pre&gt;&lt;code&gt;if a:&#xA;    b&lt;/code&gt;&lt;/pre&gt;" />
  <row Id="4" PostTypeId="1" Score="0" Title="Alone" Body="x" />
  <row Id="5" PostTypeId="2" ParentId="77" Score="0" Body="to nobody" />
  <row Id="6" PostTypeId="5" Score="0" Body="about a tag" />
  <row Id="x" PostTypeId="1" Score="0" Body="" />
  <row Id="9999999999999999999999" PostTypeId="1" Score="0" Body="" />
  <row Id="7" PostTypeId="2" ParentId="1" Score="3" Body="same score, later" />
</posts>
"""


def test_questions_with_their_answers_best_first(tmp_path: Path) -> None:
    (tmp_path / "llamas.stackexchange.com").mkdir()
    (tmp_path / "llamas.stackexchange.com" / "Posts.xml").write_text(POSTS)
    (tmp_path / "other.org-Posts.xml").write_text("<posts></posts>")
    reader = StackExchangeReader(path=tmp_path, sites=("llamas.stackexchange.com",))
    assert reader.units() == ["llamas.stackexchange.com/Posts.xml"]
    items = list(reader.read(reader.units()[0]))
    assert items == [
        Rejected("llamas.stackexchange.com/Posts.xml#6", "malformed XML"),
        Rejected("llamas.stackexchange.com/Posts.xml#7", "malformed XML"),
        Document(
            "Q: Why?\n\nTell me why.\n\nA: So:\n\nif a:\n    b\n\nA: worse\n\nA: same score, later",
            "llamas.stackexchange.com/q/1",
            {
                "site": "llamas.stackexchange.com",
                "url": "https://llamas.stackexchange.com/q/1",
                "tags": "hay,wool",
                "date": "2020",
                "score": 5,
                "num_answers": 3,
            },
        ),
        Rejected("llamas.stackexchange.com/q/4", "fewer answers than min_answers"),
        Rejected("llamas.stackexchange.com/q/77", "answers without a question"),
    ]
    with pytest.raises(InputError, match=r"none of the sites.*llamas.*other\.org"):
        StackExchangeReader(path=tmp_path, sites=("beer.stackexchange.com",)).units()


def test_real_stack_exchange(real_data: Path) -> None:
    reader = StackExchangeReader(path=real_data / "corpora" / "stackexchange" / "beer_Posts.xml.gz")
    items = [item for unit in reader.units() for item in reader.read(unit)]
    kept = [item for item in items if isinstance(item, Document)]
    assert (len(items), len(kept)) == (663, 644)
    assert not any("<p>" in item.text or "&lt;" in item.text for item in kept)
    assert kept[0].text.startswith("Q: What is a citra hop")
    assert max(item.metadata["num_answers"] for item in kept) > 10
