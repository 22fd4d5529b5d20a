"""LLaMA's sources as recipes: each is valid, and makes documents of real input."""

import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from puna.config import apply_overrides, parse_config
from puna.curate.main import CurateConfig, main

RECIPES = Path(__file__).resolve().parents[3] / "recipes" / "curate"


def config(name: str, output: Path, *overrides: str) -> CurateConfig:
    recipe: dict[str, Any] = tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8"))
    corpus = recipe["corpus"]
    assert corpus.pop("stage") == "curate"
    apply_overrides(corpus, overrides)
    return parse_config(CurateConfig, {**corpus, "output": str(output), "workers": 1}, name)


@pytest.mark.parametrize("name", ["wikipedia", "stackexchange", "arxiv", "books", "github"])
def test_recipes_are_valid(name: str, tmp_path: Path) -> None:
    assert config(name, tmp_path / "out").steps


def test_the_lists_of_the_paper(tmp_path: Path) -> None:
    assert len(set(config("wikipedia", tmp_path).sources[0].read.languages)) == 20  # type: ignore[attr-defined]
    assert len(set(config("stackexchange", tmp_path).sources[0].read.sites)) == 28  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "at_least"), [("wikipedia", 80), ("stackexchange", 600), ("arxiv", 1), ("github", 3)])
def test_recipes_make_documents_of_real_input(name: str, at_least: int, real_data: Path, tmp_path: Path) -> None:
    dumps = tmp_path / "dumps"
    dumps.mkdir()
    corpora = real_data / "corpora"
    if name == "wikipedia":
        (dumps / "enwiki-pages-articles.xml.bz2").symlink_to(corpora / "enwiki_pages_articles_shortened.xml.bz2")
    elif name == "stackexchange":
        (dumps / "stackoverflow.com-Posts.xml.gz").symlink_to(corpora / "stackexchange" / "beer_Posts.xml.gz")
    elif name == "arxiv":
        (dumps / "book.tar.gz").symlink_to(corpora / "latex" / "hott_book.tar.gz")
    else:
        licences = real_data / "curation" / "cs336_dedup" / "documents_with_fuzzy_duplicates"
        for licence in sorted(licences.iterdir()):
            with tarfile.open(dumps / f"{licence.stem}.tar.gz", "w:gz") as archive:
                archive.add(licence, f"{licence.stem}/LICENSE")
                archive.add(__file__, f"{licence.stem}/{licence.stem}.py")
                archive.add(licence, f"{licence.stem}/{licence.stem}.md")
    main(config(name, tmp_path / "out", f"sources[0].read.path={dumps}", "held_out_share=0"))
    texts = pq.read_table(tmp_path / "out" / "documents")["text"].to_pylist()
    assert len(texts) >= at_least
    assert all(text.strip() for text in texts)
