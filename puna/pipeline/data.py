"""What a folder of curated documents holds, in numbers and examples, gathered by DuckDB in bounded memory."""

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puna.batches.shards import TokenShards, shard_folders
from puna.runtime.errors import InputError
from puna.runtime.files import document_files, read_json
from puna.runtime.manifest import FILE_NAME, Manifest

EXCERPT_CHARACTERS = 700
_EXAMPLES = 3
_CLUSTERS = 6
_MEMBERS = 4
_BINS = 40
_PARTS = ("documents", "held_out", "rejected")


@dataclass
class SourceFacts:
    """What a source amounts to."""

    name: str
    documents: int = 0
    """In training."""
    num_bytes: int = 0
    """Of their texts."""
    held_out: int = 0
    """Documents kept from training."""
    tokens: int | None = None
    """Of the training documents; None where they are not tokenised."""


@dataclass(frozen=True)
class Histogram:
    """Counts of a quantity."""

    name: str
    edges: list[float]
    """One more than there are counts."""
    counts: list[int]


@dataclass(frozen=True)
class Example:
    """The beginning of a document."""

    id: str
    source: str
    pieces: list[tuple[str, bool]]
    """Text, and whether it is set off (in a cluster: not in the first member); none if equal to the first member's."""
    kept: bool = True


@dataclass(frozen=True)
class Rejects:
    """Documents that one step rejected for one reason."""

    step: str
    reason: str
    count: int
    examples: list[Example]


@dataclass(frozen=True)
class Cluster:
    """Documents that a step found to be alike."""

    kind: str
    size: int
    members: list[Example]


@dataclass
class DataFacts:
    """Everything that the page shows."""

    folder: Path
    created: str = ""
    sources: list[SourceFacts] = field(default_factory=list)
    languages: list[tuple[str, int, int]] = field(default_factory=list)
    """(language, documents, bytes), most bytes first."""
    lengths: Histogram | None = None
    scores: list[Histogram] = field(default_factory=list)
    funnel: list[dict[str, Any]] = field(default_factory=list)
    """The ledger's lines over all sources: step, documents_in, documents_out, bytes_in, bytes_out, reasons, ..."""
    funnels: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """The same by source."""
    rejects: list[Rejects] = field(default_factory=list)
    clusters: list[Cluster] = field(default_factory=list)
    cluster_counts: list[tuple[str, int, int]] = field(default_factory=list)
    """(kind, clusters, documents in them)."""


def gather(folder: Path, tokens: Path | None = None) -> DataFacts:
    """Look through the output of `puna curate`, or any folder or file of documents.

    Args:
        folder: of documents/, held_out/, rejected/ and ledger.json; or of Parquet or JSON Lines files.
        tokens: output of `puna tokenize` for these documents; looked for beside `folder` where absent.

    Raises:
        InputError: there are no documents, or duckdb is absent.
    """
    try:
        import duckdb
    except ImportError as error:
        raise InputError("Looking at data needs duckdb: pip install 'puna[curate]'.") from error
    with duckdb.connect() as connection:
        connection.execute("SET memory_limit = '2GB'")
        try:
            return _Look(connection, folder).facts(tokens)
        except (duckdb.IOException, duckdb.InvalidInputException) as error:
            raise InputError(f"{folder} holds a file that cannot be read: {error}") from error


