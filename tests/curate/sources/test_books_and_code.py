"""Gutenberg's books, source code and its licences, and mended text."""

import gzip
import importlib.metadata
import re
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.curate.document import Document, Outcome, table_of
from puna.curate.sources import licence_texts
from puna.curate.sources.code import CodeHeaders, CodeQuality, without_header
from puna.curate.sources.gutenberg import Gutenberg, strip_boilerplate, unwrap
from puna.curate.sources.licences import CodeLicences, detect_licence, is_kept
from puna.curate.sources.repair import RepairText


def documents(*texts: str, **metadata: str):  # type: ignore[no-untyped-def]
    return table_of([Document(text, str(n), metadata) for n, text in enumerate(texts)], "s")


def reasons(outcome: Outcome) -> dict[str, str]:
    return dict(zip(outcome.rejected["id"].to_pylist(), outcome.rejected["reason"].to_pylist(), strict=True))


BODY = "CHAPTER I\n\n" + "It was a long day in the mountains, and the llama would not go on.\n" * 3
NEW = (
    "The Project Gutenberg eBook of Wool\n\nThis ebook is for the use of anyone anywhere\n\n"
    "*** START OF THE PROJECT GUTENBERG EBOOK WOOL ***\n\nProduced by Somebody and the\nProofreading Team\n\n"
    f"{BODY}\n*** END OF THE PROJECT GUTENBERG EBOOK WOOL ***\n\nUpdated editions will replace the previous one\n"
    + "licence text\n"
    * 300
)
OLD = (
    "**The Project Gutenberg Etext of Wool**\n\n***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START***\n"
    "Why is this here?\n*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\n"
    f"{BODY}\nEnd of The Project Gutenberg Etext of Wool\n"
)


@pytest.mark.parametrize("book", [NEW, OLD, BODY], ids=["new", "old", "plain"])
def test_boilerplate(book: str) -> None:
    assert strip_boilerplate(book).strip() == BODY.strip()


def test_gutenberg_step() -> None:
    outcome = Gutenberg()(documents(NEW, BODY, NEW.replace(BODY, "")))
    kept = outcome.kept["text"].to_pylist()
    assert kept[0] == kept[1]
    assert kept[0].count("\n") == 2
    assert reasons(outcome) == {"2": "no text between header and footer"}
    assert outcome.counts == {"books with boilerplate": 2}
    assert Gutenberg(unwrap=False)(documents(NEW)).kept["text"].to_pylist() == [BODY.strip()]


def test_verse_lists_and_headings_keep_their_lines() -> None:
    prose = (
        "This is a line of prose that was wrapped at some width, and so it\n"
        "goes on in the next one, which is not short either, until the end\nof it.\n"
    )
    verse = "The llama went\nup to the snow\nand was content.\n"
    items = "  indented line of something that is as long as all the others are\n  another one\n- item\n"
    lines = unwrap(f"{prose * 3}\n{verse}\n{items}").split("\n")
    assert lines[0].endswith("until the end of it.")
    assert "The llama went" in lines
    assert "  another one" in lines
    assert "- item" in lines


@settings(deadline=None)
@given(st.lists(st.text(st.sampled_from("ab -\n")), max_size=30))
def test_unwrapping_keeps_every_word(parts: list[str]) -> None:
    text = "\n".join(parts)
    assert re.sub(r"\s", "", unwrap(text)) == re.sub(r"\s", "", text)


@pytest.mark.parametrize(("name", "share"), [("war_and_peace_gutenberg", 0.95), ("wizard_of_oz", 0.85)])
def test_real_books_have_whole_paragraphs(name: str, share: float, real_data: Path) -> None:
    """Lines that end like sentences: a quarter before, nearly all after."""
    with gzip.open(real_data / "corpora" / f"{name}.txt.gz", "rt", encoding="utf-8") as file:
        book = file.read()

    def ended(text: str) -> float:
        lines = [line.rstrip() for line in text.split("\n") if line.strip()]
        return sum(line[-1] in ".!?\"”’:;—'" for line in lines) / len(lines)

    (text,) = Gutenberg()(documents(book)).kept["text"].to_pylist()
    assert ended(book) < 0.3
    assert ended(text) > share


def test_licences(real_data: Path) -> None:
    folder = real_data / "curation" / "cs336_dedup" / "documents_with_fuzzy_duplicates"
    assert {path.stem: detect_licence(path.read_text()) for path in folder.iterdir()} == {
        "pytorch_license": "BSD-3-Clause",
        "rails_mit_license": "MIT",
        "react_mit_license": "MIT",
    }


def test_licence_files_of_installed_packages() -> None:
    """Against what the packages declare, where that is one plain SPDX identifier of those that are told exactly."""
    exact = {"Apache-2.0", "MIT", "BSD-3-Clause", "BSD-2-Clause"}
    told: list[tuple[str, str, str | None]] = []
    for package in importlib.metadata.distributions():
        declared = package.metadata.get("License-Expression") or package.metadata.get("License")
        names = [file for file in package.files or [] if re.search(r"dist-info/(licenses/)?LICENSE[.a-z]*$", str(file))]
        if declared in exact and len(names) == 1:
            text = Path(str(package.locate_file(names[0]))).read_text(encoding="utf-8", errors="replace")
            told.append((package.metadata["Name"], declared, detect_licence(text)))
    wrong = [one for one in told if one[1] != one[2]]
    assert len(told) >= 20
    assert len(wrong) <= 0.15 * len(told), wrong


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("# SPDX-License-Identifier: MIT OR GPL-2.0\nimport x", "MIT OR GPL-2.0"),
        ("# " + licence_texts.APACHE_2_HEADER.strip().replace("\n", "\n# "), "Apache-2.0"),
        ("/* This program is free software under the terms of the GNU General Public License */", "GPL"),
        ("/* GNU Lesser General Public License; MIT License */", "LGPL"),
        ("# Use of this source code is governed by a BSD-style license", "BSD"),
        ("# Released under the MIT License.", "MIT"),
        ("# Copyright X. All rights reserved. Confidential.", "proprietary"),
        ("print('hello')", None),
    ],
)  # fmt: skip
def test_heads_of_files(text: str, licence: str | None) -> None:
    assert detect_licence(text, in_header=True) == licence


