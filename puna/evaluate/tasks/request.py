"""What a task may ask of a model, and what it gets to know."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Prompt = str | tuple[Mapping[str, Any], ...]
"""A text that goes on, or a conversation that the model answers (rendered with its chat template)."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """How likely is `text` after `prompt`?"""

    prompt: Prompt
    text: str
    """With the blank in front that belongs there."""


@dataclass(frozen=True, slots=True)
class Text:
    """How likely is a whole text? Longer ones than the context are read in windows."""

    text: str
    stride: int | None = None
    """How many tokens each window after the first predicts, all others before them being read; absent: as many as the
    context holds, so that windows do not overlap (but for the last)."""


@dataclass(frozen=True, slots=True)
class Generation:
    """How does the model go on?"""

    prompt: Prompt
    max_tokens: int
    until: tuple[str, ...] = ()
    """The answer ends before the first of these strings, or where the model ends it."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0
    """Of drawing; requests that differ in it give different samples."""


Request = Continuation | Text | Generation


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The answer to `Continuation` and `Text`."""

    log_likelihood: float
    """Sum over its tokens, in nats."""
    greedy: bool
    """Whether each token was the likeliest at its place."""
    num_tokens: int
    num_truncated: int = 0
    """Tokens that the prompt lost at its beginning, as the context was full."""


@dataclass(frozen=True, slots=True)
class Generated:
    """The answer to `Generation`."""

    text: str
    finished: bool
    """Whether it came to an end by itself, not by `max_tokens` or the end of the context."""
    num_tokens: int
    num_truncated: int = 0
    """As above."""


Answer = Likelihood | Generated
