"""Configuration: TOML and `--set a.b=c` into frozen dataclasses, or one readable paragraph.

A configuration is an ordinary frozen dataclass whose fields carry an attribute docstring; the docstrings are the
comments that `puna config STAGE` prints. Validation is pydantic's, in its strict JSON mode: a TOML integer is not
silently taken for a string, but an array may become a tuple and a string a path. Where a setting is one of many things,
each with settings of its own (`Kinds`), its table says which by the key `kind`.
"""

import ast
import dataclasses
import difflib
import importlib
import inspect
import itertools
import json
import re
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from puna.runtime.errors import InputError

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True, eq=False)
class Kinds:
    """Marks a setting whose value is one of several dataclasses, told apart by their field `kind`.

        steps: tuple[Annotated[Step, Kinds("step", {"c4": "puna.curate.filters.c4:C4"})], ...]

    A class is imported when a configuration names it, not before.
    """

    noun: str
    """What they are, for messages: "step"."""
    classes: Mapping[str, str]
    """Kind -> "module:Class"."""

    def load(self, kind: str) -> type[Any]:
        """The dataclass called `kind`, which has to be one of `classes`."""
        module, _, name = self.classes[kind].partition(":")
        loaded: type[Any] = getattr(importlib.import_module(module), name)
        return loaded

    def choose(self, value: Mapping[str, Any], where: str) -> type[Any]:
        """The dataclass that the table `value` asks for; `where` names the table in errors.

        Raises:
            InputError: it has no `kind`, or there is none of that name; the message names the nearest.
        """
        kind = value.get("kind")
        if isinstance(kind, str) and kind in self.classes:
            return self.load(kind)
        near = difflib.get_close_matches(str(kind), self.classes, n=1, cutoff=0.4)
        wrong = (
            f"{where}.kind is {kind!r}, and there is no such {self.noun}."
            if "kind" in value
            else (f'{where} needs kind = "...", to say which {self.noun} it is.')
        )
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{wrong}{hint} Kinds of {self.noun}: {', '.join(self.classes)}.")

    def summary(self, kind: str) -> str:
        """The first line of the docstring of the dataclass called `kind`."""
        return inspect.cleandoc(self.load(kind).__doc__ or "").splitlines()[0]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """How pydantic reads and writes such a value."""
        import pydantic
        from pydantic_core import core_schema

        def read(value: Any) -> Any:
            if not isinstance(value, Mapping):
                raise ValueError(f"is {value!r}, but has to be a table with the kind of {self.noun} and its settings.")
            kind = self.choose(value, f"this {self.noun}")
            return pydantic.TypeAdapter(kind).validate_json(json.dumps(value), strict=True)

        write = core_schema.plain_serializer_function_ser_schema(to_plain)
        return core_schema.no_info_plain_validator_function(read, serialization=write)


