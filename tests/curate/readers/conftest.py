"""What reading hostile input costs, measured where nothing else runs."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

PROGRAM = """
import json, resource, sys, time
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
reader = eval(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
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
}))
"""


@dataclass(frozen=True)
class Cost:
    """What came out, and what it took."""

    ids: list[str]
    reasons: list[str]
    seconds: float  # of processor time
    megabytes: float


@pytest.fixture
def cost_of() -> Callable[[str], Cost]:
    """Reads all that a reader, given as Python, gives, in a process of its own."""

    def measure(reader: str) -> Cost:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, reader], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        values: dict[str, Any] = json.loads(done.stdout)
        return Cost(**values)

    return measure
