"""Executors: they call a function on many tasks, somewhere. Steps and tasks know nothing of them.

This one uses processes on this machine. Each is started afresh (spawn) and computes with as many threads as it is
given, so that processes do not fight over cores; a worker that dies takes only its own task with it.
"""

import contextlib
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

from puna.runtime.errors import InputError

Input = TypeVar("Input")
Output = TypeVar("Output")

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "ARROW_IO_THREADS",
)


@dataclass(frozen=True)
class Died:
    """The process that worked on a task is gone."""


class Executor(Protocol):
    """Somewhere to do tasks."""

    def map(self, function: Callable[[Input], Output], tasks: Sequence[Input]) -> Iterator[tuple[int, Output | Died]]:
        """Yield (number of the task, its result) as they finish, in any order.

        Raises:
            Exception: what `function` raised.
        """
        ...


class WorkerError(RuntimeError):
    """A fault in a worker: the message is the worker's traceback."""


class LocalExecutor:
    """Processes on this machine; a context manager, which ends them."""

    def __init__(self, workers: int, threads: int = 1) -> None:
        """Start `workers` processes of `threads` threads each, when there is something to do."""
        self._limit, self._threads = workers, threads
        self._workers: list[_Worker] = []

    def __enter__(self) -> "LocalExecutor":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()
        self._workers = []

    def map(self, function: Callable[[Input], Output], tasks: Sequence[Input]) -> Iterator[tuple[int, Output | Died]]:
        """See `Executor`."""
        waiting = deque(enumerate(tasks))
        busy: dict[_Worker, int] = {}
        while waiting or busy:
            while waiting and len(busy) < self._limit:
                number, task = waiting.popleft()
                worker = next((worker for worker in self._workers if worker not in busy), None)
                if worker is None:
                    worker = _Worker(self._threads)
                    self._workers.append(worker)
                busy[worker] = number
                worker.send(function, task)
            ready = connection.wait([worker.pipe for worker in busy])
            for worker in [worker for worker in busy if worker.pipe in ready]:
                number = busy.pop(worker)
                reply = worker.reply()
                if isinstance(reply, Died):
                    self._workers.remove(worker)
                    worker.end()
                    yield number, reply
                else:
                    kind, value = reply
                    if kind == "raised":
                        raise value
                    yield number, value


class _Worker:
    """One process and the pipe to it."""

    def __init__(self, threads: int) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
        with _environment(thread_environment(threads)):
            self._process.start()
        theirs.close()

    def send(self, function: Callable[[Any], Any], task: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # it died idle; the reply says so
            self.pipe.send_bytes(pickle.dumps((function, task)))

    def reply(self) -> tuple[str, Any] | Died:
        try:
            received: tuple[str, Any] = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            return Died()
        return received

    def end(self) -> None:
        self.pipe.close()
        self._process.kill()
        self._process.join()
        self._process.close()


def _serve(pipe: "Connection[Any, Any]", threads: int) -> None:
    """A worker's life: tasks until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    limit_threads(threads)
    while True:
        try:
            function, task = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            reply = ("done", function(task))
        except Exception as error:
            reply = ("raised", _portable(error))
        try:
            pipe.send(reply)
        except BrokenPipeError:
            return


def thread_environment(threads: int) -> dict[str, str]:
    """Environment of a process that computes with so many threads."""
    return {name: str(threads) for name in _THREAD_VARIABLES} | {"TOKENIZERS_PARALLELISM": "false"}


def limit_threads(threads: int) -> None:
    """Compute with so many threads in this process, where libraries did not take it from the environment."""
    import pyarrow as pa

    pa.set_cpu_count(threads)
    pa.set_io_thread_count(max(1, threads))


def _portable(error: Exception) -> Exception:
    """What a user can mend as it is; anything else with the traceback of where it happened."""
    if isinstance(error, InputError | OSError):
        with contextlib.suppress(Exception):
            pickle.loads(pickle.dumps(error))
            return error
    return WorkerError("".join(traceback.format_exception(error)))


def _die_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
