"""The vocabulary inside a GGUF file: llama.cpp's `llama` (SentencePiece) and `gpt2` (byte-level BPE) models.

Keys are those of ggml, docs/gguf.md; how llama.cpp reads them is in its src/llama-vocab.cpp.
"""

import json
from collections.abc import Mapping, Sequence
from enum import IntEnum
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, models, normalizers

from puna.runtime.errors import InputError
from puna.runtime.gguf_file import GgufFile, read_gguf
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.convert import add_bos, all_merges, prepare_byte_level, sentencepiece_to_library
from puna.tokenizer.pieces import is_byte_piece
from puna.tokenizer.tiktoken_ranks import LLAMA3_PATTERN, QWEN_PATTERN
from puna.tokenizer.tokenizer_json import JsonTokenizer

_PREFIX = "tokenizer.ggml."
_CHAT_TEMPLATE = "tokenizer.chat_template"

_PATTERNS = {"llama-bpe": LLAMA3_PATTERN, "qwen2": QWEN_PATTERN}
_OTHER_NAMES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "qwen35": "qwen2"}

_MAX_TOKEN_CHARS = 1024
"""The longest published token has 128; the time for finding a token's merges grows with the square of its length."""


class _Kind(IntEnum):
    """What a token is (llama.cpp, include/llama.h, llama_token_type)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def holds_tokenizer(path: Path) -> bool:
    """Whether there is a tokenizer in a GGUF file.

    Raises:
        InputError: the file is broken.
    """
    return _PREFIX + "model" in read_gguf(path).metadata


def read_gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a GGUF file, with its chat template.

    Raises:
        InputError: the file is broken, holds no vocabulary, or one that Puna does not read.
    """
    file = read_gguf(path)
    model = file.get(_PREFIX + "model", str)
    if model is None:
        raise InputError(f"{path} holds no tokenizer.")
    try:
        tokens, kinds = _tokens(file)
        match model:
            case "llama":
                library = _read_sentencepiece(file, tokens, kinds)
            case "gpt2":
                library = _read_byte_level(file, tokens, kinds)
            case _:
                raise InputError(f"it is of the kind {model!r}; Puna reads 'llama' and 'gpt2'")
        named = {role: _token(file, f"{role}_token_id", tokens) for role in ("bos", "eos", "padding")}
        if file.get(_PREFIX + "add_bos_token", bool) is False:
            named["bos"] = None
        add_bos(library, named["bos"])
        tokenizer = JsonTokenizer(library.to_str(), bos=named["bos"], eos=named["eos"], pad=named["padding"])
        if moved := [token for token, i in tokenizer.special_tokens.items() if i >= len(tokens) or tokens[i] != token]:
            raise InputError(f"its special tokens have no place of their own: {', '.join(map(repr, moved[:8]))}")
        ends = {_token(file, f"{role}_token_id", tokens) for role in ("eot", "eom")}
        tokenizer.stop_ids |= {tokenizer.special_tokens[end] for end in ends if end in tokenizer.special_tokens}
    except InputError as error:
        raise InputError(f"The tokenizer in {path} cannot be used: {str(error).removesuffix('.')}.") from error
    tokenizer.chat_template = file.get(_CHAT_TEMPLATE, str)
    return tokenizer


def _tokens(file: GgufFile) -> tuple[list[str], list[int]]:
    """The text and the kind of every token, without the unused ones at the end, which only fill up the embedding."""
    tokens = file.metadata.get(_PREFIX + "tokens")
    kinds = file.metadata.get(_PREFIX + "token_type")
    if not isinstance(tokens, list) or not tokens:
        raise InputError("there is no list of tokens")
    if kinds is None:
        kinds = np.full(len(tokens), _Kind.NORMAL)
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
        raise InputError("tokens and token types do not match")
    used = np.flatnonzero(kinds != _Kind.UNUSED)
    tokens, kinds = tokens[: used[-1] + 1 if len(used) else 0], kinds.tolist()
    if len(set(tokens)) < len(tokens) or not tokens:
        raise InputError("some of its tokens are equal")
    if max(map(len, tokens)) > _MAX_TOKEN_CHARS or not all(tokens):
        raise InputError(f"it has a token that is empty, or longer than {_MAX_TOKEN_CHARS} characters")
    return tokens, kinds[: len(tokens)]


def _id(file: GgufFile, key: str, tokens: Sequence[str]) -> int | None:
    token_id = file.get(_PREFIX + key, int)
    if token_id is not None and not 0 <= token_id < len(tokens):
        raise InputError(f"{key} is {token_id}, and there are {len(tokens)} tokens")
    return token_id


def _token(file: GgufFile, key: str, tokens: Sequence[str]) -> str | None:
    token_id = _id(file, key, tokens)
    return None if token_id is None else tokens[token_id]


def _read_sentencepiece(file: GgufFile, tokens: list[str], kinds: list[int]) -> tokenizers.Tokenizer:
    scores = file.metadata.get(_PREFIX + "scores")
    if not isinstance(scores, np.ndarray) or len(scores) < len(tokens) or not np.isfinite(scores).all():
        raise InputError("it has no score for every token")
    unknown_id = _id(file, "unknown_token_id", tokens)
    space_prefix = file.get(_PREFIX + "add_space_prefix", bool)
    library = sentencepiece_to_library(
        tokens,
        scores[: len(tokens)].tolist(),
        unknown_id=0 if unknown_id is None else unknown_id,
        control_ids=[i for i, kind in enumerate(kinds) if kind == _Kind.CONTROL],
        bos_id=None,
        dummy_prefix=space_prefix is not False,
    )
    library.add_tokens(
        [AddedToken(tokens[i], normalized=False) for i, kind in enumerate(kinds) if kind == _Kind.USER_DEFINED]
    )
    return library


