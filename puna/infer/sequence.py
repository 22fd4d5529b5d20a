"""One sequence of tokens on its way through the engine, in integers alone: what the deciders look at."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "failed", "content_filter"]
"""A stop id or string came, or what was demanded is complete; `max_tokens` or the context's end was reached; the
request was given up; it could not be done (`Request.error` says why); a server's guard refused it, and the text is the
refusal."""


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, and the books that `Scheduler` and `BlockManager` keep on them.

    Attributes:
        tokens: the prompt's, then the generated ones.
        num_prompt: how many of them are the prompt's.
        max_tokens: most tokens to generate.
        priority: of two that wait, the one with the greater number goes first.
        namespace: sequences share cached blocks only with those of an equal namespace (weights, adapter).
        most_cached: how many of its first tokens it may take over from others at most; any number where absent.
        draft: guesses at the next tokens, to be checked in the next step.
        finish_reason: None while the sequence waits or runs.
        arrival: number in the order of arrival.
        num_computed: tokens, from the first on, whose keys and values are in the cache.
        num_cached: prompt tokens that did not have to be computed when the sequence first ran.
        blocks: its blocks of the cache, in order.
        stale_from: the first of them that changed since the runner copied them.
        num_registered: blocks, from the first on, that others can find.
        parent: the last such block's name, or the namespace.
    """

    tokens: list[int]
    num_prompt: int
    max_tokens: int
    priority: int = 0
    namespace: Hashable = ()
    most_cached: int | None = None
    draft: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    arrival: int = -1
    num_computed: int = 0
    num_cached: int | None = None
    blocks: list[int] = field(default_factory=list)
    stale_from: int = 0
    num_registered: int = 0
    parent: Hashable = None

    @property
    def length(self) -> int:
        """Tokens so far, the prompt's included."""
        return len(self.tokens)

    @property
    def num_generated(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that are known, but not yet computed. One means that the sequence decodes."""
        return len(self.tokens) - self.num_computed

    @property
    def worst_length(self) -> int:
        """Most tokens that can come to stand in the cache: the last one generated is never read again."""
        return self.num_prompt + max(self.max_tokens - 1, 0)

    @property
    def rank(self) -> tuple[int, int]:
        """Sorts by who goes first: by priority, then by arrival."""
        return (-self.priority, self.arrival)