def load_config(kind: type[Config], recipe: Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read a recipe, apply overrides in order, and validate.

    Args:
        kind: the dataclass to fill.
        recipe: a TOML file; every default where absent.
        overrides: "a.b=value" strings, or "a[0].b=value"; the value is TOML, or taken as a bare string if it is not.

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
        *tables, last = re.sub(r"\[(\d+)\]", r".\1", key.strip()).split(".")
        table: Any = values
        for name in tables:
            table = table.setdefault(name, {}) if isinstance(table, dict) else _element(table, name, override)
            if not isinstance(table, dict | list):
                raise InputError(f"--set {override!r} goes through {name!r}, which holds a value, not a table.")
        if isinstance(table, dict):
            table[last] = value
        else:
            _element(table, last, override)
            table[int(last)] = value


def _element(array: list[Any], name: str, override: str) -> Any:
    if not name.isdigit() or int(name) >= len(array):
        raise InputError(f"--set {override!r}: {name!r} is not the number of one of the array's {len(array)} elements.")
    return array[int(name)]


def parse_config(kind: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """Validate plain values against a dataclass; `source` names them in errors."""
    import pydantic

    _refuse_unknown_keys(kind, values, source, where="")
    try:
        return pydantic.TypeAdapter(kind).validate_json(_to_json(values, source), strict=True)
    except pydantic.ValidationError as error:
        raise InputError(_explain(error, source)) from error


def to_plain(config: Any) -> Any:
    """A configuration as JSON values, the inverse of `parse_config`."""
    import pydantic

    return pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")


def render_values(values: Mapping[str, Any], path: str = "") -> str:
    """Plain values as TOML, the inverse of `read_toml`: what is no table first, then tables by their dotted names.

    Args:
        path: the tables around these values, with a dot behind.
    """
    lines, tables = [], []
    for key, value in values.items():
        name = key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)
        if isinstance(value, Mapping):
            tables.append(f"\n[{path}{name}]\n{render_values(value, f'{path}{name}.')}")
        elif isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
            tables += [f"\n[[{path}{name}]]\n{render_values(part, f'{path}{name}.')}" for part in value]
        else:
            lines.append(f"{name} = {_toml(value)}\n")
    return "".join(lines + tables)


def render_defaults(kind: type[Any]) -> str:
    """A commented TOML recipe holding every field of `kind` with its default."""
    return "\n".join(_render_table(kind, path="", listed=set())) + "\n"


def render_kind(config: type[Any], kind: str) -> str:
    """The same for one kind of what a configuration offers a choice of; for each, where several are called so.

    Raises:
        InputError: nothing is called so; the message names the nearest.
    """
    choices = kinds_in(config)
    found = [choice for choice in choices if kind in choice.classes]
    if not found:
        known = sorted({name for choice in choices for name in choice.classes})
        near = difflib.get_close_matches(kind, known, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"There is no kind {kind!r}.{hint} Kinds: {', '.join(known) or 'none'}.")
    parts = []
    for choice in found:
        loaded = choice.load(kind)
        doc = [
            f"# {choice.noun} {kind}: {line}" if number == 0 else f"# {line}".rstrip()
            for number, line in enumerate(inspect.cleandoc(loaded.__doc__ or "").splitlines())
        ]
        parts.append("\n".join([*doc, "", *_render_table(loaded, path="", listed=set())]))
    return "\n".join(parts) + "\n"


def _to_json(values: Mapping[str, Any], source: str) -> str:
    try:
        return json.dumps(values)
    except TypeError as error:
        raise InputError(f"{source} holds a date or time; no Puna configuration has one.") from error


def _field_types(kind: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _nested_dataclasses(annotation: Any) -> list[type[Any]]:
    """The dataclasses that a value of this annotation could be."""
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(annotation) for kind in _nested_dataclasses(part)]
    return []


def _kinds(annotation: Any) -> Kinds | None:
    return next((extra for extra in getattr(annotation, "__metadata__", ()) if isinstance(extra, Kinds)), None)


def _element_type(annotation: Any) -> Any:
    """X of tuple[X, ...]; None for anything else."""
    arguments = typing.get_args(annotation)
    return arguments[0] if typing.get_origin(annotation) is tuple and arguments[1:] == (...,) else None


def kinds_in(kind: type[Any]) -> list[Kinds]:
    """Every choice of kinds that a configuration offers, at any depth, each once."""
    found: list[Kinds] = []
    for annotation in _field_types(kind).values():
        inner = _element_type(annotation) or annotation
        here = _kinds(inner)
        found += [here] if here else [kinds for part in _nested_dataclasses(inner) for kinds in kinds_in(part)]
    return list(dict.fromkeys(found))


def _refuse_unknown_keys(annotation: Any, value: Any, source: str, where: str) -> None:
    """Walk `value` along its annotation; `where` is the way so far, such as sources[1].steps[0]."""
    element = _element_type(annotation)
    if element is not None and isinstance(value, list):
        for number, part in enumerate(value):
            _refuse_unknown_keys(element, part, source, f"{where}[{number}]")
    if not isinstance(value, Mapping):
        return
    kinds = _kinds(annotation)
    nested = [kinds.choose(value, f"{source}: {where}")] if kinds else _nested_dataclasses(annotation)
    if len(nested) != 1:
        return
    hints, prefix = _field_types(nested[0]), f"{where}." if where else ""
    known = [field.name for field in dataclasses.fields(nested[0])]
    for key, part in value.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            hint = f" Did you mean {prefix}{near[0]}?" if near else ""
            raise InputError(
                f"{source}: there is no key {prefix}{key}.{hint} "
                f"Valid keys {'in ' + where if where else 'at the top'}: {', '.join(known)}."
            )
        _refuse_unknown_keys(hints[key], part, source, f"{prefix}{key}")


def _explain(error: Any, source: str) -> str:
    lines = []
    for problem in error.errors(include_url=False):
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])[1:]
        message = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Unexpected keyword argument")
        if problem["type"] == "missing":
            message = "is required and has no default"
        elif problem["type"] != "value_error":
            message = f"{message[:1].lower()}{message[1:]}, not {problem['input']!r}"
        lines.append(f"{where}: {message}" if where else message)
    return f"{source}: " + "; ".join(lines) + ("" if lines[-1].endswith(".") else ".")


