"""Needle in a haystack: is one sentence in a long text found, wherever it stands? (Kamradt 2023)"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from puna.evaluate.tasks.continuation import OneContinuation
from puna.evaluate.tasks.task import Example
from puna.runtime.errors import InputError
from puna.runtime.files import read_documents
from puna.runtime.seeds import derive_seed

NEEDLE = "\nThe secret number of {city} is {number}.\n"
QUESTION = "\nThe secret number of {city} is"

_CITIES = ("Lima", "Cusco", "Puno", "Tacna", "Iquitos", "Oruro", "Salta", "Quito", "Loja", "Arica")

_ENOUGH = 20
"""Text that is read, for each character of the longest prompt."""

_NEAR = 40
"""Characters within which the end of a word is looked for, to put the needle there."""


@dataclass(frozen=True, kw_only=True)
class Needle(OneContinuation):
    """A sentence with a random number is hidden in texts, at several lengths and depths, and asked for at the end:

        ... plain text ...
        The secret number of Puno is 48103.
        ... plain text ...
        The secret number of Puno is
      + 48103

    Each length and depth is a group. Lengths are in characters, as the same questions are for all models: between those
    with other tokenizers, too. Of a text that is longer than the model's context, the beginning is cut off, and with it
    what stands there; results say of how many. `puna needle` is the same by tokens, with a picture.

    - accuracy: how often greedy decoding gives the number;
    - perplexity: exp of the mean negative log-likelihood of numbers.
    """

    kind: Literal["needle"] = "needle"
    """Its name."""
    file: Path
    """Text to hide the sentence in: documents with "text", Parquet or JSON Lines, a file or a folder of them."""
    lengths: tuple[int, ...] = (1000, 4000)
    """Lengths of the whole prompt, in characters."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the sentence stands: 0 is the beginning, 1 just before the question."""
    trials: int = 10
    """Texts for each length and depth."""
    needle: str = NEEDLE
    """The sentence; {city} and {number} are filled in."""
    question: str = QUESTION
    """What stands at the end, for the model to go on with a blank and the number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self.depths, self.trials, self.needle, self.question)
        if not self.lengths or min(self.lengths) < 1 or len({*self.lengths}) < len(self.lengths):
            raise ValueError(f"lengths are {self.lengths}; name some, each once, in characters.")
        if self.shots:
            raise ValueError("a needle has no shots: what is asked for stands in the text.")

    def read(self, data: Path | None) -> list[Example]:
        """A question for each length, depth and trial; the text is looked for where `file` says.

        Raises:
            InputError: there is no text, or a length has no room for needle and question.
        """
        text = _haystack(self.file, _ENOUGH * max(self.lengths))
        return [
            self._example(text, length, depth, trial)
            for length in self.lengths
            for depth in self.depths
            for trial in range(self.trials)
        ]

    def inputs(self, data: Path | None) -> list[Path]:
        """The text."""
        return [self.file]

    def _example(self, haystack: str, length: int, depth: float, trial: int) -> Example:
        chance, city, number = draw(self.seed, length, depth, trial)
        needle, question = self.needle.format(city=city, number=number), self.question.format(city=city)
        room = length - len(needle) - len(question)
        if room < 0:
            raise InputError(
                f"Task {self.title}: a length of {length} characters has no room for needle and question, which take "
                f"{length - room}."
            )
        start = chance.randrange(len(haystack))
        text = "".join(haystack[(start + n) % len(haystack)] for n in range(room))
        place = _end_of_word(text, round(depth * room))
        name = f"{length:,} characters, depth {depth:g}"
        return Example(
            id=f"{length}-{depth:g}-{trial}",
            where=f"{self.file}, {name}, trial {trial}",
            prompt=text[:place] + needle + text[place:] + question,
            target=f" {number}",
            group=name,
            extra={"place": place},
        )


def check_settings(depths: Sequence[float], trials: int, needle: str, question: str) -> None:
    """Look whether needles can be hidden like this.

    Raises:
        ValueError: they cannot.
    """
    if not all(0 <= depth <= 1 for depth in depths) or not depths:
        raise ValueError(f"depths are {depths}; name some, between 0 and 1.")
    if trials < 1:
        raise ValueError(f"trials is {trials}; it has to be at least 1.")
    for name, text, parts in (("needle", needle, ("{city}", "{number}")), ("question", question, ("{city}",))):
        if missing := [part for part in parts if part not in text]:
            raise ValueError(f"{name} lacks {' and '.join(missing)}.")


def draw(seed: int, length: int, depth: float, trial: int) -> tuple[random.Random, str, str]:
    """City and number of a needle, and what to draw the rest from: the same for the same arguments."""
    chance = random.Random(derive_seed(seed, "needle", length, str(depth), trial))
    return chance, chance.choice(_CITIES), str(chance.randrange(10_000, 100_000))


def _haystack(file: Path, enough: int) -> str:
    """The first documents, one after another, until there are so many characters."""
    parts: list[str] = []
    size = 0
    for row in read_documents(file):
        parts.append(f"{row['text']}\n\n")
        size += len(parts[-1])
        if size >= enough:
            break
    if not "".join(parts).strip():
        raise InputError(f"{file} holds no text to hide anything in.")
    return "".join(parts)


def _end_of_word(text: str, place: int) -> int:
    """The nearest place before, where a word ends; `place` itself where none does, as in Chinese."""
    if place in (0, len(text)):
        return place
    found = max(text.rfind(blank, max(place - _NEAR, 0), place) for blank in " \n")
    return place if found < 0 else found
