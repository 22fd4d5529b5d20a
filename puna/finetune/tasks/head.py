"""Heads: put on a model, and what they say about examples.

Shapes: B examples, T tokens, D model dimension, C outputs of the head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from puna.finetune.config import FinetuneConfig
from puna.finetune.tasks.several import OpenSeveral
from puna.finetune.tasks.task import Example, OpenTask, Task, collate
from puna.model.transformer import Transformer
from puna.peft.heads import Attention, head_logits
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer

_PREDICTED_AT_ONCE = 32


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
