"""What a classification makes of texts that have no label.

Shapes: N texts, T tokens, C classes, D model dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from puna.batches.packing import IGNORE
from puna.batches.tables import Row, read_table
from puna.finetune.tasks.classification import Classification, text_ids
from puna.finetune.tasks.task import Example, collate
from puna.finetune.tasks.trained import trained_task
from puna.peft.heads import HeadModel, attend_within
from puna.runtime.errors import InputError
from puna.runtime.progress import progress

_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a head says about texts."""

    rows: list[Row]
    """The texts."""
    probabilities_NC: Tensor
    """Of the classes, float32 on the CPU."""
    states_ND: Tensor
    """What the head read: the last hidden state of each text's last token, float32 on the CPU."""


def trained_classification(head: HeadModel, directory: Path) -> tuple[Classification, int]:
    """What a head was trained to do, and the most tokens of a text.

    Raises:
        InputError: it is no classification with one class for each text.
    """
    task, max_tokens = trained_task(head, directory)
    if type(task) is not Classification or task.problem != "one_class":
        raise InputError(
            f"The head in {directory} was not trained for a classification with one class for each text, which is what "
            "texts without labels are read for here."
        )
    return task, max_tokens


def read_unlabelled(path: Path, columns: Sequence[str], task: Classification) -> list[Row]:
    """The rows of a table whose label is empty or absent; others are labelled already.

    Raises:
        InputError: there is none.
    """
    rows = [row for row in read_table(path, columns) if row.values.get(task.label) in (None, "")]
    if not rows:
        raise InputError(f"{path} holds no text without a label (column {task.label!r}).")
    return rows


@torch.no_grad()
def predict_rows(head: HeadModel, task: Classification, rows: Sequence[Row], max_tokens: int) -> Predictions:
    """The probabilities of the classes of each text, computed where the model is.

    Raises:
        InputError: a row has no text.
    """
    model, module = head.model, head.model.get_submodule(head.spec.module)
    texts = [text_ids(task, row, head.tokenizer, max_tokens)[0] for row in rows]
    by_length = sorted(range(len(texts)), key=lambda n: len(texts[n]))
    probabilities_NC = torch.empty(len(texts), len(head.spec.labels))
    states_ND = torch.empty(len(texts), model.config.dim)
    with progress("Reading texts", total=len(texts)) as advance:
        for start in range(0, len(texts), _AT_ONCE):
            chosen = by_length[start : start + _AT_ONCE]
            examples = [Example(texts[n], [IGNORE] * (len(texts[n]) - 1) + [0]) for n in chosen]
            batch = collate(examples, head.tokenizer.pad_id).to(model.norm.weight.device)
            attend = attend_within(batch.documents_BT, head.attention)
            h_BTD = model(batch.ids_BT, batch.positions_BT, attend, lambda h_BTD, _: h_BTD)
            last_BD = h_BTD[batch.labels_BT != IGNORE]
            states_ND[chosen] = last_BD.float().cpu()
            probabilities_NC[chosen] = module(last_BD).float().softmax(-1).cpu()
            advance(len(chosen))
    return Predictions(list(rows), probabilities_NC, states_ND)
