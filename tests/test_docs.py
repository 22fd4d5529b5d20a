"""Documentation that is generated is up to date; what the README shows exists."""

import importlib.util
import re
import shlex
from pathlib import Path

from puna.config import apply_overrides, read_toml
from puna.pipeline.run import plan
from puna.pipeline.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]


def test_commands_page_is_generated_from_the_commands() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == module.TARGET.read_text(encoding="utf-8"), "run `make docs`"


def test_readme_commands_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    words = set(re.findall(r"puna ([a-z]+)[ `]", readme))
    assert words <= {*STAGES, "run", "config", "inspect"}
    for recipe, settings in re.findall(r"puna run (recipes/\S+)((?: --set \S+)*)", readme):
        values = read_toml(ROOT / recipe)
        apply_overrides(values, [word for word in shlex.split(settings) if word != "--set"])
        plan(values, recipe)


def test_links_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
