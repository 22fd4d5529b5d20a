"""Recipes of single trials: the base, with the values of a trial, checked before the first of them runs."""

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from puna.config import apply_overrides, parse_config, read_toml
from puna.finetune.config import FinetuneConfig
from puna.finetune.search.config import SearchConfig, Value
from puna.runtime.errors import InputError

Recipe = dict[str, Any]
"""Plain values, as TOML has them."""


def base_recipe(config: SearchConfig) -> tuple[Recipe, FinetuneConfig]:
    """The recipe that is varied, with what the search sets (the model of a trial is the best by the search's metric);
    and what it is as a configuration.

    Every extreme of a parameter has to be right where the other settings are as in the recipe, or where they are at
    their first values: a setting may need another to follow it.

    Raises:
        InputError: the recipe cannot be read; or it, or an extreme, is wrong.
    """
    recipe = _merged(read_toml(config.recipe), config.settings)
    selection = recipe.get("selection", {})
    if not isinstance(selection, dict):
        raise InputError(f"{config.recipe}: selection is {selection!r}; it has to be a table.")
    recipe["selection"] = selection | {"metric": config.metric, "goal": config.goal}
    recipe["output"] = str(config.output / "best")
    first = {parameter.key: parameter.extremes[0] for parameter in config.parameters}
    base = _one_right([recipe, with_values(recipe, first)], str(config.recipe))
    for parameter in config.parameters:
        for value in parameter.extremes:
            own = {parameter.key: value}
            source = f"{config.recipe}, with {parameter.key} = {json.dumps(value)}"
            _one_right([with_values(recipe, own), with_values(recipe, first | own)], source)
    return recipe, base


def _merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> Recipe:
    """Values with changes; tables are merged, all else is replaced."""
    merged = dict(values)
    for key, change in changes.items():
        before = merged.get(key)
        if isinstance(before, Mapping) and isinstance(change, Mapping):
            change = _merged(before, change)
        merged[key] = change
    return merged


def _one_right(recipes: Sequence[Recipe], source: str) -> FinetuneConfig:
    """The first of the recipes that is right.

    Raises:
        InputError: none is; says what is wrong with the first.
    """
    errors = []
    for recipe in recipes:
        try:
            return parse_config(FinetuneConfig, recipe, source)
        except InputError as error:
            errors.append(error)
    raise errors[0]


def with_values(recipe: Recipe, values: Mapping[str, Value]) -> Recipe:
    """A copy of a recipe with settings by dotted key."""
    changed = copy.deepcopy(recipe)
    apply_overrides(changed, [f"{key}={json.dumps(value)}" for key, value in values.items()])
    return changed


def input_paths(config: Any) -> Iterator[Path]:
    """The files and folders that a configuration names, other than its output."""
    if isinstance(config, Path):
        yield config
    elif isinstance(config, tuple):
        for part in config:
            yield from input_paths(part)
    elif dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            if field.name != "output":
                yield from input_paths(getattr(config, field.name))
