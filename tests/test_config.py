"""Configuration: what is valid is read, what is not is explained."""

import dataclasses
import itertools
import json
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest

from puna.config import (
    Kinds,
    apply_overrides,
    kinds_in,
    load_config,
    parse_config,
    render_defaults,
    render_kind,
    to_plain,
)
from puna.pipeline.stages import STAGES, load_stage
from puna.runtime.errors import InputError


@dataclass(frozen=True)
class Inner:
    """Nested."""

    kind: Literal["a", "b"] = "a"
    """Which."""
    rate: float = 0.5
    """How fast,
    over two lines."""

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError("rate is negative.")


@dataclass(frozen=True)
class Outer:
    """Top."""

    folder: Path
    """Where."""
    steps: int = 3
    """How many."""
    names: tuple[str, ...] = ("x",)
    """Which names."""
    inner: Inner = field(default_factory=Inner)
    """Nested settings."""
    other: Inner | None = None
    """Optional settings."""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_toml_and_overrides_in_order(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.toml", 'folder = "a"\nsteps = 5\n[inner]\nrate = 1')
    config = load_config(Outer, recipe, ["steps=7", "inner.kind=b", "steps=8", 'names=["y", "z"]', "folder=some/where"])
    assert config == Outer(Path("some/where"), 8, ("y", "z"), Inner("b", 1.0))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('folder = "a"\nstep = 5', ["r.toml", "no key step", "Did you mean steps?"]),
        ('folder = "a"\n[inner]\nrat = 5', ["no key inner.rat", "Did you mean inner.rate?"]),
        ('folder = "a"\n[other]\nkinds = "a"', ["no key other.kinds", "other.kind?"]),
        ('folder = "a"\nsteps = "five"', ["steps", "valid integer", "'five'"]),
        ('folder = "a"\nsteps = true', ["steps", "valid integer"]),
        ('folder = "a"\nsteps = 1.5', ["steps"]),
        ("folder = 3", ["folder", "3"]),
        ("steps = 5", ["folder", "required"]),
        ('folder = "a"\n[inner]\nkind = "c"', ["inner.kind", "'a' or 'b'"]),
        ('folder = "a"\n[inner]\nrate = -1', ["inner: rate is negative."]),
        ('folder = "a"\ninner = 3', ["inner"]),
        ('folder = "a"\nsteps = 1979-05-27', ["date"]),
        ("steps = 3\nfolder == 1", ["r.toml", "not valid TOML", "line 2"]),
    ],
)
def test_mistakes_are_one_readable_paragraph(tmp_path: Path, text: str, parts: list[str]) -> None:
    recipe = write(tmp_path / "r.toml", text)
    with pytest.raises(InputError) as caught:
        load_config(Outer, recipe)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_missing_binary_or_folder_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no recipe at"):
        load_config(Outer, tmp_path / "absent.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        load_config(Outer, tmp_path / "b.toml")
    with pytest.raises(InputError, match="is a folder"):
        load_config(Outer, tmp_path)


@pytest.mark.parametrize("override", ["steps", "=3", "steps.a=3"])
def test_bad_overrides(override: str) -> None:
    with pytest.raises(InputError, match="--set"):
        apply_overrides({"steps": 3}, [override])


def test_plain_values_parse_back() -> None:
    config = Outer(Path("a"), other=Inner("b", 2.0))
    assert parse_config(Outer, to_plain(config), "test") == config


@dataclass(frozen=True)
class Walk:
    """Goes somewhere.

    In two paragraphs.
    """

    kind: Literal["walk"] = "walk"
    """This step's name."""
    miles: float = 1.0
    """How far."""

    def __post_init__(self) -> None:
        if self.miles < 0:
            raise ValueError("miles is negative.")


@dataclass(frozen=True)
class Rest:
    """Stays where it is."""

    kind: Literal["rest"] = "rest"
    """This step's name."""
    place: Path = field(kw_only=True)
    """Where."""


STEPS = Kinds("step", {"walk": f"{__name__}:Walk", "rest": f"{__name__}:Rest"})


@dataclass(frozen=True)
class Leg:
    """A part of a day."""

    name: str
    """Of the part."""
    first: Annotated[Any, STEPS]
    """What it begins with."""
    steps: tuple[Annotated[Any, STEPS], ...] = ()
    """What follows."""


@dataclass(frozen=True)
class Journey:
    """Several days."""

    legs: tuple[Leg, ...] = ()
    """Parts."""
    steps: tuple[Annotated[Any, STEPS], ...] = (Walk(),)
    """On all days."""


JOURNEY = """
[[legs]]
name = "morning"
first.kind = "rest"
first.place = "home"
[[legs.steps]]
kind = "walk"
miles = 3
[[legs]]
name = "noon"
first = { kind = "walk" }
"""


def test_a_table_says_by_its_kind_what_it_is(tmp_path: Path) -> None:
    journey = load_config(Journey, write(tmp_path / "r.toml", JOURNEY), ["legs[0].steps[0].miles=4", "legs.1.name=x"])
    assert journey == Journey((Leg("morning", Rest(place=Path("home")), (Walk(miles=4.0),)), Leg("x", Walk())))
    assert parse_config(Journey, to_plain(journey), "test") == journey
    assert to_plain(journey)["steps"] == [{"kind": "walk", "miles": 1.0}]


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        (
            'kind = "walk"\nmiles',
            'kind = "wlak"\nmiles',
            ["legs[0].steps[0].kind", "Did you mean 'walk'?", "walk, rest"],
        ),
        ('kind = "walk"\nmiles', "miles", ["legs[0].steps[0] needs kind", "which step"]),
        ("miles = 3", "mile = 3", ["no key legs[0].steps[0].mile", "Did you mean legs[0].steps[0].miles?"]),
        ("miles = 3", "miles = -3", ["legs[0].steps[0]: miles is negative."]),
        ("miles = 3", 'miles = "far"', ["legs[0].steps[0].miles", "'far'"]),
        ("first.place", "first.plaice", ["legs[0].first.plaice", "legs[0].first.place?"]),
        ('first.place = "home"', "", ["legs[0].first.place", "required"]),
        ('{ kind = "walk" }', '"walk"', ["legs[1].first", "has to be a table"]),
        ('name = "noon"', "nane = 3", ["legs[1].nane", "legs[1].name?"]),
    ],
)
def test_mistakes_in_kinds_are_one_readable_paragraph(tmp_path: Path, old: str, new: str, parts: list[str]) -> None:
    assert old in JOURNEY
    with pytest.raises(InputError) as caught:
        load_config(Journey, write(tmp_path / "r.toml", JOURNEY.replace(old, new)))
    assert "\n" not in str(caught.value)
    for part in ["r.toml", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize("override", ["legs.2.name=x", "legs.x.name=x", "legs[0]=3", "legs.5=3", "legs[0].name.x=3"])
def test_bad_overrides_of_arrays(tmp_path: Path, override: str) -> None:
    with pytest.raises(InputError):
        load_config(Journey, write(tmp_path / "r.toml", JOURNEY), [override])


def test_kinds_are_listed_once_and_printed_one_by_one() -> None:
    text = render_defaults(Journey)
    assert text.count("Goes somewhere.") == 1
    assert "# [[legs]]" in text
    assert "# [legs.first]" in text
    assert "# [[legs.steps]]" in text
    assert tomllib.loads(text) == {}
    assert kinds_in(Journey) == [STEPS]
    walk = render_kind(Journey, "walk")
    assert tomllib.loads(walk) == {"kind": "walk", "miles": 1.0}
    assert "# How far." in walk
    assert "# In two paragraphs." in walk
    assert "(required)" in render_kind(Journey, "rest")
    with pytest.raises(InputError, match=r"no kind 'wlak'. Did you mean 'walk'\?"):
        render_kind(Journey, "wlak")


def check_values(kind: type[Any], values: dict[str, Any]) -> None:
    """Each value by itself, since what is required is absent."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for key, value in values.items():
        if isinstance(value, dict) and dataclasses.is_dataclass(hints[key]):
            check_values(hints[key], value)
        else:
            pydantic.TypeAdapter(hints[key]).validate_json(json.dumps(value), strict=True)


@pytest.mark.parametrize("name", STAGES)
def test_printed_defaults_are_valid_and_every_setting_is_explained(name: str) -> None:
    kind, _ = load_stage(name)
    text = render_defaults(kind)
    check_values(kind, tomllib.loads(text))
    lines = text.splitlines()
    for previous, line in itertools.pairwise(lines):
        if " =" in line and not line.startswith("# "):
            assert previous.startswith("# "), f"{name}: {line} has no comment"
