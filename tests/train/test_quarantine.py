"""From a batch back to its documents, through mixtures too."""

from pathlib import Path

from puna.batches.mixture import Ingredient, MixedRows
from puna.batches.packing import PackedRows, Rows, TokenBatch
from puna.batches.shards import ShardWriter, TokenShards
from puna.runtime.manifest import Manifest
from puna.train.quarantine import BadBatch, Quarantine, next_good, trace


def shards(folder: Path, name: str) -> TokenShards:
    (folder / name).mkdir()
    with ShardWriter(folder / name, 100) as writer:
        for number in range(20):
            writer.add(list(range(5 + number)), f"{name}-{number}", 5 + number)
    Manifest("tokenize", {}, {}, writer.results("hash")).write(folder / name)
    return TokenShards(folder / name)


def test_documents_of_a_mixture(tmp_path: Path) -> None:
    parts = {name: PackedRows(shards(tmp_path, name), 16, 0, "cut") for name in ("books", "code")}
    rows = MixedRows([Ingredient(name, part, 0.5, 0.5) for name, part in parts.items()], 1000)
    found = trace(rows, range(4, 8))
    assert {entry["row"] for entry in found} == {4, 5, 6, 7}
    for row in range(4, 8):
        number, own = rows.locate(row)
        name = ("books", "code")[number]
        mine = [entry for entry in found if entry["row"] == row]
        assert [entry["id"] for entry in mine] == [f"{name}-{document}" for document in parts[name].documents(own)]
        assert {entry["shards"] for entry in mine} == {str(tmp_path / name)}


def test_what_is_left_out_is_remembered_by_the_folder(tmp_path: Path) -> None:
    class Unknown:
        def batch(self, rows: object) -> TokenBatch:
            raise AssertionError

    rows: Rows = Unknown()
    quarantine = Quarantine(tmp_path / "quarantine")
    quarantine.add(BadBatch(3, 4, "the loss is not finite", "nan", "nan"), rows, range(12, 16))
    Quarantine(tmp_path / "quarantine", writes=False).add(BadBatch(4, 5, "", "", ""), rows, range(16, 20))
    again = Quarantine(tmp_path / "quarantine")
    assert again.batches == {3}
    assert [next_good(number, again.batches | {4}) for number in (2, 3, 4, 5)] == [2, 5, 5, 5]
