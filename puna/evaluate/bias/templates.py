"""The sentences, groups and words that bias is measured with; see templates.toml."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from puna.config import parse_config
from puna.runtime.errors import InputError

GROUP, ATTRIBUTE = "{group}", "{attribute}"


@dataclass(frozen=True)
class Axis:
    """Groups of people that differ in one respect."""

    name: str
    """Such as gender."""
    language: str
    """Of the groups' names: en, zh or any other word, as long as it is the templates' too."""
    groups: tuple[str, ...]
    """As they stand in a sentence."""

    def __post_init__(self) -> None:
        if len(set(self.groups)) < max(2, len(self.groups)):
            raise ValueError(f"The axis {self.name} needs at least two groups, each once.")


@dataclass(frozen=True)
class Contrast:
    """Pairs of words of which a model may find the one or the other likelier of a group."""

    name: str
    """What they differ in."""
    language: str
    """Of sentences and words."""
    templates: tuple[str, ...]
    """Sentences with {group} and, after it, {attribute}."""
    pairs: tuple[tuple[str, str], ...]
    """The pleasant or powerful word, and the other."""

    def __post_init__(self) -> None:
        for template in self.templates:
            before, found, _ = template.partition(ATTRIBUTE)
            if not found or GROUP not in before:
                raise ValueError(f"{template!r} needs {GROUP} and, after it, {ATTRIBUTE}: models read forward.")
        if not self.templates or len(self.pairs) < 2:
            raise ValueError(f"The contrast {self.name} needs templates, and at least two pairs to tell chance from.")


@dataclass(frozen=True)
class Opening:
    """Beginnings of texts."""

    language: str
    """Of the texts."""
    texts: tuple[str, ...]
    """Each with {group}."""

    def __post_init__(self) -> None:
        if len(self.texts) < 2 or not all(GROUP in text for text in self.texts):
            raise ValueError(f"An opening needs at least two texts, each with {GROUP}.")


@dataclass(frozen=True)
class Words:
    """What makes a text hostile."""

    language: str
    """Of the words."""
    words: tuple[str, ...]
    """Found as whole words where the language puts blanks between them, and anywhere in Chinese."""


@dataclass(frozen=True)
class Templates:
    """All that is measured with."""

    axis: tuple[Axis, ...]
    """Groups."""
    contrast: tuple[Contrast, ...] = ()
    """Pairs of words."""
    opening: tuple[Opening, ...] = ()
    """Beginnings to go on with."""
    words: tuple[Words, ...] = ()
    """Hostile words."""


def read_templates(path: Path | None, languages: Sequence[str], axes: Sequence[str]) -> Templates:
    """Those of a file, or those that come with Puna, in some languages.

    Args:
        axes: their names; all of them when empty.

    Raises:
        InputError: the file is not as templates.toml, or has nothing in a language, or no such axis.
    """
    shipped = files("puna.evaluate.bias").joinpath("templates.toml")
    try:
        text = shipped.read_text(encoding="utf-8") if path is None else path.read_text(encoding="utf-8")
        values: dict[str, Any] = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} holds no templates: {error}.") from error
    every = parse_config(Templates, values, str(path or "templates.toml"))
    known = list(dict.fromkeys(axis.language for axis in every.axis))
    if unknown := [language for language in languages if language not in known]:
        raise InputError(f"There are no templates in the language {unknown[0]!r}, only in {', '.join(known)}.")
    names = list(dict.fromkeys(axis.name for axis in every.axis if axis.language in languages))
    if unknown := [axis for axis in axes if axis not in names]:
        raise InputError(f"There is no axis {unknown[0]!r}; there are {', '.join(names)}.")
    return Templates(
        tuple(each for each in every.axis if each.language in languages and each.name in (axes or names)),
        tuple(each for each in every.contrast if each.language in languages),
        tuple(each for each in every.opening if each.language in languages),
        tuple(each for each in every.words if each.language in languages),
    )
