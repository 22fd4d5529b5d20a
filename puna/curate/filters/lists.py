"""Lists in text files: domains, words, phrases."""

from functools import cache
from pathlib import Path

from puna.runtime.errors import InputError


@cache
def read_list(path: Path) -> tuple[str, ...]:
    """Entries of a text file, one a line, lower-cased, sorted; blank lines and what follows a "#" do not count.

    Raises:
        InputError: the file is absent, not UTF-8, or holds no entry.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise InputError(f"The list {path} does not exist. It is a text file with one entry a line.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"The list {path} is not UTF-8 text: {error}.") from error
    entries = {line.partition("#")[0].strip().lower() for line in lines} - {""}
    if not entries:
        raise InputError(f"The list {path} holds no entry. Write one a line.")
    return tuple(sorted(entries))
