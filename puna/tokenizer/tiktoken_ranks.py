"""Byte-pair ranks in tiktoken's text form: Llama 3's `tokenizer.model` and `qwen.tiktoken`."""

import base64
import binascii
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import tiktoken
import tokenizers

from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.convert import ranks_to_library

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts text before byte pairs are merged (llama-models, models/llama3/tokenizer.py)."""

QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
"""Qwen's: digits one by one."""

LLAMA3_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
)
"""Llama 3.1's 256 special tokens, in the order of their ids. Llama 3.0 has some of the reserved ones elsewhere."""

QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@dataclass(frozen=True, slots=True)
class Family:
    """What a ranks file does not say about the tokenizer that it belongs to."""

    pattern: str
    special_names: tuple[str, ...]
    bos: str | None
    eos: str
    pad: str
    file_name: str
    normalization: Literal["NFC"] | None


FamilyName = Literal["llama3", "qwen"]
FAMILIES: dict[str, Family] = {
    "llama3": Family(
        LLAMA3_PATTERN,
        LLAMA3_SPECIALS,
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|finetune_right_pad_id|>",
        "tokenizer.model",
        None,
    ),
    "qwen": Family(QWEN_PATTERN, QWEN_SPECIALS, None, "<|endoftext|>", "<|endoftext|>", "qwen.tiktoken", "NFC"),
}
FAMILY_OF_SIZE = {128_000: "llama3", 151_643: "qwen"}

# Beyond these the regular expression engine overflows its stack. The values, and so the ids of such texts,
# are those of Meta's tokenizer.
_MAX_CHARS = 400_000
_MAX_RUN = 25_000


class TiktokenTokenizer(Tokenizer):
    """Byte-level BPE given by ranks.

    Args:
        ranks: token bytes -> id, from 0 without a gap; see `parse_ranks`.
        family: whose split pattern and special tokens; None recognises it by the number of ranks.
        special_tokens: name -> id, instead of the family's own list (Llama 3.0, a fine-tuned vocabulary).

    Raises:
        InputError: the family cannot be told, or an id is given twice.
    """

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        family: FamilyName | None = None,
        special_tokens: Mapping[str, int] | None = None,
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
    ) -> None:
        name = family or FAMILY_OF_SIZE.get(len(ranks))
        if name is None:
            known = ", ".join(f"{size} ({known})" for size, known in FAMILY_OF_SIZE.items())
            raise InputError(
                f"These are {len(ranks)} ranks; known are {known}. Name the family whose split pattern to use."
            )
        self._family = FAMILIES[name]
        if special_tokens is None:
            special_tokens = {n: len(ranks) + i for i, n in enumerate(self._family.special_names)}
        if clash := sorted(n for n, i in special_tokens.items() if i < len(ranks)):
            raise InputError(f"The special tokens {', '.join(clash)} have ids that the ranks use.")
        self._ranks = dict(ranks)
        self._encoding = tiktoken.Encoding(
            name, pat_str=self._family.pattern, mergeable_ranks=self._ranks, special_tokens={}
        )
        pieces: list[bytes | None] = [None] * (max([len(ranks) - 1, *special_tokens.values()]) + 1)
        for piece, rank in ranks.items():
            pieces[rank] = piece
        for special, i in special_tokens.items():
            pieces[i] = special.encode()
        super().__init__(
            pieces,
            special_tokens,
            bos=bos or _if_there(self._family.bos, special_tokens),
            eos=eos or _if_there(self._family.eos, special_tokens),
            pad=pad or _if_there(self._family.pad, special_tokens),
        )

    def _encode(self, text: str, continuation: bool) -> list[int]:
        if self._family.normalization:
            text = unicodedata.normalize(self._family.normalization, text)
        if len(text) <= _MAX_RUN:
            return self._encoding.encode_ordinary(text)
        return [i for part in _bounded(text) for i in self._encoding.encode_ordinary(part)]

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        if self._family.normalization or any(len(text) > _MAX_RUN for text in texts):
            return super()._encode_batch(texts)
        return self._encoding.encode_ordinary_batch(texts)

    def _native_file(self) -> tuple[str, bytes]:
        return self._family.file_name, format_ranks(self._ranks)

    def to_library(self) -> tokenizers.Tokenizer:
        return ranks_to_library(
            self._ranks,
            self._family.pattern,
            self.special_tokens,
            bos_id=self.bos_id,
            normalization=self._family.normalization,
        )


def parse_ranks(content: bytes) -> dict[bytes, int]:
    """Read lines of `base64(token) rank`.

    Raises:
        InputError: a line is something else, a single byte is missing, or the ranks are not 0, 1, 2, ...
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise InputError(f"Line {number} is not a token in base64 and its rank: {line[:60]!r}.") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise InputError(f"The {len(ranks)} ranks have gaps, or lack single bytes. Is the file cut short?")
    return ranks


def format_ranks(ranks: Mapping[bytes, int]) -> bytes:
    """The inverse of `parse_ranks`: the content of a Meta `tokenizer.model`."""
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in by_rank)


def _if_there(name: str | None, special_tokens: Mapping[str, int]) -> str | None:
    return name if name in special_tokens else None


def _bounded(text: str) -> Iterator[str]:
    for start in range(0, len(text), _MAX_CHARS):
        chunk = text[start : start + _MAX_CHARS]
        begin = 0
        for run in re.finditer(r"\s+|\S+", chunk):
            for cut in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                yield chunk[begin:cut]
                begin = cut
        yield chunk[begin:]
