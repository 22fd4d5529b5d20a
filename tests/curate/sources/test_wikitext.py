"""Wikitext to text, beside mwparserfromhell."""

import re
import time
from collections import Counter
from pathlib import Path

import mwparserfromhell
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.curate.document import Document, table_of
from puna.curate.readers.dumps import WikipediaReader
from puna.curate.sources.wikitext import Wikitext, clean_wikitext


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("'''Llamas''' are ''[[camelid]]s'' of the [[Andes|high Andes]].", "Llamas are camelids of the high Andes."),
        ("{{Infobox|a={{b|{{c}}}}|d=[[e]]}}Text", "Text"),
        ("a<ref name=x>note [[b]]</ref> c<ref name=x /> d.", "a c d."),
        ("a <!-- hidden -->b<!-- never closed", "a b"),
        ("{| class=x\n|-\n| a || {{b|}}\n{|\n| inner\n|}\n|}\nText", "Text"),
        ("[[File:x.jpg|thumb|a [[link]] in a caption]]Text [[Category:Dogs]]", "Text"),
        ("[[Datei:x.jpg|mini]]Text[[Kategorie:Hunde]] [[:Category:Dogs]]", "Text Category:Dogs"),
        ("see [http://x.org the page], [https://y.org] and https://z.org", "see the page,  and https://z.org"),
        ("Text\n[[fr:Lama]]\n[[zh-min-nan:Lama]]", "Text"),
        ("[[Lama (animal)|]] and [[Help:Lama|]]", "Lama and Lama"),
        ("H\n== Life ==\n=== Youth ===\nBorn.\n== Notes ==\n{{reflist}}\n", "H\n\nLife\n\nYouth\n\nBorn."),
        ("H\n== Notes ==\n{{reflist}}\n== Links ==\n* [[a]]\n", "H\n\nLinks\n\na"),
        ("* one\n** two\n# three\n: four", "one\ntwo\nthree\nfour"),
        ("a<br/>b H<sub>2</sub>O &amp; &lt;tag&gt; <nowiki>x</nowiki>", "a\nb H2O & <tag> x"),
        ("{{lang|grc|ἀναρχία}} is {{convert|5|km|mi}} ({{IPA|x}})", "ἀναρχία is 5 km"),
        ("{{transl|grc|ISO|anarchia}} {{nowrap|a b}} {{lang-fr|lama}}", "anarchia a b lama"),
        ("an {{unclosed template and [[unclosed link", "an {{unclosed template and unclosed link"),
        ("a }} b ]] c |} d", "a }} b  c |} d"),
        ("__NOTOC__\nText\n----\nMore", "Text\n\nMore"),
        ("<gallery>\nFile:a.jpg|x\n</gallery>Text<gallery>lost", "Textlost"),
        ("", ""),
    ],
)  # fmt: skip
def test_markup(text: str, expected: str) -> None:
    assert clean_wikitext(text) == expected


def test_the_step() -> None:
    documents = [
        Document("A [[lama]].", "1", {"title": "Lama"}),
        Document("#REDIRECT [[Lama]]", "2", {"title": "Llama"}),
        Document("#WEITERLEITUNG [[Lama]]", "3", {"title": "Guanako"}),
        Document("{{stub}}", "4", {"title": "Stub"}),
    ]
    outcome = Wikitext()(table_of(documents, "w"))
    assert outcome.kept["text"].to_pylist() == ["Lama\n\nA lama."]
    assert outcome.rejected["reason"].to_pylist() == ["redirect", "redirect", "no text besides markup"]
    assert outcome.rejected["text"].to_pylist()[2] == "{{stub}}"
    assert Wikitext(title_column="")(table_of(documents, "w")).kept["text"].to_pylist() == ["A lama."]


BRACKETS = ["[[", "]]", "{{", "}}", "|", "{|\n", "\n|}", "<ref>", "</ref>", "<!--", "-->", "[http://x ", "]", "(", ")"]
PIECES = [*BRACKETS, "\n", "== ", "'''", "a", " ", "File:", "* ", "&lt;"]


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=60))
def test_any_text_is_cleaned_and_plain_text_stays(parts: list[str]) -> None:
    cleaned = clean_wikitext("".join(parts))
    assert cleaned == cleaned.strip()
    assert "\n\n\n" not in cleaned
    words = "".join(part for part in parts if part in {"a", " ", "\n"})
    assert Counter(clean_wikitext(words).split()) == Counter(words.split())


@pytest.mark.parametrize("piece", [*PIECES, "{{lang|", "[[a|", "<ref name=", "<b ", "__A", "&amp", "[http://a"])
def test_time_is_linear(piece: str) -> None:
    start = time.process_time()
    clean_wikitext(piece * (200_000 // len(piece)) + "x")
    assert time.process_time() - start < 3


def oracle(text: str) -> str:
    code = mwparserfromhell.parse(text)
    for link in code.filter_wikilinks(recursive=True):
        if re.match(r"(?i)\s*(file|image|category|media)\s*:|[a-z]{2,3}(-[a-z]+)?:", str(link.title)) and code.contains(
            link
        ):
            code.remove(link)
    dropped = {"ref", "table", "gallery", "references", "timeline"}
    for tag in code.filter_tags(matches=lambda tag: str(tag.tag).lower() in dropped):
        if code.contains(tag):
            code.remove(tag)
    return str(code.strip_code(normalize=True, collapse=True))


def test_real_articles_equal_the_parsers_and_come_faster(real_data: Path) -> None:
    reader = WikipediaReader(path=real_data / "corpora" / "enwiki_pages_articles_shortened.xml.bz2")
    articles = [item for item in reader.read(reader.units()[0]) if isinstance(item, Document)]
    sample = [article.text for article in articles if len(article.text) < 40_000][:12]
    start = time.process_time()
    ours = [clean_wikitext(text) for text in sample]
    middle = time.process_time()
    theirs = [oracle(text) for text in sample]
    end = time.process_time()
    scores = []
    for mine, other in zip(ours, theirs, strict=True):
        counts = [Counter(re.findall(r"\w+", text.lower())) for text in (mine, other)]
        scores.append(2 * sum((counts[0] & counts[1]).values()) / sum(map(sum, (c.values() for c in counts))))
    # Seen on 25 articles: 0.995, and 50 times faster.
    assert sum(scores) / len(scores) > 0.98
    assert (end - middle) > 5 * (middle - start)

    outcome = Wikitext()(table_of(articles, "w"))
    assert outcome.kept.num_rows == 106
    text = "\n".join(outcome.kept["text"].to_pylist())
    assert not re.search(r"\[\[|\]\]|<ref|'''|\{\||^==|<!--", text)
    assert text.count("{{") + text.count("}}") < 20
