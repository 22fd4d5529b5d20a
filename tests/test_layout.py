"""The house: imports point one way, the README's map is the tree, every module imports and explains itself."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "puna"

ROWS = [
    {"config", "runtime"},
    {"tokenizer", "model"},
    {"kernels"},
    {"weights", "batches", "compress"},
    {"parallel", "peft"},
    {"train", "infer"},
    {"evaluate"},
    {"curate", "pretrain", "finetune", "align", "serve"},
    {"apps"},
    {"pipeline"},
    {"cli"},
]
"""Import order (docs/architecture.md): a module may import from earlier rows, and from its own folder."""

EXCEPTIONS = {("config", "runtime"), ("evaluate", "train")}
"""config stands on runtime's errors; the loss that evaluation sums is the training loss."""

MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def row_of(part: str) -> int:
    return next(number for number, row in enumerate(ROWS) if part in row)


def imported(path: Path) -> set[str]:
    """Top-level parts of puna that a module imports, anywhere in it."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("puna.")}
    return parts - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_to_earlier_rows(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for other in imported(path) - {own}:
        assert row_of(other) < row_of(own) or (own, other) in EXCEPTIONS, f"{own} may not import {other}"


def test_model_imports_torch_and_itself_only() -> None:
    for path in (PACKAGE / "model").glob("*.py"):
        assert imported(path) <= {"model"}, path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in sys.stdlib_module_names | {"torch"} for alias in node.names), (
                    path
                )


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_module_imports_and_says_what_it_is(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    assert importlib.import_module(name).__doc__


def test_readme_map_equals_the_tree() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```text\npuna/\n(.*?)```", readme, re.S)
    assert block is not None
    listed = re.findall(r"^  (\w+)(?:/|\.py) ", block[1], re.M)
    folders = [path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]
    files = [path.stem for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    assert sorted(listed) == sorted(folders + files)
    assert [row_of(part) for part in listed] == sorted(row_of(part) for part in listed), "not in the order of data"


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys, puna.cli; heavy = {'torch', 'numpy', 'transformers', 'pydantic', 'tokenizers'} & set(sys.modules);"
        "print(sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