def _read_byte_level(file: GgufFile, tokens: list[str], kinds: list[int]) -> tokenizers.Tokenizer:
    name = file.get(_PREFIX + "pre", str) or "default"
    name = _OTHER_NAMES.get(name, name)
    if name not in _PATTERNS:
        raise InputError(f"it cuts text as {name!r} does; Puna knows {', '.join(_PATTERNS)}")
    lines = file.metadata.get(_PREFIX + "merges")
    merges = [tuple(line.split(" ")) for line in lines] if isinstance(lines, list) else []
    if not merges or any(len(merge) != 2 for merge in merges):
        raise InputError("it has no merges, or some that are not of two tokens")
    # Special tokens at the end are not part of the vocabulary proper, as in published tokenizer.json files.
    added = (_Kind.CONTROL, _Kind.USER_DEFINED, _Kind.UNUSED)
    num_proper = max((i + 1 for i, kind in enumerate(kinds) if kind not in added), default=0)
    vocabulary = {token: i for i, token in enumerate(tokens[:num_proper])}
    try:
        library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name == "llama-bpe"))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(str(error)) from error
    prepare_byte_level(library, _PATTERNS[name])
    if name == "qwen2":
        library.normalizer = normalizers.NFC()
    for i, kind in enumerate(kinds):
        if kind in (_Kind.CONTROL, _Kind.USER_DEFINED) or i >= num_proper:
            token = AddedToken(tokens[i], normalized=False, special=kind != _Kind.USER_DEFINED)
            (library.add_tokens if kind == _Kind.USER_DEFINED else library.add_special_tokens)([token])
    return library


def gguf_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The metadata from which llama.cpp makes this tokenizer.

    Args:
        vocab_size: rows of the model's embedding; llama.cpp wants as many tokens, so unused ones fill up the rest.

    Raises:
        InputError: llama.cpp has no such tokenizer.
    """
    parts = json.loads(tokenizer.to_library().to_str())
    added = {token["content"]: token for token in parts["added_tokens"]}
    of_id = {i: token for token, i in parts["model"]["vocab"].items()} | {t["id"]: t["content"] for t in added.values()}
    byte_fallback = parts["model"]["byte_fallback"]

    def kind(token: str | None) -> _Kind:
        if token is None:
            return _Kind.UNUSED
        if byte_fallback and token == parts["model"]["unk_token"]:
            return _Kind.UNKNOWN
        if token in added:
            return _Kind.CONTROL if added[token]["special"] else _Kind.USER_DEFINED
        return _Kind.BYTE if byte_fallback and is_byte_piece(token) else _Kind.NORMAL

    tokens = [of_id.get(i) for i in range(vocab_size)]
    values: dict[str, Any] = {
        "model": "llama" if byte_fallback else "gpt2",
        "tokens": [f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)],
        "token_type": np.array([kind(token) for token in tokens], np.int32),
        "add_bos_token": tokenizer.bos_id is not None,
        "add_eos_token": False,
    }
    if byte_fallback:
        values |= {"pre": "default", "add_space_prefix": tokenizer.prefix != "never"}
        values["scores"] = _scores(tokens, parts["model"], added)
        values["unknown_token_id"] = parts["model"]["vocab"].get(parts["model"]["unk_token"], 0)
    else:
        values |= {"pre": _pattern_name(parts), "merges": [" ".join(merge) for merge in parts["model"]["merges"]]}
    own_pad = tokenizer.pad_id in tokenizer.special_ids
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id if own_pad else None}
    turn_ends = [i for name, i in tokenizer.special_tokens.items() if i in tokenizer.stop_ids and i != tokenizer.eos_id]
    ids["eot"] = turn_ends[0] if turn_ends else None
    values |= {f"{role}_token_id": i for role, i in ids.items() if i is not None}
    metadata = {_PREFIX + key: value for key, value in values.items()}
    return metadata | ({} if tokenizer.chat_template is None else {_CHAT_TEMPLATE: tokenizer.chat_template})


def _pattern_name(parts: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pattern that cuts text before byte pairs are merged."""
    text = json.dumps(parts["pre_tokenizer"])
    for name, pattern in _PATTERNS.items():
        if json.dumps(pattern) in text:
            return name
    raise InputError(
        "This tokenizer cuts text by a pattern that Puna has no GGUF name for; it writes byte-level tokenizers that "
        "cut as Llama 3 or Qwen do."
    )


def _scores(
    tokens: Sequence[str | None], model: Mapping[str, Any], added: Mapping[str, Any]
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """SentencePiece's scores, whose order is the order of the merges.

    Raises:
        InputError: the merges are not all ways to cut the pieces, so that llama.cpp would merge otherwise.
    """
    merges = [tuple(merge) for merge in model["merges"]]
    rank: dict[str, int] = {}
    for first, second in merges:
        rank.setdefault(first + second, len(rank))
    mergeable = {
        token: i for i, token in enumerate(tokens) if token and token not in added and not is_byte_piece(token)
    }
    in_order = [first + second for first, second in merges]
    grouped = in_order == sorted(in_order, key=rank.__getitem__)
    if not grouped or set(all_merges(mergeable, list(rank))) != set(merges):
        raise InputError(
            "This tokenizer merges pieces otherwise than SentencePiece does, so llama.cpp would give other tokens. "
            "Take the model's own tokenizer.model, if there is one."
        )
    unmerged = count(len(rank))  # single characters, which no merge makes
    ranks = [rank[token] if token in rank else next(unmerged) for token in mergeable]
    score = dict(zip(mergeable, ranks, strict=True))
    return np.array([-score.get(token, 0) if token else 0 for token in tokens], np.float32)
