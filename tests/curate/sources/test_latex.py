"""LaTeX papers: comments, macros, head and bibliography."""

import contextlib
import gzip
import itertools
import json
import re
import time
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.curate.document import Document, table_of
from puna.curate.readers.arxiv import ArxivReader
from puna.curate.sources.latex import Latex, remove_bibliography, remove_comments
from puna.curate.sources.latex_macros import TooLong, expand_macros

PIECES = [*"\\{}[]#1 %$a\n", r"\newcommand", r"\def", r"\let", r"\a", r"\b", r"\begin{verbatim}", r"\verb|"]
"""What macros are made of."""

OPENINGS = [
    "%",
    " ",
    r"\bibliography[",
    "{",
    r"\newcommand{\a}{",
    r"\begin{verbatim}",
    r"\verb|",
    r"\iffalse ",
    r"\input{",
]
"""What may be opened and never closed."""


def expand(text: str) -> str:
    return expand_macros(text, 100_000)


def run(*texts: str, **settings: bool) -> tuple[list[str], list[str]]:
    outcome = Latex(**settings)(table_of([Document(text, str(n)) for n, text in enumerate(texts)], "s"))  # type: ignore[arg-type]
    return outcome.kept["text"].to_pylist(), outcome.rejected["reason"].to_pylist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\newcommand{\R}{\mathbb{R}}$x \in \R^n$", r"$x \in \mathbb{R}^n$"),
        (r"\newcommand\R{\mathbb R}$\R x$", r"$\mathbb Rx$"),
        (r"\newcommand{\norm}[1]{\|#1\|}$\norm{x+y}$ $\norm x$", r"$\|x+y\|$ $\|x\|$"),
        (r"\newcommand{\inner}[2][2]{\la#2\ra_{#1}}$\inner{a}$ $\inner[3]{b}$", r"$\la a\ra_{2}$ $\la b\ra_{3}$"),
        (r"\def\pair#1#2{(#1,#2)}\pair{a}{b} \pair cd", "(a,b) (c,d)"),
        (r"\DeclareMathOperator{\tr}{tr}$\tr A$", r"$\operatorname{tr}A$"),
        (r"\DeclareMathOperator*{\amax}{arg\,max}$\amax_x$", r"$\operatorname{arg\,max}_x$"),
        (r"\newcommand{\ie}{i.e.\xspace}\ie this, \ie, that", "i.e. this, i.e., that"),
        (r"\newcommand{\ie}{i.e.}\ie{} this", "i.e. this"),
        (r"\newcommand{\a}{\b}\newcommand{\b}{c}\a", "c"),
        (r"\newcommand{\a}{old}\a, \renewcommand{\a}{new}\a", "old, new"),
        (r"\let\old\vec\renewcommand{\vec}[1]{\old{\mathbf{#1}}}\vec{x}", r"\vec{\mathbf{x}}"),
        (r"\let\eps\varepsilon $\eps a$", r" $\varepsilon a$"),
        (r"\let\eps=\varepsilon$\eps$", r"$\varepsilon$"),
        (r"\providecommand{\a}{1}\providecommand{\a}{2}\a", "1"),
        (r"\newcommand{\E}[1]{\mathrm{E}\left[#1\right]}\E{\frac{a}{b}}", r"\mathrm{E}\left[\frac{a}{b}\right]"),
        (r"\newcommand{\sq}[1]{#1^2}\newcommand{\cube}[1]{\sq{#1}#1}\cube{\sq{x}}", "x^2^2x^2"),
        (r"\newcommand{\a}{b}\verb|\a|", r"\verb|\a|"),
        (r"\newcommand{\a}{b}\begin{verbatim}\a\end{verbatim}", r"\begin{verbatim}\a\end{verbatim}"),
        (r"\newcommand{\a}[1]{\@ifnextchar x{#1}{}}\a{b}", r"\a{b}"),
        (r"\def\a(#1){x}\a(b)", r"\a(b)"),
        (r"\renewcommand{\section}{big}\section{A}", r"\section{A}"),
        (r"\newcommand{\a}{1}\ab \a1", r"\ab 11"),
    ],
)  # fmt: skip
def test_macros(text: str, expected: str) -> None:
    assert expand(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        r"\newcommand{\a}{\a}\a b",
        r"\newcommand{\a}[1]{\a}\a" + "x" * 3000,
        r"\def\a{x\a}\a",
        r"\newcommand{\a}{\b}\newcommand{\b}{\a}\a",
        r"\newcommand{\a}",
        r"\newcommand",
        r"\def",
        r"\let",
        r"\newcommand{\a}[9]{#1#9}\a",
        r"\newcommand{\a}[x]{#1}\a{b}",
        "{" * 5000,
        "\\",
        "#1##",
    ],
)
def test_macros_that_go_wrong_end(text: str) -> None:
    with contextlib.suppress(TooLong):
        assert len(expand(text)) < 100_000


