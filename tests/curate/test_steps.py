"""Every reader and step of the tree can be named in a recipe, and explains itself."""

import ast
import dataclasses
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from puna.config import Kinds, field_docs, render_kind
from puna.curate.main import CurateConfig
from puna.curate.steps import READERS, STEPS

PACKAGE = Path(__file__).resolve().parents[2] / "puna"
KINDS = [("reader", kind) for kind in READERS] + [("step", kind) for kind in STEPS]


def kinds_in_the_tree() -> dict[str, str]:
    """Kind -> module:Class, of every class whose first field is `kind`."""
    found = {}
    for path in sorted((PACKAGE / "curate").rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            fields = (
                [part for part in node.body if isinstance(part, ast.AnnAssign)]
                if isinstance(node, ast.ClassDef)
                else []
            )
            if fields and ast.unparse(fields[0].target) == "kind":
                assert isinstance(node, ast.ClassDef)
                assert fields[0].value is not None
                found[str(ast.literal_eval(fields[0].value))] = f"{module}:{node.name}"
    return found


def test_every_kind_is_registered_under_its_name() -> None:
    assert kinds_in_the_tree() == READERS | STEPS
    assert not READERS.keys() & STEPS.keys()


def load(noun: str, kind: str) -> type[Any]:
    return Kinds(noun, READERS if noun == "reader" else STEPS).load(kind)


@pytest.mark.parametrize(("noun", "kind"), KINDS)
def test_every_kind_keeps_to_the_form(noun: str, kind: str) -> None:
    loaded = load(noun, kind)
    fields = dataclasses.fields(loaded)
    assert fields[0].name == "kind"
    assert fields[0].default == kind
    assert typing.get_args(typing.get_type_hints(loaded)["kind"]) == (kind,)
    assert {field.name for field in fields} == set(field_docs(loaded)), "each field needs a docstring below it"
    assert loaded.__dataclass_params__.frozen
    assert loaded.__doc__
    methods = {"reader": ({"units", "read"},), "step": ({"__call__"}, {"keys", "decide", "apply"})}[noun]
    assert any(all(hasattr(loaded, name) for name in names) for names in methods)
    assert f"# {noun} {kind}: " in render_kind(CurateConfig, kind)


def test_kinds_are_imported_only_when_named() -> None:
    code = "import sys, puna.curate.main as m; m.CurateConfig; print({'torch', 'numba', 'duckdb'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_only_a_step_that_is_a_model_imports_torch() -> None:
    modules = {name.partition(":")[0] for name in (READERS | STEPS).values()} - {
        STEPS["llama_quality"].partition(":")[0]
    }
    code = (
        f"import sys, importlib; [importlib.import_module(m) for m in {sorted(modules)}]; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
