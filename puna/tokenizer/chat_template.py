"""Jinja chat templates, run in a sandbox the way `transformers` runs them."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from puna.runtime.errors import InputError

TemplateName = Literal["llama2", "llama3", "chatml"]

RESERVED = re.compile("[\ufdd0-\ufdd5]")
"""Unicode noncharacters that Puna marks text with while it renders; no text has a use for them."""

GENERATION_START, GENERATION_END = "\ufdd4", "\ufdd5"
"""Two of them, around what a `{% generation %}` block prints."""

_MAX_CHARS = 50_000_000
_MAX_REPEATED = 1_000_000


def builtin_template(name: TemplateName) -> str:
    """Jinja source of a template that Puna ships: Llama 2's, Llama 3's (as Meta) or ChatML (as Qwen)."""
    if name not in get_args(TemplateName):
        raise InputError(f"There is no built-in chat template {name!r}; there are {get_args(TemplateName)}.")
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A compiled template.

    Attributes:
        variables: names that the template reads from outside.
        marks_generation: it has `{% generation %}` blocks, which say what the assistant generates.
    """

    compiled: jinja2.Template
    variables: frozenset[str]
    marks_generation: bool

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text, with `GENERATION_START` and `GENERATION_END` around the generation blocks.

        Raises:
            InputError: the template refuses the messages (`raise_exception`), fails on them, or prints
                without end.
        """
        parts: list[str] = []
        length = 0
        try:
            for part in self.compiled.generate(messages=messages, **variables):
                parts.append(part)
                length += len(part)
                if length > _MAX_CHARS:
                    raise InputError(f"it printed more than {_MAX_CHARS:,} characters")
        except InputError:
            raise
        except Exception as error:  # whatever an arbitrary template does wrong: types, recursion, division
            raise InputError(str(error) or type(error).__name__) from error
        return "".join(parts)


@lru_cache(maxsize=64)
def compile_template(source: str) -> ChatTemplate:
    """Compile Jinja source.

    Raises:
        InputError: the template has a syntax error, or holds one of the reserved noncharacters.
    """
    if RESERVED.search(source):
        raise InputError("The chat template holds a Unicode noncharacter (U+FDD0 to U+FDD5). Remove it.")
    environment = _environment()
    try:
        tree = environment.parse(source)
        compiled = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"The chat template has a mistake in line {error.lineno}: {error.message}.") from error
    blocks = (call.name for call in tree.find_all(nodes.ExtensionAttribute))
    return ChatTemplate(compiled, frozenset(find_undeclared_variables(tree)), _Generation.METHOD in blocks)


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: prints what is inside, between markers."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)
    METHOD = "_mark"

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method(self.METHOD), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{GENERATION_START}{caller()}{GENERATION_END}"


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which in addition refuses to multiply its way to a full memory."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for value, times in ((left, right), (right, left)):
            too_long = isinstance(value, Sequence) and len(value) * max(int(times), 0) > _MAX_REPEATED
            if too_long or (operator == "**" and abs(times) > 1000):
                raise jinja2.exceptions.SecurityError(f"the result of {operator!r} is too large")
        return super().call_binop(context, operator, left, right)


@cache
def _environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML and sorts keys; chat templates are written for this one of transformers.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
