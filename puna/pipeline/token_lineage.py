"""`puna inspect data SHARDS --token N`: from a token back to its document, and to what that document went through."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from puna.batches.shards import TokenShards
from puna.runtime.errors import InputError
from puna.runtime.files import document_files, read_documents, read_json
from puna.runtime.manifest import FILE_NAME, Manifest
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.load import load_tokenizer

_CONTEXT_TOKENS = 60


@dataclass
class TokenOrigin:
    """Where a token came from."""

    token: int
    """Its number in the shards."""
    token_id: int
    """Its id in the vocabulary."""
    before: str
    """The text before it, of at most 60 tokens."""
    text: str
    """Its own text."""
    after: str
    """The text after it."""
    shards: Path
    document: int
    """The number of its document in the shards."""
    place: int
    """The token's place in the document; 0 is the BOS, where there is one."""
    document_tokens: int
    document_id: str
    source: str
    documents: Path
    """What was tokenised."""
    file: Path | None = None
    """The file there that holds the document; None if it is gone."""
    line: int | None = None
    """Of the document's text, from 1, where the token begins; None if the text is gone or has changed."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What else curation knew of the document."""
    curated: Path | None = None
    """The output of `puna curate` that the documents belong to."""
    reader: dict[str, Any] = field(default_factory=dict)
    """Settings of what read the source."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """The ledger's line of each step of that source, with its `settings`."""


def trace(shards_folder: Path, token: int) -> TokenOrigin:
    """Follow the manifests from a token to its source.

    Raises:
        InputError: not a folder of token shards, no such token, or the tokenizer that made them is gone.
    """
    shards = TokenShards(shards_folder)
    manifest = Manifest.read(shards_folder)
    document, place = shards.document_of_token(token)
    facts = shards.document_facts(document)
    tokenizer = load_tokenizer(Path(manifest.config["tokenizer"]))
    if tokenizer.hash != shards.tokenizer_hash:
        raise InputError(f"{manifest.config['tokenizer']} is not the tokenizer any more that made {shards_folder}.")
    ids = shards.ids(document).tolist()
    origin = TokenOrigin(
        token=token,
        token_id=ids[place],
        before=tokenizer.decode(ids[max(0, place - _CONTEXT_TOKENS) : place]),
        text=tokenizer.token_bytes(ids[place]).decode("utf-8", "backslashreplace"),
        after=tokenizer.decode(ids[place + 1 : place + 1 + _CONTEXT_TOKENS]),
        shards=shards_folder,
        document=document,
        place=place,
        document_tokens=len(ids),
        document_id=facts["id"],
        source=facts.get("source") or "",
        documents=Path(manifest.config["documents"]),
    )
    _find_document(origin, tokenizer, ids)
    _find_steps(origin)
    return origin


def _find_document(origin: TokenOrigin, tokenizer: Tokenizer, ids: list[int]) -> None:
    """Look the document up in what was tokenised."""
    if not origin.documents.exists():
        return
    for file in document_files(origin.documents):
        for row in _rows_named(file, origin.document_id):
            if (row.get("source") or "") == origin.source:
                origin.file = file
                origin.metadata = {key: row[key] for key in row.keys() - {"id", "source", "text"}}
                if tokenizer.decode(ids, skip_special=True) == row["text"]:
                    origin.line = 1 + tokenizer.decode(ids[: origin.place], skip_special=True).count("\n")
                return


def _rows_named(file: Path, name: str) -> list[dict[str, Any]]:
    if file.suffix != ".parquet":
        return [row for row in read_documents(file) if row["id"] == name]
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(file, filters=[("id", "=", name)]).to_pylist()
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def _find_steps(origin: TokenOrigin) -> None:
    """The curation that the documents come from: its folder is theirs, or the one above."""
    for folder in (origin.documents, origin.documents.parent):
        if not (folder / FILE_NAME).exists() or not (folder / "ledger.json").exists():
            continue
        config = Manifest.read(folder).config
        origin.curated = folder
        own = next((source for source in config["sources"] if source["name"] == origin.source), None)
        origin.reader = own["read"] if own else {"source": config["source"]}
        settings = [*(own["steps"] if own else ()), *config["steps"]]
        ledger = read_json(folder / "ledger.json")
        lines: list[dict[str, Any]] = next(
            (one["steps"] for one in ledger["sources"] if one["name"] == origin.source), []
        )
        # Besides reading, the ledger has a line for each step, in their order.
        origin.steps = [
            line | {"settings": setting} for line, setting in zip(lines, [origin.reader, *settings], strict=False)
        ]
        return


def show_token(shards_folder: Path, token: int) -> None:
    """Print where a token came from.

    Raises:
        InputError: see `trace`.
    """
    origin = trace(shards_folder, token)
    console = Console()
    console.print(Text.assemble(origin.before, (origin.text, "bold black on yellow"), origin.after))
    console.print()
    table = Table(show_header=False)
    table.add_row("token", f"{origin.token:,} of {origin.shards}: id {origin.token_id}")
    table.add_row("place", f"{origin.place:,} of {origin.document_tokens:,} tokens of document {origin.document:,}")
    table.add_row("document", Text(origin.document_id))
    if origin.source:
        table.add_row("source", Text(origin.source))
    if origin.reader:
        table.add_row("read by", Text(_settings(origin.reader)))
    if origin.file is None:
        table.add_row("text", f"not in {origin.documents} any more")
    else:
        where = "has changed since" if origin.line is None else f"line {origin.line:,}"
        table.add_row("text", f"{origin.file}, {where}")
    for key, value in sorted(origin.metadata.items()):
        table.add_row(key, Text(str(value)))
    console.print(table)
    if origin.steps:
        steps = Table(title=f"Steps that it passed in {origin.curated}", title_justify="left")
        for column in ("step", "settings", "documents in", "out"):
            steps.add_column(column, justify="right" if column in ("documents in", "out") else "left")
        for line in origin.steps:
            steps.add_row(
                Text(line["step"]),
                Text(_settings(line["settings"])),
                f"{line['documents_in']:,}",
                f"{line['documents_out']:,}",
            )
        console.print(steps)
    elif origin.curated is None:
        console.print(f"{origin.documents} is no output of `puna curate`, so there are no steps to show.")


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())
