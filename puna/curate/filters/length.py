"""Bounds on how long a text is."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from puna.batches.words import split_words
from puna.curate.document import Outcome, split
from puna.curate.filters.reasons import first_reason, require_not_negative


@dataclass(frozen=True)
class Length:
    """Reject texts that are too short or too long."""

    kind: Literal["length"] = "length"
    """This step's name."""
    min_characters: int = 1
    """Fewest characters."""
    max_characters: int = 0
    """Most characters; 0 for any number."""
    min_words: int = 0
    """Fewest words; punctuation is none, a Chinese character is one."""
    max_words: int = 0
    """Most words; 0 for any number."""

    def __post_init__(self) -> None:
        require_not_negative(self, "min_characters", "max_characters", "min_words", "max_words")
        for unit in ("characters", "words"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if most and least > most:
                raise ValueError(f"min_{unit} ({least}) is larger than max_{unit} ({most}).")

    def __call__(self, documents: pa.Table) -> Outcome:
        """Reject what is out of bounds."""
        characters = pc.utf8_length(documents["text"]).to_numpy()
        tests = [
            (characters < self.min_characters, f"fewer than {self.min_characters} characters"),
            (characters > (self.max_characters or np.inf), f"more than {self.max_characters} characters"),
        ]
        if self.min_words or self.max_words:
            words = np.diff(split_words(documents["text"]).documents)
            tests.append((words < self.min_words, f"fewer than {self.min_words} words"))
            tests.append((words > (self.max_words or np.inf), f"more than {self.max_words} words"))
        return split(documents, first_reason(len(documents), tests))
