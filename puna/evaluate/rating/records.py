"""A rating, and the file that ratings are kept in: lines are only ever added, so that nothing is lost."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from puna.batches.preferences import STRENGTHS, Messages
from puna.runtime.errors import InputError
from puna.runtime.files import read_jsonl
from puna.runtime.progress import say

Verdict = int | Literal["both_bad"]
"""-4 to -1: the left answer is better, by the index into STRENGTHS plus one; 0: they are as good as each other; 1 to 4:
the right one is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rating:
    """What one rater found of two answers to a prompt."""

    item: str
    """Names the comparison; the same for all who rate it."""
    prompt: Messages
    """What was answered."""
    category: str
    """What kind of request it is, such as "coding"; may be empty."""
    left: str
    """The model whose answer stood on the left."""
    right: str
    """The other."""
    left_answer: str
    """What stood there."""
    right_answer: str
    """What stood there."""
    verdict: Verdict
    """Which is better, and by how much."""
    rater: str
    """Who says so: a person, or a model that judges. A model asked again with the answers swapped is another rater."""
    seconds: float
    """How long it took."""
    edited: str | None = None
    """The better answer, made better still by the rater."""
    left_unsafe: bool = False
    """The rater finds that the left answer should not be given at all."""
    right_unsafe: bool = False
    """The same of the right one."""

    def __post_init__(self) -> None:
        levels = len(STRENGTHS)
        if self.verdict != "both_bad" and (type(self.verdict) is not int or abs(self.verdict) > levels):
            raise ValueError(f"verdict is {self.verdict!r}; it has to be -{levels} to {levels}, or both_bad.")
        if self.edited is not None:
            if not self.better:
                raise ValueError("Only a better answer can be edited, and neither is.")
            if not self.edited.strip() or self.edited.strip() in (self.left_answer.strip(), self.right_answer.strip()):
                raise ValueError("The edited answer is empty, or the same as one of the answers.")

    @property
    def better(self) -> Literal["left", "right"] | None:
        """Which answer is better, if any."""
        if self.verdict == "both_bad" or self.verdict == 0:
            return None
        return "left" if self.verdict < 0 else "right"


class RatingLog:
    """The ratings of a file, which grows by a line for each that is given, replaced or taken back.

    A line is written at once and forced to the disk. What a kill has left of a last line is cut off at opening. One
    process at a time may write (`puna.runtime.files.only_process`).

    Raises:
        InputError: the file holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_line(path)
        self._ratings = _replay(path) if path.exists() else {}

    @property
    def ratings(self) -> list[Rating]:
        """Those that stand, the latest last."""
        return list(self._ratings.values())

    def has(self, item: str, rater: str) -> bool:
        """Whether a rater has rated a comparison."""
        return (item, rater) in self._ratings

    def add(self, rating: Rating) -> bool:
        """Keep a rating; one of the same comparison by the same rater no longer counts, but stays in the file.

        Returns:
            Whether there was one.
        """
        self._append(asdict(rating))
        return _take(self._ratings, rating)

    def undo(self, rater: str) -> Rating | None:
        """Take back a rater's latest rating; None where there is none."""
        last = next((rating for rating in reversed(self._ratings.values()) if rating.rater == rater), None)
        if last is not None:
            self._append({"undo": last.item, "rater": rater})
            del self._ratings[last.item, rater]
        return last

    def _append(self, line: dict[str, Any]) -> None:
        data = (json.dumps(line, ensure_ascii=False) + "\n").encode()
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            before = os.fstat(file).st_size
            try:
                while data:
                    data = data[os.write(file, data) :]
                os.fsync(file)
            except OSError:  # such as a full disk: the line is there as a whole, or not at all
                os.ftruncate(file, before)
                raise
        finally:
            os.close(file)


def read_ratings(path: Path) -> list[Rating]:
    """The ratings of a file that stand: without those that were replaced or taken back.

    Raises:
        InputError: there is no file, or no rating in it, or something else; names the line.
    """
    ratings = list(_replay(path).values())
    if not ratings:
        raise InputError(f"There is no rating in {path}.")
    return ratings


_Standing = dict[tuple[str, str], Rating]


def _take(standing: _Standing, rating: Rating) -> bool:
    replaced = standing.pop((rating.item, rating.rater), None) is not None
    standing[rating.item, rating.rater] = rating
    return replaced


def _replay(path: Path) -> _Standing:
    standing: _Standing = {}
    for where, line in _lines(path):
        if "undo" in line:
            if standing.pop((line["undo"], line.get("rater", "")), None) is None:
                raise InputError(f"{where}: takes back a rating that is not there. Was the file edited?")
            continue
        try:
            _take(standing, Rating(**line))
        except (TypeError, ValueError) as error:
            names = ", ".join(field.name for field in fields(Rating))
            raise InputError(f"{where} is not a rating: {error} A rating has: {names}.") from error
    return standing


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_jsonl(path), start=1):
        yield f"{path}, line {number}", line


def _cut_torn_line(path: Path) -> None:
    """A line without an end was being written when the process was killed; nobody was told that it was kept."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
        say(f"Cut off the end of {path}: its last line was not written to the end.")
