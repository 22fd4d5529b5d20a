"""Train a tokenizer on text: Llama 3's kind (byte-level BPE) or Llama 1's (SentencePiece BPE)."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import tokenizers
from sentencepiece import SentencePieceTrainer
from tokenizers import AddedToken, models, trainers
from tokenizers.pre_tokenizers import ByteLevel

from puna.config import to_plain
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, document_files, read_documents
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say
from puna.tokenizer.base import Tokenizer, well_formed
from puna.tokenizer.chat_template import TemplateName, builtin_template
from puna.tokenizer.convert import add_bos, prepare_byte_level
from puna.tokenizer.sentencepiece_model import SentencePieceTokenizer
from puna.tokenizer.tiktoken_ranks import LLAMA3_PATTERN
from puna.tokenizer.tokenizer_json import JsonTokenizer

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
    "<|finetune_right_pad_id|>",
)
"""Llama 3's special tokens that have a use; they end the vocabulary of a trained byte-level tokenizer."""

_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

_HELD_OUT_EVERY = 20
_HELD_OUT_CHARS = 1_000_000
_MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """What `puna tokenizer` does."""

    documents: Path
    """A Parquet or JSON Lines file with a "text" in each row, or a folder of such files."""

    output: Path
    """Directory to write the tokenizer to; replaced as a whole when training has succeeded."""

    kind: Literal["byte_level_bpe", "sentencepiece_bpe"] = "byte_level_bpe"
    """byte_level_bpe as Llama 3 and Qwen use, sentencepiece_bpe as Llama 1 and 2."""

    vocab_size: int = 32_000
    """Number of ids, special tokens included. A multiple of 128 is best for speed."""

    sample_bytes: int = 1_000_000_000
    """Use at most this much text, in bytes of UTF-8: the beginning of each file, an equal share of each."""

    chat_template: Literal["llama2", "llama3", "chatml"] = "llama3"
    """How conversations are written; its special tokens are added to the vocabulary."""


def main(config: TokenizerConfig) -> None:
    """Train the tokenizer that `config` describes, save it, and print how well it compresses held-out text.

    Every twentieth document is held out.

    Raises:
        InputError: no or broken documents, or too little text for the vocabulary.
    """
    files = document_files(config.documents)
    train = train_byte_level_bpe if config.kind == "byte_level_bpe" else train_sentencepiece_bpe
    documents = enumerate(_read_documents(files, config.sample_bytes))
    with atomic_path(config.output) as directory:
        tokenizer = train(
            (text for i, text in documents if i % _HELD_OUT_EVERY != _HELD_OUT_EVERY - 1),
            config.vocab_size,
            directory,
            chat_template=config.chat_template,
        )
        read = _read_documents(files, config.sample_bytes)
        sample = list(_first_chars(islice(read, _HELD_OUT_EVERY - 1, None, _HELD_OUT_EVERY), _HELD_OUT_CHARS))
        num_tokens = sum(map(len, tokenizer.encode_batch(sample)))
        num_bytes = sum(len(well_formed(text).encode()) for text in sample)
        results = {
            "vocab_size": tokenizer.vocab_size,
            "num_held_out_bytes": num_bytes,
            "bytes_per_token": num_bytes / num_tokens if num_tokens else None,
        }
        inputs = {str(config.documents): content_hash(config.documents)}
        Manifest("tokenizer", to_plain(config), inputs, results).write(directory)
    measured = (
        f"{num_bytes / num_tokens:.2f} bytes a token on {num_bytes:,} held-out bytes"
        if num_tokens
        else f"nothing held out to measure on, as there are fewer than {_HELD_OUT_EVERY} documents"
    )
    say(f"{config.kind}, {tokenizer.vocab_size:,} ids in {config.output}; {measured}")


