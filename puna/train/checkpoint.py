"""Checkpoints of a running training: written beside it, whole or absent, exact, checked when they are read.

They are in the format of torch.distributed.checkpoint: every rank writes what it holds, and another number of ranks or
another layout can read it.

Layout of the folder:
    step-00000040/          a complete checkpoint: *.distcp, .metadata, and run.json with the hash of each of them
    .step-00000060.partial/ one that is being written, or that a kill left half-written; never read
    damaged-step-00000040/  one whose hashes were wrong when it was to be read
"""

import re
import shutil
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from puna.runtime.errors import InputError
from puna.runtime.files import file_hash, read_json, write_json
from puna.runtime.progress import say
from puna.train.ranks import RankError, agree, gather, rank_of
from puna.train.state import TrainState

_ERRORS = (CheckpointException, OSError, ValueError, RuntimeError, KeyError)
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
"""Optimiser state by parameter name, not by place in a list: ranks of a pipeline have different parameters."""


class Checkpoints:
    """The checkpoints of one run.

    Saving costs the training a copy of the state; the writing goes on in a thread. A process group of its own keeps
    its messages apart from the training's. Every rank has to make the same calls.

    Args:
        directory: the folder of checkpoints, which all ranks see.
        run: plain values that define the run; `restore` refuses a checkpoint of another.
        keep: how many stay.
    """

    def __init__(self, directory: Path, run: dict[str, Any], keep: int) -> None:
        self.directory, self.run, self.keep = directory, run, keep
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._pending: Future[str | None] | None = None
        # torch warns, in its own thread, that there is only one process, which we know.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Training that ends by an error or by Ctrl-C keeps the checkpoint that was being written."""
        if self._pending is not None:
            wait([self._pending])

    def save(self, state: TrainState) -> None:
        """Copy the state and begin to write step-N; wait first for the one before, if it is still being written."""
        self.finish()
        scratch = self.directory / f".step-{state.step:08}.partial"
        if rank_of(self._group) == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            for abandoned in self.directory.glob(".step-*.partial"):
                shutil.rmtree(abandoned)
        upload = async_save(
            _tensors(state), checkpoint_id=scratch, process_group=self._group, no_dist=self._group is None
        )
        assert isinstance(upload, Future)
        thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending = thread.submit(self._publish, upload, scratch, state.step, state.batch)
        thread.shutdown(wait=False)

    def finish(self) -> str | None:
        """Wait for what is being written; return why it could not be, if so, which is also said in a line."""
        if self._pending is None:
            return None
        failure = self._pending.result()
        self._pending = None
        if failure is not None:
            say(f"A checkpoint could not be written ({failure}). Those before it stay.")
        return failure

    def restore(self, state: TrainState) -> bool:
        """Load the newest good checkpoint into `state`; return whether there was one.

        A damaged one is set aside, with a line that says so, and the one before is taken.

        Raises:
            InputError: it belongs to a run with another configuration, or all of them are damaged.
        """
        self.finish()
        complaints = []
        for path in reversed(gather(_complete_ones(self.directory), self._group)[0]):
            try:
                saved = agree(partial(read_json, path / "run.json"), self._group, _ERRORS)[0]
                if differences := _differences(saved["run"], self.run):
                    raise InputError(
                        f"{self.directory} holds checkpoints of another run: {'; '.join(differences)}. Set these back "
                        "to go on with it, or choose another output."
                    )
                agree(partial(self._verify, path, saved["files"]), self._group, _ERRORS)
                agree(partial(self._load, state, path), self._group, _ERRORS)
            except RankError as error:
                complaints.append(f"{path.name}: {error}")
                aside = path.with_name(f"damaged-{path.name}")
                say(f"The checkpoint {path} is damaged ({error}); it is set aside as {aside.name}.")
                if rank_of(self._group) == 0:
                    shutil.rmtree(aside, ignore_errors=True)
                    path.rename(aside)
                gather(None, self._group)
                continue
            state.step, state.batch = saved["step"], saved["batch"]
            return True
        if complaints:
            raise InputError(
                f"No checkpoint in {self.directory} can be read ({'; '.join(complaints)}). Delete the folder to begin "
                "from the first step."
            )
        return False

    def _publish(self, upload: "Future[Any]", scratch: Path, step: int, batch: int) -> str | None:
        """In the thread: wait for torch's writing, hash, rename, delete old ones; return what went wrong."""
        try:
            agree(upload.result, self._group, _ERRORS)
            hashes = agree(lambda: self._hashes(sorted(scratch.iterdir())), self._group, _ERRORS)
            agree(partial(self._complete, scratch, step, batch, hashes), self._group, _ERRORS)
        except RankError as error:
            if rank_of(self._group) == 0:
                shutil.rmtree(scratch, ignore_errors=True)
            return str(error)
        return None

    def _complete(self, scratch: Path, step: int, batch: int, hashes: Sequence[dict[str, str]]) -> None:
        """The first rank gives a written checkpoint its name, and deletes the oldest."""
        if rank_of(self._group):
            return
        files = {name: value for part in hashes for name, value in part.items()}
        write_json(scratch / "run.json", {"step": step, "batch": batch, "run": self.run, "files": files})
        destination = self.directory / f"step-{step:08}"
        if destination.exists():
            shutil.rmtree(destination)
        scratch.rename(destination)
        for old in _complete_ones(self.directory)[: -self.keep]:
            shutil.rmtree(old)

    def _hashes(self, files: Sequence[Path]) -> dict[str, str]:
        """Of this rank's share of the files."""
        number, size = rank_of(self._group), 1 if self._group is None else self._group.size()
        return {path.name: file_hash(path) for path in files[number::size]}

    def _verify(self, path: Path, expected: dict[str, str]) -> None:
        for name, value in self._hashes([path / name for name in sorted(expected)]).items():
            if value != expected[name]:
                raise ValueError(f"{name} has changed since it was written")

    def _load(self, state: TrainState, path: Path) -> None:
        tensors = _tensors(state)
        load(tensors, checkpoint_id=path, process_group=self._group, no_dist=self._group is None)
        set_state_dict(
            state.model,
            state.optimizers,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
            options=_OPTIONS,
        )


def _tensors(state: TrainState) -> dict[str, Any]:
    model, optimizer = get_state_dict(state.model, state.optimizers, options=_OPTIONS)
    return {"model": model, "optimizer": optimizer, "statistics": state.statistics}


def _complete_ones(directory: Path) -> list[Path]:
    """Oldest first."""
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
