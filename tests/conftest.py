"""What every test folder shares: quiet single-threaded torch, and the optional folder of real data."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(1)

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def real_data() -> Path:
    """Folder of published tokenizers, vectors and weights; the test is skipped where there is none."""
    if not REAL_DATA.is_dir():
        pytest.skip("no folder of real data beside the checkout")
    return REAL_DATA
