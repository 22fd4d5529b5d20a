r"""The macros of a LaTeX text, expanded where they are used, as TeX does it but for what only TeX can do.

Definitions by \newcommand and its kin, \def and \let, and \DeclareMathOperator are taken in as the text is gone
through, and a use is replaced by what it stands for, arguments and all. Groups do not end a definition. Macros that
compute (conditionals, \expandafter, names with @) are left as they are used, and so is everything that is not the
text's own.
"""

import re
from dataclasses import dataclass

MAX_NESTING = 100
"""Uses of macros within what macros stand for; beyond it they are left as they are."""

_TOKEN = re.compile(
    r"\\begin\{(verbatim\*?|Verbatim|lstlisting|minted)\}.*?(?:\\end\{\1\}|\Z)"
    r"|\\verb\*?([^a-zA-Z\s*]).*?(?:\2|$)"
    r"|\\(?:[a-zA-Z@]+|.|\n)|#[1-9]|##|[{}\[\]]|[ \t]*\n[ \t]*(?:\n\s*)?|[ \t]+|[^\\{}\[\]#\s]{1,64}|.",
    re.DOTALL | re.MULTILINE,
)
_DEFINING = frozenset({r"\newcommand", r"\renewcommand", r"\providecommand", r"\DeclareRobustCommand"})
_DEFINITIONS = frozenset({r"\def", r"\gdef", r"\edef", r"\xdef"})
_COMPUTING = re.compile(
    r"\\(?:if[a-zA-Z@]*|else|fi|expandafter|csname|endcsname|noexpand|futurelet|loop|repeat|the|advance|count|dimen|newif"
    r"|begingroup|endgroup|catcode|let|def|edef|gdef|xdef|newcommand|renewcommand|relax|number|romannumeral|string|jobname"
    r"|ifx|or|global|long|protect)(?![a-zA-Z])|\\[a-zA-Z]*@"
)
_STRUCTURE = re.compile(
    r"\\(?:begin|end|item|chapter|section|subsection|subsubsection|paragraph|subparagraph|part|appendix|label|ref|eqref"
    r"|cite|citep|citet|bibliography|bibliographystyle|caption|footnote|title|author|date|maketitle|input|include|left"
    r"|right|document|usepackage|documentclass|arraystretch|baselinestretch|par)"
)
"""What a text may redefine, for looks, without meaning something else by it."""

_END = "\0"
"""Token that ends what a macro stands for; no text holds it."""


class TooLong(Exception):
    """Macros stand for more text than is allowed."""


@dataclass(frozen=True, slots=True)
class Macro:
    """What a use of a name stands for."""

    body: list[str]
    """Tokens, with #1 to #9 for arguments."""
    num_arguments: int = 0
    """How many follow."""
    default: list[str] | None = None
    """Of the first one, which then is optional, in brackets."""
    final: bool = False
    """It stands for a command of TeX's own, even if that has since been given a new meaning."""


def expand_macros(text: str, max_characters: int) -> str:
    """A text with its own macros expanded and their definitions removed.

    Args:
        text: LaTeX without comments.
        max_characters: of the result, and of all that is gone through on the way, in tokens.

    Raises:
        TooLong: it would be more.
    """
    return _Expander(text.replace(_END, ""), max_characters).run()


