"""Heads in place of the projection to the vocabulary: put on a model, and in model directories as `transformers` loads
them, or in adapter directories, for methods that cannot be merged.

Shapes: N texts, B rows, T tokens, D model dimension, C outputs of the head.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from puna.batches.packing import IGNORE, PADDING, TokenBatch
from puna.kernels.attend import document_attend
from puna.model.attend import Attend, DocumentAttend
from puna.model.transformer import Linear, Transformer
from puna.peft.files import CONFIG_FILE as ADAPTER_FILE
from puna.peft.files import load_adapter, save_adapter
from puna.peft.method import Method
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, read_json, write_json
from puna.runtime.manifest import Manifest
from puna.runtime.seeds import derive_seed
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.load import load_tokenizer
from puna.weights.huggingface import CONFIG_FILE, SINGLE_FILE, hf_config, hf_tensors, read_hf_config
from puna.weights.load import check_vocabulary, load_model, resolve, write_tokenizer
from puna.weights.names import to_hf
from puna.weights.stored import copy_weights

Attention = Literal["causal", "bidirectional"]
"""Whether a token sees only what is before it, or everything."""

_HEADS = {
    "ForSequenceClassification": ("score", "SEQ_CLS"),
    "ForTokenClassification": ("score", "TOKEN_CLS"),
    "ForQuestionAnswering": ("qa_outputs", "QUESTION_ANS"),
}
"""Kind of a head -> its name in `transformers`, and PEFT's name of the task."""

_READ_AT_ONCE = 16


@dataclass(frozen=True)
class HeadSpec:
    """What a head is called and how it is written down, so that `transformers` finds it."""

    architecture: str
    """What follows the family's name: "ForSequenceClassification"."""
    module: str
    """Name of the head's linear map: "score"."""
    bias: bool
    """Whether that map has one."""
    labels: tuple[str, ...]
    """The head's outputs by name."""
    config: Mapping[str, Any]
    """What else config.json says."""


@dataclass(frozen=True)
class HeadModel:
    """A model with a head, read from a directory."""

    model: Transformer
    """With the head as a module of the name `spec.module`; in evaluation mode."""
    spec: HeadSpec
    """The head; its `config` is all that config.json says."""
    attention: Attention
    """Whether a token sees what comes after it."""
    tokenizer: Tokenizer
    """The model's."""


def add_head(model: Transformer, spec: HeadSpec, seed: int) -> None:
    """Put a new head on a model, which is trained along with what is trained of the model."""
    head = Linear(model.config.dim, len(spec.labels), bias=spec.bias)
    generator = torch.Generator().manual_seed(derive_seed(seed, "head"))
    nn.init.normal_(head.weight, std=0.02, generator=generator)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    model.add_module(spec.module, head)
    if not model.config.tie_embeddings:
        model.output.requires_grad_(False)


def attend_within(documents_BT: Tensor, attention: Attention) -> Attend:
    """Attention inside documents, causal or both ways."""
    return document_attend(documents_BT) if attention == "causal" else DocumentAttend(documents_BT, causal=False)


def head_logits(model: Transformer, batch: TokenBatch, module: str, attention: Attention) -> Tensor:
    """What the head says at every token, float32 [B, T, C]."""
    attend = attend_within(batch.documents_BT, attention)
    head = model.get_submodule(module)
    logits: Tensor = model(batch.ids_BT, batch.positions_BT, attend, lambda h_BTD, _: head(h_BTD))
    return logits.float()


@torch.no_grad()
def last_logits(
    head: HeadModel, texts: Sequence[Sequence[int]], read: Callable[[int], object] = lambda amount: None
) -> Tensor:
    """What the head says at the last token of each text, float32 [N, C] on the CPU.

    Args:
        texts: the ids of each; none is empty.
        read: called with the number of texts each time that some have been read.
    """
    device = head.model.embedding.weight.device
    by_length = sorted(range(len(texts)), key=lambda n: len(texts[n]))
    found_NC = torch.empty(len(texts), len(head.spec.labels))
    for start in range(0, len(texts), _READ_AT_ONCE):
        chosen = by_length[start : start + _READ_AT_ONCE]
        batch, last_B = _filled_up([texts[n] for n in chosen], head.tokenizer.pad_id)
        logits_BTC = head_logits(head.model, batch.to(device), head.spec.module, head.attention).cpu()
        found_NC[chosen] = logits_BTC[torch.arange(len(chosen)), last_B]
        read(len(chosen))
    return found_NC


def _filled_up(texts: Sequence[Sequence[int]], pad_id: int) -> tuple[TokenBatch, Tensor]:
    """Texts as rows, filled up on the right, and the place of each one's last token."""
    lengths_B = torch.tensor([len(text) for text in texts])
    places_T = torch.arange(int(lengths_B.max()))
    ids_BT = torch.full((len(texts), len(places_T)), pad_id)
    for row, text in enumerate(texts):
        ids_BT[row, : len(text)] = torch.tensor(text)
    documents_BT = torch.where(places_T < lengths_B[:, None], 0, PADDING)
    labels_BT = torch.full_like(ids_BT, IGNORE)
    return TokenBatch(ids_BT, labels_BT, places_T.expand_as(ids_BT).clone(), documents_BT), lengths_B - 1


