"""Texts with {column} in them, filled in from a row."""

import re

from puna.evaluate.tasks.data import Row
from puna.runtime.errors import InputError

_COLUMN = re.compile(r"\{(\w+)\}")


def fill(template: str, row: Row) -> str:
    """The template with the row's texts and numbers in the places of their columns' names; other braces stay.

    Raises:
        InputError: the row has no such column, or something else in it; the message names file and line.

    >>> fill("{a} + {b}, {}", Row({"a": 1, "b": "two"}, "sums.csv, line 2"))
    '1 + two, {}'
    """

    def value(found: re.Match[str]) -> str:
        column = found.group(1)
        if column not in row.values:
            raise InputError(
                f"{row.where}: there is no {column!r}, which {template!r} asks for, only "
                f"{', '.join(map(repr, row.values))}."
            )
        value = row.values[column]
        if not isinstance(value, str | int | float) or (isinstance(value, str) and not value.strip()):
            raise InputError(f"{row.where}: {column!r} is {value!r}; {template!r} needs a text or a number.")
        return str(value)

    return _COLUMN.sub(value, template)
