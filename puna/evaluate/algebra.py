"""Whether two answers to mathematics problems mean the same, by computer algebra.

`puna.evaluate.scorers.same_maths` compares strings and numbers, which is quick and cannot go wrong. Here math-verify
(on top of SymPy) takes them for what they mean: (x+1)^2 is x^2+2x+1. What a model wrote can keep it busy for ever, or
fill the memory (9^{9^{9^{9}}}), so it works in a process of its own, which is ended when that happens.
"""

import contextlib
import importlib.util
import logging
import multiprocessing
import resource
from collections.abc import Sequence
from multiprocessing.connection import Connection

from puna.evaluate.maths import last_boxed
from puna.runtime.errors import InputError
from puna.runtime.progress import progress

_MEMORY_BYTES = 4 * 2**30


def equivalent_all(pairs: Sequence[tuple[str, str]], *, timeout_seconds: float = 5.0) -> list[bool]:
    """Whether each answer means the same as its reference.

    Args:
        pairs: (answer, reference): what stands in the answer's last \\boxed{}, or else its last expression, is compared
            with the reference, LaTeX or plain.
        timeout_seconds: for each pair; one that takes longer counts as different.

    Raises:
        InputError: math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise InputError("Comparing by computer algebra needs math-verify: pip install 'puna[evaluate]'.")
    found: list[bool] = []
    with progress("Comparing", total=len(pairs)) as advance:
        while len(found) < len(pairs):
            with contextlib.closing(_Worker()) as worker:
                verdict: bool | None = False
                while verdict is not None and len(found) < len(pairs):
                    verdict = worker.ask(pairs[len(found)], timeout_seconds)
                    found.append(verdict is True)
                    advance()
    return found


class _Worker:
    """A process that compares, one pair after the other."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_compare, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()  # It has loaded what it needs, which no pair's time is spent on.

    def ask(self, pair: tuple[str, str], timeout_seconds: float) -> bool | None:
        """The verdict; None where it took too long, or the process broke down."""
        self._connection.send(pair)
        try:
            return bool(self._connection.recv()) if self._connection.poll(timeout_seconds) else None
        except EOFError:
            return None

    def close(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def _compare(connection: Connection) -> None:
    from math_verify import parse, verify  # type: ignore[import-untyped]

    logging.disable()  # That it keeps no time of its own is as it should be.
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    connection.send("ready")
    while True:
        answer, reference = connection.recv()
        boxed = last_boxed(answer)
        try:
            given = parse(answer if boxed is None else f"$\\boxed{{{boxed}}}$", parsing_timeout=None)
            same = verify(parse(f"${reference}$", parsing_timeout=None), given, timeout_seconds=None)
        except Exception:  # Whatever two libraries may raise on what a model wrote, it is not the reference.
            same = False
        connection.send(same)
