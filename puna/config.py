"""Configuration: TOML and `--set a.b=c` into frozen dataclasses, or one readable paragraph.

A configuration is an ordinary frozen dataclass whose fields carry an attribute docstring; the docstrings are the
comments that `puna config STAGE` prints. Validation is pydantic's, in its strict JSON mode: a TOML integer is not
silently taken for a string, but an array may become a tuple and a string a path.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from puna.runtime.errors import InputError

Config = TypeVar("Config")


def load_config(kind: type[Config], recipe: Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read a recipe, apply overrides in order, and validate.

    Args:
        kind: the dataclass to fill.
        recipe: a TOML file; every default where absent.
        overrides: "a.b=value" strings; the value is TOML, or taken as a bare string if it is not.

    Raises:
        InputError: the file is absent or malformed, a key is unknown, a value has the wrong type, or the
            dataclass itself refuses the combination.
    """
    values = read_toml(recipe) if recipe is not None else {}
    apply_overrides(values, overrides)
    return parse_config(kind, values, source=str(recipe) if recipe is not None else "--set")


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        InputError: it does not exist, is not text, or is malformed; with the line where the parser gave up.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"There is no recipe at {path}.") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder; a recipe is a TOML file.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text, so it cannot be a TOML recipe.") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}.") from error


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> None:
    """Set "a.b=value" in nested tables, in place, in order.

    Raises:
        InputError: an override does not read KEY=VALUE, or goes through something that is not a table.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set {override!r} does not read KEY=VALUE, for example --set train.steps=100.")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *tables, last = key.strip().split(".")
        table: Any = values
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise InputError(f"--set {override!r} goes through {name!r}, which holds a value, not a table.")
        table[last] = value


def parse_config(kind: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """Validate plain values against a dataclass; `source` names them in errors."""
    import pydantic

    _refuse_unknown_keys(kind, values, source, prefix="")
    try:
        return pydantic.TypeAdapter(kind).validate_json(_to_json(values, source), strict=True)
    except pydantic.ValidationError as error:
        raise InputError(_explain(error, source)) from error


def to_plain(config: Any) -> Any:
    """A configuration as JSON values, the inverse of `parse_config`."""
    import pydantic

    return pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")


def render_defaults(kind: type[Any]) -> str:
    """A commented TOML recipe holding every field of `kind` with its default."""
    return "\n".join(_render_table(kind, path="")) + "\n"


def _to_json(values: Mapping[str, Any], source: str) -> str:
    try:
        return json.dumps(values)
    except TypeError as error:
        raise InputError(f"{source} holds a date or time; no Puna configuration has one.") from error


def _field_types(kind: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _nested_dataclasses(annotation: Any) -> list[type[Any]]:
    """The dataclasses that a value of this annotation could be."""
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(annotation) for kind in _nested_dataclasses(part)]
    return []


def _refuse_unknown_keys(kind: type[Any], values: Mapping[str, Any], source: str, prefix: str) -> None:
    hints = _field_types(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f" Did you mean {prefix}{near[0]}?" if near else ""
            raise InputError(
                f"{source}: there is no key {prefix}{key}.{hint} "
                f"Valid keys {'in ' + prefix.rstrip('.') if prefix else 'at the top'}: {', '.join(known)}."
            )
        nested = _nested_dataclasses(hints[key])
        if isinstance(value, Mapping) and len(nested) == 1:
            _refuse_unknown_keys(nested[0], value, source, prefix=f"{prefix}{key}.")


def _explain(error: Any, source: str) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        where = ".".join(str(part) for part in problem["loc"])
        message = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Unexpected keyword argument")
        if problem["type"] == "missing":
            message = "is required and has no default"
        elif problem["type"] != "value_error":
            message = f"{message[:1].lower()}{message[1:]}, not {problem['input']!r}"
        lines.append(f"{where}: {message}" if where else message)
    return f"{source}: " + "; ".join(lines) + ("" if lines[-1].endswith(".") else ".")


def field_docs(kind: type[Any]) -> dict[str, str]:
    """The attribute docstring of each field: the string literal that follows it in the class body."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    docs = {}
    for statement, following in itertools.pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = inspect.cleandoc(str(following.value.value))
    return docs


def _render_table(kind: type[Any], path: str) -> list[str]:
    import pydantic

    hints, docs = _field_types(kind), field_docs(kind)
    lines: list[str] = []
    tables: list[tuple[dataclasses.Field[Any], type[Any]]] = []
    for field in dataclasses.fields(kind):
        nested = _nested_dataclasses(hints[field.name])
        if nested:
            tables.append((field, nested[0]))
            continue
        lines += [f"# {line}" for line in docs.get(field.name, "").splitlines()]
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            lines += [f"# {field.name} =   (required)", ""]
            continue
        plain = pydantic.TypeAdapter(hints[field.name]).dump_python(default, mode="json")
        lines += [f"# {field.name} =   (absent)" if plain is None else f"{field.name} = {_toml(plain)}", ""]
    for field, nested_kind in tables:
        table = [f"[{path}{field.name}]", *_render_table(nested_kind, path=f"{path}{field.name}.")]
        lines += [f"# {line}" for line in docs.get(field.name, "").splitlines()]
        lines += [f"# {line}".rstrip() for line in table[:-1]] + [""] if field.default is None else table
    return lines


def _toml(value: Any) -> str:
    """A plain value in TOML's notation, which for these types is JSON's."""
    return json.dumps(value, ensure_ascii=False)
