"""The misbehaving readers and steps, for these tests and the processes that they start."""

from pathlib import Path

import pytest

FAKES = Path(__file__).with_name("fakes")


@pytest.fixture(autouse=True)
def fakes_on_path(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(FAKES))
    return FAKES
