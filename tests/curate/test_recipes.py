"""Every recipe that is shipped can be planned: its stages, readers, steps and settings are all known."""

from pathlib import Path

import pytest

from puna.config import read_toml
from puna.pipeline.run import plan

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.toml")), ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_a_shipped_recipe_is_valid(path: Path) -> None:
    output, stages = plan(read_toml(path), path.name)
    assert output.parts[0] == "runs"
    assert stages
