"""A task that a model has learnt before: how well its head still does."""

from pathlib import Path

import torch

from puna.finetune.regularize.earlier import as_measured
from puna.finetune.tasks.head import predict
from puna.finetune.tasks.task import TaskData
from puna.finetune.tasks.trained import trained_task
from puna.model.transformer import Transformer
from puna.peft.heads import load_head_model
from puna.runtime.errors import InputError

_MODULE = "earlier_head"


class EarlierTask:
    """The head of an earlier task and examples to measure it on.

    Args:
        directory: the model directory with the head.
        data: the examples.

    Attributes:
        metrics: names of the curves, such as "earlier/accuracy".

    Raises:
        InputError: there is no such head, the examples cannot be read, or have other labels.
    """

    def __init__(self, directory: Path, data: Path) -> None:
        trained = load_head_model(directory, dtype=torch.float32)
        task, max_tokens = trained_task(trained, directory)
        self._opened = task.open(TaskData(train=data, held_out=data), trained.tokenizer, max_tokens)
        if self._opened.head.labels != trained.spec.labels:
            raise InputError(
                f"{data} has the labels {', '.join(self._opened.head.labels)}, but the head in {directory} was trained "
                f"on {', '.join(trained.spec.labels)}. Give examples of exactly these."
            )
        self._head = trained.model.get_submodule(trained.spec.module)
        self._attention, self._pad_id = trained.attention, trained.tokenizer.pad_id
        self._dim = trained.model.config.dim
        self.metrics = tuple(map(_curve, self._opened.metrics))

    def measure(self, model: Transformer) -> dict[str, float]:
        """The metrics of the earlier head on this model.

        Raises:
            InputError: they do not fit together.
        """
        if model.config.dim != self._dim:
            raise InputError(
                f"The head of earlier.task_model is for a model of dimension {self._dim}, and this one's is "
                f"{model.config.dim}."
            )
        model.add_module(_MODULE, self._head.to(model.norm.weight.device))
        try:
            with as_measured(model):
                logits = predict(model, self._opened.held_out, _MODULE, self._attention, self._pad_id)
        finally:
            delattr(model, _MODULE)
        return {_curve(name): value for name, value in self._opened.measure(logits)[0].items()}


def _curve(metric: str) -> str:
    return metric.replace("validation/", "earlier/")
