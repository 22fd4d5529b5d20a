"""Several tasks at once on one trunk, each with a head of its own.

The heads stand side by side in one linear map, of which each task reads its own outputs. A batch mixes examples of all
tasks. `Example.targets` begins with the number of the task; behind it are the task's own targets, and zeros up to the
widest.

Shapes: B examples, T tokens, C outputs of all heads, D model dimension.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from puna.batches.mixture import Rotation, temperature_shares
from puna.finetune.tasks.task import Example, ExampleBatch, ExampleRows, OpenTask, collate, mean_units
from puna.model.transformer import Linear, Transformer
from puna.peft.heads import HeadSpec


class OpenSeveral(OpenTask):
    """Opened tasks as one. Every task counts the same for each of its examples, however many words of it are labelled.

    Args:
        tasks: by name; all look the same ways (`attention`).
        weights: factors of their losses.
        temperature: rows of a task are in proportion to its examples ** (1 / temperature).
    """

    def __init__(self, tasks: Mapping[str, OpenTask], weights: Mapping[str, float], temperature: float) -> None:
        self.tasks = dict(tasks)
        opened = list(tasks.values())
        self.attention = opened[0].attention
        width = max(len(example.targets) for task in opened for example in task.train)
        self._own_train = [_numbered(task.train, number, width) for number, task in enumerate(opened)]
        own_held_out = [_numbered(task.held_out, number, width) for number, task in enumerate(opened)]
        self.train = [example for own in self._own_train for example in own]
        self.held_out = [example for own in own_held_out for example in own]
        self.shares = temperature_shares([len(own) for own in self._own_train], temperature)
        labels = tuple(f"{name}/{label}" for name, task in tasks.items() for label in task.head.labels)
        self.head = HeadSpec("", "heads", False, labels, {})
        self.metrics = tuple(_curve(name, metric) for name, task in tasks.items() for metric in task.metrics)
        # A sum over units becomes one over examples; in all there are as many as the batch has units.
        units = [mean_units(own) for own in self._own_train]
        self._units_per_row = sum(share * each for share, each in zip(self.shares, units, strict=True))
        self._factors = [weights[name] * self._units_per_row / each for name, each in zip(tasks, units, strict=True)]

    @property
    def units_per_row(self) -> float:
        """See `OpenTask.units_per_row`."""
        return self._units_per_row

    def rows(self, pad_id: int, seed: int) -> "SeveralRows":
        """See `OpenTask.rows`."""
        return SeveralRows([ExampleRows(own, pad_id, seed) for own in self._own_train], self.shares)

    def loss(self, logits_BTC: Tensor, batch: ExampleBatch) -> Tensor:
        """See `OpenTask.loss`: the tasks' own, weighed."""
        parts = self._parts(logits_BTC, batch)
        return sum((factor * task.loss(*part) for task, factor, part in parts), logits_BTC.sum() * 0)

    def divergence(self, logits_BTC: Tensor, batch: ExampleBatch) -> Tensor:
        """See `OpenTask.divergence`: the tasks' own, weighed."""
        parts = self._parts(logits_BTC, batch)
        return sum((factor * task.divergence(*part) for task, factor, part in parts), logits_BTC.sum() * 0)

    def measure(self, logits: Sequence[Tensor]) -> tuple[dict[str, float], str]:
        """See `OpenTask.measure`: the tasks' own, as validation/NAME/METRIC."""
        found: dict[str, float] = {}
        reports = []
        first_example = 0
        for (name, task), outputs in zip(self.tasks.items(), self._outputs(), strict=True):
            own = logits[first_example : first_example + len(task.held_out)]
            first_example += len(own)
            if own:
                values, report = task.measure([logits_TC[:, outputs] for logits_TC in own])
                found |= {_curve(name, metric): value for metric, value in values.items()}
                reports.append(f"{name}\n{report}")
        return found, "\n\n".join(reports)

    @contextmanager
    def only(self, model: Transformer, name: str) -> Iterator[HeadSpec]:
        """Inside, the model has the head of one task in place of all, with a bias of zeros where it is to have one."""
        number = list(self.tasks).index(name)
        spec = self.tasks[name].head
        wide = model.get_submodule(self.head.module)
        assert isinstance(wide, Linear)
        own = Linear(wide.in_features, len(spec.labels), bias=spec.bias).to(wide.weight)
        with torch.no_grad():
            own.weight.copy_(wide.weight[self._outputs()[number]])
            if own.bias is not None:
                own.bias.zero_()
        delattr(model, self.head.module)
        model.add_module(spec.module, own)
        try:
            yield spec
        finally:
            delattr(model, spec.module)
            model.add_module(self.head.module, wide)

    def _outputs(self) -> list[slice]:
        """The outputs of each task."""
        slices, first = [], 0
        for task in self.tasks.values():
            slices.append(slice(first, first + len(task.head.labels)))
            first += len(task.head.labels)
        return slices

    def _parts(
        self, logits_BTC: Tensor, batch: ExampleBatch
    ) -> Iterator[tuple[OpenTask, float, tuple[Tensor, ExampleBatch]]]:
        """Each task that the batch has examples of, its factor, and its logits and examples."""
        tasks_B = batch.targets_BC[:, 0]
        for number, (task, outputs) in enumerate(zip(self.tasks.values(), self._outputs(), strict=True)):
            chosen_B = tasks_B == number
            if chosen_B.any():
                width = len(task.train[0].targets)
                own = ExampleBatch(
                    ids_BT=batch.ids_BT[chosen_B],
                    labels_BT=batch.labels_BT[chosen_B],
                    positions_BT=batch.positions_BT[chosen_B],
                    documents_BT=batch.documents_BT[chosen_B],
                    targets_BC=batch.targets_BC[chosen_B, 1 : 1 + width],
                )
                yield task, self._factors[number], (logits_BTC[chosen_B][:, :, outputs], own)


class SeveralRows:
    """Endless rows of one example each, each task having its share of every stretch of them.

    Args:
        tasks: the rows of each task.
        shares: of each.
    """

    def __init__(self, tasks: Sequence[ExampleRows], shares: Sequence[float]) -> None:
        self.tasks = list(tasks)
        self._turns = Rotation(shares)

    def batch(self, rows: Sequence[int]) -> ExampleBatch:
        """Rows by number, counted from 0."""
        return collate([self._example(row) for row in rows], self.tasks[0].pad_id)

    def _example(self, row: int) -> Example:
        task = self._turns.at(row)
        return self.tasks[task].example(self._turns.count(task, row))


def _numbered(examples: Sequence[Example], number: int, width: int) -> list[Example]:
    return [
        replace(example, targets=(float(number), *example.targets, *[0.0] * (width - len(example.targets))))
        for example in examples
    ]


def _curve(name: str, metric: str) -> str:
    return metric.replace("validation/", f"validation/{name}/", 1)
