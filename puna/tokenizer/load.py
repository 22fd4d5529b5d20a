"""Load a tokenizer from whatever a model directory holds."""

import re
from pathlib import Path
from typing import Any

from puna.runtime.errors import InputError
from puna.runtime.files import read_json
from puna.runtime.gguf_file import SUFFIX as GGUF_SUFFIX
from puna.runtime.gguf_file import gguf_path
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.gguf import read_gguf_tokenizer
from puna.tokenizer.sentencepiece_model import SentencePieceTokenizer
from puna.tokenizer.tiktoken_ranks import TiktokenTokenizer, parse_ranks
from puna.tokenizer.tokenizer_json import JsonTokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a vocabulary file or a model directory.

    In a directory tokenizer.json is preferred, then tokenizer.model (SentencePiece or tiktoken, told apart by
    content), then *.tiktoken, then *.gguf. The files beside it are heeded: tokenizer_config.json (names of BOS, EOS and
    padding, chat template, special tokens of a ranks file), chat_template.jinja, generation_config.json
    (further stop ids).

    Raises:
        InputError: there is no vocabulary, or a file is broken.
    """
    file = _vocabulary_file(path)
    if file.suffix == GGUF_SUFFIX:
        return read_gguf_tokenizer(file)
    config = _read_dict(file.parent / "tokenizer_config.json")
    names = {role: _token_name(config.get(f"{role}_token")) for role in ("bos", "eos", "pad")}
    content = file.read_bytes()
    tokenizer: Tokenizer
    try:
        if content.lstrip()[:1] == b"{":
            tokenizer = JsonTokenizer(content.decode(), **names)
        elif re.match(rb"[A-Za-z0-9+/]+=* \d+\s", content):
            tokenizer = _load_ranks(content, config, names)
        else:
            tokenizer = SentencePieceTokenizer(content, **names)
    except (InputError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file} cannot be used as a tokenizer. {error} Is it whole, and is it the right file? Git LFS "
            "pointers and interrupted downloads look like this."
        ) from error
    tokenizer.chat_template = _chat_template(file.parent, config)
    tokenizer.stop_ids |= _generation_stop_ids(file.parent, tokenizer.vocab_size)
    return tokenizer


def _vocabulary_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"{path} does not exist; a tokenizer is a file or a model directory.")
    candidates = [path / "tokenizer.json", path / "tokenizer.model", *sorted(path.glob("*.tiktoken"))]
    candidates += filter(None, [gguf_path(path)])
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise InputError(
        f"{path} holds no tokenizer: neither tokenizer.json nor tokenizer.model nor *.tiktoken. "
        "Copy the tokenizer files of the model there."
    )


def _read_dict(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object.")
    return value


def _token_name(token: Any) -> str | None:
    """The name of a token that tokenizer_config.json gives as a string, a dictionary, or null."""
    name = token.get("content") if isinstance(token, dict) else token
    if name is not None and not isinstance(name, str):
        raise InputError(f"tokenizer_config.json names a special token by {token!r}; it must be a string.")
    return name


def _load_ranks(content: bytes, config: dict[str, Any], names: dict[str, str | None]) -> TiktokenTokenizer:
    ranks = parse_ranks(content)
    listed = config.get("added_tokens_decoder") or {}
    special = {_token_name(token): int(i) for i, token in listed.items()}
    return TiktokenTokenizer(ranks, None, {n: i for n, i in special.items() if n is not None} or None, **names)


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        by_name = {entry["name"]: entry["template"] for entry in template}
        template = by_name.get("default", next(iter(by_name.values()), None))
    if template is not None and not isinstance(template, str):
        raise InputError(f"{directory / 'tokenizer_config.json'}: chat_template must be a string.")
    return template


def _generation_stop_ids(directory: Path, vocab_size: int) -> frozenset[int]:
    file = directory / "generation_config.json"
    eos = _read_dict(file).get("eos_token_id")
    ids = frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
    if wrong := [i for i in ids if not isinstance(i, int) or not 0 <= i < vocab_size]:
        raise InputError(f"{file}: eos_token_id {wrong} is not an id below {vocab_size}.")
    return ids
