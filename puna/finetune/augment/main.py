"""`puna augment`: more examples of a task out of those that there are, with their labels as they were."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from puna.batches.tables import Row, read_table
from puna.config import Kinds, to_plain
from puna.finetune.augment.method import Augmenter
from puna.finetune.tasks.tags import from_lists, read_sentences
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, write_jsonl
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say

METHODS = {
    "synonyms": "puna.finetune.augment.synonyms:Synonyms",
    "back_translation": "puna.finetune.augment.back_translation:BackTranslation",
}
"""Kind of a method -> its class."""

EXAMPLES_FILE = "examples.jsonl"


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Make more examples of a task out of those that there are: other words, the same labels."""

    data: Path
    """A table (JSON, JSON Lines, CSV, TSV, Parquet); for tagged words JSON Lines, Parquet or a file in CoNLL format.
    Only what is to be learnt from: a held-out file is to stay as it is."""
    output: Path
    """Folder; gets examples.jsonl, which `data.train` of `puna finetune` takes, and puna.json."""
    method: Annotated[Augmenter, Kinds("method", METHODS)]
    """How."""
    form: Literal["texts", "tagged_words"] = "texts"
    """What a row has: texts, or a list of words and one of tags, as for the task tagging."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a .csv or .tsv file that has no header."""
    text: str = "text"
    """The column with the text that is changed; all others stay."""
    words: str = "tokens"
    """The column with the words, for tagged words."""
    tags: str = "tags"
    """The column with the tags, for tagged words."""
    copies: int = 1
    """The most variants of each example."""
    keep_originals: bool = True
    """Write the examples as they are, too."""
    seed: int = 0
    """Of what is drawn by chance."""

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise ValueError(f"copies is {self.copies}; it has to be at least 1.")


def main(config: AugmentConfig) -> None:
    """Read, change, and write the examples."""
    rows = list(_tagged(config) if config.form == "tagged_words" else _texts(config))
    num_new = sum("augmented_by" in row for row in rows)
    results = {"num_examples": len(rows) - num_new, "num_augmented": num_new}
    kept = [row for row in rows if config.keep_originals or "augmented_by" in row]
    if not kept:
        raise InputError("No example came out another one; raise the method's share or copies, or give more synonyms.")
    inputs = {str(path): content_hash(path) for path in (config.data, *config.method.files())}
    with atomic_path(config.output) as folder:
        folder.mkdir()
        write_jsonl(folder / EXAMPLES_FILE, kept)
        Manifest("augment", to_plain(config), inputs, results).write(folder)
    say(f"{num_new:,} new examples of {results['num_examples']:,}; wrote {config.output / EXAMPLES_FILE}")


def _texts(config: AugmentConfig) -> Iterator[dict[str, Any]]:
    rows = list(read_table(config.data, config.columns))
    texts = [_text(row, config.text) for row in rows]
    for row, variants in zip(rows, config.method.texts(texts, config.copies, config.seed), strict=True):
        yield row.values
        for variant in variants:
            yield {**row.values, config.text: variant, **_provenance(config, row.where)}


def _tagged(config: AugmentConfig) -> Iterator[dict[str, Any]]:
    sentences = read_sentences(config.data, lambda row: from_lists(row, config.words, config.tags))
    variants = config.method.sentences(sentences, config.copies, config.seed)
    for sentence, others in zip(sentences, variants, strict=True):
        yield {config.words: sentence.words, config.tags: sentence.tags}
        for words in others:
            assert len(words) == len(sentence.tags)
            provenance = _provenance(config, sentence.places[0])
            yield {config.words: words, config.tags: sentence.tags, **provenance}


def _text(row: Row, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f"{row.where} has no text in its column {column!r}. It has {', '.join(row.values) or 'nothing'}; say with "
            "--set text=... which column is the text."
        )
    return value


def _provenance(config: AugmentConfig, where: str) -> dict[str, str]:
    """What an example that was made says of itself."""
    return {"augmented_by": config.method.kind, "augmented_from": where}
