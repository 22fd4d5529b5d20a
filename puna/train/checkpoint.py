"""Checkpoints of a running training: whole or absent, and exact.

They are in the format of torch.distributed.checkpoint, which can be read on another number of processes.
"""

import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, read_json, write_json
from puna.train.state import TrainState


def save_checkpoint(state: TrainState, directory: Path, run: dict[str, Any], keep: int) -> None:
    """Write `directory`/step-N and delete all but the newest `keep`.

    Args:
        state: what to remember.
        directory: folder of checkpoints.
        run: plain values that define the run; `restore` refuses a checkpoint of another.
        keep: how many stay.
    """
    for abandoned in directory.glob(".step-*.tmp-*"):
        shutil.rmtree(abandoned)
    with atomic_path(directory / f"step-{state.step:08}") as path:
        model, optimizer = get_state_dict(state.model, state.optimizers)
        with _single_process():
            save({"model": model, "optimizer": optimizer}, checkpoint_id=path, no_dist=True)
        write_json(path / "run.json", {"step": state.step, "run": run})
    for old in _checkpoints(directory)[:-keep]:
        shutil.rmtree(old)


def restore(state: TrainState, directory: Path, run: dict[str, Any]) -> bool:
    """Load the newest checkpoint of `directory` into `state`; return whether there was one.

    Raises:
        InputError: it belongs to a run with another configuration, or cannot be read.
    """
    found = _checkpoints(directory)
    if not found:
        return False
    newest = found[-1]
    saved = read_json(newest / "run.json")
    if differences := _differences(saved["run"], run):
        raise InputError(
            f"{directory} holds checkpoints of another run: {'; '.join(differences)}. Set these back to go on with it, "
            "or choose another output."
        )
    model, optimizer = get_state_dict(state.model, state.optimizers)
    try:
        with _single_process():
            load({"model": model, "optimizer": optimizer}, checkpoint_id=newest, no_dist=True)
    except (CheckpointException, OSError, ValueError) as error:
        reason = str(error).strip().rsplit("\n", 1)[-1]
        raise InputError(
            f"The checkpoint {newest} cannot be read ({reason}). Delete it to go on from the one before."
        ) from error
    set_state_dict(state.model, state.optimizers, model_state_dict=model, optim_state_dict=optimizer)
    state.step = saved["step"]
    return True


@contextmanager
def _single_process() -> Iterator[None]:
    """torch warns that there is only one process, which we know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if re.fullmatch(r"step-\d{8}", path.name))


def _differences(saved: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(saved.keys() | wanted.keys()):
        before, now = saved.get(key), wanted.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            found.append(f"{prefix}{key} was {before!r} and is now {now!r}")
    return found
