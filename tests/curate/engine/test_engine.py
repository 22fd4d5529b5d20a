"""The engine: same bytes whatever happens, sums that balance, and nothing that one bad document can stop."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from puna.curate.main import CurateConfig, SourceConfig, main
from puna.runtime.errors import InputError
from puna.runtime.files import read_documents

TIMEOUT_SECONDS = 4.0
"""Of a unit: much longer than its milliseconds of work take on a busy machine."""
WORDS = ["llama", "alpaca", "vicuña", "guanaco", "puna", "wool", "hay", "ox"]


def write_lines(folder: Path, files: int = 6, lines: int = 40, extra: dict[int, list[str]] | None = None) -> Path:
    """Files of lines; `extra` lines go into the middle of some."""
    folder.mkdir()
    draw = random.Random(0)
    for number in range(files):
        text = [" ".join(draw.choices(WORDS, k=draw.randint(1, 6))) + f" {number}" for _ in range(lines)]
        text[lines // 2 : lines // 2] = (extra or {}).get(number, [])
        (folder / f"{number:02d}.txt").write_text("\n".join(text), encoding="utf-8")
    return folder


def config(raw: Path, output: Path, **settings: Any) -> CurateConfig:
    from curate_fakes import Lines, MinLength, OnePerWord, Shout

    source = SourceConfig("lines", Lines(path=raw), steps=(MinLength(characters=4),))
    return CurateConfig(
        **{"output": output, "sources": (source,), "steps": (Shout(), OnePerWord()), "workers": 1} | settings
    )


def files_of(output: Path) -> dict[str, bytes]:
    """Every file that has to be the same twice: all but the manifest, and the ledger without its times."""
    found = {path.relative_to(output).as_posix(): path.read_bytes() for path in output.rglob("*.parquet")}
    ledger = json.loads((output / "ledger.json").read_text())
    for steps in [ledger["total"], *(source["steps"] for source in ledger["sources"])]:
        for step in steps:
            del step["seconds"]
    return found | {"ledger": json.dumps(ledger).encode()}


def ids(folder: Path) -> list[str]:
    return [row["id"] for row in read_documents(folder)] if any(folder.iterdir()) else []


def reasons(output: Path) -> dict[str, tuple[str, str]]:
    return {row["id"]: (row["step"], row["reason"]) for row in read_documents(output / "rejected")}


def total(output: Path) -> dict[str, dict[str, Any]]:
    return {step["step"]: step for step in json.loads((output / "ledger.json").read_text())["total"]}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a thousand characters, so that a few kilobytes make many."""
    monkeypatch.setattr("puna.curate.main.MEGABYTE", 1000)


def check_balance(output: Path) -> None:
    """What goes in comes out or is rejected, step by step, and every document is somewhere exactly once."""
    everywhere = []
    for source in json.loads((output / "ledger.json").read_text())["sources"]:
        before = None
        for step in source["steps"]:
            assert step["documents_in"] - step["documents_out"] == sum(step["reasons"].values()), step
            assert before is None or step["documents_in"] == before["documents_out"], step
            assert before is None or before["step"] == "read" or step["bytes_in"] == before["bytes_out"], step
            before = step
        assert before is not None
    for folder in ("documents", "held_out", "rejected"):
        everywhere += ids(output / folder)
    assert len(everywhere) == len(set(everywhere)) == total(output)["read"]["documents_in"]
    rejected = sum(sum(step["reasons"].values()) for step in total(output).values())
    assert rejected == len(ids(output / "rejected"))


def test_documents_go_through_the_steps_in_order(tmp_path: Path, small_parts: None) -> None:
    raw = write_lines(tmp_path / "raw", extra={2: ["BAD", "ox"]})
    main(config(raw, tmp_path / "out", batch_megabytes=1))
    output = tmp_path / "out"
    check_balance(output)
    kept = [row["text"] for row in read_documents(output / "documents")]
    kept += [row["text"] for row in read_documents(output / "held_out")]
    firsts = [text.split()[0] for text in kept]
    assert sorted(set(firsts)) == sorted(firsts) == sorted(word.upper() for word in WORDS)
    steps = total(output)
    assert list(steps) == ["read", "min_length", "shout", "one_per_word"]
    assert steps["read"]["reasons"] == {"bad line": 1}
    assert steps["read"]["bytes_in"] == sum(path.stat().st_size for path in raw.iterdir())
    assert steps["shout"]["counts"]["letters"] > 1000
    assert reasons(output)["02:20"] == ("read", "bad line")
    assert reasons(output)["02:21"] == ("min_length", "too short")
    first_by_word: dict[str, str] = {}
    for path in sorted(raw.iterdir()):
        for number, line in enumerate(path.read_text().splitlines()):
            if line != "BAD" and len(line) >= 4:
                first_by_word.setdefault(line.split()[0], f"{path.stem}:{number}")
    assert sorted(ids(output / "documents") + ids(output / "held_out")) == sorted(first_by_word.values())
    assert not list(tmp_path.glob(".out*"))


