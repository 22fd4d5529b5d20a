"""`puna convert`: from any format that Puna reads to Hugging Face's, Meta's or GGUF, with proof of equality."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from puna.config import to_plain
from puna.model.depths import depths_of
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path
from puna.runtime.gguf_file import SUFFIX as GGUF_SUFFIX
from puna.runtime.gguf_file import gguf_path
from puna.runtime.manifest import FILE_NAME as MANIFEST_FILE
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import console, say
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.convert import byte_level_ranks, read_llama2c_tokenizer
from puna.tokenizer.gguf import holds_tokenizer
from puna.tokenizer.load import load_tokenizer
from puna.tokenizer.tiktoken_ranks import format_ranks
from puna.weights.gguf import GgufType, round_weights, save_gguf
from puna.weights.load import check_vocabulary, load_model, resolve, save_model, write_tokenizer
from puna.weights.meta import save_meta

STAGE = "convert"

_DTYPES = {
    "keep": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

GGUF_FILE = "model.gguf"

_GGUF_TYPES: dict[torch.dtype, GgufType] = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}

_CHECKED_TOKENS = 64

# What rounding the weights may change in the logits, relative to the largest; far below what a mistake changes.
_ROUNDING = 0.1


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert, and into what."""

    source: str
    """A Hugging Face directory, a Meta directory, a .pth beside its params.json, a .gguf, a .bin of llama2.c, or
    hub:ORGANISATION/NAME."""
    destination: Path
    """Directory to write. It has to be absent or empty, or hold an earlier conversion, which is replaced."""
    to: Literal["hf", "meta", "gguf"] = "hf"
    """Format to write: Hugging Face's, Meta's, or llama.cpp's (model.gguf in the destination)."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """What to store the weights in; "keep" leaves every bit as it is."""
    tokenizer: Path | None = None
    """Tokenizer to put into the destination; the one beside the source when absent. A .bin is llama2.c's."""
    type: Literal["f16", "bf16", "q8_0", "q4_0", "q4_k"] | None = None
    """With to = "gguf": what weight matrices are stored in; absent is as `dtype` says. Embedding and output projection
    of a 4-bit file are in q8_0, see `pure`."""
    pure: bool = False
    """With a 4-bit type: store embedding and output projection in it too, as llama.cpp's llama-quantize --pure does."""
    shards: int = 1
    """With to = "meta": the number of model-parallel files."""
    verify: bool = True
    """Read the destination back and compare its logits with the source's; both models have to fit in memory, one at
    a time."""


def main(config: ConvertConfig) -> None:
    """Convert, verify, and only then put the result at its destination.

    Raises:
        InputError: the source is broken or unsupported, the destination holds something else, or the model has no
            form in the format asked for.
        RuntimeError: the destination does not compute what the source computes; it is not kept.
    """
    if config.to != "meta" and config.shards != 1:
        raise InputError(
            'shards is for to = "meta"; a Hugging Face directory is split by size, and any reader joins it.'
        )
    _check_gguf_options(config)
    source = resolve(config.source)
    _refuse_destination(config.destination, source)
    dtype = _DTYPES[config.dtype]

    console.print(f"Reading {config.source}")
    model = load_model(source)
    if config.to != "hf" and depths_of(model) is not None:
        raise InputError(f"{source} has layers that most tokens pass by, for which {config.to} has no form.")
    tokenizer, vocabulary = _find_tokenizer(config.tokenizer, source)
    if tokenizer is None:
        console.print(f"There is no tokenizer beside {source}, so none is written; `tokenizer` names one elsewhere.")
    else:
        check_vocabulary(model.config, tokenizer)
    inputs = {str(path): content_hash(path) for path in (source, config.tokenizer) if path is not None}
    manifest = Manifest(stage=STAGE, config=to_plain(config), inputs=inputs)
    source_dtype = model.embedding.weight.dtype
    gguf_type = config.type or _GGUF_TYPES[dtype or source_dtype]
    expected = logits_of_random_tokens(model) if config.verify else None

    with atomic_path(config.destination) as fresh:
        console.print(f"Writing {config.destination}")
        if config.to == "hf":
            save_model(model, fresh, tokenizer=tokenizer, dtype=dtype, manifest=manifest)
        elif config.to == "gguf":
            fresh.mkdir()
            name = config.destination.resolve().name
            save_gguf(model, fresh / GGUF_FILE, type=gguf_type, pure=config.pure, tokenizer=tokenizer, name=name)
            manifest.write(fresh)
        else:
            fresh.mkdir()
            save_meta(model, fresh, manifest=manifest, dtype=dtype, num_shards=config.shards)
        if tokenizer is not None and config.to != "gguf":
            if config.to == "meta":
                write_tokenizer(tokenizer, fresh)
            _write_tokenizer_model(tokenizer, vocabulary, fresh, ranks=config.to == "meta")
        if expected is not None and config.to == "gguf":
            difference = _verify_gguf(expected, model, fresh, config.source, gguf_type, config.pure)
        elif expected is not None:
            del model
            exact = dtype is None or torch.promote_types(source_dtype, dtype) == dtype
            difference = _verify(expected, fresh, config.source, exact)
        if expected is not None:
            written = Manifest.read(fresh)
            replace(written, results=written.results | {"max_logit_difference": difference}).write(fresh)
            largest = expected.abs().max().item()
            say(f"Read back and compared: the logits differ by {difference:.3g} at most; the largest is {largest:.3g}.")
    console.print(f"Done: {config.destination}")


