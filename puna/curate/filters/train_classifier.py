"""`puna classifier`: learn a linear text classifier from labelled documents."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from puna.config import to_plain
from puna.curate.filters.linear import Features, train_classifier
from puna.curate.filters.reasons import require_not_negative
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, read_documents
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say
from puna.runtime.seeds import derive_seed


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Documents and their label."""

    documents: Path
    """A Parquet or JSON Lines file with a "text" and an "id" in each row, or a folder of such files."""
    label: str = ""
    """The label of all of them."""
    label_column: str = ""
    """Or the column with the label of each."""
    max_documents: int = 1_000_000
    """Only so many of them, from the first on."""

    def __post_init__(self) -> None:
        if bool(self.label) == bool(self.label_column):
            raise ValueError("examples need either label, the same for all, or label_column.")
        if self.max_documents < 1:
            raise ValueError(f"max_documents must be at least 1, not {self.max_documents}.")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """What `puna classifier` does."""

    examples: tuple[Examples, ...]
    """Where labelled documents come from; at least two labels in all."""
    output: Path
    """Folder for the classifier, for the step `classifier`, or `language` with detector = "model"."""
    features: Features = field(default_factory=Features)
    """What of a text the classifier looks at."""
    epochs: int = 5
    """Passes over the documents."""
    learning_rate: float = 1.0
    """Of Adagrad."""
    held_out_share: float = 0.1
    """Share of the documents, chosen by their id, that the classifier is measured on instead of trained."""
    seed: int = 0
    """Of the order of documents, and of the choice of what is held out."""

    def __post_init__(self) -> None:
        require_not_negative(self, "learning_rate")
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, not {self.epochs}.")
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"held_out_share must be between 0 and 1, not {self.held_out_share}.")


def main(config: ClassifierConfig) -> None:
    """Train on a part of the documents, measure on the other, write classifier and manifest.

    Raises:
        InputError: documents are missing or broken, or there are too few or unlabelled ones.
    """
    texts, labels, held_out = _read(config)
    rows = np.array(held_out)
    if not rows.any():
        raise InputError("None of the examples fell into the held-out share: give more documents.")
    column, names = pa.array(texts, pa.large_string()), np.array(labels)
    classifier = train_classifier(
        column.filter(pa.array(~rows)),
        names[~rows].tolist(),
        config.features,
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        seed=config.seed,
    )
    truth = names[rows]
    best = classifier.probabilities(column.filter(pa.array(rows))).argmax(axis=1)
    results = {
        "num_documents": len(texts),
        "num_held_out_documents": len(truth),
        "labels": dict(sorted(Counter(labels).items())),
        "accuracy": float((np.array(classifier.labels)[best] == truth).mean()),
        "accuracy_of_the_commonest_label": max(Counter(truth.tolist()).values()) / len(truth),
    }
    inputs = {str(one.documents): content_hash(one.documents) for one in config.examples}
    with atomic_path(config.output) as folder:
        classifier.save(folder)
        Manifest("classifier", to_plain(config), inputs, results).write(folder)
    say(
        f"On {len(truth):,} held-out documents: accuracy {results['accuracy']:.3f} (always the commonest label: "
        f"{results['accuracy_of_the_commonest_label']:.3f}). Wrote {config.output}"
    )


def _read(config: ClassifierConfig) -> tuple[list[str], list[str], list[bool]]:
    """Texts, labels, and whether each is held out."""
    texts, labels, held_out = [], [], []
    for examples in config.examples:
        for row in islice(read_documents(examples.documents), examples.max_documents):
            text, name = row.get("text"), row.get("id")
            label = examples.label or row.get(examples.label_column)
            if not isinstance(text, str) or not isinstance(name, str):
                raise InputError(
                    f'{examples.documents}: every document needs a string "text" and "id"; one has neither.'
                )
            if label is None:
                raise InputError(f"{examples.documents}: document {name!r} has no {examples.label_column!r}.")
            texts.append(text)
            labels.append(str(label))
            held_out.append(derive_seed(config.seed, "hold out", name) < config.held_out_share * 2**63)
    return texts, labels, held_out
