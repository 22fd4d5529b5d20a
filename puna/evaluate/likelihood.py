"""Bits per byte: how well a model predicts text, comparable between tokenizers.

Shapes: B windows, T tokens.
"""

import math
from collections.abc import Iterable, Sequence

import torch

from puna.batches.packing import IGNORE, PADDING, TokenBatch
from puna.model.transformer import Transformer
from puna.runtime.progress import progress
from puna.train.loss import causal_lm_loss


def total_nats(
    model: Transformer,
    documents: Sequence[tuple[Sequence[int], Sequence[int] | None]],
    *,
    window: int,
    batch_rows: int = 8,
    title: str = "Measuring likelihood",
) -> tuple[float, int]:
    """Negative log-likelihood of documents, each by itself.

    A document longer than `window` is read in windows that overlap by half; every token is predicted once, with at
    least half a window before it (but for the first window).

    Args:
        model: the model; computes on its own device.
        documents: ids of each, beginning with BOS, and a mask of the tokens to count (None counts all but the first).
        window: tokens the model sees at once.
        batch_rows: windows in one forward pass.
        title: of the progress bar.

    Returns:
        Sum in nats, and the number of tokens predicted.
    """
    windows = [part for ids, mask in documents for part in _windows(ids, mask, window)]
    windows.sort(key=lambda part: len(part[0]))
    device = next(model.parameters()).device
    nats, count = 0.0, 0
    with torch.inference_mode(), progress(title, total=len(windows)) as advance:
        for start in range(0, len(windows), batch_rows):
            group = windows[start : start + batch_rows]
            part = causal_lm_loss(model, _pad(group).to(device))
            nats += part.total.item()
            count += part.count
            advance(len(group))
    return nats, count


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Nats over a text of `num_bytes` UTF-8 bytes as bits per byte; smaller is better, 8 is no model at all."""
    return nats / math.log(2) / num_bytes


def _windows(
    ids: Sequence[int], mask: Sequence[int] | None, window: int
) -> Iterable[tuple[Sequence[int], Sequence[int]]]:
    """(inputs, labels) of each window."""
    targets = [token if mask is None or mask[at] else IGNORE for at, token in enumerate(ids)][1:]
    yield ids[:-1][:window], targets[:window]
    half = window // 2
    for start in range(half, len(targets) - half, half):
        new = targets[start + half : start + window]
        if new:
            inputs = ids[start : start + half + len(new)]
            yield inputs, [IGNORE] * half + new


def _pad(group: Sequence[tuple[Sequence[int], Sequence[int]]]) -> TokenBatch:
    longest = max(len(inputs) for inputs, _ in group)

    def column(rows: Iterable[Sequence[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], dtype=torch.int64)

    return TokenBatch(
        ids_BT=column((inputs for inputs, _ in group), 0),
        labels_BT=column((labels for _, labels in group), IGNORE),
        positions_BT=column((range(len(inputs)) for inputs, _ in group), 0),
        documents_BT=column(([0] * len(inputs) for inputs, _ in group), PADDING),
    )