class _Look:
    """The queries, over views named after the parts of the folder that are there."""

    def __init__(self, connection: Any, folder: Path) -> None:
        self._sql, self._folder = connection, folder
        self._columns: dict[str, dict[str, str]] = {}
        curated = (folder / "documents").is_dir()
        for part in _PARTS if curated else _PARTS[:1]:
            place = folder / part if curated else folder
            if curated and not any(place.glob("*.parquet")):
                continue
            files = document_files(place)
            read = connection.read_parquet if files[0].suffix == ".parquet" else connection.read_json
            options = {"union_by_name": True} if files[0].suffix == ".parquet" else {"format": "newline_delimited"}
            relation = read([str(file) for file in files], **options)
            if "source" not in relation.columns:
                relation = relation.project("*, '' AS source")
            relation.create_view(part)
            self._columns[part] = dict(zip(relation.columns, map(str, relation.types), strict=True))
        if missing := {"id", "text"} - self._columns.get("documents", {}).keys():
            raise InputError(f"{folder} holds no documents with a {' and a '.join(sorted(missing))}.")

    def facts(self, tokens: Path | None) -> DataFacts:
        facts = DataFacts(self._folder)
        if (self._folder / FILE_NAME).exists():
            facts.created = Manifest.read(self._folder).created
        facts.sources = self._sources()
        for source, count in self._tokens(tokens).items():
            for row in facts.sources:
                if row.name == source:
                    row.tokens = (row.tokens or 0) + count
        columns = self._columns["documents"]
        if "language" in columns:
            facts.languages = self._rows(
                "SELECT coalesce(language, 'unknown'), count(*), sum(strlen(text)) FROM documents "
                "GROUP BY ALL ORDER BY 3 DESC, 1"
            )
        facts.lengths = self._lengths()
        facts.scores = [
            histogram
            for name, kind in columns.items()
            if name.endswith(("score", "perplexity")) and kind in ("FLOAT", "DOUBLE", "BIGINT", "INTEGER")
            if (histogram := self._histogram(name)) is not None
        ]
        if (self._folder / "ledger.json").exists():
            ledger = read_json(self._folder / "ledger.json")
            facts.funnel = ledger["total"]
            facts.funnels = {source["name"]: source["steps"] for source in ledger["sources"]}
        if "rejected" in self._columns:
            facts.rejects = self._rejects()
        facts.cluster_counts, facts.clusters = self._clusters()
        return facts

    def _rows(self, query: str, *values: object) -> list[Any]:
        rows: list[Any] = self._sql.execute(query, list(values)).fetchall()
        return rows

    def _sources(self) -> list[SourceFacts]:
        found: dict[str, SourceFacts] = {}
        for name, documents, num_bytes in self._rows(
            "SELECT source, count(*), sum(strlen(text)) FROM documents GROUP BY ALL ORDER BY 3 DESC, 1"
        ):
            found[name] = SourceFacts(name, documents, num_bytes)
        if "held_out" in self._columns:
            for name, documents in self._rows("SELECT source, count(*) FROM held_out GROUP BY ALL ORDER BY 1"):
                found.setdefault(name, SourceFacts(name)).held_out = documents
        return list(found.values())

    def _lengths(self) -> Histogram:
        """Documents by the binary logarithm of their bytes."""
        rows = self._rows(
            "SELECT greatest(0, floor(log2(strlen(text) + 0.5)))::INT, count(*) FROM documents GROUP BY 1"
        )
        counts = dict(rows)
        low, high = min(counts), max(counts)
        edges = [float(2**power) for power in range(low, high + 2)]
        return Histogram("length", edges, [counts.get(power, 0) for power in range(low, high + 1)])

    def _histogram(self, column: str) -> Histogram | None:
        name = _quoted(column)
        [(low, high)] = self._rows(f"SELECT min({name}), max({name}) FROM documents WHERE isfinite({name}::DOUBLE)")
        if low is None:
            return None
        width = (high - low) / _BINS or 1.0
        rows = self._rows(
            f"SELECT least(floor(({name} - ?) / ?), {_BINS - 1})::INT, count(*) FROM documents "
            f"WHERE isfinite({name}::DOUBLE) GROUP BY 1",
            low,
            width,
        )
        counts = dict(rows)
        edges = [low + width * place for place in range(_BINS + 1)]
        return Histogram(column, edges, [counts.get(place, 0) for place in range(_BINS)])

    def _rejects(self) -> list[Rejects]:
        text = f"left(text, {EXCERPT_CHARACTERS})" if "text" in self._columns["rejected"] else "NULL"
        rows = self._rows(
            f"SELECT step, reason, count(*), arg_min({{'id': id, 'source': source, 'text': {text}}}, hash(id), "
            f"{_EXAMPLES}) FROM rejected GROUP BY ALL ORDER BY 3 DESC, 1, 2"
        )
        return [
            Rejects(
                step,
                reason,
                count,
                [Example(one["id"], one["source"], [(one["text"] or "", False)], kept=False) for one in examples],
            )
            for step, reason, count, examples in rows
        ]

    def _clusters(self) -> tuple[list[tuple[str, int, int]], list[Cluster]]:
        """Clusters by every column KIND_cluster, the largest ones with their members' texts."""
        names = {name for columns in self._columns.values() for name in columns if name.endswith("_cluster")}
        counts, clusters = [], []
        for column in sorted(names, key=lambda name: ("exact" in name, name)):
            kind, quoted = column.removesuffix("_cluster"), _quoted(column)
            parts = [
                f"SELECT {quoted} AS cluster, id, source, "
                f"{f'left(text, {EXCERPT_CHARACTERS})' if 'text' in columns else 'NULL'} AS text, "
                f"{'step <> ' + _literal(kind) if part == 'rejected' else 'true'} AS kept FROM {part}"
                for part, columns in self._columns.items()
                if column in columns
            ]
            rows_of_clusters = f"(SELECT * FROM ({' UNION ALL '.join(parts)}) WHERE cluster IS NOT NULL)"
            sizes = f"(SELECT cluster, count(*) AS size FROM {rows_of_clusters} GROUP BY 1)"
            [(number, documents)] = self._rows(f"SELECT count(*), coalesce(sum(size), 0) FROM {sizes}")
            if not number:
                continue
            counts.append((kind, number, int(documents)))
            rows = self._rows(
                f"SELECT size, arg_min({{'id': id, 'source': source, 'text': text, 'kept': kept}}, "
                f"(NOT kept, id), {_MEMBERS}) FROM {rows_of_clusters} JOIN (FROM {sizes} ORDER BY size DESC, cluster "
                f"LIMIT {_CLUSTERS}) USING (cluster) GROUP BY cluster, size ORDER BY size DESC, cluster"
            )
            for size, found in rows:
                texts = [one["text"] or "" for one in found]
                pieces = [[(texts[0], False)], *(_set_off(texts[0], text) for text in texts[1:])]
                members = [
                    Example(one["id"], one["source"], shown, one["kept"])
                    for one, shown in zip(found, pieces, strict=True)
                ]
                clusters.append(Cluster(kind, size, members))
        return counts, clusters

    def _tokens(self, tokens: Path | None) -> dict[str, int]:
        """Tokens by source."""
        import numpy as np
        import pyarrow as pa

        counts: dict[str, int] = {}
        for folder in [tokens] if tokens is not None else find_tokens(self._folder):
            for place in shard_folders(folder).values():
                lengths = pa.table({"tokens": np.diff(TokenShards(place).offsets)})
                self._sql.register("lengths", lengths)
                named = self._sql.read_json(
                    str(place / "documents.jsonl"),
                    format="newline_delimited",
                    columns={"id": "VARCHAR", "source": "VARCHAR", "bytes": "BIGINT"},
                )
                named.create_view("named", replace=True)
                for source, count in self._rows(
                    "SELECT coalesce(source, ''), sum(tokens) FROM named POSITIONAL JOIN lengths GROUP BY ALL"
                ):
                    counts[source] = counts.get(source, 0) + int(count)
        return counts


def find_tokens(folder: Path) -> list[Path]:
    """Outputs of `puna tokenize` beside a folder of documents that were made from what is in it for training."""
    training = {folder.resolve(), (folder / "documents").resolve()}
    found = []
    for place in sorted(folder.resolve().parent.glob(f"*/{FILE_NAME}")):
        manifest = Manifest.read(place.parent)
        if manifest.stage == "tokenize" and Path(manifest.config["documents"]).resolve() in training:
            found.append(place.parent)
    return found[:1]


def _set_off(first: str, other: str) -> list[tuple[str, bool]]:
    """`other` in pieces, those set off that are not in `first`; nothing if they are equal."""
    if first == other:
        return []
    words, reference = re.findall(r"\s*\S+\s*?", other), re.findall(r"\s*\S+\s*?", first)
    same = difflib.SequenceMatcher(None, [word.strip() for word in reference], [word.strip() for word in words], False)
    pieces = []
    end = 0
    for block in same.get_matching_blocks():
        if block.b > end:
            pieces.append(("".join(words[end : block.b]), True))
        if block.size:
            pieces.append(("".join(words[block.b : block.b + block.size]), False))
        end = block.b + block.size
    return pieces


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
