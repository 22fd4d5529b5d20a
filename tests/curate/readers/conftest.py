"""What reading hostile input costs, measured where nothing else runs."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

PROGRAM = """
import json, os, resource, sys, time
from pathlib import Path
from puna.curate.document import Document
from puna.curate.readers.arxiv import ArxivReader
from puna.curate.readers.books import EpubReader
from puna.curate.readers.bounds import Bounds
from puna.curate.readers.dumps import WikipediaReader
from puna.curate.readers.folder import FolderReader
from puna.curate.readers.git import GitReader
from puna.curate.readers.html import HtmlToText
from puna.curate.readers.rows import CsvReader, JsonlReader, ParquetReader
from puna.curate.readers.stackexchange import StackExchangeReader
from puna.curate.readers.web import WarcReader, WetReader
import pyarrow.parquet, fastwarc, resiliparse.extract.html2text, duckdb
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for line in sys.stdin:
    if os.fork():
        if os.wait()[1]:
            print("null", flush=True)
        continue
    reader = eval(line)
    before, start = peak(), time.process_time()
    documents, rejected = [], []
    for unit in reader.units():
        for read in reader.read(unit):
            (documents if isinstance(read, Document) else rejected).append(read)
    print(json.dumps({
        "ids": [read.id for read in documents],
        "reasons": [read.reason for read in rejected],
        "seconds": time.process_time() - start,
        "megabytes": peak() - before,
    }), flush=True)
    os._exit(0)
"""


@dataclass(frozen=True)
class Cost:
    """What came out, and what it took."""

    ids: list[str]
    reasons: list[str]
    seconds: float  # of processor time
    megabytes: float


@pytest.fixture(scope="session")
def cost_of() -> Iterator[Callable[[str], Cost]]:
    """Reads all that a reader, given as Python, gives, in a process of its own: a fork of one that has the imports."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def measure(reader: str) -> Cost:
            print(reader, file=server.stdin, flush=True)
            values: dict[str, Any] | None = json.loads(server.stdout.readline())
            assert values is not None, "the reader failed; its traceback is among what was captured"
            return Cost(**values)

        yield measure
        server.stdin.close()
