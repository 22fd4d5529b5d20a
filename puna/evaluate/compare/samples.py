"""What `puna evaluate` left of each question, to compare models question by question."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from puna.runtime.errors import InputError
from puna.runtime.files import read_jsonl


@dataclass(frozen=True, slots=True)
class Sample:
    """One question's numbers."""

    values: dict[str, float]
    """Metric -> number; the first is the task's own."""
    cluster: str
    """What questions that belong together share; empty where each stands for itself."""
    prompt_hash: str
    """Of all that was asked."""


def read_samples(folder: Path) -> dict[str, dict[str, Sample]]:
    """Task -> question's id -> its numbers, from samples.jsonl in an output of `puna evaluate`.

    Raises:
        InputError: it is not there, or asked no task.
    """
    path = folder / "samples.jsonl"
    if not path.exists():
        raise InputError(f"{folder} is not an output of `puna evaluate`: it has no samples.jsonl.")
    found: dict[str, dict[str, Sample]] = {}
    for row in read_jsonl(path):
        try:
            sample = Sample(row["values"], row["cluster"], row["prompt_hash"])
            found.setdefault(row["task"], {})[row["id"]] = sample
        except KeyError as error:
            raise InputError(f"{path} holds something else than answers to tasks: a row has no {error}.") from error
    if not found:
        raise InputError(f"{path} has no answer to a question of a task: it evaluated no tasks.")
    return found


def first_values(samples: Mapping[str, Sample]) -> dict[str, float]:
    """Question's id -> the number of the task's first metric."""
    return {key: next(iter(sample.values.values())) for key, sample in samples.items()}
