"""Who is shown which two answers next, and on which side each stands: what the rating page asks. No web in here."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from puna.batches.preferences import Messages
from puna.evaluate.rating.records import Rating, RatingLog, Verdict
from puna.runtime.errors import InputError
from puna.runtime.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, and whose it is."""

    model: str
    """The model's name, as in the configuration; raters never see it."""
    text: str
    """The assistant's words."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two answers to a prompt, to be compared."""

    item: str
    """Names it; says nothing about the models."""
    prompt: Messages
    """Ends with what is answered."""
    category: str
    """What kind of request it is; may be empty."""
    answers: tuple[Answer, Answer]
    """In an order of no meaning."""
    shared: bool = False
    """Every rater is shown it, so that agreement can be measured; others are shown to one rater."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A comparison as a rater sees it."""

    comparison: Comparison
    left: Answer
    right: Answer


def as_text(message: dict[str, Any]) -> str:
    """What a message says; what of it is no text, such as the call of a tool, as JSON."""
    content = message.get("content")
    rest = {key: value for key, value in message.items() if key not in ("role", "content")}
    parts = [content] if isinstance(content, str) else [] if content is None else [json.dumps(content)]
    parts += [json.dumps(rest, ensure_ascii=False)] if rest else []
    return "\n".join(parts)


def arrange(comparisons: Sequence[Comparison], overlap: float, seed: int) -> list[Comparison]:
    """Comparisons in an order drawn by seed, and a share of them, at least, marked as shared.

    Which are drawn depends on the comparisons' names alone, not on their order.
    """

    def drawn(purpose: str) -> list[Comparison]:
        return sorted(comparisons, key=lambda each: derive_seed(seed, purpose, each.item))

    # The product of floats may lie a hair above the number meant, such as 0.07 * 100.
    number = math.ceil(round(overlap * len(comparisons), 9))
    shared = {each.item for each in drawn("shared")[:number]}
    return [replace(each, shared=each.item in shared) for each in drawn("order")]


class Session:
    """Hands out comparisons to raters, and takes their ratings.

    A shared comparison goes to every rater, any other to the first who comes to it. One that somebody has before them
    is kept for them as long as there are others; then it is handed out again, for they may have left. Everything but
    that is in the log, so that a session can be stopped at any time and go on.

    Args:
        comparisons: in the order in which they are handed out.
        log: has what was rated already.
        raters: how many have to rate what is shared.
        seed: decides sides.

    Raises:
        InputError: the log has ratings of other comparisons.
    """

    def __init__(self, comparisons: Sequence[Comparison], log: RatingLog, *, raters: int, seed: int) -> None:
        self.log = log
        self._comparisons = {each.item: each for each in comparisons}
        self._raters = raters
        self._seed = seed
        self._shown: dict[str, str] = {}  # rater -> item before them
        self._rated: dict[str, set[str]] = {item: set() for item in self._comparisons}
        for rating in log.ratings:
            if rating.item not in self._rated:
                raise InputError(
                    "There are ratings of other comparisons than those to rate now. Name another output, or put the "
                    "answers back that were rated."
                )
            self._rated[rating.item].add(rating.rater)

    @property
    def num_comparisons(self) -> int:
        """How many there are to rate."""
        return len(self._comparisons)

    @property
    def num_finished(self) -> int:
        """Comparisons that have been rated as often as they should be."""
        return sum(
            len(self._rated[each.item]) >= (self._raters if each.shared else 1) for each in self._comparisons.values()
        )

    def next(self, rater: str) -> Turn | None:
        """What a rater shall see: what they have before them, else the next; None when they have seen all."""
        left = self._open(rater)
        before_them = self._shown.pop(rater, None)
        taken = set(self._shown.values())
        mine = (each for each in left if each.item == before_them)
        free = (each for each in left if each.shared or each.item not in taken)
        chosen = next(itertools.chain(mine, free, left), None)
        if chosen is None:
            return None
        self._shown[rater] = chosen.item
        return self.turn(chosen.item, rater)

    def turn(self, item: str, rater: str) -> Turn:
        """A comparison as a rater sees it, always the same.

        Raises:
            KeyError: there is no such comparison.
        """
        comparison = self._comparisons[item]
        first, second = comparison.answers
        if derive_seed(self._seed, "side", item, rater) & 1:
            first, second = second, first
        return Turn(comparison, first, second)

    def rate(
        self,
        item: str,
        rater: str,
        verdict: Verdict,
        seconds: float,
        *,
        edited: str | None = None,
        left_unsafe: bool = False,
        right_unsafe: bool = False,
    ) -> bool:
        """Keep what a rater found; True if it replaces what they had found of the same comparison before.

        Raises:
            KeyError: there is no such comparison.
            ValueError: see `Rating`.
        """
        turn = self.turn(item, rater)
        rating = Rating(
            item=item,
            prompt=turn.comparison.prompt,
            category=turn.comparison.category,
            left=turn.left.model,
            right=turn.right.model,
            left_answer=turn.left.text,
            right_answer=turn.right.text,
            verdict=verdict,
            rater=rater,
            seconds=seconds,
            edited=edited,
            left_unsafe=left_unsafe,
            right_unsafe=right_unsafe,
        )
        replaced = self.log.add(rating)
        self._rated[item].add(rater)
        return replaced

    def undo(self, rater: str) -> Rating | None:
        """Take back a rater's latest rating, if any; what it was of is the next thing they are shown."""
        taken_back = self.log.undo(rater)
        if taken_back is not None:
            self._rated[taken_back.item].discard(rater)
            self._shown[rater] = taken_back.item
        return taken_back

    def num_rated(self, rater: str) -> int:
        """How many a rater has rated."""
        return sum(rater in raters for raters in self._rated.values())

    def num_left(self, rater: str) -> int:
        """How many a rater could still be shown."""
        return len(self._open(rater))

    def _open(self, rater: str) -> list[Comparison]:
        """What a rater has not rated and, unless it is shared, nobody else has."""
        return [
            each
            for each in self._comparisons.values()
            if (rater not in self._rated[each.item] if each.shared else not self._rated[each.item])
        ]
