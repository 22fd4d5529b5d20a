"""`puna self_train`: learn from texts without labels, by rounds of labelling them with the model of the round before
(Yarowsky 1995; as students of a teacher Xie et al. 2020, "Noisy Student", arXiv:1911.04252)."""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.batches.tables import Row, read_table
from puna.config import load_config, to_plain
from puna.finetune.config import FinetuneConfig
from puna.finetune.main import main as finetune
from puna.finetune.tasks.classification import Classification
from puna.finetune.unlabelled.predictions import predict_rows, read_unlabelled
from puna.peft.heads import load_head_model
from puna.runtime.devices import open_device
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, write_jsonl
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say

_METRIC = "validation/accuracy"


@dataclass(frozen=True, kw_only=True)
class SelfTrainConfig:
    """Train a classification on few labels and many texts without: each round learns from the labels that the model of
    the round before is sure of, too."""

    recipe: Path
    """A recipe of `puna finetune` for a classification with one class for each text; its `output` does not count."""
    unlabelled: Path
    """A table of texts without labels, with the recipe's columns."""
    output: Path
    """Folder; gets round-0/ (without such texts), round-1/, ..., each an output of `puna finetune` with the examples it
    learnt from in examples.jsonl, and model/, the best by accuracy on held-out data, or else the last."""
    model: Path | None = None
    """Model directory to start from, in place of the recipe's."""
    labelled: Path | None = None
    """The labelled examples, in place of the recipe's `data.train`."""
    set: tuple[str, ...] = ()
    """Settings of the recipe to change, as with --set: "train.steps=100"."""
    columns: tuple[str, ...] = ()
    """Names of the columns of a .csv or .tsv file of texts that has no header."""
    rounds: int = 2
    """Rounds after the first; ends before, when a round would learn from the same."""
    threshold: float = 0.9
    """A text is learnt from when the probability of its likeliest class is at least this. Regularization (dropout,
    augmented examples) makes students better than their teachers."""
    balance: bool = True
    """Take classes in the proportions of the labelled examples, the surest texts of each, as far as the scarcest class
    goes of those that have any; else all texts above the threshold."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; there has to be at least 1.")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; it is a probability, above 0 and at most 1.")


@dataclass(frozen=True, slots=True)
class Guess:
    """A label that a model gave."""

    number: int
    """Which text."""
    label: str
    confidence: float
    """Its probability."""


def main(config: SelfTrainConfig) -> None:
    """Train, label, and train again; every part goes on from where it was interrupted.

    Raises:
        InputError: the recipe is for something else, or a table cannot be read.
    """
    recipe = _recipe(config, 0)
    task, data = recipe.task, recipe.data
    if type(task) is not Classification or task.problem != "one_class" or data is None:
        raise InputError(f"{config.recipe} has to be for a classification with one class for each text.")
    if data.held_out_share:
        raise InputError(
            "data.held_out_share would set examples aside that the model labelled itself; give a file, data.held_out."
        )
    labelled = list(read_table(data.train, data.columns))
    unlabelled = read_unlabelled(config.unlabelled, config.columns, task)
    shares = Counter(str(row.values.get(task.label)).strip() for row in labelled)
    finetune(recipe)
    rounds: list[dict[str, Any]] = [_facts(recipe, 0, 0)]
    before: list[Guess] = []
    for number in range(1, config.rounds + 1):
        guesses = guess(_written(recipe), task, unlabelled, recipe)
        taken = take(guesses, config.threshold, shares if config.balance else None)
        if not taken:
            say(f"Round {number}: the model is sure of no text, at the threshold {config.threshold}.")
            break
        if [(one.number, one.label) for one in taken] == [(one.number, one.label) for one in before]:
            say(f"Round {number} would learn from the same labels; the end.")
            break
        examples = config.output / f"round-{number}" / "examples.jsonl"
        write_jsonl(examples, _examples(labelled, unlabelled, taken, task, number))
        recipe = _recipe(config, number, f"data.train={examples}")
        counts = ", ".join(f"{label} {count:,}" for label, count in sorted(Counter(g.label for g in taken).items()))
        say(f"Round {number} learns from {len(taken):,} of {len(unlabelled):,} texts, too: {counts}.")
        finetune(recipe)
        rounds.append(_facts(recipe, number, len(taken)))
        before = taken
    best = max(rounds, key=lambda facts: facts[_METRIC]) if data.held_out else rounds[-1]
    source = _written(_recipe(config, best["round"]))
    inputs = {str(path): content_hash(path) for path in (recipe.model, data.train, config.unlabelled)}
    with atomic_path(config.output / source.name) as fresh:
        shutil.copytree(source, fresh)
    for facts in rounds:
        accuracy = f", accuracy {facts[_METRIC]:.4f}" if _METRIC in facts else ""
        say(f"Round {facts['round']}: {facts['num_own_labels']:,} labels of its own{accuracy}")
    Manifest("self_train", to_plain(config), inputs, {"rounds": rounds, "best_round": best["round"]}).write(
        config.output
    )
    say(f"Wrote {config.output / source.name}, which is that of round {best['round']}")


def guess(directory: Path, task: Classification, rows: Sequence[Row], recipe: FinetuneConfig) -> list[Guess]:
    """The likeliest class of each text."""
    head = load_head_model(directory, dtype=torch.float32)
    head.model.to(open_device(recipe.train.device, recipe.train.num_threads))
    p_NC: Tensor = predict_rows(head, task, rows, recipe.train.row_length).probabilities_NC
    confidences, classes = (column.tolist() for column in p_NC.max(-1))
    return [
        Guess(number, head.spec.labels[at], confidence)
        for number, (at, confidence) in enumerate(zip(classes, confidences, strict=True))
    ]


def take(guesses: Sequence[Guess], threshold: float, shares: Counter[str] | None) -> list[Guess]:
    """The guesses to learn from, by text.

    Args:
        shares: examples of each class with which the guesses are to be in proportion; None takes all above the
            threshold.
    """
    sure = [each for each in guesses if each.confidence >= threshold]
    if shares is None or not sure:
        return sure
    available = Counter(each.label for each in sure)
    scale = min(available[label] / shares[label] for label in available)
    kept: list[Guess] = []
    for label in available:
        own = sorted((each for each in sure if each.label == label), key=lambda each: (-each.confidence, each.number))
        kept += own[: round(scale * shares[label])]
    return sorted(kept, key=lambda each: each.number)


def _recipe(config: SelfTrainConfig, number: int, *more: str) -> FinetuneConfig:
    own = {"model": config.model, "data.train": config.labelled, "output": config.output / f"round-{number}"}
    settings = [*config.set, *(f"{key}={path}" for key, path in own.items() if path is not None), *more]
    return load_config(FinetuneConfig, config.recipe, settings)


def _written(recipe: FinetuneConfig) -> Path:
    """The directory that a training wrote."""
    model, adapter = recipe.output / "model", recipe.output / "adapter"
    return model if model.is_dir() else adapter


def _facts(recipe: FinetuneConfig, number: int, count: int) -> dict[str, Any]:
    results = Manifest.read(_written(recipe)).results
    measured = {name: value for name, value in results.items() if name.startswith("validation/")}
    return {"round": number, "num_own_labels": count, **measured}


def _examples(
    labelled: Sequence[Row], unlabelled: Sequence[Row], taken: Sequence[Guess], task: Classification, number: int
) -> list[dict[str, Any]]:
    """The labelled examples, and those with labels of the model's, which say so."""
    own = [
        {
            **unlabelled[each.number].values,
            task.label: each.label,
            "labelled_by": f"model of round {number - 1}",
            "confidence": round(each.confidence, 4),
            "from": unlabelled[each.number].where,
        }
        for each in taken
    ]
    return [*(row.values for row in labelled), *own]
