"""The choosing half of a step: from logits to the next token of each request, by the request's own parameters.

Shapes: R rows that are sampled, V vocabulary.
"""

from collections.abc import Generator
from collections.abc import Sequence as SequenceOf
from typing import cast

import torch
from torch import Tensor

from puna.infer.constrain import Matcher
from puna.infer.request import Request, TokenLogprob
from puna.infer.runner import report
from puna.infer.sampling import Penalties, Revise, Sampler
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer


class Chooser:
    """Chooses tokens, and keeps what the next choice depends on: which tokens a text has, and what it may go on with.

    A request has a row of logits for each guess of its draft, and one more; they stand together, in order.

    Args:
        tokenizer: the model's own.
        vocab_size: logits in a row, of which some may be no token of the tokenizer's.
        device: where the logits are.

    Attributes:
        absent_ids: rows of a padded embedding, and holes in the vocabulary: they stand for no text and are never
            chosen.
        matchers: of the requests whose answers are constrained.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, device: torch.device) -> None:
        self.absent_ids = frozenset(i for i in range(vocab_size) if not is_token(tokenizer, i))
        self.matchers: dict[Request, Matcher] = {}
        self._vocab_size = vocab_size
        self._device = device
        self._absent_ids = torch.tensor(sorted(self.absent_ids), device=device) if self.absent_ids else None
        self._penalties: dict[Request, Penalties] = {}
        self._sampled: list[Request] = []
        self._sampler = Sampler([], device)  # for exactly those

    def add(self, request: Request) -> None:
        """Take in a new request; a constraint follows in `matchers` when it is compiled."""
        if request.params.adjusts:
            prompt_ids = request.tokens[: request.num_prompt]
            self._penalties[request] = Penalties(
                request.params, prompt_ids, [], vocab_size=self._vocab_size, device=self._device
            )

    def forget(self, request: Request) -> None:
        """Drop what is remembered of a request that has ended."""
        self._penalties.pop(request, None)
        self.matchers.pop(request, None)

    def choose(
        self, sampled: list[Request], logits_RV: Tensor, revise: Revise | None
    ) -> tuple[list[int], dict[int, TokenLogprob]]:
        """A token for each row; and row -> what its request asks to report of it.

        Args:
            sampled: whom each row belongs to.
            revise: changes the rows' probabilities where guesses were drawn (`Speculator.revise`).
        """
        if sampled != self._sampled:
            self._sampled, self._sampler = sampled, Sampler([r.params for r in sampled], self._device)
        uniforms = [request.draw(ahead) for request, ahead in zip(sampled, _ahead(sampled), strict=True)]
        chosen = self._sampler(self.allowed(sampled, logits_RV), uniforms, revise).tolist()
        return chosen, _logprobs(sampled, logits_RV, chosen)

    def allowed(self, sampled: list[Request], logits_RV: Tensor) -> Tensor:
        """The logits after biases and penalties, minus infinity where a token is out of the question.

        A request whose constraint leaves nothing fails.
        """
        allowed_RV = logits_RV
        if self._absent_ids is not None:
            allowed_RV = allowed_RV.index_fill(1, self._absent_ids, -torch.inf)
        if not self._penalties and not self.matchers:
            return allowed_RV
        allowed_RV = allowed_RV.float()
        if allowed_RV is logits_RV:
            allowed_RV = logits_RV.clone()  # the model's own are reported
        for i, (request, ahead) in enumerate(zip(sampled, _ahead(sampled), strict=True)):
            if request in self._penalties:
                allowed_RV[i] = self._penalties[request].adjusted(allowed_RV[i], request.draft[:ahead])
            if request in self.matchers:
                matcher = self.matchers[request]
                fitting_V = matcher.allowed()
                if matcher.error or not fitting_V.any():
                    request.fail(f"The answer cannot go on: {matcher.error or 'no token fits'}")
                else:
                    allowed_RV[i].masked_fill_(torch.from_numpy(~fitting_V).to(self._device), -torch.inf)
        return allowed_RV

    def take(self, request: Request, token_id: int, logprob: TokenLogprob | None) -> None:
        """Make a chosen token part of a request, which that may finish."""
        if request in self._penalties:
            self._penalties[request].note(token_id)
        request.append(token_id, logprob)
        if request in self.matchers and request.finish_reason != "stop":
            self.matchers[request].note(token_id)
            if self.matchers[request].finished:
                request.finish("stop")


def is_token(tokenizer: Tokenizer, token_id: int) -> bool:
    """Whether an id stands for text, or for something special."""
    try:
        tokenizer.token_bytes(token_id)
    except InputError:
        return False
    return True


def _ahead(sampled: SequenceOf[Request]) -> Generator[int, None, None]:
    """For each row, how many guesses stand before its token."""
    ahead, previous = 0, None
    for request in sampled:
        ahead = ahead + 1 if request is previous else 0
        previous = request
        yield ahead


def _logprobs(sampled: SequenceOf[Request], logits_RV: Tensor, chosen: SequenceOf[int]) -> dict[int, TokenLogprob]:
    """Row -> what its parameters ask to report."""
    asking = [i for i, request in enumerate(sampled) if request.params.logprobs is not None]
    if not asking:
        return {}
    counts = [cast(int, sampled[i].params.logprobs) for i in asking]
    rows = logits_RV if len(asking) == len(sampled) else logits_RV[asking]
    return dict(zip(asking, report(rows, [chosen[i] for i in asking], counts), strict=True))
