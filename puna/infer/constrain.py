"""Texts that have to follow a JSON schema, a regular expression, a grammar, or be one of a few choices.

`llguidance` does the parsing: it computes, for each place of a text, which tokens may follow.
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer

_EXAMPLE = '{"type": "object"}'
_MAX_REMEMBERED, _MAX_REMEMBERED_CHARACTERS = 128, 1 << 17
"""Compiled constraints that are kept, and the length of all of them together. With a vocabulary of 128,256 tokens one
takes 0.3 MB, or some 300 bytes for each character where it is long."""
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
"""Between the parts of a JSON text: bounded, so that a model cannot go on with blanks for ever."""


@dataclass(frozen=True)
class Constraint:
    """What an answer has to look like; one of these."""

    json_schema: str | None = None
    """A JSON schema, as JSON; {} is any JSON."""
    regex: str | None = None
    """A regular expression that the whole answer matches."""
    choice: tuple[str, ...] = ()
    """The answer is one of these."""
    grammar: str | None = None
    """A context-free grammar in Lark's syntax; its rule `start` is the answer."""

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value not in (None, ())]
        if len(given) != 1:
            raise InputError(
                f"A constraint is one of json_schema, regex, choice and grammar; here {' and '.join(given) or 'none'} "
                "of them is given."
            )
        if not all(self.choice):
            raise InputError("choice holds an empty string, which no answer can be.")
        if self.json_schema is not None:
            try:
                schema = json.loads(self.json_schema)
            except ValueError as error:
                raise InputError(f"json_schema is not JSON: {error}. Write a schema, such as {_EXAMPLE}.") from error
            if not isinstance(schema, dict):
                raise InputError(f"json_schema is {self.json_schema:.40}; it has to be an object, such as {_EXAMPLE}.")

    @property
    def num_characters(self) -> int:
        """How long it is."""
        return sum(map(len, (self.json_schema or "", self.regex or "", self.grammar or "", *self.choice)))


def check_support(tokenizer: Tokenizer) -> None:
    """See whether answers can be constrained at all.

    Raises:
        InputError: llguidance is not installed, or the tokenizer has no token that could end an answer.
    """
    if find_spec("llguidance") is None:
        raise InputError("Constrained answers need the package llguidance: pip install llguidance.")
    if not tokenizer.stop_ids:
        raise InputError("This tokenizer has no end token, so nothing could end a constrained answer.")


class Matcher:
    """How far an answer has come in what is demanded of it.

    Args:
        state: llguidance's.
        vocab_size: logits in a row.
    """

    def __init__(self, state: Any, vocab_size: int) -> None:
        self._state = state
        self._vocab_size = vocab_size
        self._bits = np.zeros((vocab_size + 31) // 32, dtype=np.int32)

    @property
    def error(self) -> str:
        """Why it cannot go on; empty where it can."""
        return str(self._state.get_error()).partition("\n<state>")[0].strip()

    def copy(self) -> "Matcher":
        """Another that stands where this one stands."""
        return Matcher(self._state.deep_copy(), self._vocab_size)

    @property
    def finished(self) -> bool:
        """Whether nothing more can follow."""
        return bool(self._state.is_stopped())

    def allowed(self) -> NDArray[np.bool_]:
        """For each token of the vocabulary, whether it can follow."""
        self._state.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        return bits[: self._vocab_size].astype(bool)

    def note(self, token_id: int) -> None:
        """Take in the next token."""
        self._state.consume_token(token_id)


class Constraints:
    """Compiles constraints for a tokenizer, in a thread of its own, and remembers them.

    Args:
        tokenizer: has passed `check_support`.
        vocab_size: of the model, whose logits may be more than the tokenizer's tokens.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._source = tokenizer
        self._vocab_size = vocab_size
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="puna-grammar")
        self._compiled: OrderedDict[Constraint, Future[Matcher]] = OrderedDict()

    def compile(self, constraint: Constraint) -> "Future[Matcher]":
        """A matcher at an answer's beginning, to be copied, when it is ready; an InputError where it is refused."""
        if constraint not in self._compiled:
            self._compiled[constraint] = self._compiler.submit(self._compile, constraint)
        self._compiled.move_to_end(constraint)
        found = self._compiled[constraint]
        while (
            len(self._compiled) > _MAX_REMEMBERED
            or sum(known.num_characters for known in self._compiled) > _MAX_REMEMBERED_CHARACTERS
        ):
            self._compiled.popitem(last=False)
        return found

    @cached_property
    def _tokenizer(self) -> Any:
        """llguidance's view of the vocabulary, made by the compiling thread: it takes half a second."""
        from llguidance import LLTokenizer, TokenizerWrapper

        vocabulary = TokenizerWrapper(_Vocabulary(self._source, self._vocab_size))
        return LLTokenizer(vocabulary, n_vocab=self._vocab_size, eos_token=sorted(self._source.stop_ids))

    def _compile(self, constraint: Constraint) -> Matcher:
        from llguidance import LLMatcher

        matcher = Matcher(LLMatcher(self._tokenizer, _grammar(constraint), log_level=0), self._vocab_size)
        if matcher.error:
            raise InputError(f"The constraint is refused: {matcher.error}")
        return matcher


def _grammar(constraint: Constraint) -> str:
    """A constraint in llguidance's own form."""
    from llguidance import LLMatcher

    if constraint.json_schema is not None:
        return LLMatcher.grammar_from_json_schema(
            constraint.json_schema, overrides={"whitespace_pattern": _WHITESPACE, "lenient": False}
        )
    if constraint.regex is not None:
        return LLMatcher.grammar_from_regex(constraint.regex)
    if constraint.grammar is not None:
        return LLMatcher.grammar_from_lark(constraint.grammar)
    return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, constraint.choice)))


class _Vocabulary:
    """A tokenizer in the form that llguidance asks for."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(tokenizer.stop_ids)
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids = sorted(tokenizer.special_ids)
        self.tokens = [self._bytes(token_id) for token_id in range(vocab_size)]

    def _bytes(self, token_id: int) -> bytes:
        try:
            return self._tokenizer.token_bytes(token_id)
        except InputError:
            return b""

    def __call__(self, text: str) -> Sequence[int]:
        return self._tokenizer.encode(text, continuation=True)
