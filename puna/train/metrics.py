"""Where curves go: metrics.jsonl always, TensorBoard by default, Weights & Biases when asked for."""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from puna.runtime.errors import InputError


class MetricsWriter:
    """Appends points of named curves; use as a context manager.

    A resumed run first drops the points after its checkpoint, so that no step stands twice.

    Args:
        directory: gets metrics.jsonl and, if wanted, tensorboard/.
        step: the step the run starts from.
        tensorboard: write TensorBoard events.
        wandb_project: log to this project; empty means not.
        config: the run's configuration, for Weights & Biases.
    """

    def __init__(
        self, directory: Path, *, step: int, tensorboard: bool, wandb_project: str, config: dict[str, Any]
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= step] if path.exists() else []
        self._file = path.open("w", encoding="utf-8")
        self._events: Any = None
        self._wandb: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)
        if wandb_project:
            try:
                import wandb
            except ImportError as error:
                raise InputError(
                    "wandb_project is set, but wandb is not installed: pip install 'puna[track]'."
                ) from error
            self._wandb = wandb.init(project=wandb_project, config=config, dir=str(directory))
        for row in kept:
            self._file.write(json.dumps(row) + "\n")

    def __enter__(self) -> "MetricsWriter":
        return self

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add one point to each curve in `values`; the part of a name before "/" groups curves."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if error is None else 1)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The points of a metrics.jsonl; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
