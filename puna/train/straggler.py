"""Which rank the others wait for: a step is as slow as its slowest rank, and looks equally slow on all.

torch's profiler watches one step now and then. What a rank does not spend in messages is its own; in a message it
waits for those that come late to it.
"""

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

_SLOW = 1.5
"""A rank is reported that takes this many times as long as the others do by their median,"""
_NOTICEABLE_SECONDS = 0.1
"""and so much longer."""


@dataclass
class StepTime:
    """Of one rank's step, in seconds; filled when the step has ended."""

    whole: float = 0.0
    """From beginning to end."""
    in_messages: float = 0.0
    """Of that, with a message under way, at its own pace or another rank's."""

    @property
    def own(self) -> float:
        """What does not depend on other ranks."""
        return self.whole - self.in_messages


@contextmanager
def timed_step() -> Iterator[StepTime]:
    """Measure the block."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would speak of its start and end
    step = StepTime()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        started = time.perf_counter()
        yield step
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        step.whole = time.perf_counter() - started
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.name.startswith(("gloo:", "ncclDevKernel", "ncclKernel"))
    ]
    step.in_messages = min(step.whole, covered(spans) / 1e6)


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def slow_rank(own_seconds: Sequence[float]) -> str | None:
    """A line about the slowest of all ranks, if it is much slower than the others."""
    if len(own_seconds) == 1:
        return None
    rank = max(range(len(own_seconds)), key=own_seconds.__getitem__)
    usual = statistics.median(seconds for other, seconds in enumerate(own_seconds) if other != rank)
    if own_seconds[rank] <= max(_SLOW * usual, usual + _NOTICEABLE_SECONDS):
        return None
    return (
        f"Rank {rank} is slow: its own part of a step took {own_seconds[rank]:.2f} s, that of the others "
        f"{usual:.2f} s. All wait for it."
    )
