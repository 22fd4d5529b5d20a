"""Heads: put on a model, and what they say about examples.

Shapes: B examples, T tokens, D model dimension, C outputs of the head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from puna.batches.packing import TokenBatch
from puna.finetune.config import FinetuneConfig
from puna.finetune.tasks.several import OpenSeveral
from puna.finetune.tasks.task import Attention, Example, HeadSpec, OpenTask, Task, collate
from puna.kernels.attend import document_attend
from puna.model.attend import Attend, DocumentAttend
from puna.model.transformer import Linear, Transformer
from puna.runtime.errors import InputError
from puna.runtime.seeds import derive_seed
from puna.tokenizer.base import Tokenizer

_PREDICTED_AT_ONCE = 32


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


def head_logits(model: Transformer, batch: TokenBatch, module: str, attention: Attention) -> Tensor:
    """What the head says at every token, float32 [B, T, C]."""
    attend: Attend = document_attend(batch.documents_BT)
    if attention == "bidirectional":
        attend = DocumentAttend(batch.documents_BT, causal=False)
    head = model.get_submodule(module)
    logits: Tensor = model(batch.ids_BT, batch.positions_BT, attend, lambda h_BTD, _: head(h_BTD))
    return logits.float()


@torch.no_grad()
def predict(
    model: Transformer, examples: Sequence[Example], module: str, attention: Attention, pad_id: int
) -> list[Tensor]:
    """The logits [T, C] of each example, on the CPU."""
    device = model.embedding.weight.device
    by_length = sorted(range(len(examples)), key=lambda n: len(examples[n].ids))
    found: dict[int, Tensor] = {}
    for start in range(0, len(by_length), _PREDICTED_AT_ONCE):
        chosen = by_length[start : start + _PREDICTED_AT_ONCE]
        batch = collate([examples[n] for n in chosen], pad_id).to(device)
        for n, logits_TC in zip(chosen, head_logits(model, batch, module, attention).cpu(), strict=True):
            found[n] = logits_TC[: len(examples[n].ids)]
    return [found[n] for n in range(len(examples))]


def open_tasks(config: FinetuneConfig, tokenizer: Tokenizer) -> OpenTask:
    """Read and check the data of `config.task`, or of `config.tasks`.

    Raises:
        InputError: see `Task.open`.
    """
    length = config.train.row_length
    if isinstance(config.task, Task) and config.data is not None:
        return config.task.open(config.data, tokenizer, length)
    opened = {}
    for each in config.tasks:
        try:
            opened[each.name] = each.task.open(each.data, tokenizer, length)
        except InputError as error:
            raise InputError(f"Task {each.name}: {error}") from error
    return OpenSeveral(opened, {each.name: each.weight for each in config.tasks}, config.tasks_temperature)
