"""The one thread that owns the engine, so that requests of all connections share its batches."""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from puna.infer.engine import Engine
from puna.infer.request import Delta, Request
from puna.infer.sampling import SamplingParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One answer to generate."""

    prompt_ids: Sequence[int]
    params: SamplingParams
    new_text: bool


class EngineFailed(Exception):
    """The engine met a fault of its own, or stopped, while it worked on a request."""


class RequestFailed(Exception):
    """A request turned out to be impossible after it had been accepted: what constrains the answer is at fault."""


class Run:
    """The answers to one request, made in an event loop and filled by the worker."""

    def __init__(self, num_jobs: int, cancel: Callable[["Run", int | None], None]) -> None:
        self._running = set(range(num_jobs))
        self._cancel = cancel
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Delta] | EngineFailed | RequestFailed] = asyncio.Queue()

    def put(self, item: tuple[int, Delta] | EngineFailed | RequestFailed) -> None:
        """Hand over an update; called by the worker's thread."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """(number of the job, what is new) until every job has finished.

        Raises:
            EngineFailed: the answers will not be finished.
            RequestFailed: nor can they be.
        """
        while self._running:
            item = await self._queue.get()
            if isinstance(item, EngineFailed | RequestFailed):
                raise item
            number, delta = item
            if number in self._running:
                if delta.finish_reason is not None:
                    self._running.remove(number)
                yield item

    def drop(self, number: int) -> None:
        """Give up one of the answers: no more of it comes."""
        self._running.discard(number)
        self._cancel(self, number)

    def close(self) -> None:
        """Give up what has not finished; to be called in any case."""
        self._cancel(self, None)


class Worker:
    """Runs the engine's steps for as long as there is work, and sleeps otherwise."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._runs: dict[Request, tuple[Run, int]] = {}
        self._thread = threading.Thread(target=self._work, name="puna-engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """Break off what is running, with an `EngineFailed` for each, and end; it takes up to a step."""
        self._inbox.put(None)

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests are worked on."""
        return self._thread.is_alive()

    def open(self, jobs: Sequence[Job]) -> Run:
        """Queue the jobs of one request. Their prompts have passed `Engine.check`; call it from an event loop."""
        run = Run(len(jobs), cancel=lambda run, number: self._inbox.put(partial(self._cancel, run, number)))
        self._inbox.put(partial(self._submit, run, jobs))
        return run

    def _submit(self, run: Run, jobs: Sequence[Job]) -> None:
        for number, job in enumerate(jobs):
            sequence = self._engine.submit(job.prompt_ids, job.params, new_text=job.new_text)
            self._runs[sequence] = (run, number)

    def _cancel(self, run: Run, number: int | None = None) -> None:
        """Cancel one of a run's jobs, or all of them."""
        own = [sequence for sequence, (owner, _) in self._runs.items() if owner is run]
        for sequence in own if number is None else [each for each in own if self._runs[each][1] == number]:
            self._engine.cancel(sequence)
            del self._runs[sequence]

    def _work(self) -> None:
        while True:
            while self._engine.idle or not self._inbox.empty():
                action = self._inbox.get()
                if action is None:
                    self._fail("The server is shutting down.")
                    return
                action()
            try:
                for sequence in self._engine.step():
                    run, number = self._runs[sequence]
                    if sequence.finish_reason == "failed":
                        run.put(RequestFailed(sequence.error))
                    else:
                        run.put((number, sequence.take()))
                    if sequence.finish_reason is not None:
                        del self._runs[sequence]
            except Exception as error:
                logger.exception("The engine failed; the requests that it worked on are given up.")
                self._fail(f"The engine failed: {error}")

    def _fail(self, message: str) -> None:
        for run in {run for run, _ in self._runs.values()}:
            run.put(EngineFailed(message))
            self._cancel(run)
