"""Whether the library is there, and what is said when it is not."""

import subprocess
import sys

import pytest

from puna.kernels import library


def test_missing_library_is_said_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(library.importlib.machinery, "EXTENSION_SUFFIXES", [])
    library.native_library.cache_clear()
    try:
        assert library.native_library() is None
        assert library.native_library() is None
        assert capsys.readouterr().err.count("without a C++ compiler") == 1
    finally:
        library.native_library.cache_clear()


@pytest.mark.skipif(library.native_library() is None, reason="installed without a C++ compiler")
def test_variable_turns_it_off_or_down() -> None:
    code = "from puna.kernels import library; print(library.native_library() is None or library.level())"
    for value, expected in (("0", "True"), ("portable", "0")):
        run = [sys.executable, "-c", code]
        done = subprocess.run(run, capture_output=True, text=True, check=True, env={"PUNA_NATIVE": value})
        assert done.stdout.strip() == expected
