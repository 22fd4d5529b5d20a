"""Ids to text while they arrive."""

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from puna.tokenizer.base import Tokenizer


class StreamDecoder:
    """Turns ids into text one at a time, in constant time each, never showing half a character.

    What `push` returned for each id, and `flush` at the end, is together exactly `tokenizer.decode` of all
    ids.

    Example:
        decoder = StreamDecoder(tokenizer)
        for token_id in generated_ids:
            print(decoder.push(token_id), end="")
        print(decoder.flush())
    """

    def __init__(self, tokenizer: "Tokenizer", *, skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_blank = tokenizer.prefix != "never"

    def push(self, token_id: int) -> str:
        """The text that became certain with this id; empty inside a character.

        Raises:
            InputError: no token has this id.
        """
        piece = self._tokenizer.token_bytes(token_id)
        if token_id in self._tokenizer.special_ids:
            if self._skip_special:
                return ""
            self._drop_blank = self._tokenizer.prefix == "always" or (
                self._tokenizer.prefix == "first" and self._drop_blank
            )
        elif self._drop_blank and piece:
            piece = piece.removeprefix(b" ")
            self._drop_blank = False
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """U+FFFD if the ids ended inside a character, else nothing."""
        return self._utf8.decode(b"", final=True)
