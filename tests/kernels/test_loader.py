"""Whether the library is there, and what is said when it is not."""

import subprocess
import sys

import pytest

from puna.kernels import loader


def test_missing_library_is_said_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(loader.importlib.machinery, "EXTENSION_SUFFIXES", [])
    loader.native_library.cache_clear()
    try:
        assert loader.native_library() is None
        assert loader.native_library() is None
        assert capsys.readouterr().err.count("without a C++ compiler") == 1
    finally:
        loader.native_library.cache_clear()


@pytest.mark.skipif(loader.native_library() is None, reason="installed without a C++ compiler")
def test_variable_turns_it_off_or_down() -> None:
    code = "from puna.kernels import loader; print(loader.native_library() is None or loader.level())"
    for value, expected in (("0", "True"), ("portable", "0")):
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, capture_output=True, text=True, check=True, env={"PUNA_NATIVE": value})
        assert done.stdout.strip() == expected
