"""One request on its way through the engine: integers and text, no tensors."""

import random
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Literal

from puna.infer.sampling import SamplingParams
from puna.infer.stopping import StopStrings
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.stream import StreamDecoder

FinishReason = Literal["stop", "length", "cancelled"]
"""A stop id or string came; `max_tokens` or the context's end was reached; the request was given up."""

_LONGEST_CHARACTER_BYTES = 4


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token and its log-probability under the model, before temperature and filters."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens and their log-probabilities, best first; as many as were asked for."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of a sequence. A token's text may come later than the token, so either part can be empty."""

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    """One for each of `ids` where the parameters ask for them, else empty."""
    finish_reason: FinishReason | None
    """Set on the last delta of a sequence, and only there."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What became of a prompt."""

    text: str
    """Without the stop string or stop token that ended it; special tokens are left out."""
    ids: tuple[int, ...]
    """Everything generated, the stop token or the tokens of the stop string included."""
    logprobs: tuple[TokenLogprob, ...]
    """One for each of `ids` where the parameters ask for them, else empty."""
    finish_reason: FinishReason
    num_prompt_tokens: int


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and what has been generated after it.

    Attributes:
        ids: the generated tokens.
        text: the generated text, as far as it is certain.
        finish_reason: None while the sequence waits or runs.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    """`params.max_tokens`, or what the context leaves."""
    stop_ids: frozenset[int]
    decoder: StreamDecoder
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    _stops: StopStrings = field(init=False)
    _random: random.Random = field(init=False)
    _taken: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        self._stops = StopStrings(self.params.stop)
        self._random = random.Random(self.params.seed)

    @property
    def length(self) -> int:
        """Tokens so far, the prompt's included."""
        return len(self.prompt_ids) + len(self.ids)

    @property
    def has_news(self) -> bool:
        """Whether `take` would return text or an end."""
        return len(self.text) > self._taken[0] or self.finish_reason is not None

    def draw(self) -> float:
        """The next number in [0, 1) of this sequence's own random stream."""
        return self._random.random()

    def append(self, token_id: int, logprob: TokenLogprob | None) -> None:
        """Take in the next token, and finish if it ends the text."""
        self.ids.append(token_id)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token_id in self.stop_ids:
            self.finish("stop")
            return
        self.text += self._stops.push(self.decoder.push(token_id))
        if self._stops.found:
            self.finish("stop")
        elif len(self.ids) == self.max_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """End here; text that was held back for the sake of what might have followed is let go."""
        if not self._stops.found:
            self.text += self._stops.push(self.decoder.flush())
            self.text += self._stops.flush()
        self.finish_reason = reason

    def take(self) -> Delta:
        """What is new since the last call."""
        text, ids, logprobs = self._taken
        self._taken = (len(self.text), len(self.ids), len(self.logprobs))
        return Delta(self.text[text:], tuple(self.ids[ids:]), tuple(self.logprobs[logprobs:]), self.finish_reason)

    def completion(self) -> Completion:
        """The whole of a finished sequence."""
        assert self.finish_reason is not None
        return Completion(self.text, tuple(self.ids), tuple(self.logprobs), self.finish_reason, len(self.prompt_ids))


def open_decoder(tokenizer: Tokenizer, prompt_ids: SequenceOf[int], *, new_text: bool) -> StreamDecoder:
    """A decoder for what follows the prompt.

    Args:
        new_text: the answer is a text of its own, as in a chat, so the dummy blank that SentencePiece puts before a
            text is taken off. Otherwise it goes on where the prompt stops, blank and half character included.
    """
    decoder = StreamDecoder(tokenizer, skip_special=True)
    if not new_text:
        for token_id in prompt_ids[-_LONGEST_CHARACTER_BYTES:]:
            decoder.push(token_id)
    return decoder
