"""Which solved examples stand in front of a question: the same for all questions, as far as can be."""

import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice

from puna.evaluate.tasks.task import Example, Task
from puna.runtime.errors import InputError
from puna.runtime.seeds import derive_seed


def choose_shots(
    task: Task, asked: Sequence[Example], everything: Sequence[Example], pool: Sequence[Example] | None
) -> list[list[Example]]:
    """Shots for each question of `asked`, from its own group.

    Those of `pool` are taken in its order; without one, those of `everything` in an order that the task's seed draws. A
    question is never a shot for itself, nor for one that reads the same; but for those few, the shots of a group are
    the same, so that they are computed once.

    Raises:
        InputError: there are too few.
    """
    if not task.shots:
        return [[] for _ in asked]
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in everything if pool is None else pool:
        groups[example.group].append(example)
    if pool is None:
        for name, examples in groups.items():
            random.Random(derive_seed(task.seed, "shots", task.kind, name)).shuffle(examples)
    chosen = []
    for question in asked:
        others = (example for example in groups[question.group] if example.prompt != question.prompt)
        shots = list(islice(others, task.shots))
        if len(shots) < task.shots:
            group = f" in {question.group!r}" if question.group else ""
            raise InputError(
                f"Task {task.title} has only {len(shots)} examples{group} to show before {question.where}, but shots "
                f"is {task.shots}."
            )
        chosen.append(shots)
    return chosen
