"""Training runs as points (parameters, tokens, loss), read from the files that people keep them in."""

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puna.runtime.errors import InputError
from puna.runtime.files import read_json, read_jsonl

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Columns:
    """What the columns of a file of runs are called; empty: looked for under the usual names."""

    parameters: str = ""
    """Parameters of the model."""
    tokens: str = ""
    """Tokens trained on; may be absent where there is compute."""
    compute: str = ""
    """Training FLOPs; tokens are compute / (6 * parameters) where they are not given."""
    loss: str = ""
    """Final loss, in nats per token."""


_USUAL = {
    "parameters": ("parameters", "num_parameters", "n", "params", "model size"),
    "tokens": ("tokens", "num_tokens", "d", "training tokens"),
    "compute": ("compute", "compute_budget", "flops", "c", "training flop", "training flops"),
    "loss": ("loss", "final_loss", "validation_loss"),
}


@dataclass(frozen=True, eq=False)
class Runs:
    """Finished training runs, as columns of equal length."""

    parameters: Floats
    """Parameters of the model."""
    tokens: Floats
    """Tokens trained on."""
    loss: Floats
    """Final loss, in nats per token."""
    compute: Floats
    """Training FLOPs."""

    def __len__(self) -> int:
        return len(self.loss)

    def take(self, chosen: NDArray[np.int64]) -> "Runs":
        """The runs of these numbers, in this order; a number may come again."""
        return Runs(self.parameters[chosen], self.tokens[chosen], self.loss[chosen], self.compute[chosen])

    def without_worst(self, count: int) -> "Runs":
        """All but the `count` runs of highest loss."""
        return self.take(np.sort(np.argsort(self.loss, kind="stable")[: len(self) - count]))


def read_runs(path: Path, columns: Columns | None = None) -> Runs:
    """Read a .csv, .json (an array of objects) or .jsonl file.

    Raises:
        InputError: no such file, a column is absent, or a value is not a positive number; the message says where.
    """
    rows = read_rows(path)
    names = {what: _find(rows[0], what, columns or Columns(), path) for what in _USUAL}
    for what in ("parameters", "loss"):
        if names[what] is None:
            raise InputError(
                f"{path} has no column of {what} (its columns: {', '.join(rows[0])}). Set columns.{what} to its name."
            )
    if names["tokens"] is None and names["compute"] is None:
        raise InputError(
            f"{path} has neither tokens nor compute (its columns: {', '.join(rows[0])}). Set columns.tokens or "
            "columns.compute."
        )
    found = {what: _numbers(rows, name, path) for what, name in names.items() if name is not None}
    parameters = found["parameters"]
    compute = found.get("compute")
    tokens = found["tokens"] if "tokens" in found else found["compute"] / (6 * parameters)
    return Runs(parameters, tokens, found["loss"], 6 * parameters * tokens if compute is None else compute)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .csv, .json or .jsonl file as objects; at least one.

    Raises:
        InputError: no such file, or not of that kind.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; it should be a .csv, .json or .jsonl file of finished runs.")
    rows: list[Any]
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    elif path.suffix == ".json":
        value = read_json(path)
        rows = value if isinstance(value, list) else []
    else:
        rows = list(read_jsonl(path))
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} holds no rows: a .csv needs a header line, a .json an array of objects.")
    return rows


def _find(row: Mapping[str, Any], what: str, columns: Columns, path: Path) -> str | None:
    chosen: str = getattr(columns, what)
    if chosen:
        if chosen not in row:
            raise InputError(f"{path} has no column {chosen!r}; its columns are {', '.join(row)}.")
        return chosen
    return next((name for usual in _USUAL[what] for name in row if name.strip().lower() == usual), None)


def _numbers(rows: Iterable[Mapping[str, Any]], name: str, path: Path) -> Floats:
    values = []
    for number, row in enumerate(rows, start=1):
        try:
            value = float(row[name])
        except (KeyError, TypeError, ValueError):
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise InputError(
                f"{path}, run {number}: {name} is {row.get(name)!r}; it has to be a positive number. Leave out runs "
                "that did not finish."
            )
        values.append(value)
    return np.array(values)
