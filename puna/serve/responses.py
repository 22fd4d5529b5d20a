"""What clients get back: bodies of the two endpoints, whole or in chunks."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import puna
from puna.infer.engine import Engine
from puna.infer.request import Delta, TokenLogprob
from puna.infer.sampling import SamplingParams
from puna.tokenizer.base import Tokenizer

_LOWEST_LOGPROB = -9999.0


def join(deltas: Sequence[Delta]) -> Delta:
    """All of a sequence's deltas as one; of an answer that was refused in the end, the refusal alone."""
    refused = deltas[-1].finish_reason == "content_filter"
    return Delta(
        deltas[-1].text if refused else "".join(delta.text for delta in deltas),
        tuple(i for delta in deltas for i in delta.ids),
        tuple(entry for delta in deltas for entry in delta.logprobs),
        deltas[-1].finish_reason,
        deltas[0].prompt,
    )


class Reply(ABC):
    """The reply to one request.

    Args:
        params: of the request's first answer; all have the same stop ids and report the same log-probabilities.
        num_choices: answers to each prompt.
    """

    id_prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, engine: Engine, model: str, params: SamplingParams, num_choices: int) -> None:
        self._num_choices = num_choices
        self._tokenizer = engine.tokenizer
        self._stop_ids = engine.stop_ids(params)
        self._has_logprobs = params.logprobs is not None
        self._head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"puna-{puna.__version__}",
        }

    def whole(self, answers: Sequence[Delta], num_prompt_tokens: int) -> dict[str, Any]:
        """The body of a reply that comes at once."""
        choices = [self._whole_choice(index, answer) for index, answer in enumerate(answers)]
        num_tokens = sum(len(answer.ids) for answer in answers)
        num_cached = sum(self.num_cached(index, answer) for index, answer in enumerate(answers))
        usage = usage_of(num_prompt_tokens, num_tokens, num_cached)
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": usage}

    def num_cached(self, index: int, delta: Delta) -> int:
        """Prompt tokens that cost nothing, where a delta tells; a prompt answered several times counts once."""
        first = index % self._num_choices == 0
        return delta.prompt.num_cached_tokens if first and delta.prompt is not None else 0

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The body of one event of a stream."""
        return {**self._head, "object": self.chunk_object, "choices": choices}

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """The choice with which an answer's stream begins, before anything is generated."""

    @abstractmethod
    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        """The choice that carries one delta of a stream."""

    @abstractmethod
    def _whole_choice(self, index: int, answer: Delta) -> dict[str, Any]: ...

    def _reported(self, delta: Delta) -> tuple[TokenLogprob, ...]:
        """Log-probabilities of tokens that have a text, thus not of the stop token."""
        ended = delta.finish_reason == "stop" and delta.ids and delta.ids[-1] in self._stop_ids
        return delta.logprobs[:-1] if ended else delta.logprobs


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that is part of the reply."""

    text: str
    ids: Sequence[int]


class CompletionReply(Reply):
    """The reply of /v1/completions.

    Args:
        echoes: for each answer the prompt, where it goes before it, or nothing.
    """

    id_prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, engine: Engine, model: str, params: SamplingParams, num_choices: int, echoes: Sequence[Echo | None]
    ) -> None:
        super().__init__(engine, model, params, num_choices)
        self._echoes = echoes
        # Where echoed tokens are reported, they move the offsets themselves.
        counted = params.prompt_logprobs is not None
        self._offsets = [0 if counted or echo is None else len(echo.text) for echo in echoes]

    def opening(self, index: int) -> dict[str, Any] | None:
        echo = self._echoes[index]
        if echo is None or self._has_logprobs:
            return None  # with log-probabilities the prompt is not known before it is computed
        return {"index": index, "text": echo.text, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        echo = self._echoes[index]
        echoed = echo is not None and self._has_logprobs and delta.prompt is not None
        text = "" if delta.finish_reason == "content_filter" else delta.text
        return {
            "index": index,
            "text": echo.text + text if echo is not None and echoed else text,
            "logprobs": self._logprobs(index, delta) if self._has_logprobs else None,
            "finish_reason": delta.finish_reason,
        }

    def _whole_choice(self, index: int, answer: Delta) -> dict[str, Any]:
        choice, opening = self.piece(index, answer), self.opening(index)
        return {**choice, "text": (opening["text"] if opening else "") + choice["text"]}

    def _logprobs(self, index: int, delta: Delta) -> dict[str, Any]:
        echo = self._echoes[index]
        ids = [entry.id for entry in self._reported(delta)]
        entries: list[TokenLogprob | None] = list(self._reported(delta))
        if echo is not None and delta.prompt is not None:
            ids = [*echo.ids, *ids]
            entries = [None, *delta.prompt.logprobs, *entries]  # nothing comes before the first token
        offsets = []
        for token_id in ids:
            offsets.append(self._offsets[index])
            # The bytes that begin a character count as the whole of it, those that go on with it as nothing.
            data = self._tokenizer.token_bytes(token_id)
            self._offsets[index] += sum(byte & 0xC0 != 0x80 for byte in data)
        return {
            "tokens": [_printable(self._tokenizer, token_id) for token_id in ids],
            "token_logprobs": [entry and _finite(entry.logprob) for entry in entries],
            "top_logprobs": [
                entry and {_printable(self._tokenizer, i): _finite(logprob) for i, logprob in entry.top}
                for entry in entries
            ],
            "text_offset": offsets,
        }


class ChatReply(Reply):
    """The reply of /v1/chat/completions."""

    id_prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any]:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}

    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {_field(delta): delta.text} if delta.text else {},
            **({"logprobs": self._logprobs(delta)} if self._has_logprobs else {}),
            "finish_reason": delta.finish_reason,
        }

    def _whole_choice(self, index: int, answer: Delta) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": None, "refusal": None, _field(answer): answer.text},
            "logprobs": self._logprobs(answer) if self._has_logprobs else None,
            "finish_reason": answer.finish_reason,
        }

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        content = [
            {**self._token(entry.id, entry.logprob), "top_logprobs": [self._token(*pair) for pair in entry.top]}
            for entry in self._reported(delta)
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}


def _field(delta: Delta) -> str:
    """What an answer's text is called in a message."""
    return "refusal" if delta.finish_reason == "content_filter" else "content"


def usage_of(num_prompt_tokens: int, num_tokens: int, num_cached_tokens: int) -> dict[str, Any]:
    """Token counts of a request; a prompt answered several times counts once."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }


def model_card(model: str, created: int) -> dict[str, Any]:
    """A model, as the list of models shows it."""
    return {"id": model, "object": "model", "created": created, "owned_by": "puna"}


def _printable(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as a string; part of a character in the notation bytes:\\xe2\\x82, so that no two look the same."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, _LOWEST_LOGPROB)
