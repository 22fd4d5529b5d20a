"""Requests to ids, cut as lm-eval cuts them: what the model reads, and which of it is scored."""

from collections.abc import Sequence
from dataclasses import dataclass

from puna.evaluate.tasks.request import Continuation, Generation, Prompt, Text
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.chat import render_chat


@dataclass(frozen=True, slots=True)
class Window:
    """One forward's worth of a text whose likelihood is asked for."""

    ids: tuple[int, ...]
    """What the model reads; at most the context."""
    first: int
    """Place of the first scored token; those from here on are."""
    next: int
    """The last scored token, which follows `ids` and need not be read."""

    @property
    def num_scored(self) -> int:
        """Tokens whose likelihood counts."""
        return len(self.ids) + 1 - self.first


@dataclass(frozen=True, slots=True)
class Encoded:
    """A request in ids."""

    windows: tuple[Window, ...]
    num_truncated: int = 0
    """Tokens that had to be cut off at the beginning, as the context holds no more."""


class Encoder:
    """Turns requests into ids for one model.

    Args:
        tokenizer: the model's own.
        max_context: most tokens that the model reads.
        read_special: whether the names of special tokens in a text are these tokens, as other libraries have it, and
            not text.
    """

    def __init__(self, tokenizer: Tokenizer, max_context: int, *, read_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._max_context = max_context
        self._read_special = read_special

    def encode(self, requests: Sequence[Continuation | Text]) -> list[Encoded]:
        """The windows of each request.

        As in lm-eval, prompt and continuation are encoded as one text, and what comes after as many tokens as the
        prompt has alone is the continuation; blanks at the end of a prompt belong to the continuation; a model without
        BOS begins an empty prompt with its EOS.

        Raises:
            InputError: a continuation has no tokens, or more than the context; or a model without chat template is
                asked to chat.
        """
        texts: dict[str, list[int]] = {}
        for request in requests:
            if isinstance(request, Text):
                texts[request.text] = []
            elif isinstance(request.prompt, str):
                context, continuation = _move_blanks(request.prompt, request.text)
                texts[context] = texts[context + continuation] = []
        texts = dict(zip(texts, self._ids(list(texts)), strict=True))
        chats: dict[int, list[int]] = {}
        return [
            self._rolling(texts[request.text], request.stride)
            if isinstance(request, Text)
            else self._continuation(request, texts, chats)
            for request in requests
        ]

    def prompt(self, request: Generation) -> tuple[list[int], int]:
        """Ids of a prompt, as many of the last as leave room for the answer, and how many were cut off.

        Raises:
            InputError: the answer alone takes the context.
        """
        if isinstance(request.prompt, str):
            ids = self._bos() + self._ids([request.prompt])[0]
        else:
            ids = self._chat(request.prompt)
        room = self._max_context - request.max_tokens
        if room < 1:
            raise InputError(
                f"An answer may have {request.max_tokens} tokens, but the context holds {self._max_context}, the "
                "question included. Ask for fewer (max_tokens), or open the model with a longer context."
            )
        return ids[-room:], max(len(ids) - room, 0)

    def _continuation(self, request: Continuation, texts: dict[str, list[int]], chats: dict[int, list[int]]) -> Encoded:
        if isinstance(request.prompt, str):
            context, continuation = _move_blanks(request.prompt, request.text)
            before, whole = texts[context], texts[context + continuation]
            if context:
                bos = self._bos()
                before, after = bos + before, whole[len(before) :]
            else:
                start = self._start()
                before, after = (whole[:1], whole[1:]) if whole[:1] == start else (start, whole)
        else:
            key = id(request.prompt)
            if key not in chats:
                chats[key] = self._chat(request.prompt)
            before, after = chats[key], self._tokenizer.encode(request.text, continuation=True)
        if not after:
            raise InputError(f"The answer {request.text!r} adds no token to its question, so it cannot be scored.")
        if len(after) > self._max_context:
            raise InputError(
                f"The answer {request.text[:60]!r}... has {len(after)} tokens, but the context holds only "
                f"{self._max_context}. Take the question out, or open the model with a longer context."
            )
        ids = before + after
        kept = ids[-(self._max_context + 1) :]
        return Encoded((_window(kept, len(after)),), len(ids) - len(kept))

    def _rolling(self, ids: Sequence[int], stride: int | None) -> Encoded:
        if not ids:
            raise InputError("A text without tokens has no likelihood.")
        return Encoded(tuple(rolling_windows([*self._start(), *ids], self._max_context, stride or self._max_context)))

    def _chat(self, messages: Prompt) -> list[int]:
        assert not isinstance(messages, str)
        return render_chat(self._tokenizer, messages, add_generation_prompt=True).ids

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if self._read_special:
            return [self._tokenizer.encode(text, allowed_special="all") for text in texts]
        return self._tokenizer.encode_batch(texts)

    def _bos(self) -> list[int]:
        return [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]

    def _start(self) -> list[int]:
        """What the first token of a text is predicted from."""
        starts = [i for i in (self._tokenizer.bos_id, self._tokenizer.eos_id) if i is not None]
        if not starts:
            raise InputError(
                "This tokenizer has neither BOS nor EOS, so the first token of a text cannot be predicted."
            )
        return starts[:1]


def rolling_windows(ids: Sequence[int], context: int, stride: int) -> list[Window]:
    """Windows that predict each token but the first once.

    The first predicts all that it can; each further one `stride` tokens, or what is left, after as many as fit before
    them (`get_rolling_token_windows` of lm-eval, where context_len is context - stride + 1).

    Raises:
        InputError: `stride` is longer than the context.
    """
    if stride > context:
        raise InputError(f"stride is {stride}, but the context holds only {context} tokens.")
    windows = []
    predicted = 1
    while predicted < len(ids):
        new = min(len(ids) - predicted, context if predicted == 1 else stride)
        predicted += new
        windows.append(_window(ids[max(predicted - context - 1, 0) : predicted], new))
    return windows


def _window(ids: Sequence[int], num_scored: int) -> Window:
    return Window(tuple(ids[:-1]), len(ids) - num_scored, ids[-1])


def _move_blanks(prompt: str, text: str) -> tuple[str, str]:
    kept = prompt.rstrip()
    return kept, prompt[len(kept) :] + text