def field_docs(kind: type[Any]) -> dict[str, str]:
    """The attribute docstring of each field, also of inherited ones: the string literal that follows it in the class
    body."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= _own_field_docs(base)
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: doc for name, doc in docs.items() if name in names}


def _own_field_docs(kind: type[Any]) -> dict[str, str]:
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


def _render_table(kind: type[Any], path: str, listed: set[Kinds]) -> list[str]:
    """`listed`: the choices whose kinds have been printed above."""
    import pydantic

    hints, docs = _field_types(kind), field_docs(kind)
    lines: list[str] = []
    tables: list[str] = []
    for field in dataclasses.fields(kind):
        doc = [f"# {line}".rstrip() for line in docs.get(field.name, "").splitlines()]
        inner = _element_type(hints[field.name])
        nested, kinds = _nested_dataclasses(inner or hints[field.name]), _kinds(inner or hints[field.name])
        if nested or kinds:
            name = f"[{path}{field.name}]"
            table = [f"[{name}]" if inner else name]
            if kinds:
                table += _render_kinds(kinds, kinds not in listed)
                listed.add(kinds)
            else:
                table += _render_table(nested[0], f"{path}{field.name}.", listed)
            # What is absent stands as a comment, and what has to be chosen; within an array all is one already.
            absent = inner or field.default is None or (kinds and not path)
            tables += [*doc, *_commented(table)] if absent else [*doc, *table]
            continue
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            lines += [*doc, f"# {field.name} =   (required)", ""]
            continue
        plain = pydantic.TypeAdapter(hints[field.name]).dump_python(default, mode="json")
        lines += [*doc, f"# {field.name} =   (absent)" if plain is None else f"{field.name} = {_toml(plain)}", ""]
    return lines + tables


def _render_kinds(kinds: Kinds, with_list: bool) -> list[str]:
    if not with_list:
        return [f"# kind =   (required) a {kinds.noun}, as above", ""]
    width = max(map(len, kinds.classes))
    lines = [f"# kind =   (required) the {kinds.noun}; `puna config STAGE.KIND` prints its settings. One of:"]
    return [*lines, *(f"#     {kind:<{width}}  {kinds.summary(kind)}" for kind in kinds.classes), ""]


def _commented(lines: list[str]) -> list[str]:
    return [f"# {line}".rstrip() for line in lines[:-1]] + [""]


def _toml(value: Any) -> str:
    """A plain value in TOML's notation, which for these types is JSON's."""
    return json.dumps(value, ensure_ascii=False)