def test_workers_do_not_change_a_byte(tmp_path: Path, small_parts: None) -> None:
    raw = write_lines(tmp_path / "raw", files=3, lines=200)
    for workers in (1, 3):
        main(config(raw, tmp_path / str(workers), batch_megabytes=1, workers=workers))
    assert len(list((tmp_path / "1" / "rejected").iterdir())) > 5
    assert files_of(tmp_path / "3") == files_of(tmp_path / "1")


RUN = """
import sys
sys.path[:0] = {paths!r}
import puna.curate.main as curate
from curate_fakes import Lines, MinLength, OnePerWord, Shout
if __name__ == "__main__":
    curate.MEGABYTE = 1000
    from pathlib import Path
    lines = Lines(path=Path({raw!r}), seconds_a_line=0.01)
    source = curate.SourceConfig("lines", lines, steps=(MinLength(characters=4),))
    steps = (Shout(), OnePerWord())
    settings = dict(sources=(source,), steps=steps, workers=2, batch_megabytes=1, keep_work=True)
    curate.main(curate.CurateConfig(Path({output!r}), **settings))
"""


def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path,
    fakes_on_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wait_until: Callable[[Callable[[], object]], None],
    all_ended: Callable[[list[int]], bool],
) -> None:
    raw = write_lines(tmp_path / "raw", files=4, lines=150)
    program = tmp_path / "program.py"
    output = tmp_path / "out"

    def start(to: Path) -> "subprocess.Popen[str]":
        paths = [str(fakes_on_path), str(Path(__file__).resolve().parents[3])]
        program.write_text(RUN.format(paths=paths, raw=str(raw), output=str(to)))
        return subprocess.Popen([sys.executable, str(program)], stderr=subprocess.PIPE, text=True)

    def parts_done() -> int:
        return len(list((tmp_path / ".out.work").glob("*/*-0*.json")))

    seen: list[int] = []
    for target in (3, 8):
        run = start(output)
        wait_until(lambda run=run, target=target: parts_done() >= target or run.poll() is not None)
        assert run.poll() is None, run.communicate()[1]
        workers = [int(n) for n in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
        run.send_signal(signal.SIGKILL)
        run.communicate()
        assert len(workers) >= 2
        wait_until(lambda workers=workers: all_ended(workers))
        seen.append(parts_done())
        assert not output.exists()
    assert seen[1] >= seen[0] >= 3
    whole = [path.with_suffix(".documents.parquet") for path in (tmp_path / ".out.work").glob("*/*-0*.json")]
    before = {path: path.stat().st_ino for path in whole if path.exists()}
    run = start(output)
    errors = run.communicate()[1]
    assert run.returncode == 0, errors
    assert len(before) >= 3
    assert {path: path.stat().st_ino for path in before} == before, "finished parts were made again"
    monkeypatch.setattr("puna.curate.main.MEGABYTE", 1000)
    main(config(raw, tmp_path / "clean", batch_megabytes=1))
    assert files_of(output) == files_of(tmp_path / "clean")


def test_one_bad_document_stops_nothing(tmp_path: Path, small_parts: None) -> None:
    extra = {1: ["KILL the step", "a step to RAISE"], 3: ["the step will HANG"], 4: ["KILL KEYS", "RAISE KEYS too"]}
    raw = write_lines(tmp_path / "raw", extra=extra)
    main(config(raw, tmp_path / "out", batch_megabytes=1, unit_timeout_seconds=TIMEOUT_SECONDS))
    output = tmp_path / "out"
    check_balance(output)
    found = reasons(output)
    assert found["01:20"] == ("shout", "killed the process that worked on it")
    assert found["01:21"] == ("shout", "shout failed with RuntimeError")
    assert found["03:20"] == ("shout", "took longer than unit_timeout_seconds")
    assert {"04:20", "04:21"} <= set(ids(output / "documents") + ids(output / "held_out"))
    assert total(output)["one_per_word"]["counts"] == {
        "documents without a key: killed the process that worked on it": 1,
        "documents without a key: one_per_word keys failed with RuntimeError": 1,
    }
    assert total(output)["shout"]["documents_in"] == 6 * 40 + 5


def test_one_bad_file_stops_nothing(tmp_path: Path, small_parts: None) -> None:
    raw = write_lines(tmp_path / "raw", lines=60, extra={0: ["RAISE"], 2: ["KILL"], 5: ["HANG"]})
    main(config(raw, tmp_path / "out", batch_megabytes=1, unit_timeout_seconds=TIMEOUT_SECONDS))
    output = tmp_path / "out"
    check_balance(output)
    found = reasons(output)
    assert found[str(raw / "00.txt")] == ("read", "the reader failed with RuntimeError")
    assert found[str(raw / "02.txt")] == ("read", "killed the process that read it")
    assert found[str(raw / "05.txt")] == ("read", "took longer than unit_timeout_seconds")
    everything = [*ids(output / "documents"), *ids(output / "held_out"), *found]
    assert {f"00:{number}" for number in range(30)} <= set(everything)
    assert {f"{n:02d}:59" for n in (1, 3, 4)} <= set(everything)


def test_a_broken_step_is_a_fault_and_not_a_rejection(tmp_path: Path) -> None:
    from curate_fakes import Loses, Shout

    raw = write_lines(tmp_path / "raw")
    with pytest.raises(RuntimeError, match="loses made 1 kept and 0 rejected documents of"):
        main(config(raw, tmp_path / "out", steps=(Loses(),)))
    every = write_lines(tmp_path / "every", files=2, lines=2, extra={})
    for path in every.iterdir():
        path.write_text("step RAISE\n" * 10)
    with pytest.raises(RuntimeError, match="as asked"):
        main(config(every, tmp_path / "out", steps=(Shout(),)))
    assert not (tmp_path / "out").exists()


def test_what_a_change_makes_again(tmp_path: Path, small_parts: None) -> None:
    from curate_fakes import MinLength, OnePerWord, Shout

    raw, output, work = write_lines(tmp_path / "raw"), tmp_path / "out", tmp_path / ".out.work"

    def made(**settings: Any) -> set[str]:
        """Ledgers of tasks that this run wrote: "00" reading and first steps, "01" after deduplication."""
        before = set(work.glob("*/*.json")) if work.exists() else set()
        main(config(raw, output, keep_work=True, batch_megabytes=1, **settings))
        return {path.parent.name for path in set(work.glob("*/*.json")) - before}

    assert made() == {"00", "01"}
    first = files_of(output)
    assert made(workers=2) == set()
    assert files_of(output) == first
    assert made(seed=1, steps=(Shout(), OnePerWord(), MinLength(characters=5))) == {"01"}
    assert made(steps=(OnePerWord(),)) == {"00", "01"}
    assert made() == {"00", "01"}, "only what the last run used is kept"
    time.sleep(0.01)
    (raw / "05.txt").write_text((raw / "05.txt").read_text() + "\nllama new")
    before = {path: path.stat().st_mtime_ns for path in work.glob("00/*.documents.parquet")}
    assert made() == {"00", "01"}
    again = [path for path in work.glob("00/*.documents.parquet") if path not in before]
    assert 0 < len(again) < len(before)


def test_held_out_depends_on_the_id_alone(tmp_path: Path) -> None:
    raw = write_lines(tmp_path / "raw", lines=100)
    settings: dict[str, Any] = {"steps": (), "held_out_share": 0.2}
    main(config(raw, tmp_path / "a", **settings))
    held_out = set(ids(tmp_path / "a" / "held_out"))
    assert 0.15 < len(held_out) / 600 < 0.25
    assert not held_out & set(ids(tmp_path / "a" / "documents"))
    (raw / "00a.txt").write_text("a new file\nwith two lines")
    main(config(raw, tmp_path / "b", **settings))
    assert held_out == {name for name in ids(tmp_path / "b" / "held_out") if not name.startswith("00a")}
    main(config(raw, tmp_path / "c", steps=(), held_out_share=0.0))
    assert ids(tmp_path / "c" / "held_out") == []


@pytest.mark.parametrize("share", [0.0001, 0.9999])
def test_there_is_something_on_both_sides(tmp_path: Path, share: float) -> None:
    raw = write_lines(tmp_path / "raw", files=2, lines=5)
    main(config(raw, tmp_path / "out", steps=(), held_out_share=share))
    sides = [len(ids(tmp_path / "out" / side)) for side in ("documents", "held_out")]
    assert sorted(sides) == [
        1,
        9 - len(reasons(tmp_path / "out") if any((tmp_path / "out" / "rejected").iterdir()) else []),
    ]


def test_a_global_step_of_one_source_sees_only_that_source(tmp_path: Path) -> None:
    from curate_fakes import Lines, OnePerWord

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("llama one\nllama two\nalpaca three")
    own = SourceConfig("a", Lines(path=tmp_path / "a"), steps=(OnePerWord(),))
    other = SourceConfig("b", Lines(path=tmp_path / "b"))
    main(CurateConfig(output=tmp_path / "out", sources=(own, other), steps=(), held_out_share=0.0, workers=1))
    assert [(row["source"], row["id"]) for row in read_documents(tmp_path / "out" / "documents")] == [
        ("a", "x:0"),
        ("a", "x:2"),
        ("b", "x:0"),
        ("b", "x:1"),
        ("b", "x:2"),
    ]
    main(
        CurateConfig(
            output=tmp_path / "out", sources=(own, other), steps=(OnePerWord(),), held_out_share=0.0, workers=2
        )
    )
    assert ids(tmp_path / "out" / "documents") == ["x:0", "x:2"]
    steps = json.loads((tmp_path / "out" / "ledger.json").read_text())["sources"]
    assert [step["step"] for step in steps[0]["steps"]] == ["read", "one_per_word", "one_per_word (2)"]
    assert [step["step"] for step in steps[1]["steps"]] == ["read", "one_per_word"]


def test_rejects_without_their_texts(tmp_path: Path) -> None:
    raw = write_lines(tmp_path / "raw")
    main(config(raw, tmp_path / "out", keep_rejected=False))
    columns = set(pq.read_schema(next((tmp_path / "out" / "rejected").iterdir())).names)
    assert columns == {"id", "source", "step", "reason", "length"}


def test_two_runs_do_not_write_to_one_place(tmp_path: Path) -> None:
    import fcntl

    raw = write_lines(tmp_path / "raw")
    (tmp_path / ".out.work").mkdir()
    with (tmp_path / ".out.work" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="Another puna curate is at work"):
            main(config(raw, tmp_path / "out"))


def test_a_source_without_a_good_document_and_one_without_any(tmp_path: Path) -> None:
    from curate_fakes import Lines, OnePerWord

    for name, text in (("bad", "BAD\nBAD"), ("good", "llama\nalpaca\nllama")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(text)
    (tmp_path / "empty").mkdir()
    sources = tuple(SourceConfig(name, Lines(path=tmp_path / name)) for name in ("bad", "empty", "good"))
    main(CurateConfig(tmp_path / "out", sources=sources, steps=(OnePerWord(),), held_out_share=0.0, workers=1))
    assert ids(tmp_path / "out" / "documents") == ["x:0", "x:1"]
    ledger = json.loads((tmp_path / "out" / "ledger.json").read_text())["sources"]
    assert [source["steps"][0]["documents_in"] for source in ledger] == [2, 0, 3]
    with pytest.raises(InputError, match=r"0 usable document.*2 bad line"):
        main(CurateConfig(tmp_path / "out", sources=sources[:2], steps=(OnePerWord(),), workers=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "x"}, "short for one entry"),
        ({"held_out_share": 1.0}, "held_out_share is 1.0"),
        ({"workers": -1}, "workers is -1"),
        ({"batch_megabytes": 0}, "batch_megabytes is 0"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, tmp_path / "out", **settings)
    from curate_fakes import Lines

    with pytest.raises(ValueError, match="two sources are called 'a'"):
        CurateConfig(tmp_path / "out", sources=(SourceConfig("a", Lines(path=tmp_path)),) * 2)


def test_a_full_disk_is_said_and_no_document_is_blamed(tmp_path: Path) -> None:
    raw = write_lines(tmp_path / "raw", extra={1: ["this step finds the disk FULL"]})
    with pytest.raises(OSError, match="No space left"):
        main(config(raw, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    (raw / "01.txt").write_text("llama")
    main(config(raw, tmp_path / "out"))
    assert not list(tmp_path.glob(".out*"))


def test_workers_end_with_the_run(tmp_path: Path) -> None:
    raw = write_lines(tmp_path / "raw")
    main(config(raw, tmp_path / "out"))
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    commands = [Path(f"/proc/{child}/cmdline").read_bytes() for child in children]
    assert not any(b"spawn_main" in command for command in commands)
