"""What clients get back: bodies of the two endpoints, whole or in chunks."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import puna
from puna.infer.engine import Engine
from puna.infer.sampling import SamplingParams
from puna.infer.sequence import Delta, TokenLogprob
from puna.tokenizer.base import Tokenizer

_LOWEST_LOGPROB = -9999.0


def join(deltas: Sequence[Delta]) -> Delta:
    """All of a sequence's deltas as one."""
    return Delta(
        "".join(delta.text for delta in deltas),
        tuple(i for delta in deltas for i in delta.ids),
        tuple(entry for delta in deltas for entry in delta.logprobs),
        deltas[-1].finish_reason,
    )


class Reply(ABC):
    """The reply to one request.

    Args:
        params: of the request's first answer; all have the same stop ids and report the same log-probabilities.
    """

    id_prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, engine: Engine, model: str, params: SamplingParams) -> None:
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
        usage = usage_of(num_prompt_tokens, num_tokens)
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": usage}

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


class CompletionReply(Reply):
    """The reply of /v1/completions.

    Args:
        echoes: for each answer the text that goes before it.
    """

    id_prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, engine: Engine, model: str, params: SamplingParams, echoes: Sequence[str]) -> None:
        super().__init__(engine, model, params)
        self._echoes = echoes
        self._offsets = [len(echo) for echo in echoes]

    def opening(self, index: int) -> dict[str, Any] | None:
        echo = self._echoes[index]
        return {"index": index, "text": echo, "logprobs": None, "finish_reason": None} if echo else None

    def piece(self, index: int, delta: Delta) -> dict[str, Any]:
        return {
            "index": index,
            "text": delta.text,
            "logprobs": self._logprobs(index, delta) if self._has_logprobs else None,
            "finish_reason": delta.finish_reason,
        }

    def _whole_choice(self, index: int, answer: Delta) -> dict[str, Any]:
        choice = self.piece(index, answer)
        return {**choice, "text": self._echoes[index] + answer.text}

    def _logprobs(self, index: int, delta: Delta) -> dict[str, Any]:
        reported = self._reported(delta)
        tokens = [_printable(self._tokenizer, entry.id) for entry in reported]
        offsets = []
        for entry in reported:
            offsets.append(self._offsets[index])
            # The bytes that begin a character count as the whole of it, those that go on with it as nothing.
            data = self._tokenizer.token_bytes(entry.id)
            self._offsets[index] += sum(byte & 0xC0 != 0x80 for byte in data)
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(entry.logprob) for entry in reported],
            "top_logprobs": [
                {_printable(self._tokenizer, i): _finite(logprob) for i, logprob in entry.top} for entry in reported
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
            "delta": {"content": delta.text} if delta.text else {},
            **({"logprobs": self._logprobs(delta)} if self._has_logprobs else {}),
            "finish_reason": delta.finish_reason,
        }

    def _whole_choice(self, index: int, answer: Delta) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
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


def usage_of(num_prompt_tokens: int, num_tokens: int) -> dict[str, int]:
    """Token counts of a request; a prompt answered several times counts once."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
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
