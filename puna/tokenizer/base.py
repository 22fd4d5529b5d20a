"""One interface over every kind of tokenizer."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tokenizers

from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, write_json
from puna.tokenizer.stream import StreamDecoder

PrefixScheme = Literal["always", "first", "never"]
"""Where a blank is put in front: of every piece between special tokens, of the first piece, or nowhere."""

BOS_NAMES = ("<|begin_of_text|>", "<s>")
EOS_NAMES = ("<|end_of_text|>", "</s>", "<|endoftext|>")
STOP_NAMES = (*EOS_NAMES, "<|eot_id|>", "<|eom_id|>", "<|im_end|>")
"""Special tokens that end a turn or a document in the families that Puna reads."""


def well_formed(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates, which no UTF-8 can hold, turned into U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Tokenizer(ABC):
    """Text to ids and back, the same for every vocabulary format.

    Attributes:
        vocab_size: number of ids, special tokens included (the largest id plus one).
        special_tokens: name -> id of the tokens that only code may produce, never text.
        bos_id, eos_id: begin and end of a document; None where the vocabulary has none.
        pad_id: filler in batches; eos_id where there is no token of its own (0 where there is neither).
        stop_ids: ids that end a turn or a document. Loaders add those that `generation_config.json` names.
        prefix: where encoding puts the dummy blank of SentencePiece.
        chat_template: Jinja source, or None. May be replaced.
    """

    def __init__(
        self,
        pieces: Sequence[bytes | None],
        special_tokens: Mapping[str, int],
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
        prefix: PrefixScheme = "never",
    ) -> None:
        self._pieces = pieces
        self.vocab_size = len(pieces)
        self.special_tokens = dict(sorted(special_tokens.items(), key=lambda item: item[1]))
        self.special_ids = frozenset(self.special_tokens.values())
        self.bos_id = self._named("bos", bos)
        self.eos_id = self._named("eos", eos)
        pad_id = self._named("pad", pad)
        self.pad_id: int = next((i for i in (pad_id, self.eos_id) if i is not None), 0)
        self.stop_ids = frozenset(self.special_tokens[n] for n in STOP_NAMES if n in self.special_tokens)
        if self.eos_id is not None:
            self.stop_ids |= {self.eos_id}
        self.prefix = prefix
        self.chat_template: str | None = None
        self._patterns: dict[frozenset[str], re.Pattern[str]] = {}

    def _named(self, role: str, name: str | None) -> int | None:
        if name is not None and name not in self.special_tokens:
            raise InputError(f"The {role} token {name!r} is not a special token of this vocabulary.")
        return None if name is None else self.special_tokens[name]

    @abstractmethod
    def _encode(self, text: str, continuation: bool) -> list[int]:
        """Ids of well-formed text without special tokens."""

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._encode(text, continuation=False) for text in texts]

    @abstractmethod
    def to_library(self) -> tokenizers.Tokenizer:
        """The same tokenizer as an object of the `tokenizers` library, whose file form is tokenizer.json."""

    def _native_file(self) -> tuple[str, bytes] | None:
        """Name and content of the vocabulary's own file, where it is not tokenizer.json."""
        return None

    def _special_pattern(self, name: str) -> str:
        """Regular expression of the name, and the white space around it that the token swallows."""
        return re.escape(name)

    def encode(
        self,
        text: str,
        *,
        allowed_special: Collection[str] | Literal["all"] = (),
        continuation: bool = False,
    ) -> list[int]:
        """Ids of `text`; adds neither a BOS nor an EOS.

        Args:
            allowed_special: names of the special tokens that are recognised in the text. All others are plain
                text, so that what a user types never becomes a control token.
            continuation: the text goes on from an earlier piece, so it gets no dummy blank in front.

        Raises:
            InputError: `allowed_special` holds a name that is not a special token.
        """
        text = well_formed(text)
        if not allowed_special:
            return self._encode(text, continuation)
        ids: list[int] = []
        for piece, special_id in self.split_special(text, allowed_special):
            if special_id is None:
                ids += self._encode(piece, continuation)
            else:
                ids.append(special_id)
                continuation = self.prefix != "always"
        return ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`[encode(text) for text in texts]`, faster: the library's own batch call."""
        return self._encode_batch([well_formed(text) for text in texts])

    def split_special(
        self, text: str, allowed: Collection[str] | Literal["all"] = "all"
    ) -> list[tuple[str, int | None]]:
        """Cut `text` at its special tokens: (piece, None) for ordinary text, (piece, id) for a special token.

        The pieces joined are `text`; the longest name wins where several match. None of the pieces is empty.
        """
        names = frozenset(self.special_tokens if allowed == "all" else allowed)
        if not names:
            return [(text, None)] if text else []
        if names not in self._patterns:
            if unknown := sorted(names - self.special_tokens.keys()):
                raise InputError(f"Not special tokens of this vocabulary: {', '.join(unknown)}.")
            longest_first = sorted(names, key=lambda name: (-len(name), name))
            self._patterns[names] = re.compile("|".join(map(self._special_pattern, longest_first)))
        pieces: list[tuple[str, int | None]] = []
        end = 0
        for match in self._patterns[names].finditer(text):
            if match.start() > end:
                pieces.append((text[end : match.start()], None))
            piece = match.group()
            name = piece if piece in self.special_tokens else piece.strip()
            pieces.append((piece, self.special_tokens[name]))
            end = match.end()
        if end < len(text):
            pieces.append((text[end:], None))
        return pieces

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that one id stands for (a special token: its name), without regard to its
        neighbours.

        Raises:
            InputError: no token has this id.
        """
        piece = self._pieces[token_id] if 0 <= token_id < self.vocab_size else None
        if piece is None:
            raise InputError(f"{token_id} is not the id of a token; this vocabulary has {self.vocab_size} ids.")
        return piece

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD.

        The dummy blank that encoding puts before a text is taken off again: at the start, and after a special
        token that is printed where encoding puts one there. With `skip_special` special tokens are left out
        as if absent.

        Raises:
            InputError: no token has one of the ids.
        """
        decoder = StreamDecoder(self, skip_special=skip_special)
        return "".join(map(decoder.push, ids)) + decoder.flush()

    @cached_property
    def hash(self) -> str:
        """SHA-256 of vocabulary, merges, special tokens and text preparation.

        Equal before and after `save`, whatever the format; token shards refuse a tokenizer with another hash.
        """
        library = json.loads(self.to_library().to_str())
        parts = {key: library[key] for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write the files that `transformers.AutoTokenizer` loads without a trust flag.

        Always tokenizer.json and tokenizer_config.json (special-token names, chat template), and the
        vocabulary's own file (tokenizer.model) where it came from one. Files of an earlier tokenizer that
        would overrule these are removed.
        """
        directory.mkdir(parents=True, exist_ok=True)
        with atomic_path(directory / "tokenizer.json") as path:
            self.to_library().save(str(path), pretty=False)
        if native := self._native_file():
            with atomic_path(directory / native[0]) as path:
                path.write_bytes(native[1])
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.special_names(),
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_json(directory / "tokenizer_config.json", config)
        for stale in ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json"):
            (directory / stale).unlink(missing_ok=True)

    def special_names(self) -> dict[str, str]:
        """`bos_token`, `eos_token`, `pad_token` -> name, those that there are; chat templates use them."""
        names = {i: name for name, i in self.special_tokens.items()}
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        return {key: names[i] for key, i in ids.items() if i is not None and i in names}
