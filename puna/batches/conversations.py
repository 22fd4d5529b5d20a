"""Conversations in the forms in which people publish them, as messages of the OpenAI API.

messages            {"messages": [{"role", "content"}, ...], "tools": [...]}          OpenAI
sharegpt            {"conversations": [{"from", "value"}, ...], "system", "tools"}    ShareGPT, Vicuna
alpaca              {"instruction", "input", "output", "system", "history"}           Stanford Alpaca
prompt_completion   {"prompt", "completion" or "response"}                            OpenAI (old), TRL, Dolly
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from puna.batches.tables import Row, read_table
from puna.runtime.errors import InputError

FormName = Literal["detect", "messages", "sharegpt", "alpaca", "prompt_completion"]


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is said, by whom, and where it was read."""

    where: str
    """File and line, for errors."""
    messages: list[dict[str, Any]]
    """As `puna.tokenizer.chat.render_chat` takes them."""
    tools: list[dict[str, Any]] | None = None
    """Functions that the assistant may call."""
    id: str = ""
    """What the row calls itself."""


def read_conversations(path: Path, form: FormName = "detect") -> Iterator[Conversation]:
    """The conversations of a file or folder (`puna.batches.tables.read_table`).

    Args:
        form: how rows are written; "detect" looks at each row's columns.

    Raises:
        InputError: a row that is not of the form; names its line.
    """
    for row in read_table(path):
        yield to_conversation(row, form)


def to_conversation(row: Row, form: FormName = "detect") -> Conversation:
    """One row as a conversation; see `read_conversations`."""
    name = detect(row) if form == "detect" else form
    try:
        messages, tools = _READERS[name](row.values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{row.where} is not of the form {name}: {reason}.") from error
    for message in messages:
        if isinstance(message, dict) and message.get("weight", 1) != 1:
            raise InputError(
                f"{row.where}: a message has the weight {message['weight']}. Puna trains on every answer of a "
                "conversation alike; cut it off before that message, or take the weight out."
            )
    return Conversation(row.where, messages, tools, str(row.values.get("id", "")))


def detect(row: Row) -> Literal["messages", "sharegpt", "alpaca", "prompt_completion"]:
    """The form of a row, by its columns.

    Raises:
        InputError: they fit none.
    """
    columns = row.values.keys()
    if "messages" in columns:
        return "messages"
    if "conversations" in columns:
        return "sharegpt"
    if "instruction" in columns and "output" in columns:
        return "alpaca"
    if "prompt" in columns and ("completion" in columns or "response" in columns):
        return "prompt_completion"
    raise InputError(
        f"{row.where} is not a conversation: it has {', '.join(columns) or 'nothing'}. Needed are messages (OpenAI), "
        "conversations (ShareGPT), instruction and output (Alpaca), or prompt and completion."
    )


Read = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]


def _messages(values: dict[str, Any]) -> Read:
    messages = values["messages"]
    if isinstance(messages, str):  # a cell of a CSV file
        messages = json.loads(messages)
    if not isinstance(messages, list):
        raise ValueError("messages is not a list")
    return messages, _tools(values.get("tools"))


_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}


def _sharegpt(values: dict[str, Any]) -> Read:
    turns = values["conversations"]
    if isinstance(turns, str):
        turns = json.loads(turns)
    if not isinstance(turns, list):
        raise ValueError("conversations is not a list")
    if turns and all("role" in turn for turn in turns):
        return _system(values) + turns, _tools(values.get("tools"))
    messages = _system(values)
    for turn in turns:
        speaker, value = turn["from"], turn["value"]
        if speaker not in _SHAREGPT_ROLES:
            raise ValueError(f"{speaker!r} speaks, but the known speakers are {', '.join(_SHAREGPT_ROLES)}")
        if speaker in ("function_call", "tool_call"):
            messages.append({"role": "assistant", "content": None, "tool_calls": _calls(value)})
        else:
            messages.append({"role": _SHAREGPT_ROLES[speaker], "content": value})
    return messages, _tools(values.get("tools"))


def _alpaca(values: dict[str, Any]) -> Read:
    messages = _system(values)
    for question, answer in values.get("history") or []:
        messages += _exchange(question, answer)
    question = "\n\n".join(part for part in (values["instruction"], values.get("input")) if part)
    return messages + _exchange(question, values["output"]), None


def _prompt_completion(values: dict[str, Any]) -> Read:
    prompt = values["prompt"]
    answer = values["completion"] if "completion" in values else values["response"]
    if isinstance(prompt, list) and isinstance(answer, list):
        return prompt + answer, _tools(values.get("tools"))
    return _system(values) + _exchange(prompt, answer), _tools(values.get("tools"))


_READERS: dict[str, Callable[[dict[str, Any]], Read]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
}


def _system(values: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": values["system"]}] if values.get("system") else []


def _exchange(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _calls(value: Any) -> list[dict[str, Any]]:
    calls = json.loads(value) if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    return [{"type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}} for c in calls]


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """JSON schemas of functions, also where they stand as text, or without the wrapping of the OpenAI API."""
    tools: Sequence[Any] = json.loads(value) if isinstance(value, str) and value.strip() else value or []
    if not isinstance(tools, list):
        raise ValueError("tools is not a list")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools] or None
