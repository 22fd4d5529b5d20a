"""Beam search: the likeliest whole texts that can be found by keeping a few beginnings, rather than token by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nlargest
from operator import itemgetter

from puna.infer.engine import Engine
from puna.infer.request import Completion, Request, TokenLogprob, open_decoder
from puna.infer.sampling import SamplingParams
from puna.runtime.errors import InputError


@dataclass(frozen=True)
class BeamParams:
    """How a beam search goes."""

    num_beams: int = 4
    """How many beginnings are kept; and at most so many texts are found."""
    max_tokens: int = 128
    """Longest text in tokens, where the context does not end before."""
    length_penalty: float = 1.0
    """A text's score is its log-probability over its number of tokens to this power: 0 prefers short texts, more than
    1 long ones."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end a text, besides those that the tokenizer names."""
    ignore_eos: bool = False
    """Go on after the tokenizer's end-of-text and end-of-turn tokens."""

    def __post_init__(self) -> None:
        for name in ("num_beams", "max_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it has to be at least 1.")

    def score(self, logprob: float, num_tokens: int) -> float:
        """What texts are compared by."""
        return logprob / float(num_tokens**self.length_penalty)


@dataclass(frozen=True, slots=True)
class _Beam:
    """A text, or its beginning, and its log-probability."""

    tokens: tuple[TokenLogprob, ...]
    logprob: float

    def followed_by(self, token_id: int, logprob: float) -> "_Beam":
        return _Beam((*self.tokens, TokenLogprob(token_id, logprob, ())), self.logprob + logprob)


class _Search:
    """The search for one prompt, with the rules of `transformers` (its `early_stopping` False)."""

    def __init__(
        self, prompt_ids: Sequence[int], params: BeamParams, stop_ids: frozenset[int], max_tokens: int
    ) -> None:
        self.prompt_ids = list(prompt_ids)
        self.running = [_Beam((), 0.0)]
        self.finished: list[_Beam] = []
        self._params = params
        self._stop_ids = stop_ids
        self._max_tokens = max_tokens

    def advance(self, followers: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Go on by a token.

        Args:
            followers: for each running beam its likeliest next tokens and their log-probabilities. There are enough of
                them that, whatever ends, as many go on as there are beams.
        """
        num_beams = self._params.num_beams
        longer = [
            (beam.logprob + logprob, beam, token_id, logprob)
            for beam, own in zip(self.running, followers, strict=True)
            for token_id, logprob in own
        ]
        likeliest = nlargest(num_beams * self.num_followers, longer, key=itemgetter(0))
        best = [beam.followed_by(token_id, logprob) for _, beam, token_id, logprob in likeliest]
        ended = [beam for beam in best[:num_beams] if self._ends(beam)]
        self.finished = nlargest(num_beams, self.finished + ended, key=self._score)
        self.running = [beam for beam in best if not self._ends(beam)][:num_beams]
        full = len(self.finished) == num_beams
        if full and self.running and self._score(self.running[0]) <= self._score(self.finished[-1]):
            self.running = []

    @property
    def num_followers(self) -> int:
        """Next tokens of a beam that have to be known, in multiples of the number of beams."""
        return max(2, 1 + len(self._stop_ids))

    def _ends(self, beam: _Beam) -> bool:
        return beam.tokens[-1].id in self._stop_ids or len(beam.tokens) == self._max_tokens

    def _score(self, beam: _Beam) -> float:
        return self._params.score(beam.logprob, len(beam.tokens))


def beam_search(
    engine: Engine, prompts: Sequence[Sequence[int]], params: BeamParams, *, new_text: bool = False
) -> list[list[Completion]]:
    """The best texts that go on from each prompt, best first, at most `num_beams` of them.

    A beam is an ordinary request of the engine for its next token. What beams have in common is in the cache once, as
    far as it fills blocks; the rest of the last block is computed anew for each.

    Args:
        prompts: ids of each, BOS included where the model wants one (`Engine.encode`).
        new_text: see `Engine.generate`.

    Raises:
        InputError: a prompt cannot be continued (see `Engine.check`; the message says which).
    """
    stop_ids = engine.stop_ids(SamplingParams(stop_ids=params.stop_ids, ignore_eos=params.ignore_eos))
    for i, prompt_ids in enumerate(prompts):
        try:
            engine.check(prompt_ids)
        except InputError as error:
            raise InputError(f"Prompt {i + 1} of {len(prompts)}: {error}") from error
    searches = [
        _Search(prompt_ids, params, stop_ids, min(params.max_tokens, engine.max_context - len(prompt_ids)))
        for prompt_ids in prompts
    ]
    absent = engine.chooser.absent_ids
    while running := [search for search in searches if search.running]:
        count = params.num_beams * running[0].num_followers
        asked = SamplingParams(max_tokens=1, temperature=0, logprobs=count + len(absent), ignore_eos=True)
        texts = [
            [*search.prompt_ids, *(token.id for token in beam.tokens)] for search in running for beam in search.running
        ]
        answers = iter(engine.generate(texts, asked))
        for search in running:
            tops = [next(answers).logprobs[0].top for _ in search.running]
            search.advance([[pair for pair in top if pair[0] not in absent] for top in tops])
    return [[_completion(engine, search, beam, stop_ids, new_text) for beam in search.finished] for search in searches]


def _completion(engine: Engine, search: _Search, beam: _Beam, stop_ids: frozenset[int], new_text: bool) -> Completion:
    request = Request(
        tokens=list(search.prompt_ids),
        num_prompt=len(search.prompt_ids),
        max_tokens=len(beam.tokens),
        params=SamplingParams(),
        stop_ids=stop_ids,
        decoder=open_decoder(engine.tokenizer, search.prompt_ids, new_text=new_text),
    )
    for token in beam.tokens:
        request.append(token.id, token)
    return request.completion()
