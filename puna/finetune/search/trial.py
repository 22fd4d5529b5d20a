"""One trial, in a process of its own."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import parent_process
from pathlib import Path

from puna.finetune.config import FinetuneConfig
from puna.finetune.main import main as finetune
from puna.runtime.errors import InputError


@dataclass(frozen=True, slots=True)
class Validated:
    """Values of the metric at all validations so far; the answer is whether to end the trial."""

    values: list[float]


@dataclass(frozen=True, slots=True)
class Ended:
    """The trial's training is over, for whatever reason."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The trial could not be done."""

    reason: str
    """In a sentence."""
    by_input: bool
    """Whether something given was wrong."""


def run_trial(config: FinetuneConfig, metric: str, log: Path, search: Connection) -> None:
    """Fine-tune, reporting every validation to the search, which answers whether to go on.

    Ends at once when the search dies: another one may take up the trial.

    Args:
        config: what to do; checked.
        metric: the curve that is compared.
        log: gets what the command would have printed.
        search: where messages go.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Ctrl-C reaches all processes of a terminal; it is the search that ends its trials.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _print_to(log)

    def ended(points: Sequence[Mapping[str, float]]) -> bool:
        values = [point[metric] for point in points if metric in point]
        if not values:
            return False
        search.send(Validated(values))
        answer: bool = search.recv()
        return answer

    try:
        finetune(config, ended)
    except InputError as error:
        print(f"puna: {error}", file=sys.stderr)
        search.send(Failed(str(error), by_input=True))
    except Exception as error:
        traceback.print_exc()
        search.send(Failed(f"{type(error).__name__}: {error}", by_input=False))
    else:
        search.send(Ended())


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _print_to(log: Path) -> None:
    """Send standard output and error to a file, those of libraries in other languages too."""
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
