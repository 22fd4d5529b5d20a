"""What every way to augment has in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from puna.finetune.tasks.tags import Sentence
from puna.runtime.errors import InputError

Variants = list[list[str]]
"""For each text other texts that mean about the same, none twice, perhaps none at all."""


class Augmenter(ABC):
    """The settings of a way to augment; each is a frozen dataclass with a `kind`."""

    kind: str

    @abstractmethod
    def files(self) -> list[Path]:
        """The files and model directories that it needs."""

    @abstractmethod
    def texts(self, texts: Sequence[str], copies: int, seed: int) -> Variants:
        """Variants of each text, at most `copies`.

        Raises:
            InputError: a file or model that it needs cannot be read, or is of no use.
        """

    def sentences(self, sentences: Sequence[Sentence], copies: int, seed: int) -> list[list[list[str]]]:
        """For each sentence at most `copies` other lists of as many words, to which the same tags belong.

        Raises:
            InputError: see `texts`; or this way does not keep words apart.
        """
        raise InputError(
            f"{self.kind} makes other sentences, whose words have no tags; for tagged words use the method synonyms."
        )


def distinct(original: str, variants: Sequence[str]) -> list[str]:
    """The variants that are neither empty, nor the original, nor there already."""
    found = dict.fromkeys(variant.strip() for variant in variants)
    return [variant for variant in found if variant and variant != original.strip()]