def save_head_model(
    model: Transformer,
    spec: HeadSpec,
    attention: Attention,
    tokenizer: Tokenizer,
    directory: Path,
    dtype: torch.dtype,
    manifest: Manifest,
) -> None:
    """Write trunk, head and tokenizer; whole or not at all.

    `LlamaForSequenceClassification.from_pretrained(directory)` and its like compute the same logits from the same ids.
    A trunk that looks both ways is one for them too (`is_causal` in config.json, from transformers 5 on).

    Raises:
        InputError: the tokenizer has more ids than the model, or the model has no Hugging Face form.
        OSError: the disk is full, or cannot be written; nothing is left behind.
    """
    check_vocabulary(model.config, tokenizer)
    values = _config_values(model, spec, attention, tokenizer, dtype)
    tensors = {
        _stored_name(name, spec): parameter.detach().to("cpu", dtype).contiguous()
        for name, parameter in model.named_parameters()
        if name != "output.weight"
    }
    with atomic_path(directory) as fresh:
        fresh.mkdir()
        save_file(tensors, fresh / SINGLE_FILE, metadata={"format": "pt"})
        write_json(fresh / CONFIG_FILE, values)
        write_tokenizer(tokenizer, fresh)
        manifest.write(fresh)


def save_head_adapter(
    model: Transformer,
    method: Method,
    spec: HeadSpec,
    attention: Attention,
    tokenizer: Tokenizer,
    directory: Path,
    base_model: Path,
    manifest: Manifest,
) -> None:
    """Write adapters and head as a directory for PEFT, with the head's config.json beside; whole or not at all.

    Raises:
        OSError: the disk is full, or cannot be written; nothing is left behind.
    """
    with atomic_path(directory) as fresh:
        settings = {"task_type": _HEADS[spec.architecture][1]}
        save_adapter(
            model, method, fresh, base_model=str(base_model), head=spec.module, settings=settings, manifest=manifest
        )
        write_json(fresh / CONFIG_FILE, _config_values(model, spec, attention, tokenizer, torch.float32))


def load_head_model(path: Path | str, *, dtype: torch.dtype | None = None) -> HeadModel:
    """Read what `save_head_model` or `save_head_adapter` wrote, or a model with one of these heads from elsewhere.

    Args:
        dtype: of the parameters; None takes the stored one.

    Raises:
        InputError: there is no head in the directory, or it is broken or incomplete.
    """
    directory = resolve(path)
    if not (directory / CONFIG_FILE).is_file():
        raise InputError(f"{path} has no {CONFIG_FILE}: it is no directory of a model with a head.")
    values = read_json(directory / CONFIG_FILE)
    architecture = str((values.get("architectures") or [""])[0])
    kind = next((kind for kind in _HEADS if architecture.endswith(kind)), None)
    if kind is None:
        raise InputError(
            f"{directory / CONFIG_FILE} has the architecture {architecture!r}; a model with a head is one of "
            f"{', '.join(_HEADS)}, as `puna finetune` writes for a task."
        )
    labels = tuple(label for _, label in sorted(values["id2label"].items(), key=lambda item: int(item[0])))
    attention: Attention = "causal" if values.get("is_causal", True) else "bidirectional"
    spec = HeadSpec(kind, _HEADS[kind][0], kind != "ForSequenceClassification", labels, values)
    if (directory / ADAPTER_FILE).is_file():
        base = read_json(directory / ADAPTER_FILE).get("base_model_name_or_path")
        model = load_model(str(base), dtype=dtype)
        _put_on(model, spec)
        load_adapter(model, directory, head=spec.module)
        tokenizer = load_tokenizer(resolve(str(base)))
    else:
        config = read_hf_config(directory, head=kind)
        stored = replace(hf_tensors(directory), file_name=lambda name: _stored_name(name, spec))
        # Such a model has no projection to the vocabulary; a tied one takes no room.
        model = Transformer(replace(config, tie_embeddings=True))
        _put_on(model, spec)
        model.to(dtype or stored.dtype)
        copy_weights(model, stored)
        tokenizer = load_tokenizer(directory)
    return HeadModel(model.eval(), spec, attention, tokenizer)


def has_head(path: Path | str) -> bool:
    """Whether a model directory is one with a head in place of the projection to the vocabulary."""
    file = Path(path) / CONFIG_FILE
    return file.is_file() and any(name.endswith(tuple(_HEADS)) for name in read_json(file).get("architectures") or [])


def load_trunk(path: Path | str, *, dtype: torch.dtype | None = None) -> Transformer:
    """A model to put a head on: as `load_model` reads it, or what is below another head, which is then left behind.

    What was below a head has no projection to the vocabulary of its own.

    Raises:
        InputError: see `load_model` and `load_head_model`.
    """
    if not has_head(path):
        return load_model(path, dtype=dtype)
    head = load_head_model(path, dtype=dtype)
    delattr(head.model, head.spec.module)
    return head.model


def _put_on(model: Transformer, spec: HeadSpec) -> None:
    head = Linear(model.config.dim, len(spec.labels), bias=spec.bias)
    model.add_module(spec.module, head.to(model.embedding.weight.dtype))


def _config_values(
    model: Transformer, spec: HeadSpec, attention: Attention, tokenizer: Tokenizer, dtype: torch.dtype
) -> dict[str, Any]:
    """The content of config.json."""
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    values = hf_config(model.config, dtype, **ids)
    family = values["architectures"][0].removesuffix("ForCausalLM")
    return values | {
        "architectures": [family + spec.architecture],
        "id2label": {str(number): label for number, label in enumerate(spec.labels)},
        "label2id": {label: number for number, label in enumerate(spec.labels)},
        "is_causal": attention == "causal",
        "use_cache": False,
        **spec.config,
    }


def _stored_name(name: str, spec: HeadSpec) -> str:
    """What a parameter is called in the file."""
    if name.startswith(f"{spec.module}."):
        return name
    # What transformers calls the trunk in its classes for span extraction.
    trunk = "transformer." if spec.architecture == "ForQuestionAnswering" else "model."
    return trunk + to_hf(name).removeprefix("model.")
