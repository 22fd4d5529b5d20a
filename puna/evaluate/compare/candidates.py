"""What is compared: models with weights, published configurations, published results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from puna.evaluate.compare.published import PublishedTable, same_name
from puna.model.config import LlamaConfig
from puna.model.presets import PRESETS, preset
from puna.runtime.errors import InputError
from puna.weights.load import read_config, resolve


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of the models, and how much of it there is."""

    name: str
    """What tables and plots call it."""
    source: str
    """As it was named."""
    kind: str
    """What there is of it, in words."""
    config: LlamaConfig | None
    """Its architecture; None where only results are known."""
    directory: Path | None
    """Where its weights are; None where there are none."""
    tokenizer: Path | None
    """Where its tokenizer is; None where there is none."""


def read_candidates(
    models: Sequence[str], names: Sequence[str], tokenizers: Mapping[str, Path], published: Sequence[PublishedTable]
) -> list[Candidate]:
    """Find out what each model is.

    Args:
        models: paths, hub names, names of published configurations, or of models in published tables.
        names: what to call them; absent, the shortest ends of their paths that differ.
        tokenizers: model (as in `models`) -> a tokenizer for it.
        published: tables of published results.

    Raises:
        InputError: a model is none of these, names are not as many as models or not all different, or a tokenizer is
            for none of the models.
    """
    if names and len(names) != len(models):
        raise InputError(f"There are {len(names)} names for {len(models)} models.")
    if unknown := [model for model in tokenizers if model not in models]:
        raise InputError(f"tokenizers names {unknown[0]}, which is none of the models ({', '.join(models)}).")
    shown = list(names) or short_names(models)
    if len(set(shown)) < len(shown):
        raise InputError(f"Two models have the same name ({', '.join(shown)}). Set names, or name each model once.")
    return [_read(model, name, tokenizers.get(model), published) for model, name in zip(models, shown, strict=True)]


def short_names(models: Sequence[str]) -> list[str]:
    """The last part of each path, without a closing "model", and as many parts before it as tell them apart."""
    parts = [[part for part in Path(model).parts if part != "model"] or [model] for model in models]
    longest = max(map(len, parts))
    for length in range(1, longest + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read(model: str, name: str, tokenizer: Path | None, published: Sequence[PublishedTable]) -> Candidate:
    if not Path(model).exists() and not model.startswith("hub:"):
        if model in PRESETS:
            return Candidate(name, model, "published configuration, no weights", PRESETS[model], None, tokenizer)
        if any(same_name(model, other) for table in published for other in table.models):
            return Candidate(name, model, "published results only", None, None, tokenizer)
        try:
            preset(model)
        except ValueError as error:
            tables = " nor in the tables of published results" if published else ""
            raise InputError(f"There is no checkpoint at {model}{tables}. {error}") from error
    directory = resolve(model)
    return Candidate(name, model, "weights", read_config(directory), directory, tokenizer or directory)
