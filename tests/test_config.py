"""Configuration: what is valid is read, what is not is explained."""

import dataclasses
import itertools
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from puna.config import apply_overrides, load_config, parse_config, render_defaults, to_plain
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


@pytest.mark.parametrize("name", STAGES)
def test_printed_defaults_are_valid_and_every_setting_is_explained(name: str) -> None:
    kind, _ = load_stage(name)
    text = render_defaults(kind)
    values = tomllib.loads(text)
    required = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    assert parse_config(kind, dict.fromkeys(required, "x") | values, name)
    lines = text.splitlines()
    for previous, line in itertools.pairwise(lines):
        if " =" in line and not line.startswith("# "):
            assert previous.startswith("# "), f"{name}: {line} has no comment"
