"""Stack Exchange dumps: a question with its answers, best first, is a document.

LLaMA (Touvron et al. 2023), section 2.1: "We removed the HTML tags from text and sorted the answers by score (from
highest to lowest)."
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from puna.curate.document import Document, Rejected
from puna.curate.readers.bounds import Bounds, Unreadable, open_expanded
from puna.curate.readers.dumps import read_elements
from puna.curate.readers.files import list_files, locate
from puna.curate.readers.html import fragment_to_text
from puna.curate.readers.text import to_document
from puna.runtime.errors import InputError

_MAX_POST_BYTES = 256_000
"""Of a row; the sites allow 30,000 characters in a post."""
_POSTS_PER_BATCH = 5000
_BYTES_PER_BATCH = 32_000_000


@dataclass(frozen=True)
class StackExchangeReader:
    """Questions with their answers out of `Posts.xml` files, in which questions and answers stand apart."""

    kind: Literal["stackexchange"] = "stackexchange"
    """Stack Exchange's Posts.xml dumps: questions with their answers, best first."""
    path: Path = field(kw_only=True)
    """A Posts.xml (.gz, .bz2, .zst), or a folder of them: SITE/Posts.xml or SITE-Posts.xml."""
    sites: tuple[str, ...] = ()
    """Sites to read, such as "math.stackexchange.com"; all where empty."""
    min_answers: int = 1
    """Questions with fewer answers are rejected."""
    memory_megabytes: int = 512
    """Memory for bringing answers to their questions; more posts than that are sorted on disk."""
    bounds: Bounds = field(default_factory=Bounds)
    """What one file may cost."""

    def __post_init__(self) -> None:
        if self.min_answers < 0 or self.memory_megabytes < 64:
            raise ValueError("min_answers has to be at least 0, memory_megabytes at least 64.")

    def units(self) -> Sequence[str]:
        """Sites."""
        endings = tuple(f"posts.xml{packed}" for packed in ("", ".gz", ".bz2", ".zst"))
        names = list_files(self.path, endings, "a Stack Exchange Posts.xml (unpack the .7z files first)")
        units = [name for name in names if not self.sites or self._site(name) in self.sites]
        if not units:
            found = ", ".join(sorted({self._site(name) for name in names}))
            raise InputError(f"{self.path} holds none of the sites that `sites` lists. It holds {found}.")
        return units

    def files(self, unit: str) -> Sequence[Path]:
        """What a unit is read from."""
        return [locate(self.path, unit)[0]]

    def read(self, unit: str) -> Iterator[Document | Rejected]:
        """One document a question."""
        import duckdb

        with tempfile.TemporaryDirectory(prefix="puna-posts-") as folder:
            settings: dict[str, Any] = {
                "memory_limit": f"{self.memory_megabytes}MB",
                "temp_directory": folder,
                "threads": 1,
                "preserve_insertion_order": False,
            }
            with duckdb.connect(str(Path(folder) / "posts.duckdb"), config=settings) as database:
                database.execute(
                    "CREATE TABLE posts (question BIGINT, is_answer BOOLEAN, score BIGINT, id BIGINT, title VARCHAR,"
                    " tags VARCHAR, date VARCHAR, text VARCHAR)"
                )
                try:
                    yield from self._load(unit, database)
                    yield from self._questions(unit, database)
                except duckdb.OutOfMemoryException:
                    yield Rejected(unit, "does not fit into memory_megabytes")

    def _load(self, unit: str, database: Any) -> Iterator[Rejected]:
        import pyarrow as pa

        names = ("question", "is_answer", "score", "id", "title", "tags", "date", "text")
        rows: list[tuple[Any, ...]] = []

        def flush() -> None:
            batch = pa.table([pa.array(column) for column in zip(*rows, strict=True)], names=list(names))
            database.register("batch", batch)
            database.execute("INSERT INTO posts SELECT * FROM batch")
            database.unregister("batch")
            rows.clear()

        size = 0
        try:
            with open_expanded(locate(self.path, unit)[0], self.bounds) as stream:
                for number, element in enumerate(read_elements(stream, b"<row ", b"/>", _MAX_POST_BYTES)):
                    if element is None:
                        yield Rejected(f"{unit}#{number}", "larger than a post can be")
                        continue
                    try:
                        row = _post(element)
                    except (ElementTree.ParseError, KeyError, ValueError):
                        yield Rejected(f"{unit}#{number}", "malformed XML")
                        continue
                    if row:
                        rows.append(row)
                        size += len(element)
                    if len(rows) == _POSTS_PER_BATCH or size > _BYTES_PER_BATCH:
                        flush()
                        size = 0
        except Unreadable as error:
            yield Rejected(unit, error.reason)
        if rows:
            flush()

    def _questions(self, unit: str, database: Any) -> Iterator[Document | Rejected]:
        posts = database.execute("SELECT * FROM posts ORDER BY question, is_answer, score DESC, id")
        posts_of_one: list[tuple[Any, ...]] = []
        size = 0
        while batch := posts.fetchmany(200):
            for post in batch:
                if posts_of_one and post[0] != posts_of_one[0][0]:
                    yield self._document(unit, posts_of_one)
                    posts_of_one, size = [], 0
                # Answers beyond what a document may hold only have to make it too large.
                size += len(post[7])
                if size <= 2 * self.bounds.max_document_bytes:
                    posts_of_one.append(post)
        if posts_of_one:
            yield self._document(unit, posts_of_one)

    def _document(self, unit: str, posts: list[tuple[Any, ...]]) -> Document | Rejected:
        (number, is_answer, score, _, title, tags, date, text), answers = posts[0], posts[1:]
        site = self._site(unit)
        name = f"{site}/q/{number}"
        if is_answer:
            return Rejected(name, "answers without a question")
        if len(answers) < self.min_answers:
            return Rejected(name, "fewer answers than min_answers")
        parts = [f"Q: {title}", text, *(f"A: {answer[7]}" for answer in answers)]
        metadata = {
            "site": site,
            "url": f"https://{site}/q/{number}",
            "tags": tags,
            "date": date,
            "score": score,
            "num_answers": len(answers),
        }
        text = "\n\n".join(part for part in parts if part)
        return to_document(text, name, self.bounds.max_document_bytes, metadata)

    def _site(self, unit: str) -> str:
        path = locate(self.path, unit)[0]
        before = path.name.lower().partition("posts.xml")[0].rstrip("-_")
        return before or path.absolute().parent.name


def _post(element: bytes) -> tuple[Any, ...] | None:
    """The columns of a question or an answer; None for posts of other types, such as tag descriptions."""
    row = ElementTree.fromstring(element).attrib
    kind = row.get("PostTypeId")
    if kind not in ("1", "2"):
        return None
    is_answer = kind == "2"
    tags = row.get("Tags", "").strip("<>|").replace("><", ",").replace("|", ",")
    numbers = [int(row["ParentId"] if is_answer else row["Id"]), int(row.get("Score", 0)), int(row["Id"])]
    if any(abs(number) >= 2**63 for number in numbers):
        raise ValueError
    return (
        numbers[0],
        is_answer,
        numbers[1],
        numbers[2],
        row.get("Title", ""),
        tags,
        row.get("CreationDate", ""),
        fragment_to_text(row.get("Body", "")).strip(),
    )
