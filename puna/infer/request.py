"""A request for a text: the sequence of tokens that the deciders see, and what has become of it as text."""

import random
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from puna.infer.sampling import SamplingParams
from puna.infer.sequence import FinishReason, Sequence
from puna.infer.stopping import StopStrings
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.stream import StreamDecoder

_LONGEST_CHARACTER_BYTES = 4


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log-probability under the model, before penalties, temperature and filters."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens and their log-probabilities, best first; as many as were asked for."""


@dataclass(frozen=True, slots=True)
class PromptReport:
    """What there is to say about a prompt once it has been read."""

    num_cached_tokens: int
    """How many of its tokens were found in the cache, so that they cost nothing."""
    logprobs: tuple[TokenLogprob, ...]
    """One for each token from `SamplingParams.prompt_logprobs_from` on, where parameters ask for them, else empty."""
    next_logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `SamplingParams.next_logprobs`, with the likeliest token of all, once the prompt is read."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of a request. A token's text may come later than the token, so either part can be empty."""

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    """One for each of `ids` where the parameters ask for them, else empty."""
    finish_reason: FinishReason | None
    """Set on the last delta of a request, and only there. A request that has failed says why in its `error`."""
    prompt: PromptReport | None = None
    """Set on the first delta of a request, and only there."""


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
    prompt: PromptReport
    error: str = ""
    """Why it failed, where it did."""


@dataclass(slots=True, eq=False, kw_only=True)
class Request(Sequence):
    """A prompt and what has been generated after it.

    Attributes:
        params: how the text goes on.
        stop_ids: the ids that end it.
        adapter: number of the adapter that it is generated with (`Adapters.acquire`), 0 for none.
        decoder: turns ids into text.
        logprobs: of the generated tokens, where asked for.
        prompt_logprobs: of the prompt's tokens, from the first that is asked for on.
        next_logprobs: of the tokens that could follow, where asked for.
        text: the generated text, as far as it is certain.
        error: why it failed, where it did.
    """

    params: SamplingParams
    stop_ids: frozenset[int]
    adapter: int = 0
    decoder: StreamDecoder
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    next_logprobs: tuple[TokenLogprob, ...] = ()
    text: str = ""
    error: str = ""
    _stops: StopStrings = field(init=False)
    _random: random.Random = field(init=False)
    _draws: list[float] = field(default_factory=list)
    _taken: tuple[int, int, int] = (0, 0, 0)
    _prompt_taken: bool = False

    def __post_init__(self) -> None:
        self._stops = StopStrings(self.params.stop)
        self._random = random.Random(self.params.seed)

    @property
    def ids(self) -> list[int]:
        """The generated tokens."""
        return self.tokens[self.num_prompt :]

    @property
    def has_news(self) -> bool:
        """Whether `take` would return text or an end."""
        return self.finish_reason is not None or len(self.text) > self._taken[0]

    def draw(self, ahead: int = 0) -> float:
        """The number in [0, 1) that chooses the token `ahead` places after the next; it never changes."""
        place = self.num_generated + ahead
        while len(self._draws) <= place:
            self._draws.append(self._random.random())
        return self._draws[place]

    def chance(self) -> float:
        """Another number in [0, 1) each time."""
        return self._random.random()

    def append(self, token_id: int, logprob: TokenLogprob | None) -> None:
        """Take in the next token, and finish if it ends the text."""
        self.tokens.append(token_id)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token_id in self.stop_ids:
            self.finish("stop")
            return
        self.text += self._stops.push(self.decoder.push(token_id))
        if self._stops.found:
            self.finish("stop")
        elif self.num_generated >= self.max_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """End here; text that was held back for the sake of what might have followed is let go."""
        if not self._stops.found:
            self.text += self._stops.push(self.decoder.flush())
            self.text += self._stops.flush()
        self.finish_reason = reason

    def fail(self, error: str) -> None:
        """End here, as it cannot be done."""
        self.error = error
        self.finish("failed")

    def take(self) -> Delta:
        """What is new since the last call."""
        text, ids, logprobs = self._taken
        self._taken = (len(self.text), self.num_generated, len(self.logprobs))
        prompt = None if self._prompt_taken else self._prompt_report()
        self._prompt_taken = True
        new_ids = tuple(self.tokens[self.num_prompt + ids :])
        return Delta(self.text[text:], new_ids, tuple(self.logprobs[logprobs:]), self.finish_reason, prompt)

    def completion(self) -> Completion:
        """The whole of a finished request."""
        assert self.finish_reason is not None
        ids, logprobs = tuple(self.ids), tuple(self.logprobs)
        return Completion(
            self.text, ids, logprobs, self.finish_reason, self.num_prompt, self._prompt_report(), self.error
        )

    def _prompt_report(self) -> PromptReport:
        return PromptReport(self.num_cached or 0, tuple(self.prompt_logprobs), self.next_logprobs)


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
