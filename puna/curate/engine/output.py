"""The folder that a run leaves: documents, held-out ones, rejects, the ledger."""

import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from puna.curate.engine.counts import total
from puna.curate.engine.run import Progress
from puna.curate.engine.task import HeldOut, Part
from puna.curate.engine.worker import id_hashes, write_parquet
from puna.runtime.files import write_json


def write_output(folder: Path, planned: list[Progress], held_out: HeldOut | None, scratch: Path) -> None:
    """Fill `folder` from the parts of a run. Files are linked, not copied, where the file system can.

    documents/ and held_out/ hold what is left, rejected/ what is not, with the columns `step` and `reason`; ledger.json
    says by source and step what went in and came out.
    """
    last = [part for one in planned for part in one.parts[-1]]
    if held_out is not None:
        last = _both_sides(last, held_out, scratch)
    for what in ("documents", "held_out"):
        _link(folder / what, (part.files[what] for part in last if what in part.files))
    num_passes = max(len(one.parts) for one in planned)
    every = [part for number in range(num_passes) for one in planned for part in chain(*one.parts[number : number + 1])]
    _link(folder / "rejected", (part.files["rejected"] for part in every if "rejected" in part.files))
    write_json(folder / "ledger.json", ledger(planned))


def ledger(planned: list[Progress]) -> dict[str, object]:
    """Per source and over all, per step: documents and bytes in and out, reasons, counts, seconds."""
    return {
        "sources": [
            {
                "name": one.source.name,
                "num_units": sum(len(chunk.units) for chunk in one.chunks),
                "steps": [count.plain() for count in one.counts.values()],
            }
            for one in planned
        ],
        "total": [count.plain() for count in total(count for one in planned for count in one.counts.values())],
    }


def _both_sides(parts: list[Part], held_out: HeldOut, scratch: Path) -> list[Part]:
    """Where all documents happen to be on one side, move the nearest one over: there has to be something on both."""
    with_documents = [part for part in parts if part.documents]
    if sum(part.documents for part in parts) < 2:
        return parts
    if not any("held_out" in part.files for part in parts):
        chosen = min(with_documents, key=lambda part: part.extremes[0])
        moved = _move(chosen, "documents", "held_out", chosen.extremes[0], held_out, scratch)
    elif not any("documents" in part.files for part in parts):
        chosen = max(with_documents, key=lambda part: part.extremes[1])
        moved = _move(chosen, "held_out", "documents", chosen.extremes[1], held_out, scratch)
    else:
        return parts
    return [moved if part is chosen else part for part in parts]


def _move(part: Part, source: str, destination: str, id_hash: int, held_out: HeldOut, scratch: Path) -> Part:
    table = pq.read_table(part.files[source])
    moves = pa.array([value == id_hash for value in id_hashes(table, held_out)])
    files = {key: path for key, path in part.files.items() if key != source}
    for what, rows in ((source, table.filter(pc.invert(moves))), (destination, table.filter(moves))):
        if rows.num_rows:
            files[what] = str(scratch / f"{part.fingerprint}.moved.{what}.parquet")
            write_parquet(Path(files[what]), rows)
    return replace(part, files=files)


def _link(folder: Path, files: Iterable[str]) -> None:
    folder.mkdir()
    for number, file in enumerate(files):
        place = folder / f"part-{number:05d}.parquet"
        try:
            os.link(file, place)
        except OSError:
            shutil.copyfile(file, place)


def num_rows(folder: Path) -> int:
    """Rows of all Parquet files of a folder."""
    return sum(pq.read_metadata(path).num_rows for path in folder.glob("*.parquet"))
