"""Answers that a model has given, in one file: what was asked once is not computed again."""

import hashlib
import json
import sqlite3
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from puna.runtime.errors import InputError


class AnswerCache:
    """A SQLite file of answers, found by what was asked and of which model.

    `put` writes all that it is given or nothing, so a kill loses what was being computed and no more.

    Args:
        path: made where it is absent; ":memory:" is no file, but the memory.
        model: what tells the model, and how it computes, from others.

    Attributes:
        path: as given.
    """

    def __init__(self, path: Path, model: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._model = model
        self._connection = sqlite3.connect(path, timeout=60)
        self.close = weakref.finalize(self, self._connection.close)
        """Lets go of the file; done at the latest when nobody uses the cache any more."""
        try:
            self._connection.execute("CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer TEXT NOT NULL)")
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path} holds no answers of an earlier evaluation ({error}). Remove it.") from error

    def key(self, *asked: Any) -> bytes:
        """What an answer is found by; `asked` has a JSON form."""
        return hashlib.sha256(json.dumps([self._model, *asked]).encode()).digest()

    def get(self, keys: Iterable[bytes]) -> dict[bytes, Any]:
        """Those of the answers that are known."""
        found = {}
        for key in keys:
            row = self._connection.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
            if row is not None:
                found[key] = json.loads(row[0])
        return found

    def put(self, answers: Mapping[bytes, Any]) -> None:
        """Keep answers, which have a JSON form; all of them or none."""
        with self._connection:
            rows = [(key, json.dumps(answer)) for key, answer in answers.items()]
            self._connection.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