def train_byte_level_bpe(
    texts: Iterable[str],
    vocab_size: int,
    directory: Path,
    *,
    chat_template: TemplateName = "llama3",
) -> Tokenizer:
    """Train a tokenizer of Llama 3's kind and save it in `directory`.

    Text is cut by Llama 3's pattern; the vocabulary is the 256 bytes, the merges, then the special tokens.
    The same texts give the same files. Memory grows with the number of different words, not with the text.

    Raises:
        InputError: too few ids for the bytes and special tokens, or too little text for the merges wanted.
    """
    special = SPECIAL_TOKENS + (_CHATML_TOKENS if chat_template == "chatml" else ())
    if vocab_size < 256 + len(special):
        raise InputError(
            f"vocab_size {vocab_size} is too small: the bytes and special tokens alone are {256 + len(special)} ids."
        )
    library = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    prepare_byte_level(library, LLAMA3_PATTERN)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        min_frequency=2,
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(map(well_formed, texts), trainer)
    reached = library.get_vocab_size() + len(special)
    if reached < vocab_size:
        raise _too_little_text(vocab_size, reached)
    library.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    add_bos(library, SPECIAL_TOKENS[0])
    tokenizer = JsonTokenizer(
        library.to_str(), bos="<|begin_of_text|>", eos="<|end_of_text|>", pad="<|finetune_right_pad_id|>"
    )
    return _saved(tokenizer, directory, chat_template)


def train_sentencepiece_bpe(
    texts: Iterable[str],
    vocab_size: int,
    directory: Path,
    *,
    chat_template: TemplateName = "llama2",
) -> Tokenizer:
    """Train a tokenizer of Llama 1's kind and save it in `directory` (tokenizer.model, tokenizer.json).

    BPE, digits one by one, bytes for unknown characters, no normalisation, a dummy blank in front, blanks
    kept (Llama, section 2.1; the settings are those in the published model). Learns line by line, as line
    feeds are bytes in this vocabulary. The same texts give the same files.

    Raises:
        InputError: too few ids for the characters of the text, or too little text for the merges wanted.
    """
    control = {"llama2": (), "llama3": SPECIAL_TOKENS, "chatml": _CHATML_TOKENS}[chat_template]
    model = io.BytesIO()
    failures: list[Exception] = []
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_lines(texts, failures),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            control_symbols=list(control),
            split_digits=True,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.99995,
            max_sentence_length=_MAX_LINE_BYTES,
            num_threads=1,  # recorded in the model
            minloglevel=2,
        )
    except RuntimeError as error:
        raise failures[0] if failures else _explained(str(error), vocab_size) from error
    return _saved(SentencePieceTokenizer(model.getvalue()), directory, chat_template)


def _saved(tokenizer: Tokenizer, directory: Path, chat_template: TemplateName) -> Tokenizer:
    tokenizer.chat_template = builtin_template(chat_template)
    tokenizer.save(directory)
    return tokenizer


def _explained(error: str, vocab_size: int) -> Exception:
    """What the trainer's complaint means to the user."""
    if "sentences_.empty()" in error:
        return InputError("There is no text to train a tokenizer on: the documents are empty.")
    if "Vocabulary size too high" in error:
        return _too_little_text(vocab_size, int(error.rsplit("<=", 1)[1].strip(" .\n")))
    if "smaller than required_chars" in error:
        return InputError(
            f"vocab_size {vocab_size} is too small for the characters of this text. {error.split(')] ')[-1]}"
        )
    return RuntimeError(error)


def _too_little_text(wanted: int, reached: int) -> InputError:
    return InputError(
        f"There is too little text for a vocabulary of {wanted} ids: it yields {reached}. Give more (or more "
        f"varied) documents, or set vocab_size to at most {reached}."
    )


def _lines(texts: Iterable[str], failures: list[Exception]) -> Iterator[str]:
    """Lines that the trainer takes whole; it drops longer ones. It also hides exceptions, hence `failures`."""
    step = _MAX_LINE_BYTES // 4  # a character has at most 4 bytes
    try:
        for text in texts:
            for line in well_formed(text).split("\n"):
                yield from (line[i : i + step] for i in range(0, len(line), step))
    except Exception as error:
        failures.append(error)
        raise


def _read_documents(files: list[Path], sample_bytes: int) -> Iterator[str]:
    for file in files:
        left = sample_bytes // len(files)
        for text in _texts(file):
            encoded = well_formed(text).encode()[:left]
            left -= len(encoded)
            yield encoded.decode(errors="ignore")
            if left <= 0:
                break


def _texts(file: Path) -> Iterator[str]:
    for number, document in enumerate(read_documents(file), start=1):
        text = document.get("text")
        if not isinstance(text, str):
            raise InputError(f'{file}, line {number}: there is no "text" field that holds a string.')
        yield text


def _first_chars(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        yield text[:limit]
        limit -= len(text)
