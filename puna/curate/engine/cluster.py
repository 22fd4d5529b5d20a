"""Workers on a Ray cluster: the same function on the same tasks, on more than one machine.

Parts and ledgers go through a file system that all machines see, so nothing but tasks and counts goes through Ray.
Plain Ray tasks, because a dead worker is reported for the task that it worked on: Ray Data and Daft's Ray runner try
such a task again without end, and Daft's native runner gives up the whole run.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from puna.curate.engine.local import Died, Input, Output, limit_threads, thread_environment
from puna.runtime.errors import InputError

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # sends nothing anywhere
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}


class RayExecutor:
    """Tasks of one core each on a Ray cluster; a context manager, which leaves the cluster."""

    def __init__(self, address: str, workers: int) -> None:
        """Join the cluster at `address`, or start one of `workers` cores on this machine where it is empty.

        Raises:
            InputError: Ray is not installed, or there is no cluster at the address.
        """
        os.environ.update(_QUIET)
        try:
            import ray
        except ImportError as error:
            raise InputError("The executor ray needs Ray: pip install 'puna[cluster]'.") from error
        self._ray: Any = ray
        here: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False}
        try:
            ray.init(
                address=address or "local",
                runtime_env={"env_vars": thread_environment(1) | _QUIET},
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({} if address else here),
            )
        except (ConnectionError, ValueError) as error:
            raise InputError(f"There is no Ray cluster at {address}: {error}") from error

    def __enter__(self) -> "RayExecutor":
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def map(self, function: Callable[[Input], Output], tasks: Sequence[Input]) -> Iterator[tuple[int, Output | Died]]:
        """See `puna.curate.engine.local.Executor`."""
        ray = self._ray
        lost = (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError)
        remote = ray.remote(num_cpus=1, max_retries=0)(_call_in)
        folder = str(Path.cwd())
        waiting: dict[Any, int] = {}
        numbers = iter(range(len(tasks)))
        while True:
            for number in numbers:
                waiting[remote.remote(folder, function, tasks[number])] = number
                if len(waiting) >= 2 * ray.cluster_resources().get("CPU", 1):
                    break
            if not waiting:
                return
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            number = waiting.pop(ready)
            try:
                yield number, ray.get(ready)
            except lost:
                yield number, Died()
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, InputError | OSError) else error from None


def _call_in(folder: str, function: Callable[[Input], Output], task: Input) -> Output:
    """A task may name files as they are called from where the run was started."""
    os.chdir(folder)
    limit_threads(1)
    return function(task)
