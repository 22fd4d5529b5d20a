"""The same recipe on a Ray cluster of two workers gives the same bytes, and a document that kills a worker is found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")

RUN = """
from pathlib import Path
import puna.curate.main as curate
from curate_fakes import Lines, MinLength, OnePerWord, Shout
if __name__ == "__main__":
    curate.MEGABYTE = 1000
    source = curate.SourceConfig("lines", Lines(path=Path("raw")), steps=(MinLength(characters=4),))
    for executor in ("local", "ray"):
        steps = (Shout(), OnePerWord())
        settings = dict(sources=(source,), steps=steps, executor=executor, workers=2, batch_megabytes=1)
        curate.main(curate.CurateConfig(Path(executor), **settings))
"""


@pytest.mark.slow
def test_a_cluster_gives_the_same_bytes(tmp_path: Path, fakes_on_path: Path) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(6):
        lines = [
            f"{word} {number} {line}" for line in range(40) for word in ("llama", f"alpaca{line}", f"wool{number}")
        ]
        lines[50:50] = ["KILL the step"] if number == 3 else []
        (raw / f"{number}.txt").write_text("\n".join(lines))
    program = tmp_path / "program.py"
    program.write_text(RUN)
    paths = os.pathsep.join([str(fakes_on_path), str(Path(__file__).resolve().parents[3])])
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    local, ray = ({path.name: path for path in sorted((tmp_path / name).rglob("*"))} for name in ("local", "ray"))
    found = [path.relative_to(tmp_path / "local") for path in (tmp_path / "local").rglob("*.parquet")]
    assert len(found) > 5
    assert local.keys() == ray.keys()
    for path in found:
        assert (tmp_path / "local" / path).read_bytes() == (tmp_path / "ray" / path).read_bytes(), path
    assert done.stderr.count("killed the process") == 2
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in left
