"""Processes to run cases on; see workers.py."""

import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("workers.py")


@pytest.fixture(scope="session")
def workers() -> ModuleType:
    """The module of workers.py, under the name that pickles of the server's answers use."""
    spec = importlib.util.spec_from_file_location("parallel_workers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["parallel_workers"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def on_ranks(workers: ModuleType) -> Iterator[Callable[[Any], Any]]:
    """Run a `workers.Case` on as many processes as its layout wants; the outcome of each case is kept.

    What was raised on a rank comes back as (name of the exception, message, traceback).
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[1])
    server = subprocess.Popen(
        [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert server.stdin is not None
    assert server.stdout is not None
    outcomes: dict[Any, Any] = {}

    def run(case: Any) -> Any:
        if case not in outcomes:
            pickle.dump(case, server.stdin)
            server.stdin.flush()
            outcomes[case] = pickle.load(server.stdout)
        return outcomes[case]

    yield run
    server.stdin.close()
    server.wait()
    server.stdout.close()


@pytest.fixture(scope="session")
def agrees(on_ranks: Callable[[Any], Any], workers: ModuleType) -> Callable[..., Any]:
    """Assert that a case on its layout comes to what it comes to on one process; returns what it comes to.

    Bounds are absolute, on losses of about 4 and weights of about 0.1 to 1. What layouts change is the order of float32
    sums of up to some thousand terms: relative differences of a few 1e-7 in a gradient, which the steps after it
    amplify. Seen at most: 3e-6 in a loss, 1e-5 in a weight. A gradient that is wrong on one rank moves them by 1e-2.
    """

    def check(case: Any, *, bitwise: bool = False) -> Any:
        one, many = on_ranks(workers.alone(case)), on_ranks(case)
        assert isinstance(one, workers.Outcome), one
        assert isinstance(many, workers.Outcome), "\n".join(many)
        assert many.units == one.units
        assert many.weights.keys() == one.weights.keys()
        loss_bound, weight_bound = (0.0, 0.0) if bitwise else (1e-5, 5e-5)
        for ours, theirs in zip([*many.losses, many.held_out], [*one.losses, one.held_out], strict=True):
            assert abs(ours - theirs) <= loss_bound, (many, one)
        for name, weight in one.weights.items():
            assert (many.weights[name] - weight).abs().max().item() <= weight_bound, name
        assert many.grad_norms == pytest.approx(one.grad_norms, rel=1e-6 if bitwise else 2e-5)
        return many

    return check
