"""Any checkpoint to a model, and a model to a model directory."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from puna.model.config import LlamaConfig
from puna.model.depths import depths_of, gate_layers
from puna.model.transformer import Linear, Transformer
from puna.runtime.devices import prefer_huge_pages
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, write_json
from puna.runtime.gguf_file import gguf_path
from puna.runtime.manifest import Manifest
from puna.tokenizer.base import Tokenizer
from puna.weights.gguf import gguf_tensors, read_gguf_config
from puna.weights.gguf_packed import multiplies_integers, packed_tensors
from puna.weights.huggingface import (
    CONFIG_FILE,
    MAX_SHARD_BYTES,
    depths_config,
    hf_config,
    hf_tensors,
    quantization_config,
    read_depths,
    read_hf_config,
    save_hf_weights,
)
from puna.weights.llama2c import llama2c_tensors, read_llama2c_config
from puna.weights.meta import PARAMS_FILE, meta_tensors, read_meta_config
from puna.weights.stored import StoredTensors, copy_weights, named_tensors

HUB = "hub:"
"""Prefix of a path that names a model on the Hugging Face hub, to be downloaded."""

_HUB_FILES = ("*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "*.jinja")


def resolve(path: Path | str) -> Path:
    """A local path for `path`: itself, or for `hub:org/name` where its download is.

    This is the only place in Puna that uses the network, and only for the prefix `hub:`.

    Raises:
        InputError: there is nothing at `path`, or the hub has no such model, or cannot be reached.
    """
    if not str(path).startswith(HUB):
        if not Path(path).exists():
            raise InputError(
                f"There is no checkpoint at {path}. To download a model from the Hugging Face hub write "
                f"{HUB}ORGANISATION/NAME."
            )
        return Path(path)
    import huggingface_hub

    name = str(path).removeprefix(HUB)
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (OSError, ValueError) as error:  # the hub's errors derive from these
        raise InputError(f"{path} could not be downloaded: {error}") from error


def read_config(path: Path | str) -> LlamaConfig:
    """The configuration of a checkpoint in any format that `load_model` reads, without its weights.

    Raises:
        InputError: it is none of these, or is broken or unsupported.
    """
    path = resolve(path)
    match _format(path):
        case "hf":
            return read_hf_config(path)
        case "meta":
            return read_meta_config(path)
        case "gguf":
            return read_gguf_config(_gguf(path))
        case _:
            return read_llama2c_config(path)


Fit = Callable[[Transformer, Mapping[str, Any], Collection[str], str], None]
"""Puts empty modules into a model that hold what a file holds in place of weights; `puna.compress.apply.fit` is one."""


def load_model(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    fit: Fit | None = None,
    map_embedding: bool = False,
) -> Transformer:
    """A model in evaluation mode, from any format that Puna reads.

    The model is allocated once, in its final dtype and place, and filled tensor by tensor.

    Args:
        path: a Hugging Face directory, a Meta directory, a .pth beside its params.json, a .gguf file or a folder of
            one, a .bin of llama2.c, or `hub:org/name` to download the first.
        dtype: of the parameters; None takes the checkpoint's own.
        fit: called for a model whose weights are stored as integers, with the model (without memory), the
            `quantization_config`, the names of the maps that are stored so, and `path`. Without it such a model is
            refused: it cannot be trained or converted. A GGUF file in Q4_0 or Q8_0 is read as floats then, and
            wherever the native kernels do not multiply its integers, or `dtype` asks for floats.
        map_embedding: leave the embedding in its file, if it is stored there as the model wants it and nothing else
            uses it: only the rows that are looked up come into memory. It may be changed; the file is not.

    Raises:
        InputError: the checkpoint is broken, incomplete, unsupported, or none of these formats.
    """
    model, stored = empty_model(path, device=device, dtype=dtype, fit=fit)
    model = model.to_empty(device=device)
    if model.config.tie_embeddings:
        model.output.weight = model.embedding.weight  # leaving the meta device separates them
    for _, tensor in named_tensors(model):
        prefer_huge_pages(tensor)
    name = stored.file_name("embedding.weight")
    alone = not model.config.tie_embeddings and torch.device(device).type == "cpu"
    mapped = map_embedding and alone and stored.dtypes.get(name) is model.embedding.weight.dtype
    copy_weights(model, stored, leave={"embedding.weight"} if mapped else ())
    if mapped:
        model.embedding.weight = nn.Parameter(stored.read(name))
    return model.eval()


def empty_model(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    fit: Fit | None = None,
) -> tuple[Transformer, StoredTensors]:
    """A checkpoint's model on the meta device, which has shapes and no memory, and the tensors to fill it with.

    Arguments and errors are those of `load_model`; the tensors have not been compared with the model yet.
    """
    path = resolve(path)
    config = read_config(path)
    stored = _tensors(path, config)
    with torch.device("meta"):
        model = Transformer(config)
    depths = read_depths(path) if _format(path) == "hf" else None
    if depths is not None:
        try:
            gate_layers(model, depths)
        except ValueError as error:
            raise InputError(f"{path / CONFIG_FILE}: {error}") from error
    maps = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    packed: list[tuple[Mapping[str, Any], list[str]]] = []
    if _format(path) == "hf" and (own := quantization_config(path)) is not None:
        packed = [(own, [name for name in maps if stored.file_name(f"{name}.weight_scale") in stored.shapes])]
    elif _format(path) == "gguf" and fit is not None and dtype is None and multiplies_integers(device):
        stored, packed = packed_tensors(_gguf(path), stored, maps)
    for quantization, names in packed:
        if fit is None:
            raise InputError(
                f"{path} holds quantised weights (quantization_config in {CONFIG_FILE}), which can be run and "
                "measured, but not trained or converted. Use the model that it was made from."
            )
        fit(model, quantization, names, str(path))
    return model.to(dtype or stored.dtype).eval(), stored


def _format(path: Path) -> str:
    if path.is_dir():
        if (path / CONFIG_FILE).exists():
            return "hf"
        if (path / PARAMS_FILE).exists() or any(path.glob("*.pth")) or any(path.glob("*.pt")):
            return "meta"
        if any(path.glob("*.gguf")):
            return "gguf"
    elif path.suffix == ".gguf":
        return "gguf"
    elif path.suffix in (".pth", ".pt"):
        return "meta"
    elif path.suffix == ".bin":
        return "llama2c"
    raise InputError(
        f"{path} is not a checkpoint that Puna reads: a Hugging Face directory (with {CONFIG_FILE}), a Meta "
        f"directory (with {PARAMS_FILE} and consolidated.00.pth), a GGUF file (.gguf), or a .bin of llama2.c."
    )


def _gguf(path: Path) -> Path:
    file = gguf_path(path)
    assert file is not None, f"{path} was found to be GGUF"
    return file


def _tensors(path: Path, config: LlamaConfig) -> StoredTensors:
    match _format(path):
        case "hf":
            return hf_tensors(path)
        case "meta":
            return meta_tensors(path, config)
        case "gguf":
            return gguf_tensors(_gguf(path))
        case _:
            return llama2c_tensors(path)


def save_model(
    model: Transformer,
    directory: Path,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    manifest: Manifest | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write a Hugging Face model directory, which `transformers` loads without a trust flag; whole or not at all.

    What was at `directory` before is replaced.

    A model with gated layers is the exception: nothing but Puna knows it, so it gets a `model_type` of its own.

    Args:
        tokenizer: its files go in too, and its ids into config.json and generation_config.json.
        dtype: to store the weights in; None keeps the parameters'.
        manifest: becomes `puna.json`.
        quantization: `quantization_config` of config.json, for a model with quantised maps.

    Raises:
        InputError: the tokenizer has more ids than the model, or the model has no Hugging Face form.
        OSError: the disk is full, or cannot be written; nothing is left behind.
    """
    ids: dict[str, int | None] = {}
    if tokenizer is not None:
        check_vocabulary(model.config, tokenizer)
        # An end-of-document token that doubles as padding must stay trainable, see `hf_config`.
        own_pad = tokenizer.pad_id in tokenizer.special_ids - tokenizer.stop_ids
        ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
        ids["pad_id"] = tokenizer.pad_id if own_pad else None
    values = hf_config(model.config, dtype or model.embedding.weight.dtype, **ids)
    if quantization is not None:
        values["quantization_config"] = dict(quantization)
    if (depths := depths_of(model)) is not None:
        values = depths_config(values, depths)
    with atomic_path(directory) as fresh:
        fresh.mkdir()
        save_hf_weights(model, fresh, dtype=dtype, max_shard_bytes=max_shard_bytes)
        write_json(fresh / CONFIG_FILE, values)
        if tokenizer is not None:
            write_tokenizer(tokenizer, fresh)
        if manifest is not None:
            manifest.write(fresh)


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """The tokenizer's files, and `generation_config.json` with every id that ends a turn."""
    tokenizer.save(directory)
    generation = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": sorted(tokenizer.stop_ids),
        "pad_token_id": tokenizer.pad_id,
    }
    write_json(directory / "generation_config.json", generation)


def check_vocabulary(config: LlamaConfig, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer whose ids the model's embedding does not hold.

    Raises:
        InputError: it has more ids than the embedding has rows.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"The tokenizer has {tokenizer.vocab_size} ids, but the model's embedding only {config.vocab_size} rows: "
            "this tokenizer belongs to another model, or the embedding was not extended for new tokens."
        )