@pytest.mark.parametrize("text", [r"\newcommand{\a}{\a}\a b", r"\newcommand{\a}{\b}\newcommand{\b}{\a}\a"])
def test_a_macro_for_itself_is_stopped(text: str) -> None:
    with pytest.raises(TooLong):
        expand(text)


def test_macros_that_explode_are_stopped() -> None:
    names = "abcdefghijklmnopqrstuvwxyz"
    doubling = "".join(rf"\def\{a}{{\{b}\{b}}}" for a, b in itertools.pairwise(names)) + r"\def\z{lol}"
    start = time.process_time()
    assert run(rf"\section{{A}}{doubling} \a") == ([], ["macros expand too far"])
    assert time.process_time() - start < 10


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_any_text_is_gone_through(parts: list[str]) -> None:
    text = "".join(parts)
    try:
        expanded = expand_macros(text, 2000)
    except TooLong:
        return
    if not re.search(r"\\(?:newcommand|def|let)", text):
        assert expanded.replace(" ", "") == text.replace(" ", "")


def test_comments() -> None:
    text = (
        "% a line\n  % another\nkept 50\\% of it % not this\n\\\\% nor this\n"
        "\\verb|%| \\begin{verbatim}\n% code\n\\end{verbatim}\n"
        "\\begin{comment}\nhidden\n\\end{comment}a\\iffalse hidden \\fi b"
    )
    assert remove_comments(text) == (
        "kept 50\\% of it\n\\\\\n\\verb|%| \\begin{verbatim}\n% code\n\\end{verbatim}\na b"
    )


def test_bibliography() -> None:
    text = (
        "Text.\n\\bibliographystyle{plain}\n\\bibliography{a,b}\n\\begin{thebibliography}{9}\\bibitem{x} X\n"
        "\\end{thebibliography}\n\\section{Appendix} A\n\\end{document} rest"
    )
    assert remove_bibliography(text) == "Text.\n\n\\section{Appendix} A"


def test_the_step() -> None:
    head = r"\documentclass{article}\newcommand{\w}{wool}\begin{document}\begin{abstract}A\end{abstract}"
    kept, reasons = run(
        head + r"intro\section{One} \w\end{document}",
        head + r" letter about \w",
        "just words",
        r"\begin{document}\end{document}",
    )
    assert kept == [r"\section{One} wool", "letter about wool"]
    assert reasons == ["not LaTeX", "no text after the first section"]
    assert run(head + r"\section{One}\w", expand_macros=False)[0] == [r"\section{One}\w"]
    with pytest.raises(ValueError, match="max_growth"):
        Latex(max_growth=0)


@pytest.mark.parametrize("piece", OPENINGS)
def test_time_is_linear(piece: str) -> None:
    start = time.process_time()
    run("\\section{A} " + piece * (300_000 // len(piece)) + "x")
    assert time.process_time() - start < 5


def test_a_real_book(real_data: Path) -> None:
    reader = ArxivReader(path=real_data / "corpora" / "latex" / "hott_book.tar.gz")
    (book,) = reader.read(reader.units()[0])
    outcome = Latex()(table_of([book], "arxiv"))  # type: ignore[list-item]
    (text,) = outcome.kept["text"].to_pylist()
    assert text.startswith("\\chapter*{Preface}")
    assert not re.search(r"\\(?:newcommand|def|let)\b", text)
    plain = remove_comments(book.text)  # type: ignore[union-attr]
    names = set(re.findall(r"\\(?:newcommand|DeclareMathOperator)\*?\{?(\\[a-zA-Z]+)", plain))
    uses = {source: sum(name in names for name in re.findall(r"\\[a-zA-Z]+", source)) for source in (plain, text)}
    assert len(names) > 200
    assert uses[plain] > 2000
    # What is left are macros that look at what follows them (\@ifnextchar).
    assert uses[text] < 0.15 * uses[plain]
    # Its own macro for judgemental equality, spelled out: \newcommand{\jdeq}{\equiv}.
    assert r"\jdeq" not in text
    assert text.count(r"\equiv") > 200


def test_what_is_already_clean_stays_as_it_is(real_data: Path) -> None:
    """RedPajama's papers have been through the same cleaning; little is left to do."""
    with gzip.open(real_data / "corpora" / "latex" / "redpajama_arxiv.jsonl.gz", "rt", encoding="utf-8") as file:
        papers = [json.loads(line)["text"] for line in file]
    documents = pa.table({"id": [str(n) for n in range(len(papers))], "source": ["a"] * len(papers), "text": papers})
    outcome = Latex()(documents)
    shares = [
        len(after) / len(papers[int(name)])
        for name, after in zip(outcome.kept["id"].to_pylist(), outcome.kept["text"].to_pylist(), strict=True)
    ]
    assert outcome.kept.num_rows >= 18
    assert sorted(shares)[len(shares) // 2] > 0.98
