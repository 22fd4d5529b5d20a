"""Guesses at the next tokens, and the rule by which they are accepted without changing what is generated.

Shapes: K guesses, R rows to choose a token from, V vocabulary of the model, W vocabulary of the guesser, at most V.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from puna.infer.request import Request


@dataclass(frozen=True, slots=True)
class Draft:
    """What may follow a text."""

    ids: list[int] = field(default_factory=list)
    """The guesses, in order."""
    probabilities_KW: Tensor | None = None
    """The distributions that they were drawn from; None where nothing was drawn."""


class Proposer(Protocol):
    """Something that guesses the next tokens of texts."""

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[Draft]:
        """At most `counts` guesses for each request, of which all tokens but the last are in the model's cache."""
        ...

    def forget(self, request: Request) -> None:
        """Drop what is remembered of a request."""
        ...


def revise(probabilities_RV: Tensor, guesses: Sequence[int], guessed_KW: Tensor, chance: Callable[[], float]) -> None:
    """Turn the model's distributions into those by which a draft is judged, in place.

    Algorithm 1 of Leviathan et al. 2023 (arXiv:2211.17192): the guess x, drawn from q, is accepted with probability
    min(1, p(x) / q(x)); at the first that is not, the token is drawn from max(0, p - q), scaled to a sum of 1. So each
    row's token is distributed as p says, whatever q is. Here an accepted guess's row becomes certainty of it, the first
    other row becomes the rest of p, and those after that are left alone: nobody looks at them.

    A guess that was not drawn (q certain of it) needs none of this. To draw from p and see whether the guess comes out
    accepts with probability p(x), and what else comes out is drawn from the rest.

    Args:
        probabilities_RV: p after 0, 1, ..., K guesses; K + 1 rows.
        guesses: K of them.
        guessed_KW: q.
        chance: gives numbers uniform in [0, 1).
    """
    num_guesses, width = len(guesses), guessed_KW.shape[1]
    guesses_K1 = torch.tensor(guesses, device=guessed_KW.device)[:, None]
    p_K = probabilities_RV[:num_guesses].gather(1, guesses_K1).squeeze(1).tolist()
    q_K = guessed_KW[:num_guesses].gather(1, guesses_K1).squeeze(1).tolist()
    accepted = itertools.takewhile(lambda p_and_q: chance() * p_and_q[1] < p_and_q[0], zip(p_K, q_K, strict=True))
    num_accepted = sum(1 for _ in accepted)
    probabilities_RV[:num_accepted] = 0
    probabilities_RV[:num_accepted].scatter_(1, guesses_K1[:num_accepted], 1)
    if num_accepted < num_guesses:
        rest_V = probabilities_RV[num_accepted].clone()
        rest_V[:width] -= guessed_KW[num_accepted]
        rest_V.clamp_(min=0)
        # Without rounding there is a rest wherever a guess is refused.
        if rest_V.sum() > 0:
            probabilities_RV[num_accepted] = rest_V
