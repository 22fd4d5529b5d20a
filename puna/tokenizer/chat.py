"""Conversations to ids and loss mask in one pass: the same function for training and for serving.

How special tokens are kept out of users' hands: every string that does not come from the template is searched
for special-token names, and each is broken by a noncharacter before the template sees it. After rendering,
the text is cut at the names that are still whole (only the template can have written those), the
noncharacters are removed, and what lies between is encoded as plain text.

How the mask is found: the part that the assistant generates begins where the prompt ends which a server would
have fed at that point, that is, the conversation so far rendered with `add_generation_prompt=True`. Ids are
cut there, so a prompt's ids are a prefix of the training ids. Where the template writes the past differently
(it drops reasoning from earlier turns, say), the part begins with the assistant's content, found by
noncharacters put around it. It ends with the first stop token. A template with `{% generation %}` blocks says
itself what is generated.

Where ids can differ from `transformers`' `apply_chat_template`, which encodes the rendered text in one go: a
token that would straddle the beginning or end of an assistant's part (its text starts with a line feed, right
after the template's own) is two tokens here; and blanks at the very end of a generation prompt are left to
the model, as they belong to the first token of the answer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from rich.text import Text

from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.chat_template import GENERATION_END, GENERATION_START, RESERVED, ChatTemplate, compile_template
from puna.tokenizer.stream import StreamDecoder

Message = Mapping[str, Any]

_BREAK, _START, _END, _INDEX_END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_MARK = re.compile(f"([{_START}{_END}])([0-9]+){_INDEX_END}|{RESERVED.pattern}")


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A conversation as the model sees it.

    Attributes:
        text: what the template printed.
        ids: its tokens, BOS included where the template prints one; nothing must be added.
        mask: for each id 1 if the assistant generates it (its end-of-turn token included), else 0.
    """

    text: str
    ids: list[int]
    mask: list[int]


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template: str | None = None,
    **variables: Any,
) -> RenderedChat:
    """Render a conversation to text, ids and loss mask.

    Args:
        messages: dictionaries with `role` and `content` (a string, or text parts as in the OpenAI protocol,
            which are joined), and what else the template reads (`tool_calls`, `name`, ...). Arguments of tool
            calls given as JSON text are read, as templates expect objects.
        add_generation_prompt: end with the header after which the assistant speaks.
        tools: JSON schemas of functions that the assistant may call.
        template: Jinja source instead of `tokenizer.chat_template`.
        variables: further variables of the template.

    Raises:
        InputError: no template; a message without role or content; a template that has a mistake, refuses the
            messages, or does not read `tools` or one of `variables`; text that holds one of six noncharacters
            (U+FDD0 to U+FDD5); text with a special token's name that the template alters.

    Example:
        chat = render_chat(tokenizer, [{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    """
    source = tokenizer.chat_template if template is None else template
    if source is None:
        raise InputError("This tokenizer has no chat template. Set one, for example builtin_template('llama3').")
    compiled = compile_template(source)
    if tools:
        variables = {"tools": list(tools), **variables}
    if unread := sorted(variables.keys() - compiled.variables):
        raise InputError(f"The chat template does not read {', '.join(unread)}; leave it out, or use another template.")
    if not messages:
        raise InputError("A conversation needs at least one message.")
    checked = [_checked(i, message) for i, message in enumerate(messages)]
    for i, message in enumerate(checked):
        _check_role(i, message["role"], tokenizer)
    return _Chat(tokenizer, compiled, checked, variables).render(add_generation_prompt)


def preview(rendered: RenderedChat, tokenizer: Tokenizer, *, show_ids: bool = False) -> Text:
    """What the model reads and what it learns, coloured: special tokens magenta, the assistant's part green.

    With `show_ids` the id stands after each token.
    """
    text = Text()
    decoder = StreamDecoder(tokenizer)
    for token_id, supervised in zip(rendered.ids, rendered.mask, strict=True):
        style = "green" if supervised else "default"
        if token_id in tokenizer.special_ids:
            style = "bold magenta on green" if supervised else "bold magenta"
        text.append(decoder.push(token_id), style)
        if show_ids:
            text.append(f"[{token_id}]", "dim")
    text.append(decoder.flush(), "red")
    return text


