"""The command line as a user meets it: statuses, messages, help."""

import subprocess
import sys
from pathlib import Path

import pytest

from puna.pipeline.stages import STAGES


def puna(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    code = "from puna.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=cwd, timeout=120)


def test_help_lists_every_stage() -> None:
    done = puna("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in [*STAGES, "run", "config", "inspect"])


def test_config_prints_a_recipe() -> None:
    done = puna("config", "pretrain")
    assert done.returncode == 0
    assert "[train.optimizer]" in done.stdout
    assert "learning_rate" in done.stdout


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("pretrain", "absent.toml"), ["no recipe at absent.toml"]),
        (("pretrain", "--set", "train.stepz=3"), ["train.stepz", "train.steps?"]),
        (("curate", "--set", "source=absent", "--set", "output=out"), ["absent is not a folder"]),
        (("config", "pretain"), ["did you mean 'pretrain'"]),
        (("run", "absent.toml"), ["no recipe at absent.toml"]),
        (("inspect", "model", "llama-3.1-9b"), ["llama-3.1-8b"]),
        (("chat", "absent"), ["absent"]),
        (("generate", "absent", "--set", "prompt=x"), ["absent"]),
        (("serve", "absent", "--set", "port=0"), ["absent"]),
    ],
)
def test_wrong_use_is_status_2_and_one_paragraph(tmp_path: Path, words: tuple[str, ...], parts: list[str]) -> None:
    done = puna(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    for part in parts:
        assert part in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_unknown_command_is_status_2() -> None:
    assert puna("pretain").returncode == 2


def test_inspect_model_shows_a_published_size() -> None:
    done = puna("inspect", "model", "llama-3.1-8b")
    assert done.returncode == 0
    assert "8,030,261,248" in done.stdout
    assert "128 KiB" in done.stdout
