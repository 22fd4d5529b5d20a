"""Keep or reject by what a trained linear classifier says: quality, toxicity, adult content, subject."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa

from puna.curate.document import REQUIRED, Outcome, split
from puna.curate.filters.linear import cached_classifier
from puna.curate.filters.reasons import first_reason, require_shares
from puna.curate.filters.texts import with_column
from puna.runtime.errors import InputError


@dataclass(frozen=True)
class Classifier:
    """Score texts by a linear classifier of yours, and keep those whose score is in bounds.

    Llama 1 (section 2.1) keeps pages like those that Wikipedia refers to; Llama 3 (section 3.1.1) adds classifiers for
    code, for reasoning and for adult content. `puna.curate.filters.linear.train_classifier` trains one.
    """

    kind: Literal["classifier"] = "classifier"
    """This step's name."""
    model: Path = Path()
    """Folder of a trained classifier."""
    label: str = ""
    """The label whose probability is the score."""
    min_score: float = 0.0
    """Texts with a smaller score are rejected."""
    max_score: float = 1.0
    """Texts with a larger score are rejected."""
    column: str = ""
    """Column for the score; if empty, the label and "_score"."""

    def __post_init__(self) -> None:
        require_shares(self, "min_score", "max_score")
        if self.model == Path():
            raise ValueError("model must name the folder of a trained classifier.")
        if not self.label:
            raise ValueError("label must name the label whose probability is the score.")
        if self.min_score > self.max_score:
            raise ValueError(f"min_score ({self.min_score}) is larger than max_score ({self.max_score}).")
        if self.column in REQUIRED.names:
            raise ValueError(f"column must not be {self.column!r}, which every document has.")

    def __call__(self, documents: pa.Table) -> Outcome:
        """Add the score; reject what is out of bounds.

        Raises:
            InputError: there is no such classifier, or it knows no such label.
        """
        classifier = cached_classifier(self.model)
        if self.label not in classifier.labels:
            known = ", ".join(classifier.labels)
            raise InputError(f"The classifier in {self.model} knows no label {self.label!r}, only: {known}.")
        scores = classifier.probabilities(documents["text"])[:, classifier.labels.index(self.label)]
        tests = [
            (scores < self.min_score, f"{self.label} score under {self.min_score:g}"),
            (scores > self.max_score, f"{self.label} score over {self.max_score:g}"),
        ]
        scored = with_column(documents, self.column or f"{self.label}_score", pa.array(scores))
        return split(scored, first_reason(len(documents), tests))