def _checked(index: int, message: Message) -> dict[str, Any]:
    """A plain copy of one message, without keys that are None, ready for a template."""
    if not isinstance(message, Mapping):
        raise InputError(f"Message {index} must be a dictionary with role and content, not {message!r}.")
    plain = {key: value for key, value in message.items() if value is not None}
    if not isinstance(plain.get("role"), str) or not plain["role"]:
        raise InputError(f"Message {index} has no role; it needs one such as 'user' or 'assistant'.")
    content = plain.get("content")
    if content is None and not plain.get("tool_calls"):
        raise InputError(f"Message {index} (role {plain['role']!r}) has no content.")
    if isinstance(content, Sequence) and not isinstance(content, str) and plain["role"] not in ("tool", "ipython"):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise InputError(f"Message {index} holds a part that is not text; this is a text model.")
        plain["content"] = "".join(part["text"] for part in content)
    elif not isinstance(content, str | None) and plain["role"] not in ("tool", "ipython"):
        raise InputError(f"The content of message {index} must be a string, not {type(content).__name__}.")
    if "tool_calls" in plain:
        if not isinstance(plain["tool_calls"], list | tuple):
            raise InputError(f"The tool_calls of message {index} must be a list, not {plain['tool_calls']!r}.")
        plain["tool_calls"] = [_checked_call(index, call) for call in plain["tool_calls"]]
    return plain


def _check_role(index: int, role: str, tokenizer: Tokenizer) -> None:
    """Refuse a role that could become a special token; roles go in as they are, since templates compare them."""
    outer = {n for n, i in tokenizer.special_tokens.items() if i in tokenizer.stop_ids or i == tokenizer.bos_id}
    if any(name in role for name in tokenizer.special_tokens) or any(role in name for name in outer):
        raise InputError(f"The role of message {index} is {role!r}, which could become a special token.")


def _checked_call(index: int, call: Any) -> Any:
    if not isinstance(call, Mapping):
        raise InputError(f"Message {index} has a tool call that is not a dictionary: {call!r}.")
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(arguments := function.get("arguments"), str):
        return dict(call)
    try:
        return {**call, "function": {**function, "arguments": json.loads(arguments)}}
    except ValueError as error:
        raise InputError(f"The tool call's arguments in message {index} are not JSON: {arguments!r}.") from error


