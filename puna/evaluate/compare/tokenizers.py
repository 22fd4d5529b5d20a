"""Tokenizers side by side: how many bytes a token stands for, by language, and which tokens two have in common."""

from collections.abc import Mapping, Sequence
from itertools import combinations, islice
from pathlib import Path
from typing import Any

from puna.evaluate.compare.candidates import Candidate
from puna.evaluate.compare.section import Figure, Section, Sheet, not_measured
from puna.runtime.errors import InputError
from puna.runtime.files import read_documents
from puna.runtime.page import new_figure, plain_label, to_svg
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.load import load_tokenizer


def tokenizer_section(
    candidates: Sequence[Candidate], languages: Path | None, corpora: Mapping[str, Path], max_documents: int
) -> Section:
    """Measure all that have a tokenizer.

    Args:
        candidates: the models.
        languages: sentences with "lang" and "text"; none where absent.
        corpora: name -> documents with "text".
        max_documents: of each corpus, from its beginning.
    """
    tokenizers = {c.name: load_tokenizer(c.tokenizer) for c in candidates if c.tokenizer is not None}
    missing = [f"{c.name}: {not_measured('no tokenizer')}" for c in candidates if c.tokenizer is None]
    texts = {name: _read_texts(path, max_documents) for name, path in corpora.items()}
    by_language = {} if languages is None else _read_languages(languages)
    if languages is None:
        missing.append(f"Languages: {not_measured('no sentences were named (languages)')}")
    rates = {
        kind: {group: _bytes_per_token(parts, tokenizers) for group, parts in groups.items()}
        for kind, groups in (("corpora", texts), ("languages", by_language))
    }
    names = list(tokenizers)
    sheets = []
    for kind, what in (("corpora", "Bytes per token of documents"), ("languages", "Bytes per token by language")):
        rows = [[group, *(f"{rate[name]:.2f}" for name in names)] for group, rate in rates[kind].items()]
        if rows:
            sheets.append(Sheet(what, ["", *names], rows, terminal_columns=None if kind == "corpora" else 0))
    if len(rates["languages"]) > 1:
        means = [sum(rate[name] for rate in rates["languages"].values()) / len(rates["languages"]) for name in names]
        row = [f"mean of {len(rates['languages'])} languages", *(f"{mean:.2f}" for mean in means)]
        sheets.insert(len(sheets) - 1, Sheet("Bytes per token over languages", ["", *names], [row]))
    vocabularies = {name: _vocabulary(tokenizer) for name, tokenizer in tokenizers.items()}
    if overlaps := [_overlap(one, other, vocabularies) for one, other in combinations(names, 2)]:
        columns = ["", "tokens of the first", "of the second", "in both", "share of all"]
        sheets.append(Sheet("Tokens in common", columns, overlaps))
    return Section(
        "Tokenizers",
        "UTF-8 bytes that a token stands for: the more, the fewer tokens a text costs. A character takes one byte in "
        "English, mostly two in Cyrillic or Greek, three in Chinese, so compare along a row, not down a column.",
        sheets,
        [_figure(rates["languages"], names)] if rates["languages"] and names else [],
        missing,
        data={"bytes_per_token": rates},
    )


def _read_texts(path: Path, max_documents: int) -> list[str]:
    texts = []
    for number, row in enumerate(islice(read_documents(path), max_documents)):
        if not isinstance(row.get("text"), str):
            raise InputError(f'{path}, document {number}: it has no "text".')
        texts.append(row["text"])
    if not any(texts):
        raise InputError(f"{path} holds no text.")
    return texts


def _read_languages(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for number, row in enumerate(read_documents(path), start=1):
        if not (isinstance(row.get("lang"), str) and row.get("text")):
            raise InputError(f'{path}, row {number}: a sentence needs "lang" and "text".')
        found.setdefault(row["lang"], []).append(row["text"])
    return found


def _bytes_per_token(texts: Sequence[str], tokenizers: Mapping[str, Tokenizer]) -> dict[str, float]:
    size = sum(len(text.encode()) for text in texts)
    return {name: size / sum(map(len, tokenizer.encode_batch(texts))) for name, tokenizer in tokenizers.items()}


def _vocabulary(tokenizer: Tokenizer) -> set[bytes]:
    """What the ordinary tokens stand for."""
    found = set()
    for token in range(tokenizer.vocab_size):
        if token not in tokenizer.special_ids:
            try:
                found.add(tokenizer.token_bytes(token))
            except InputError:  # an id that no token has
                continue
    return found


def _overlap(one: str, other: str, vocabularies: Mapping[str, set[bytes]]) -> list[str]:
    first, second = vocabularies[one], vocabularies[other]
    both = len(first & second)
    return [
        f"{one} and {other}",
        f"{len(first):,}",
        f"{len(second):,}",
        f"{both:,} ({both / len(first):.0%} and {both / len(second):.0%})",
        f"{both / len(first | second):.0%}",
    ]


def _figure(rates: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> Figure:
    """Languages along the axis, those with the longest tokens first; a mark for each tokenizer."""
    order = sorted(rates, key=lambda language: -sum(rates[language].values()))
    figure = new_figure(9, 3.4)
    axes = figure.subplots()
    for name, marker in zip(names, _markers(len(names)), strict=True):
        axes.plot(order, [rates[language][name] for language in order], marker, label=plain_label(name), markersize=4)
    axes.tick_params(axis="x", rotation=90, labelsize=6 if len(order) > 40 else 9)
    axes.margins(x=0.01)
    axes.set(ylabel="bytes per token", ylim=(0, None), xlabel="language (ISO 639-1)")
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, fontsize=9)
    axes.grid(alpha=0.3)
    return Figure(f"Bytes per token in {len(order)} languages, those with the longest tokens first.", to_svg(figure))


def _markers(count: int) -> list[str]:
    marks: Any = "os^Dv<>ph*"
    return [marks[i % len(marks)] for i in range(count)]