@torch.inference_mode()
def logits_of_random_tokens(model: Transformer) -> Tensor:
    """Logits of fixed random tokens, computed in float32 whatever dtype the weights are in; shape [T, V]."""
    num_tokens = min(_CHECKED_TOKENS, model.config.context_length)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(model.config.vocab_size, (1, num_tokens), generator=generator)
    model.compute_dtype = torch.float32
    logits: Tensor = model(ids_BT)[0]
    return logits


def _check_gguf_options(config: ConvertConfig) -> None:
    if config.to != "gguf":
        if config.type is not None or config.pure:
            raise InputError('type and pure are for to = "gguf"; other formats have dtype.')
        return
    if config.type is not None and config.dtype != "keep":
        raise InputError("type and dtype both say what weights are stored in; leave one of them out.")
    if config.pure and not (config.type or "").startswith("q4"):
        raise InputError("pure is for the 4-bit types, q4_0 and q4_k.")
    if config.destination.suffix == GGUF_SUFFIX:
        raise InputError(
            f"The destination is a folder, in which {GGUF_FILE} and the manifest are written. Choose a name that does "
            f"not end in {GGUF_SUFFIX}, such as {config.destination.with_suffix('')}."
        )


def _refuse_destination(destination: Path, source: Path) -> None:
    if source.resolve().is_relative_to(destination.resolve()):
        raise InputError(f"The destination {destination} holds the source {source}, which would be lost.")
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return
    if (destination / MANIFEST_FILE).exists() and Manifest.read(destination).stage == STAGE:
        return
    raise InputError(
        f"{destination} exists and is not an earlier conversion. Choose another destination, or remove it first."
    )


def _find_tokenizer(named: Path | None, source: Path) -> tuple[Tokenizer | None, Path]:
    """The tokenizer to write, and the folder that its files are in."""
    if named is not None and not named.exists():
        raise InputError(f"There is no tokenizer at {named}.")
    if named is not None and named.suffix == ".bin":
        return read_llama2c_tokenizer(named), named.parent
    path = named or (source if source.is_dir() else source.parent)
    folder = path if path.is_dir() else path.parent
    there = any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    there = there or any(path.glob("*.tiktoken"))
    if named is None and (file := gguf_path(source)) is not None and (source == file or not there):
        path, there = file, holds_tokenizer(file)
    if named is None and not there:
        return None, folder
    return load_tokenizer(path), folder


def _write_tokenizer_model(tokenizer: Tokenizer, folder: Path, directory: Path, ranks: bool) -> None:
    """Put `tokenizer.model`, the only file that Meta's code reads, beside the others.

    It is the original where there is one; else, with `ranks`, written from a byte-level vocabulary.
    """
    path = directory / "tokenizer.model"
    if path.exists():
        return
    if (folder / path.name).exists():
        shutil.copyfile(folder / path.name, path)
    elif ranks:
        try:
            path.write_bytes(format_ranks(byte_level_ranks(tokenizer)))
        except InputError as error:
            console.print(f"No tokenizer.model is written, which Meta's code would need. {error}")


def _verify_gguf(
    expected: Tensor, model: Transformer, directory: Path, source: str, gguf_type: GgufType, pure: bool
) -> float:
    """The largest difference between `expected` and the logits of the GGUF model in `directory`.

    A mistake cannot be told from the rounding to four bits by its size, so what was written is compared with the model
    whose weights were rounded the same way; there it has to be exact.
    """
    model = model.float()  # what a file holds is exact there
    round_weights(model, gguf_type, pure)
    rounded = logits_of_random_tokens(model)
    del model
    _verify(rounded, directory, source, exact=True)
    return (rounded - expected).abs().max().item()


def _verify(expected: Tensor, directory: Path, source: str, exact: bool) -> float:
    """The largest difference between `expected` and the logits of the model in `directory`."""
    difference = (logits_of_random_tokens(load_model(directory)) - expected).abs().max().item()
    limit = 0.0 if exact else _ROUNDING * expected.abs().max().item()
    if not difference <= limit:  # also if it is not a number
        raise RuntimeError(
            f"The conversion of {source} went wrong: its logits and those of what was written differ by "
            f"{difference:.3g}, where at most {limit:.3g} can come from rounding. Nothing was kept."
        )
    return difference
