"""The command line as a user meets it: statuses, messages, help."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from puna.cli import main
from puna.pipeline.stages import STAGES

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def puna(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process, which has imported already what takes a process of its own seconds."""

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        monkeypatch.setattr(sys, "argv", ["puna", *words])
        try:
            main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(words, status, said.out, said.err)

    return run


def test_a_process_of_its_own_has_the_statuses_of_main(tmp_path: Path) -> None:
    for words, status, message in (["--help"], 0, ""), (["run", "absent.toml"], 2, "no recipe at absent.toml"):
        command = [sys.executable, "-m", "puna.cli", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
        assert done.returncode == status, done.stderr
        assert message in done.stderr


def test_help_lists_every_stage(puna: Run) -> None:
    done = puna("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in [*STAGES, "run", "config", "inspect"])


def test_config_prints_a_recipe(puna: Run) -> None:
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
        (("align", "absent.toml"), ["no recipe at absent.toml"]),
        (("align", "collect", "absent.toml"), ["no recipe at absent.toml"]),
        (("align", "collect", "--set", "raterz=2"), ["raterz", "raters?"]),
        (("align", "one.toml", "two.toml"), ["two.toml stands behind one.toml"]),
        (("config", "pretain"), ["did you mean 'pretrain'"]),
        (("run", "absent.toml"), ["no recipe at absent.toml"]),
        (("inspect", "model", "llama-3.1-9b"), ["llama-3.1-8b"]),
        (("chat", "absent"), ["absent"]),
        (("generate", "absent", "--set", "prompt=x"), ["absent"]),
        (("serve", "absent", "--set", "port=0"), ["absent"]),
    ],
)
def test_wrong_use_is_status_2_and_one_paragraph(
    puna: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], parts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = puna(*words)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    for part in parts:
        assert part in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_unknown_command_is_status_2(puna: Run) -> None:
    assert puna("pretain").returncode == 2


def test_inspect_model_shows_a_published_size(puna: Run) -> None:
    done = puna("inspect", "model", "llama-3.1-8b")
    assert done.returncode == 0
    assert "8,030,261,248" in done.stdout
    assert "128 KiB" in done.stdout
