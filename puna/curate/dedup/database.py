"""DuckDB as the out-of-core half of deduplication: groups, joins and sorts over keys that need not fit in memory."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from puna.runtime.files import atomic_path

DECISIONS = "decisions.parquet"


@contextmanager
def keys_database(
    keys: Sequence[Path], schema: pa.Schema, work: Path, memory_bytes: int
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database with one view, `keys`: all rows of the key files. It spills into `work`, and leaves nothing there.

    Args:
        keys: Parquet files.
        schema: their columns, for when there is no file.
        work: folder for what does not fit.
        memory_bytes: limit for the database; rows on their way out of it come on top.
    """
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work, prefix="spill-") as folder:
        spill = Path(folder)
        if not keys:
            keys = [spill / "none.parquet"]
            pq.write_table(schema.empty_table(), keys[0])
        with duckdb.connect(spill / "keys.duckdb") as connection:
            connection.execute(f"SET memory_limit = '{memory_bytes // 1024} KiB'")
            connection.execute("SET temp_directory = ?", [str(spill / "spill")])
            connection.execute("SET preserve_insertion_order = false")
            connection.execute("SET TimeZone = 'UTC'")
            connection.read_parquet([str(path) for path in keys]).create_view("keys")
            yield connection


def write_decisions(connection: duckdb.DuckDBPyConnection, query: str, work: Path) -> None:
    """Write the rows of a query, which orders them by `document`, to `work`/decisions.parquet."""
    with atomic_path(work / DECISIONS) as path:
        connection.sql(query).write_parquet(str(path), compression="zstd")
