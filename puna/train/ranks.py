"""What one rank tells the others. Without a process group there is one rank, and every answer is its own."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

Value = TypeVar("Value")


def rank_of(group: ProcessGroup | None) -> int:
    """This process's number in the group, from 0."""
    return 0 if group is None else group.rank()


def gather(value: Value, group: ProcessGroup | None) -> list[Value]:
    """The value of every rank, in their order; every rank has to call."""
    if group is None:
        return [value]
    values: list[Value | None] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values  # type: ignore[return-value]


def agree(
    work: Callable[[], Value], group: ProcessGroup | None, errors: tuple[type[BaseException], ...]
) -> list[Value]:
    """Do something on every rank; return the results, or raise everywhere if it failed anywhere.

    Args:
        work: what to do.
        group: the ranks.
        errors: what `work` may raise.

    Raises:
        RankError: `work` failed; its message begins with the first rank on which it did.
    """
    result, failure = None, None
    try:
        result = work()
    except errors as error:
        failure = reason(error)
    outcomes = gather((result, failure), group)
    failed = [(rank, failure) for rank, (_, failure) in enumerate(outcomes) if failure is not None]
    if failed:
        rank, failure = failed[0]
        raise RankError(failure if group is None else f"rank {rank}: {failure}")
    return [result for result, _ in outcomes]  # type: ignore[misc]


class RankError(Exception):
    """Something failed on a rank, and every rank knows it."""


def reason(error: BaseException) -> str:
    """The last line of an error's message, which in errors of torch.distributed.checkpoint names the cause."""
    return str(error).strip().rsplit("\n", 1)[-1] or type(error).__name__
