"""Vocabularies from one format to another, with identical ids."""

import json
import struct
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.pieces import byte_to_unicode, is_byte_piece, unicode_to_byte
from puna.tokenizer.tokenizer_json import JsonTokenizer


def sentencepiece_to_library(
    pieces: Sequence[str],
    scores: Sequence[float],
    *,
    unknown_id: int = 0,
    control_ids: Collection[int] = (1, 2),
    bos_id: int | None = 1,
    dummy_prefix: bool = True,
) -> tokenizers.Tokenizer:
    """A SentencePiece BPE vocabulary as a tokenizer of the `tokenizers` library.

    SentencePiece merges the neighbours whose joined piece has the best score, whichever two they are. So
    every way to cut a piece in two known pieces becomes a merge, in the order of the scores.

    Args:
        pieces, scores: by id; `▁` is the blank, `<0x00>` to `<0xFF>` are the byte fallback.
        bos_id: put before a text when `transformers` is asked for special tokens; None for nothing.

    Raises:
        InputError: the scores are not ranks, so this is no BPE model (but a unigram model).
    """
    if any(score != round(score) for score in scores):
        raise InputError("The scores of this SentencePiece model are not ranks: it is not a BPE model.")
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    special = sorted({unknown_id, *control_ids})
    mergeable = {piece: i for piece, i in vocabulary.items() if i not in special and not is_byte_piece(piece)}
    merges = all_merges(mergeable, by_rank=sorted(mergeable, key=lambda piece: -scores[vocabulary[piece]]))
    library = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=pieces[unknown_id],
            fuse_unk=True,
            byte_fallback=all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)),
        )
    )
    blanks = normalizers.Replace(" ", "▁")
    ending = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if dummy_prefix:
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks])
        library.decoder = decoders.Sequence([*ending, decoders.Strip(" ", 1, 0)])
    else:
        library.normalizer = blanks
        library.decoder = decoders.Sequence(ending)
    library.add_special_tokens([AddedToken(pieces[i], normalized=False) for i in special])
    add_bos(library, pieces[bos_id] if bos_id is not None else None)
    return library


def ranks_to_library(
    ranks: Mapping[bytes, int],
    pattern: str,
    special_tokens: Mapping[str, int],
    *,
    bos_id: int | None = None,
    normalization: Literal["NFC"] | None = None,
) -> tokenizers.Tokenizer:
    """tiktoken ranks as a tokenizer of the `tokenizers` library.

    tiktoken merges the neighbours whose joined bytes have the lowest rank, and takes a whole word that has a
    rank without merging; hence all merges in the order of ranks, and `ignore_merges`.
    """
    spell = byte_to_unicode()
    vocabulary = {"".join(spell[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = all_merges(vocabulary, by_rank=sorted(vocabulary, key=vocabulary.__getitem__))
    library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    prepare_byte_level(library, pattern)
    if normalization:
        library.normalizer = normalizers.NFC()
    names = {i: name for name, i in special_tokens.items()}
    for i in range(len(ranks), max(names, default=-1) + 1):
        # The library numbers added tokens itself, so gaps need a token of their own.
        library.add_special_tokens([AddedToken(names.get(i, f"<|unused_{i}|>"), normalized=False)])
    add_bos(library, names[bos_id] if bos_id is not None else None)
    return library


def prepare_byte_level(library: tokenizers.Tokenizer, pattern: str) -> None:
    """Give a BPE model Llama 3's surroundings: cut by `pattern`, spell bytes as characters, and back."""
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
    library.decoder = decoders.ByteLevel()


def byte_level_ranks(tokenizer: Tokenizer) -> dict[bytes, int]:
    """The tiktoken ranks of a byte-level BPE tokenizer, as a Meta checkpoint's `tokenizer.model` holds them.

    Write them with `tiktoken_ranks.format_ranks`.

    Raises:
        InputError: not byte-level BPE, or its ids do not follow the order of its merges, which is all that
            ranks can express.
    """
    model = json.loads(tokenizer.to_library().to_str())["model"]
    added = set(tokenizer.to_library().get_added_tokens_decoder())
    vocabulary = {text: i for text, i in model["vocab"].items() if i not in added}
    to_byte = unicode_to_byte()
    if model["type"] != "BPE" or model["byte_fallback"] or not all(set(t) <= to_byte.keys() for t in vocabulary):
        raise InputError("Only byte-level BPE (Llama 3, Qwen) can be written as tiktoken ranks.")
    merged = [vocabulary["".join(pair)] for pair in model["merges"]]
    if sorted(vocabulary.values()) != list(range(len(vocabulary))) or merged != sorted(merged):
        raise InputError(
            "The ids of this vocabulary do not follow the order of its merges (special tokens in between, or "
            "renumbered), so it has no form as tiktoken ranks."
        )
    return {bytes(to_byte[char] for char in text): i for text, i in vocabulary.items()}


def read_llama2c_tokenizer(path: Path) -> JsonTokenizer:
    """Read the `tokenizer.bin` of llama2.c (the tinyllamas models).

    Little-endian: int32 longest piece, then for each piece float32 score, int32 length, bytes (llama2.c,
    tokenizer.py). Blanks are written as blanks; 0 is unknown, 1 BOS, 2 EOS, 3 to 258 the bytes.

    Raises:
        InputError: the file is cut short or something else.
    """
    content = path.read_bytes()
    pieces: list[str] = []
    scores: list[float] = []
    position = 4
    try:
        while position < len(content):
            score, length = struct.unpack_from("<fi", content, position)
            position += 8 + length
            if length < 0 or position > len(content):
                raise ValueError("a piece ends beyond the end of the file")
            pieces.append(content[position - length : position].decode().replace(" ", "▁"))
            scores.append(score)
        if len(pieces) < 259 or not all(map(is_byte_piece, pieces[3:259])):
            raise ValueError("ids 3 to 258 are not the bytes")
    except (ValueError, struct.error) as error:
        raise InputError(f"{path} is not a tokenizer.bin of llama2.c: {error}.") from error
    pieces[:3] = ["<unk>", "<s>", "</s>"]
    return JsonTokenizer(sentencepiece_to_library(pieces, scores).to_str(), bos="<s>", eos="</s>")


def all_merges(vocabulary: Mapping[str, int], by_rank: Sequence[str]) -> list[tuple[str, str]]:
    """Every cut of every token into two tokens; best token first, of one token smallest ids first."""
    merges = []
    for token in by_rank:
        cuts = [(token[:k], token[k:]) for k in range(1, len(token))]
        known = [cut for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary]
        merges += sorted(known, key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))
    return merges


def add_bos(library: tokenizers.Tokenizer, bos: str | None) -> None:
    """Have `transformers` put `bos` before a text when asked for special tokens, as in published Llamas."""
    if bos is not None:
        library.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, library.token_to_id(bos))],
        )
