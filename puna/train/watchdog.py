"""A run that stands still is ended, with the name of the rank that all others wait for, so that torchrun restarts it.

A thread in each process tells the others, through the store that `torchrun` has opened anyway, how far its training has
come. When its own stands still for too long it writes where every thread is, and the first to notice compares all
ranks: one that gives no sign of life any more is the missing one, else one that is behind, else one that is not waiting
in a message while the others are.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

_LOOKS = 4
"""So many times within the timeout a thread looks whether training goes on."""
_LOOKS_OF_OTHERS = 4
"""So many more, until ranks that do not report end."""
_RESTARTS = "TORCHELASTIC_RESTART_COUNT"
"""In the environment of processes that torchrun started."""

EXIT_STATUS = 75
"""Of a process that the watchdog ended (EX_TEMPFAIL: try again)."""


@dataclass(frozen=True)
class Sign:
    """What a rank tells of itself."""

    breaths: int
    """Rises as long as the process runs."""
    beats: int
    """Rises as long as its training goes on."""
    doing: str
    """What it does, in words."""
    waits: bool
    """Whether it waits for other ranks."""


def missing_ranks(before: Sequence[Sign | None], now: Sequence[Sign | None]) -> tuple[list[int], str]:
    """Which ranks the others wait for, from the signs of all at two moments; and how that shows.

    A rank without a sign (None) has not come as far as training.
    """
    silent = [rank for rank, (old, new) in enumerate(zip(before, now, strict=True)) if new is None or new == old]
    if silent:
        return silent, "gives no sign of life"
    signs = [sign for sign in now if sign is not None]
    least = min(sign.beats for sign in signs)
    behind = [rank for rank, sign in enumerate(signs) if sign.beats == least]
    if len(behind) < len(signs):
        return behind, f"is behind the others ({signs[behind[0]].doing})"
    busy = [rank for rank, sign in enumerate(signs) if not sign.waits]
    if 0 < len(busy) < len(signs):
        return busy, f"keeps the others waiting ({signs[busy[0]].doing})"
    return list(range(len(signs))), f"stands still ({signs[0].doing})"


class Watchdog:
    """Watches this process's training; use as a context manager, and call `beat` often.

    Where torchrun would start again, the process is ended; elsewhere it is only reported, once.

    Args:
        timeout_seconds: how long training may stand still; 0 means for ever. Time in which the whole process was
            stopped does not count.
        dumps: folder that gets rank-N.txt, the stacks of a process that stood still.
    """

    def __init__(self, timeout_seconds: float, dumps: Path) -> None:
        self.timeout_seconds, self.dumps = timeout_seconds, dumps
        self._rank, self._size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._beats, self._doing = 0, "starting"
        self._watched = threading.get_ident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.timeout_seconds > 0:
            self._thread.start()
        return self

    def beat(self, doing: str) -> None:
        """Training goes on, and does this next."""
        self._beats, self._doing = self._beats + 1, doing

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        store, interval = self._open_store(), self.timeout_seconds / _LOOKS
        breaths, beats, still = 0, -1, 0
        while not self._stop.wait(interval):
            breaths += 1
            still = still + 1 if self._beats == beats else 0
            beats = self._beats
            sign = Sign(breaths, beats, self._doing, _waits_for_others(sys._current_frames().get(self._watched)))
            with suppress(dist.DistError):  # the process that holds the store may have ended first
                if store is not None:
                    store.set(f"sign/{self._rank}", json.dumps(asdict(sign)))
                if still == _LOOKS:
                    self._dump()
                    # One speaks for all; the others go on breathing while it looks twice.
                    if store is None or store.add("reports", 1) == 1:
                        print(self._report(store, sign, interval), file=sys.stderr, flush=True)
                        still = _LOOKS + _LOOKS_OF_OTHERS
            if still >= _LOOKS + _LOOKS_OF_OTHERS and _RESTARTS in os.environ:
                os._exit(EXIT_STATUS)

    def _report(self, store: Store | None, sign: Sign, interval: float) -> str:
        since = f"Training has stood still for {self.timeout_seconds:,.0f} s"
        after = f"Stacks are in {self.dumps}."
        if _RESTARTS in os.environ:
            after += " Ending, so that torchrun can start again from the last checkpoint."
        if store is None:
            return f"{since} ({sign.doing}). {after}"
        before = self._signs(store)
        time.sleep(2 * interval)
        # This thread was busy here and has given no sign, but it is alive.
        before[self._rank] = None
        ranks, why = missing_ranks(before, self._signs(store))
        return f"{since}: rank {', '.join(map(str, ranks))} {why}. {after}"

    def _signs(self, store: Store) -> list[Sign | None]:
        keys = [f"sign/{rank}" for rank in range(self._size)]
        return [Sign(**json.loads(store.get(key))) if store.check([key]) else None for key in keys]

    def _dump(self) -> None:
        self.dumps.mkdir(parents=True, exist_ok=True)
        with (self.dumps / f"rank-{self._rank}.txt").open("w", encoding="utf-8") as file:
            file.write(f"{self._doing}, for {self.timeout_seconds:,.0f} s\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _open_store(self) -> Store | None:
        """A connection of its own to the processes' store: the training's may be blocked."""
        if self._size == 1 or "MASTER_ADDR" not in os.environ:
            return None
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))  # type: ignore[attr-defined]
        return PrefixStore(f"watchdog/{os.environ.get(_RESTARTS, 0)}", store)


def _waits_for_others(frame: FrameType | None) -> bool:
    """Whether a stack is inside a message to other ranks."""
    while frame is not None:
        code = frame.f_code
        if "torch/distributed/" in code.co_filename and code.co_name in _MESSAGES:
            return True
        frame = frame.f_back
    return False


_MESSAGES = {
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "reduce_scatter_tensor", "broadcast"),
    *("barrier", "send", "recv", "wait_tensor", "wait", "batch_isend_irecv", "_wait_batch_p2p", "all_to_all_single"),
}
"""Functions of torch.distributed that wait for other ranks."""