@dataclass(frozen=True, slots=True)
class _Chat:
    """One conversation on its way to ids."""

    tokenizer: Tokenizer
    template: ChatTemplate
    messages: list[dict[str, Any]]
    variables: dict[str, Any]

    def render(self, add_generation_prompt: bool) -> RenderedChat:
        try:
            text = _without_marks(self._print(self.messages, self.variables, add_generation_prompt))
        except InputError as error:
            index = self._first_failing(add_generation_prompt, str(error))
            role = self.messages[index]["role"]
            raise InputError(f"The chat template fails at message {index} (role {role!r}): {error}.") from error
        layout = self._layout(text, add_generation_prompt)
        if self.template.marks_generation:
            spans = list(zip(layout.generation_starts, layout.generation_ends, strict=True))
        else:
            spans = self._assistant_spans(layout, add_generation_prompt)
        return self._encode(layout, spans, add_generation_prompt)

    def _print(self, messages: Sequence[Message], variables: Mapping[str, Any], add_generation_prompt: bool) -> str:
        context = {**self.tokenizer.special_names(), "tools": None, **variables}
        return self.template.render(messages, add_generation_prompt=add_generation_prompt, **context)

    def _prefix(self, text: str, end: int, add_generation_prompt: bool) -> int | None:
        """Length of the first `end` messages rendered alone, if they are the beginning of `text`."""
        try:
            head = _without_marks(self._print(self.messages[:end], self.variables, add_generation_prompt))
        except InputError:
            return None
        return len(head) if text.startswith(head) else None

    def _first_failing(self, add_generation_prompt: bool, reason: str) -> int:
        for count in range(1, len(self.messages)):
            try:
                self._print(self.messages[:count], self.variables, add_generation_prompt)
            except InputError as error:
                if str(error) == reason:
                    return count - 1
        return len(self.messages) - 1

    def _layout(self, text: str, add_generation_prompt: bool) -> "_Layout":
        """Render again with special-token names broken and contents marked; the text must come out the same."""
        guard = _guard(tuple(self.tokenizer.special_tokens))
        variables = guard.value(self.variables, "a template variable or tool")
        for marked in (True, False):
            messages = [guard.message(i, message, marked) for i, message in enumerate(self.messages)]
            try:
                raw = self._print(messages, variables, add_generation_prompt)
            except InputError:
                continue
            if _without_marks(raw) == text:
                return _Layout.parse(raw, self.tokenizer)
        raise InputError(
            "A message holds the name of a special token, and the chat template alters the text of messages "
            "(or depends on it) in a way that would let it become that token. Remove the name from the message."
        )

    def _assistant_spans(self, layout: "_Layout", add_generation_prompt: bool) -> list[tuple[int, int]]:
        spans = []
        for i, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            start = self._prefix(layout.text, i, add_generation_prompt=True)
            if start is None:
                start = layout.content_starts.get(i)
            if start is None:
                continue  # the template left this message out, or so altered that no part can be told its own
            last = i == len(self.messages) - 1 and not add_generation_prompt
            limit = len(layout.text) if last else self._prefix(layout.text, i + 1, add_generation_prompt=False)
            content_end = layout.content_ends.get(i)
            if limit is not None:
                end = layout.first_stop(start, limit) or (limit if content_end is None else content_end)
            elif content_end is not None:
                end = layout.stop_right_after(content_end) or content_end
            else:
                continue
            spans.append((start, end))
        return spans

    def _encode(self, layout: "_Layout", spans: list[tuple[int, int]], add_generation_prompt: bool) -> RenderedChat:
        tokenizer = self.tokenizer
        # An answer's first token holds the blank before it ("[/INST]| answer"), so the cut comes before blanks.
        spans = [(_before_blanks(layout.text, start), end) for start, end in spans]
        cuts = sorted({position for span in spans for position in span})
        ids: list[int] = []
        mask: list[int] = []
        continuation = False
        position = 0
        for piece, special_id in layout.pieces:
            end = position + len(piece)
            if special_id is not None:
                ids.append(special_id)
                mask.append(_inside(position, spans))
                continuation = tokenizer.prefix != "always"
            else:
                inner = [cut for cut in cuts if position < cut < end]
                for begin, stop in zip([position, *inner], [*inner, end], strict=True):
                    part = layout.text[begin:stop]
                    if add_generation_prompt and stop == len(layout.text):
                        part = part.rstrip(" ")
                    new = tokenizer.encode(part, continuation=continuation)
                    ids += new
                    mask += [_inside(begin, spans)] * len(new)
                    continuation = True
            position = end
        return RenderedChat(layout.text, ids, mask)


