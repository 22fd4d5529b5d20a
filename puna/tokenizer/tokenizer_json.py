"""`tokenizer.json`, the format of the `tokenizers` library and of Hugging Face model directories."""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import tokenizers

from puna.runtime.errors import InputError
from puna.tokenizer.base import BOS_NAMES, EOS_NAMES, STOP_NAMES, PrefixScheme, Tokenizer
from puna.tokenizer.pieces import piece_bytes, unicode_to_byte


class JsonTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library: byte-level BPE (Llama 3, Qwen) or SentencePiece-like (Llama
    2).

    Added tokens marked special, the named ones, and those that end a turn are special tokens. The other added
    tokens are ordinary vocabulary, recognised in any text, as in `transformers`.

    Args:
        content: text of the file.

    Raises:
        InputError: the content is not a tokenizer.json, or of a kind whose tokens are not bytes (WordPiece,
            ...).
    """

    def __init__(self, content: str, *, bos: str | None = None, eos: str | None = None, pad: str | None = None) -> None:
        self._library = library = _load(content)
        added = library.get_added_tokens_decoder()
        names = {token.content for token in added.values()}
        named = {name for name in (bos, eos, pad) if name is not None}
        if unknown := sorted(name for name in named if library.token_to_id(name) is None):
            raise InputError(f"The vocabulary has no token {', '.join(unknown)}.")
        forced = [
            tokenizers.AddedToken(name, special=True, normalized=False)
            for name in sorted(named | (names & set(STOP_NAMES)))
            if not any(token.content == name and token.special for token in added.values())
        ]
        library.add_special_tokens(forced)
        added = library.get_added_tokens_decoder()
        self._added = {token.content: token for token in added.values()}
        special = {token.content: i for i, token in added.items() if token.special}

        parts = json.loads(library.to_str())
        kinds = {part.get("type") for part in _walk(parts["decoder"])}
        vocabulary = library.get_vocab(with_added_tokens=False)
        pieces: list[bytes | None] = [None] * (max([*vocabulary.values(), *added]) + 1)
        if "ByteLevel" in kinds:
            from_unicode = unicode_to_byte()
            for text, i in vocabulary.items():
                spelled = set(text) <= from_unicode.keys()
                pieces[i] = bytes(from_unicode[c] for c in text) if spelled else text.encode()
        elif parts["model"].get("byte_fallback") or "Metaspace" in kinds:
            for text, i in vocabulary.items():
                pieces[i] = piece_bytes(text)
        else:
            raise InputError(
                f"Its decoder is {', '.join(sorted(map(str, kinds))) or 'absent'}; Puna reads byte-level BPE "
                "and SentencePiece-like tokenizers."
            )
        for i, token in added.items():
            pieces[i] = token.content.encode()
        super().__init__(
            pieces,
            special,
            bos=bos or next((name for name in BOS_NAMES if name in special), None),
            eos=eos or next((name for name in EOS_NAMES if name in special), None),
            pad=pad,
            prefix=_prefix_scheme(parts),
        )

    @cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        if self.prefix == "never":
            return self._library
        parts = json.loads(self._library.to_str())
        for part in _walk(parts["normalizer"]):
            if "normalizers" in part:
                part["normalizers"] = [n for n in part["normalizers"] if n["type"] != "Prepend"]
        if (parts["normalizer"] or {}).get("type") == "Prepend":
            parts["normalizer"] = None
        for part in _walk(parts["pre_tokenizer"]):
            if part.get("type") == "Metaspace":
                part["prepend_scheme"] = "never"
        return _load(json.dumps(parts))

    def _encode(self, text: str, continuation: bool) -> list[int]:
        library = self._continuing if continuation else self._library
        return library.encode(text, add_special_tokens=False).ids

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._library.encode_batch_fast(texts, add_special_tokens=False)]

    def _special_pattern(self, name: str) -> str:
        token = self._added[name]
        before, after = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
        return f"{before}{re.escape(name)}{after}"

    def to_library(self) -> tokenizers.Tokenizer:
        return self._library


def _load(content: str) -> tokenizers.Tokenizer:
    try:
        library = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"This is not a tokenizer.json that can be read ({error}).") from error
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True  # text never becomes a special token
    return library


def _walk(part: Any) -> Iterator[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder and all that it is composed of."""
    if isinstance(part, dict):
        yield part
        for value in part.values():
            for child in value if isinstance(value, list) else [value]:
                yield from _walk(child)


def _prefix_scheme(parts: dict[str, Any]) -> PrefixScheme:
    if any(part.get("type") == "Prepend" for part in _walk(parts["normalizer"])):
        return "always"
    schemes = [p["prepend_scheme"] for p in _walk(parts["pre_tokenizer"]) if p.get("type") == "Metaspace"]
    scheme: PrefixScheme = schemes[0] if schemes else "never"
    return scheme
