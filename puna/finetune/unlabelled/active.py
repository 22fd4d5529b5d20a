"""`puna active`: choose the texts that are most worth labelling next."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from puna.batches.tables import read_table
from puna.config import to_plain
from puna.finetune.unlabelled.choose import Diversity, Uncertainty, choose, uncertainty
from puna.finetune.unlabelled.predictions import predict_rows, read_unlabelled, trained_classification
from puna.peft.heads import load_head_model
from puna.runtime.devices import DeviceName, open_device
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say

TO_LABEL_FILE = "to_label.csv"


@dataclass(frozen=True, kw_only=True)
class ActiveConfig:
    """Choose, of texts without labels, those that a classification would learn most from, and write them to label."""

    model: Path
    """Model directory that `puna finetune` made for a classification with one class for each text."""
    data: Path
    """A table with the columns that it was trained on; rows that have a label already are left out."""
    output: Path
    """Folder; gets to_label.csv, the chosen rows with an empty column for the label, which `data.train` of `puna
    finetune` takes when it is filled in, and what the model says of them; and puna.json."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a .csv or .tsv file that has no header."""
    labelled: Path | None = None
    """What is labelled already, in a file of its own: with `k_centre`, nothing like it is chosen."""
    count: int = 50
    """How many to choose."""
    uncertainty: Uncertainty = "margin"
    """Prefer what the model is unsure of: `least_confidence` by the likeliest class, `margin` by the two likeliest,
    `entropy` by all."""
    diversity: Diversity = "k_means"
    """Avoid choosing texts that are alike, by the hidden states that the head reads: one of each of `count` clusters
    (`k_means`); those that leave no text far from a labelled one (`k_centre`); or not at all (`none`)."""
    candidates: int = 10
    """With diversity: choose among this many times `count` texts, those that the model is least sure of."""
    device: DeviceName = "auto"
    """"auto" takes a GPU where there is one."""
    seed: int = 0
    """Of the clusters."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.candidates < 1:
            raise ValueError("count and candidates have to be at least 1.")
        if self.labelled is not None and self.diversity != "k_centre":
            raise ValueError('labelled is for diversity = "k_centre".')


def main(config: ActiveConfig) -> None:
    """Read the texts by the model, choose, and write.

    Raises:
        InputError: the model is no such classification, or there is no text without a label.
    """
    head = load_head_model(config.model, dtype=torch.float32)
    task, max_tokens = trained_classification(head, config.model)
    rows = read_unlabelled(config.data, config.columns, task)
    head.model.to(open_device(config.device))
    found = predict_rows(head, task, rows, max_tokens)
    labelled_MD = torch.empty(0, head.model.config.dim)
    if config.labelled is not None:
        known = list(read_table(config.labelled, config.columns))
        labelled_MD = predict_rows(head, task, known, max_tokens).states_ND
    chosen = choose(
        found.probabilities_NC,
        found.states_ND,
        config.count,
        by=config.uncertainty,
        diversity=config.diversity,
        candidates=config.candidates,
        labelled_MD=labelled_MD,
        seed=config.seed,
    )
    unsure_N = uncertainty(found.probabilities_NC, config.uncertainty)
    lines: list[dict[str, Any]] = []
    for number in chosen:
        row, p_C = found.rows[number], found.probabilities_NC[number]
        likeliest = int(p_C.argmax())
        lines.append(
            {
                **row.values,
                task.label: "",
                "predicted": head.spec.labels[likeliest],
                "confidence": f"{p_C[likeliest]:.4f}",
                config.uncertainty: f"{unsure_N[number]:.4f}",
                "from": row.where,
            }
        )
    paths = (config.model, config.data, *([config.labelled] if config.labelled else []))
    results = {
        "num_texts": len(rows),
        "num_chosen": len(lines),
        f"mean_{config.uncertainty}": unsure_N.mean().item(),
        f"mean_{config.uncertainty}_of_chosen": unsure_N[chosen].mean().item(),
    }
    with atomic_path(config.output) as folder:
        folder.mkdir()
        _write_csv(folder / TO_LABEL_FILE, lines)
        Manifest("active", to_plain(config), {str(path): content_hash(path) for path in paths}, results).write(folder)
    say(
        f"{len(lines):,} of {len(rows):,} texts to label; {config.uncertainty} {unsure_N[chosen].mean():.3f} on "
        f"average, {unsure_N.mean():.3f} of all texts. Fill in the column {task.label!r} of "
        f"{config.output / TO_LABEL_FILE}."
    )


def _write_csv(path: Path, lines: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for line in lines for name in line))
    if odd := [name for line in lines for name, value in line.items() if isinstance(value, list | dict)]:
        raise InputError(f"The column {odd[0]!r} has lists, which a .csv file cannot hold; leave it out of the data.")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(lines)
