"""Looking on at a training on preferences."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch

from puna.batches.preference_rows import PreferenceBatch, PreferenceRows
from puna.model.transformer import Transformer
from puna.train.state import TrainState


class HeldOutWatch(ABC):
    """A `puna.train.loop.Watch` that measures on held-out preferences.

    Args:
        held_out: what to measure on.
        num_rows: at most so many rows of it.
    """

    def __init__(self, held_out: PreferenceRows, num_rows: int) -> None:
        self.held_out, self.num_rows = held_out, min(num_rows, held_out.rows_per_epoch)
        self.latest: tuple[dict[str, float], str] | None = None
        """What was measured last; see `of`."""

    def measure(
        self, state: TrainState, point: Mapping[str, float], earlier: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        """See `Watch.measure`."""
        state.model.eval()
        self.latest = self.of(state.model)
        state.model.train()
        return self.latest[0]

    def ends(self, points: Sequence[Mapping[str, float]]) -> bool:
        """See `Watch.ends`."""
        return False

    @torch.no_grad()
    def of(self, model: Transformer) -> tuple[dict[str, float], str]:
        """Curves by name, and a report to read."""
        values, details = self._measure(model)
        lines = [f"{name:36} {value:.4f}" for name, value in values.items()] + details
        return {f"validation/{name}": value for name, value in values.items()}, "\n".join(lines)

    @abstractmethod
    def _measure(self, model: Transformer) -> tuple[dict[str, float], list[str]]:
        """Values by name, and more lines for the report."""

    def _batches(self, model: Transformer) -> Iterator[PreferenceBatch]:
        """The rows, one by one, on the model's device."""
        for row in range(self.num_rows):
            batch = self.held_out.batch([row]).to(model.embedding.weight.device)
            assert isinstance(batch, PreferenceBatch)
            yield batch