def test_kept_licences() -> None:
    assert is_kept("MIT OR GPL-2.0", ("MIT",))
    assert is_kept("(Apache-2.0 WITH LLVM-exception) AND MIT", ("MIT", "Apache-2.0"))
    assert not is_kept("MIT AND GPL-2.0", ("MIT",))
    table = documents("x = 1", "# under the MIT license\nx", "# GNU General Public License\nx", licence="BSD-3-Clause")
    outcome = CodeLicences()(table)
    assert outcome.kept["licence"].to_pylist() == ["BSD-3-Clause", "MIT"]
    assert reasons(outcome) == {"2": "licence not kept"}
    assert reasons(CodeLicences()(documents("x = 1"))) == {"0": "no licence found"}
    assert reasons(CodeLicences(kept=("MIT",))(table)) == {"0": "licence not kept", "2": "licence not kept"}


def test_code_quality() -> None:
    table = documents("x = 1\n" * 10, "a" * 1001 + "\n" + "\n" * 50, ("b" * 101 + "\n") * 3, "+-*/ x\n" * 5, "")
    assert reasons(CodeQuality()(table)) == {
        "1": "a line of more than 1000 characters",
        "2": "lines of more than 100 characters on average",
        "3": "less than 0.25 letters and digits",
        "4": "less than 0.25 letters and digits",
    }
    with pytest.raises(ValueError, match="min_alphanumeric_share"):
        CodeQuality(min_alphanumeric_share=2)


@settings(deadline=None)
@given(st.lists(st.text(st.sampled_from("a9 é語\n\U0001f600+"), max_size=60), max_size=5))
def test_code_quality_equals_its_plain_twin(texts: list[str]) -> None:
    step = CodeQuality(max_line_characters=8, max_mean_line_characters=5, min_alphanumeric_share=0.4)

    def reason(text: str) -> str | None:
        lines = text.removesuffix("\n").split("\n") if text else []
        characters = sum(map(len, lines))
        if max(map(len, lines), default=0) > 8:
            return "a line of more than 8 characters"
        if characters > 5 * len(lines):
            return "lines of more than 5 characters on average"
        alphanumeric = sum(unicodedata.category(character)[0] in "LN" for character in text)
        return "less than 0.4 letters and digits" if alphanumeric / max(characters, 1) < 0.4 else None

    found = reasons(step(documents(*texts)))
    assert found == {str(n): why for n, text in enumerate(texts) if (why := reason(text))}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/*\n * Copyright 2020 X\n */\n\nint x;\n", "int x;\n"),
        ("#!/bin/sh\n# Copyright X\n# more\n\n# About this script.\nls\n", "#!/bin/sh\n# About this script.\nls\n"),
        ("// Licensed under MIT\n// a\npackage x\n", "package x\n"),
        ("<?php\n/* (c) 2019 X */\necho 1;\n", "<?php\necho 1;\n"),
        ("# A module about licences of drivers\nx = 1\n", "# A module about licences of drivers\nx = 1\n"),
        ("/* Sorts. */\nint x; /* copyright */\n", "/* Sorts. */\nint x; /* copyright */\n"),
        ("/* unclosed copyright", "/* unclosed copyright"),
        ("#include <a.h>\n", "#include <a.h>\n"),
    ],
)
def test_headers(text: str, expected: str) -> None:
    assert without_header(text) == expected


def test_header_step() -> None:
    header = "".join(f"# {line}\n" for line in licence_texts.MIT.strip().split("\n"))
    outcome = CodeHeaders()(documents(f"{header}\nx = 1\n", header, "x = 2\n"))
    assert outcome.kept["text"].to_pylist() == ["x = 1\n", "x = 2\n"]
    assert reasons(outcome) == {"1": "nothing but a header"}
    assert outcome.counts == {"headers removed": 2}


@pytest.mark.parametrize(
    "piece", ["/*", "#", "# \n", " ", "\n", "//x\n", "<!--", "gnu ", "copyright ", "*** START OF "]
)
def test_time_is_linear(piece: str) -> None:
    table = documents(piece * (200_000 // len(piece)) + "x")
    start = time.process_time()
    CodeLicences()(table)
    CodeHeaders()(table)
    Gutenberg()(table)
    assert time.process_time() - start < 5


def test_mojibake_is_mended() -> None:
    outcome = RepairText()(documents("It’s “fine” & ﬁne &amp; ｆｕｌｌ", "Itâ€™s SchÃ¶n", "日本語"))
    assert outcome.kept["text"].to_pylist() == ["It’s “fine” & ﬁne &amp; ｆｕｌｌ", "It’s Schön", "日本語"]
    assert outcome.counts == {"documents repaired": 1}
    assert outcome.rejected.num_rows == 0
