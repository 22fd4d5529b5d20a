"""Speculative decoding: several tokens a forward, where what comes next can be guessed.

Leviathan et al. 2023 (arXiv:2211.17192), Chen et al. 2023 (arXiv:2302.01318). A proposer guesses the next tokens of a
text; the model computes them all in one forward and keeps those that it would have chosen itself, and one more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from puna.infer.adapters import Adapters
from puna.infer.blocks import BlockManager
from puna.infer.cache import KVPool
from puna.infer.config import EngineConfig
from puna.infer.request import Request
from puna.infer.speculate_draft import Proposer, revise
from puna.infer.speculate_lookup import Lookup
from puna.infer.speculate_model import first_layers_proposer, small_model_proposer
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError

_FIRST_PAUSE, _LONGEST_PAUSE = 4, 64
"""Tokens for which nothing is guessed after a guess at a single token was wrong: twice as many each time."""


class Speculator:
    """Has a proposer guess for the requests that decode, judges the guesses, and guesses less where few are right.

    Constrained requests are left alone: each of their tokens depends on what the one before allows.

    Args:
        num_tokens: most guesses for a request in one step.

    Attributes:
        num_proposed: guesses that have been checked so far, and `num_accepted` those that were right.
    """

    def __init__(self, proposer: Proposer, num_tokens: int) -> None:
        self.num_proposed = 0
        self.num_accepted = 0
        self._proposer = proposer
        self._num_tokens = num_tokens
        self._paces: dict[Request, _Pace] = {}
        self._drawn: dict[Request, Tensor] = {}

    def propose(self, running: Sequence[Request]) -> None:
        """Give drafts to those that are about to decode."""
        self._drawn.clear()
        asked: dict[Request, int] = {}
        for request in running:
            if request.num_pending > 1 or request.params.constraint is not None:
                continue
            pace = self._paces.get(request)
            if pace is None:
                pace = self._paces[request] = _Pace(self._num_tokens)
            # The last token is always the model's own.
            count = min(pace.next(), request.max_tokens - request.num_generated - 1)
            if count > 0:
                asked[request] = count
        if not asked:
            return
        drafts = self._proposer.propose(list(asked), list(asked.values()))
        for request, draft in zip(asked, drafts, strict=True):
            request.draft = draft.ids
            if draft.probabilities_KW is not None:
                self._drawn[request] = draft.probabilities_KW

    def revise(self, sampled: Sequence[Request], probabilities_RV: Tensor) -> None:
        """Put in place of their rows, in place, what drafts that were drawn are judged by (`speculate_draft.revise`).

        Args:
            sampled: whom each row belongs to; a request's rows stand together, in order.
        """
        first = 0
        while first < len(sampled):
            request = sampled[first]
            if request.draft and request in self._drawn:
                rows = probabilities_RV[first : first + len(request.draft) + 1]
                revise(rows, request.draft, self._drawn[request], request.chance)
            first += len(request.draft) + 1

    def settle(self, request: Request, num_accepted: int) -> None:
        """Take note of how many of a request's guesses were right, and clear its draft."""
        if request.draft:
            self.num_proposed += len(request.draft)
            self.num_accepted += num_accepted
            if request.finish_reason is None:
                self._paces[request].learn(len(request.draft), num_accepted)
            request.draft = []

    def forget(self, request: Request) -> None:
        """Drop what is remembered of a request that has ended."""
        self._paces.pop(request, None)
        self._drawn.pop(request, None)
        self._proposer.forget(request)


def open_speculator(
    config: EngineConfig,
    model: Transformer,
    pool: KVPool,
    blocks: BlockManager,
    adapters: Adapters,
    *,
    max_context: int,
    guesser: Transformer | None,
) -> Speculator | None:
    """What a configuration asks for; None where it asks for no speculation.

    Args:
        model: what is guessed for, `pool` its cache, `blocks` the books on that, and `adapters` what is loaded on it.
        guesser: the smaller model of kind "model".

    Raises:
        InputError: there is no smaller model, though one is asked for, or the model has not more layers than guess.
    """
    how = config.speculation
    proposer: Proposer
    if how.kind == "none":
        return None
    if how.kind == "lookup":
        proposer = Lookup(*how.match_sizes)
    elif how.kind == "model":
        if guesser is None:
            raise InputError("A smaller model is to guess, so the engine has to be given one: guesser, or load_engine.")
        proposer = small_model_proposer(
            guesser,
            max_rows=config.max_rows,
            max_context=max_context,
            block_size=config.block_size,
            step_tokens=config.step_tokens,
            vocab_size=model.config.vocab_size,
        )
    else:
        num_layers = model.config.num_layers
        if how.layers is None or not 1 <= how.layers < num_layers:
            raise InputError(
                f"speculation.layers is {how.layers}; it has to be at least 1, and less than the model's {num_layers}."
            )
        proposer = first_layers_proposer(
            model,
            how.layers,
            pool,
            blocks,
            adapters,
            max_rows=config.max_rows,
            max_context=max_context,
            step_tokens=config.step_tokens,
        )
    return Speculator(proposer, how.tokens)


@dataclass(slots=True)
class _Pace:
    """How many tokens are guessed next: as many as went well lately, and none for a while when none did."""

    most: int
    count: int = 0
    pause: int = _FIRST_PAUSE
    resting: int = 0

    def __post_init__(self) -> None:
        self.count = self.most

    def next(self) -> int:
        if self.resting:
            self.resting -= 1
            return 0
        return self.count

    def learn(self, num_proposed: int, num_accepted: int) -> None:
        if num_accepted:
            self.pause = _FIRST_PAUSE
            more = 2 * self.count if num_accepted == num_proposed else num_accepted + 1
            self.count = min(more, self.most)
        elif self.count > 1:
            self.count //= 2
        else:
            self.resting, self.pause = self.pause, min(2 * self.pause, _LONGEST_PAUSE)
