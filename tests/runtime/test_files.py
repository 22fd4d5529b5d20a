"""Files are whole or absent; broken input is named."""

import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, read_documents, read_json, read_jsonl, write_json, write_jsonl, write_text
from puna.runtime.manifest import FILE_NAME, Manifest, code_version, content_hash
from puna.runtime.seeds import derive_seed


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("old")

    def write_half(name: str) -> None:
        with atomic_path(tmp_path / name) as path:
            if name == "folder":
                path.mkdir()
                path /= "x"
            path.write_text("half")
            raise RuntimeError

    for name in ("a.txt", "folder"):
        with pytest.raises(RuntimeError):
            write_half(name)
    assert (tmp_path / "a.txt").read_text() == "old"
    assert (tmp_path / "folder" / "x").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "folder"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with atomic_path(tmp_path / "folder") as path:
            path.mkdir()
            (path / name).touch()
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["second"]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    code = (
        "import sys, time; from pathlib import Path; from puna.runtime.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as path:\n"
        "    path.write_text('half'); print('ready', flush=True); time.sleep(60)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a.txt")], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")

    def write() -> None:
        with atomic_path(tmp_path / "a.txt") as path:
            path.symlink_to("/dev/full")
            path.write_text("x")

    with pytest.raises(OSError, match="No space left"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_jsonl_reads_plain_gzipped_and_folders(tmp_path: Path) -> None:
    assert write_jsonl(tmp_path / "a.jsonl", [{"n": 1}, {"n": 2}]) == 2
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write('{"n": 3}\n')
    assert [row["n"] for row in read_jsonl(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"n": 1}\n{"n": ', "line 2: not valid JSON"),
        ("a.jsonl", b"[1]\n", "line 1: expected a JSON object"),
        ("a.jsonl", b'{"n": 1}\n\xff\xfe\n', "not what its name says"),
        ("a.jsonl.gz", gzip.compress(b'{"n": 1}\n' * 1000, mtime=0)[:-20], "breaks off"),
        ("a.jsonl.gz", b'{"n": 1}\n', "not what its name says"),
    ],
)
def test_broken_jsonl_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_jsonl(tmp_path / name))


def test_absent_json_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_json(tmp_path / "a.json")
    with pytest.raises(InputError, match="does not exist"):
        list(read_jsonl(tmp_path / "a.jsonl"))
    with pytest.raises(InputError, match=r"holds no \.jsonl"):
        list(read_jsonl(tmp_path))


def test_manifest_survives_and_is_checked(tmp_path: Path) -> None:
    manifest = Manifest("curate", {"a": 1}, {"in": "hash"}, {"n": 2})
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert manifest.code_version == code_version()
    write_json(tmp_path / FILE_NAME, {"stage": "x"})
    with pytest.raises(InputError, match="not a Puna manifest"):
        Manifest.read(tmp_path)


def test_content_hash_is_of_names_and_bytes_but_not_of_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    first = content_hash(tmp_path)
    Manifest("x", {}, {}).write(tmp_path)
    time.sleep(0.01)
    (tmp_path / "a").write_text("1")
    assert content_hash(tmp_path) == first
    (tmp_path / "a").rename(tmp_path / "b")
    assert content_hash(tmp_path) != first
    with pytest.raises(InputError, match="does not exist"):
        content_hash(tmp_path / "absent")


def test_seeds_depend_on_every_part() -> None:
    assert derive_seed(1, "a", 2) == derive_seed(1, "a", 2)
    assert len({derive_seed(1, "a", 2), derive_seed(1, "a", 3), derive_seed(1, "b", 2), derive_seed(1, "a2")}) == 4
    assert 0 <= derive_seed("x") < 2**63


def test_documents_are_read_from_parquet_and_json_lines_alike(tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "one", "score": 1.5}, {"id": "b", "text": "two"}]
    for number, row in enumerate(rows):
        pq.write_table(pa.Table.from_pylist([row, {"id": None}]).slice(0, 1), tmp_path / f"part-{number}.parquet")
    write_jsonl(tmp_path / "all.jsonl", rows)
    assert list(read_documents(tmp_path / "all.jsonl")) == rows
    assert list(read_documents(tmp_path)) == rows, "Parquet files go before JSON Lines in a folder"
    assert list(read_documents(tmp_path / "part-1.parquet")) == rows[1:]
    (tmp_path / "part-1.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"part-1\.parquet is not a whole Parquet file"):
        list(read_documents(tmp_path))
    curated = tmp_path / "curated"
    (curated / "documents").mkdir(parents=True)
    with pytest.raises(InputError, match=r"Did you mean .*documents\?"):
        list(read_documents(curated))
    with pytest.raises(InputError, match="does not exist"):
        list(read_documents(tmp_path / "absent"))
