"""One training with all that a recipe asks for around it, the same for conversations, heads and texts."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from puna.batches.packing import EpochRows, Rows
from puna.config import to_plain
from puna.finetune.config import FinetuneConfig
from puna.finetune.regularize.safeguards import Safeguards
from puna.finetune.selection import Judge, Measure, Selector
from puna.model.transformer import Transformer
from puna.train.loop import fit
from puna.train.loss import Loss
from puna.train.metrics import read_metrics


def learn(
    model: Transformer,
    rows: Rows,
    loss: Loss,
    config: FinetuneConfig,
    safeguards: Safeguards,
    inputs: Mapping[str, str],
    *,
    held_out: EpochRows | None,
    measure: Measure | None,
    judge: Judge | None,
) -> dict[str, Any]:
    """Train `model` in place, and leave it as it was at its best, for inference.

    Args:
        rows, loss: with the safeguards around them.
        safeguards: what else they do.
        inputs: content hashes of what the training follows from.
        held_out: rows to measure the loss on.
        measure: what to measure beside the loss; None is nothing.
        judge: see `Selector`.

    Returns:
        What the training measured, for the manifest.
    """
    run = to_plain(config) | {"inputs": dict(inputs)}
    own = safeguards.measuring(measure or (lambda model, step: {}))
    selector = Selector(config.selection, config.output, own, judge)
    watched = measure is not None or config.selection is not None or config.earlier is not None
    result = fit(
        model,
        rows,
        loss,
        config.train,
        config.output,
        run,
        held_out,
        selector if watched else None,
        rates=safeguards.rates(),
        after_update=safeguards.after_update,
    )
    model.compute_dtype = None
    model.eval()
    return asdict(result) | selector.restore_best(model, read_metrics(config.output / "metrics.jsonl"))