@dataclass(slots=True)
class _Layout:
    """Rendered text without marks, and where in it the special tokens and the assistant's contents are."""

    text: str = ""
    pieces: list[tuple[str, int | None]] = field(default_factory=list)
    stops: list[tuple[int, int, bool]] = field(default_factory=list)
    """Special tokens: (begin, end, whether it ends a turn)."""
    content_starts: dict[int, int] = field(default_factory=dict)
    content_ends: dict[int, int] = field(default_factory=dict)
    generation_starts: list[int] = field(default_factory=list)
    generation_ends: list[int] = field(default_factory=list)

    @classmethod
    def parse(cls, raw: str, tokenizer: Tokenizer) -> "_Layout":
        layout = cls()
        parts: list[str] = []
        length = 0
        for piece, special_id in tokenizer.split_special(raw):
            if special_id is not None:
                layout.stops.append((length, length + len(piece), special_id in tokenizer.stop_ids))
                layout.pieces.append((piece, special_id))
                parts.append(piece)
                length += len(piece)
                continue
            plain: list[str] = []
            begin = 0
            for mark in _MARK.finditer(piece):
                plain.append(piece[begin : mark.start()])
                length += len(plain[-1])
                begin = mark.end()
                layout._note(mark, length)
            plain.append(piece[begin:])
            length += len(plain[-1])
            if joined := "".join(plain):
                layout.pieces.append((joined, None))
                parts.append(joined)
        layout.text = "".join(parts)
        return layout

    def _note(self, mark: re.Match[str], position: int) -> None:
        if mark[1] == _START:
            self.content_starts[int(mark[2])] = position
        elif mark[1] == _END:
            self.content_ends[int(mark[2])] = position
        elif mark[0] == GENERATION_START:
            self.generation_starts.append(position)
        elif mark[0] == GENERATION_END:
            self.generation_ends.append(position)

    def first_stop(self, start: int, limit: int) -> int | None:
        return next((end for begin, end, stops in self.stops if stops and start <= begin < limit), None)

    def stop_right_after(self, position: int) -> int | None:
        for begin, end, stops in self.stops:
            if begin >= position:
                return end if stops and not self.text[position:begin].strip() else None
        return None


class _Guard:
    """Breaks the names of special tokens in strings that come from outside the template."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._any_name = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._first_char = re.compile(f"(?=(?:{self._any_name.pattern}))(.)", re.DOTALL)
        # Half a name at the edge of a string could become whole with what the template prints beside it.
        self._heads = {name[:k] for name in names for k in range(1, len(name))}
        self._tails = {name[k:] for name in names for k in range(1, len(name))}
        self._longest = max(map(len, names), default=0)

    def message(self, index: int, message: Mapping[str, Any], marked: bool) -> dict[str, Any]:
        guarded = {
            self.text(str(key), f"message {index}"): self.value(value, f"message {index}")
            for key, value in message.items()
            if key != "role"
        }
        content = guarded.get("content")
        if marked and message["role"] == "assistant" and isinstance(content, str) and content.strip():
            # Inside the white space, so that templates which strip the content strip the same.
            body = content.strip()
            at = content.index(body)
            marked_body = f"{_START}{index}{_INDEX_END}{body}{_END}{index}{_INDEX_END}"
            guarded["content"] = content[:at] + marked_body + content[at + len(body) :]
        return {"role": message["role"], **guarded}

    def value(self, value: Any, where: str) -> Any:
        """A deep copy of JSON-like data in which every string, keys included, is guarded."""
        if isinstance(value, str):
            return self.text(value, where)
        if isinstance(value, Mapping):
            return {self.value(key, where): self.value(item, where) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item, where) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        raise InputError(f"In {where} is a {type(value).__name__}; chat templates are given JSON values only.")

    def text(self, text: str, where: str) -> str:
        if RESERVED.search(text):
            raise InputError(
                f"The text of {where} holds a Unicode noncharacter (U+FDD0 to U+FDD5). Remove it: no text has "
                "a use for it, and Puna marks special tokens with it."
            )
        if self._any_name.search(text):
            text = self._first_char.sub(rf"\1{_BREAK}", text)
        edges = range(1, min(self._longest, len(text) + 1))
        if any(text[:k] in self._tails for k in edges):
            text = _BREAK + text
        if any(text[-k:] in self._heads for k in edges):
            text += _BREAK
        return text


@lru_cache(maxsize=16)
def _guard(names: tuple[str, ...]) -> _Guard:
    return _Guard(names)


def _without_marks(raw: str) -> str:
    return _MARK.sub("", raw)


def _before_blanks(text: str, position: int) -> int:
    return len(text[:position].rstrip(" "))


def _inside(position: int, spans: list[tuple[int, int]]) -> int:
    return int(any(start <= position < end for start, end in spans))
