"""SentencePiece `.model` files (Llama 1 and 2)."""

from functools import cached_property

import tokenizers
from sentencepiece import SentencePieceProcessor

from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.convert import sentencepiece_to_library
from puna.tokenizer.pieces import piece_bytes

# A serialised `ModelProto { normalizer_spec { add_dummy_prefix: false } }`. Protocol Buffers define that
# parsing concatenated messages merges them, so appended to a model it switches the dummy prefix off.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    The model's unknown and control pieces are the special tokens. Text of several pieces between special
    tokens gets the dummy blank before each, as Meta's code does, which encodes them one by one.

    Args:
        model: content of the `.model` file.

    Raises:
        InputError: the content is not a SentencePiece model.
    """

    def __init__(self, model: bytes, *, bos: str | None = None, eos: str | None = None, pad: str | None = None) -> None:
        self._model = model
        self._processor = processor = _load(model)
        names = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
        special = {n: i for i, n in enumerate(names) if processor.is_control(i) or processor.is_unknown(i)}
        super().__init__(
            [n.encode() if n in special else piece_bytes(n) for n in names],
            special,
            bos=bos or (names[processor.bos_id()] if processor.bos_id() >= 0 else None),
            eos=eos or (names[processor.eos_id()] if processor.eos_id() >= 0 else None),
            pad=pad or (names[processor.pad_id()] if processor.pad_id() >= 0 else None),
            prefix="always" if processor.normalize("a") == "▁a" else "never",
        )

    @cached_property
    def _continuing(self) -> SentencePieceProcessor:
        return _load(self._model + _NO_DUMMY_PREFIX)

    def _encode(self, text: str, continuation: bool) -> list[int]:
        processor = self._continuing if continuation else self._processor
        ids: list[int] = processor.encode(text)
        return ids

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._processor.encode(texts)
        return ids

    def _native_file(self) -> tuple[str, bytes]:
        return "tokenizer.model", self._model

    def to_library(self) -> tokenizers.Tokenizer:
        """See `Tokenizer`.

        Raises:
            InputError: the model prepares text otherwise than Llama's (case folding, Unicode normalisation,
                removal of blanks), or is not a BPE model, which tokenizer.json would not reproduce.
        """
        processor = self._continuing
        probe = " ﬁ  Ａ  "
        if processor.normalize(probe) != probe.replace(" ", "▁"):
            raise InputError(
                "This SentencePiece model changes the text before it splits it (normalisation or removal of "
                "blanks); Puna converts models with identity normalisation only, as Llama's is."
            )
        ids = range(self.vocab_size)
        return sentencepiece_to_library(
            [processor.id_to_piece(i) for i in ids],
            [processor.get_score(i) for i in ids],
            unknown_id=processor.unk_id(),
            control_ids=[i for i in ids if processor.is_control(i)],
            bos_id=self.bos_id,
            dummy_prefix=self.prefix == "always",
        )


def _load(model: bytes) -> SentencePieceProcessor:
    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise InputError(f"This is not a whole SentencePiece model ({error}).") from error
    return processor
