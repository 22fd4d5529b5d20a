"""Guesses from the text itself: what followed when its last tokens last occurred."""

from collections.abc import Sequence

from puna.infer.request import Request
from puna.infer.speculate_draft import Draft


class Lookup:
    """Prompt lookup (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding).

    The longest run of last tokens that occurred before is looked for; the guesses are the tokens after its latest
    earlier occurrence. Where that reaches the text's end they go on with themselves, so a text that repeats itself is
    continued as far as asked.

    Args:
        shortest, longest: tokens in the run, both at least 1.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._indices: dict[Request, _Index] = {}

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[Draft]:
        """See `Proposer`."""
        return [Draft(self._guess(request, count)) for request, count in zip(requests, counts, strict=True)]

    def forget(self, request: Request) -> None:
        """See `Proposer`."""
        self._indices.pop(request, None)

    def _guess(self, request: Request, count: int) -> list[int]:
        index = self._indices.get(request)
        if index is None:
            index = self._indices[request] = _Index(self._sizes)
        follows = index.find(request.tokens)
        return [] if follows is None else continued(request.tokens, follows, count)


class _Index:
    """Where each run of tokens of a growing text occurred last, its end excepted."""

    def __init__(self, sizes: range) -> None:
        self._sizes = sizes
        self._ends: dict[tuple[int, ...], int] = {}
        self._num_indexed = 0

    def find(self, tokens: list[int]) -> int | None:
        """Where what followed the text's last tokens begins, for as many of them as possible."""
        for end in range(self._num_indexed + 1, len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._ends[tuple(tokens[end - size : end])] = end
        self._num_indexed = len(tokens) - 1
        ends = (self._ends.get(tuple(tokens[-size:])) for size in self._sizes)
        return next((end for end in ends if end is not None), None)


def continued(tokens: Sequence[int], follows: int, count: int) -> list[int]:
    """`count` tokens from the place `follows` on, as if the text repeated itself from its end on."""
    period = len(tokens) - follows
    return [tokens[follows + i % period] for i in range(count)]