class _Expander:
    """Goes through tokens from a stack, on which it puts back what macros stand for."""

    def __init__(self, text: str, max_characters: int) -> None:
        self._stack = [found[0] for found in _TOKEN.finditer(text)]
        self._stack.reverse()
        self._macros: dict[str, Macro] = {}
        self._nesting = 0
        self._left = max_characters
        self._out: list[str] = []
        self._tokens_left = max_characters

    def run(self) -> str:
        while self._stack:
            token = self._pop()
            if token == _END:
                self._nesting -= 1
            elif token in _DEFINING:
                self._define_command(token)
            elif token in _DEFINITIONS:
                self._define_plain(token)
            elif token == r"\let":
                self._define_alias()
            elif token in (r"\DeclareMathOperator", r"\DeclareMathOperator*"):
                self._define_operator()
            elif token == r"\xspace":
                self._put_space()
            elif token in self._macros and self._nesting < MAX_NESTING:
                self._use(token, self._macros[token])
            else:
                self._put(token)
        return "".join(self._out)

    def _pop(self) -> str:
        self._tokens_left -= 1
        if self._tokens_left < 0:
            raise TooLong
        return self._stack.pop()

    def _put(self, token: str) -> None:
        # A control word ends where no letter follows, which in the text was a space or a brace that is gone.
        if token[0].isalpha() and self._out and re.fullmatch(r"\\[a-zA-Z@]+", self._out[-1]):
            token = " " + token
        self._left -= len(token)
        if self._left < 0:
            raise TooLong
        self._out.append(token)

    def _put_space(self) -> None:
        following = next((token for token in reversed(self._stack) if token != _END), "")
        if following[:1].isalnum() or following.startswith(("\\", "$", "(", "`")):
            self._put(" ")

    def _use(self, name: str, macro: Macro) -> None:
        if macro.final:
            self._put(macro.body[0])
            return
        if name[-1].isalpha():
            self._skip_space()
        arguments: list[list[str]] = []
        count = macro.num_arguments
        if macro.default is not None:
            arguments.append(self._optional() or macro.default)
            count -= 1
        arguments += [self._argument() for _ in range(count)]
        if not macro.num_arguments and self._stack[-2:] == ["}", "{"]:
            del self._stack[-2:]  # \name{} only ends the name
        self._nesting += 1
        self._stack.append(_END)
        for token in reversed(macro.body):
            if token[0] == "#" and token != "#":
                number = token[1:]
                if number == "#":
                    self._stack.append("#")
                elif int(number) <= len(arguments):
                    self._extend(arguments[int(number) - 1])
            else:
                self._stack.append(token)

    def _extend(self, tokens: list[str]) -> None:
        self._tokens_left -= len(tokens)
        if self._tokens_left < 0:
            raise TooLong
        self._stack.extend(reversed(tokens))

    def _define_command(self, token: str) -> None:
        r"""\newcommand{\name}[arguments][default]{body}, or with \name bare, or with a star."""
        self._skip_star()
        name = "".join(self._argument()).strip()
        count = "".join(self._optional() or ["0"]).strip()
        default = self._optional()
        body = self._argument()
        if re.fullmatch(r"\\(?:[a-zA-Z@]+|.)", name) and count.isdecimal() and int(count) <= 9:
            provided = token.startswith(r"\provide") and name in self._macros
            if not provided:
                self._define(name, Macro(body, int(count), default))

    def _define_plain(self, token: str) -> None:
        r"""\def\name#1#2{body}; other forms of parameters are not taken in."""
        self._skip_space()
        name = self._pop() if self._stack else ""
        parameters: list[str] = []
        while self._stack and self._stack[-1] != "{" and len(parameters) < 50:
            parameters.append(self._pop())
        body = self._argument()
        plain = [f"#{number}" for number in range(1, len(parameters) + 1)]
        if parameters == plain and name.startswith("\\"):
            self._define(name, Macro(body, len(parameters)))
        else:
            self._macros.pop(name, None)

    def _define_alias(self) -> None:
        r"""\let\name=\other."""
        self._skip_space()
        name = self._pop() if self._stack else ""
        self._skip_space()
        if self._stack and self._stack[-1].startswith("="):
            if self._stack[-1] == "=":
                self._pop()
                self._skip_space()
            else:
                self._stack[-1] = self._stack[-1][1:]
        other = self._pop() if self._stack else ""
        if name.startswith("\\"):
            self._define(name, self._macros.get(other, Macro([other], final=True)))

    def _define_operator(self) -> None:
        r"""\DeclareMathOperator{\name}{text}."""
        self._skip_star()
        name = "".join(self._argument()).strip()
        body = self._argument()
        if re.fullmatch(r"\\[a-zA-Z]+", name):
            self._define(name, Macro([r"\operatorname", "{", *body, "}"]))

    def _define(self, name: str, macro: Macro) -> None:
        """Take a macro in, unless it computes or is the structure of the text."""
        if _STRUCTURE.fullmatch(name) or "@" in name or _COMPUTING.search("".join(macro.body)):
            self._macros.pop(name, None)
        else:
            self._macros[name] = macro

    def _skip_space(self) -> None:
        while self._stack and (self._stack[-1] == _END or self._stack[-1].isspace()):
            if "\n" in self._stack[-1] and self._stack[-1].count("\n") > 1:
                return  # an empty line is a paragraph
            self._nesting -= self._pop() == _END

    def _skip_star(self) -> None:
        self._skip_space()
        if self._stack and self._stack[-1].startswith("*"):
            rest = self._pop()[1:]
            if rest:
                self._stack.append(rest)

    def _optional(self) -> list[str] | None:
        """An argument in brackets, if one follows."""
        self._skip_space()
        if not self._stack or self._stack[-1] != "[":
            return None
        self._pop()
        return self._until("]")

    def _argument(self) -> list[str]:
        """The next group, without its braces, or the next token."""
        self._skip_space()
        if not self._stack:
            return []
        token = self._pop()
        if token == "{":
            return self._until("}")
        if token == "}":
            self._stack.append(token)
            return []
        if token.startswith("\\") or len(token) == 1:
            return [token]
        self._stack.append(token[1:])
        return [token[0]]

    def _until(self, closing: str) -> list[str]:
        """Tokens up to a closing bracket that is not inside of braces."""
        found: list[str] = []
        depth = 0
        while self._stack:
            token = self._pop()
            if token == _END:
                self._nesting -= 1
                continue
            if not depth and token == closing:
                break
            depth += (token == "{") - (token == "}")
            found.append(token)
        return found
