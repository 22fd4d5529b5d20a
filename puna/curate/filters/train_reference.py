"""`puna reference`: learn from texts that are good what the steps `perplexity` and `token_divergence` compare with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from puna.config import to_plain
from puna.curate.filters.ngram_model import NgramModel
from puna.curate.filters.token_divergence import save_word_distribution, train_word_distribution
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, read_documents
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say
from puna.runtime.seeds import derive_seed
from puna.tokenizer.load import load_tokenizer
from puna.tokenizer.train import train_sentencepiece_bpe


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """What `puna reference` does."""

    documents: Path
    """Good texts, such as Wikipedia's: a Parquet or JSON Lines file with a "text" in each row, or a folder of such."""
    output: Path
    """Folder for the n-gram model, its tokenizer and the distribution of words."""
    order: int = 5
    """Tokens of the longest n-grams that are counted."""
    tokenizer: Path | None = None
    """A tokenizer to use; without one, SentencePiece learns one from the same texts, lower-cased."""
    vocab_size: int = 16_000
    """Tokens of the tokenizer to learn; CCNet takes 65,536."""
    max_megabytes: int = 100
    """Learn from so much text, from the first document on; every megabyte takes some 50 MB of memory."""
    held_out_share: float = 0.02
    """Share of the documents, chosen by their text, that perplexity is measured on instead of learnt from."""

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 8:
            raise ValueError(f"order must be between 1 and 8, not {self.order}.")
        if self.max_megabytes < 1:
            raise ValueError(f"max_megabytes must be at least 1, not {self.max_megabytes}.")
        if not 0 <= self.held_out_share < 1:
            raise ValueError(f"held_out_share must be at least 0 and below 1, not {self.held_out_share}.")


def main(config: ReferenceConfig) -> None:
    """Read the texts, count, measure, and write everything with a manifest.

    Raises:
        InputError: documents are missing, broken or empty.
    """
    texts, held_out = _read(config)
    with atomic_path(config.output) as folder:
        if config.tokenizer:
            tokenizer = load_tokenizer(config.tokenizer)
        else:
            tokenizer = train_sentencepiece_bpe((text.lower() for text in texts), config.vocab_size, folder)
        column = pa.array(texts, pa.large_string())
        model = NgramModel.train(column, tokenizer, config.order)
        model.save(folder)
        save_word_distribution(train_word_distribution(column), folder)
        results: dict[str, Any] = {"num_documents": len(texts), "num_held_out_documents": len(held_out)}
        if held_out:
            found = model.perplexities(pa.array(held_out, pa.large_string()))
            results["median_perplexity_of_held_out_documents"] = float(np.nanmedian(found))
        inputs = {str(path): content_hash(path) for path in (config.documents, config.tokenizer) if path}
        Manifest("reference", to_plain(config), inputs, results).write(folder)
    median = results.get("median_perplexity_of_held_out_documents")
    measured = f"; median perplexity of {len(held_out):,} held-out ones {median:.1f}" if median else ""
    say(f"Learnt from {len(texts):,} documents{measured}. Wrote {config.output}")


def _read(config: ReferenceConfig) -> tuple[list[str], list[str]]:
    """Texts to learn from and texts to measure on."""
    texts: list[str] = []
    held_out: list[str] = []
    bytes_left = config.max_megabytes * 1_000_000
    for row in read_documents(config.documents):
        text = row.get("text")
        if not isinstance(text, str):
            raise InputError(f'{config.documents}: every document needs a string "text"; one has none.')
        bytes_left -= len(text.encode())
        if bytes_left < 0:
            break
        (held_out if derive_seed(0, "hold out", text) < config.held_out_share * 2**63 else texts).append(text)
    if not texts:
        raise InputError(f"{config.documents}: no text to learn from within max_megabytes = {config.max_megabytes}.")
    return texts, held_out
