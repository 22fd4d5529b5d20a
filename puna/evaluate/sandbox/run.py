"""Run programs that a model wrote, each in a child process that can neither reach out nor outlast its time.

What holds a program (`cell.py` has the details; no privileges, no container and no other program are needed):

- *system calls* are filtered: no sockets, no other processes (threads it may start), no signals to anybody else;
- *files* may be read from the standard library and written in one flat temporary folder, which is removed afterwards;
- *limits* on processor time, time on the clock, memory, a file's size and that of all; output beyond a cap is dropped;
- it gets the standard library alone, an empty environment, and nothing on its standard input.

The kernel has to be Linux with seccomp and Landlock (5.13 or newer); elsewhere programs are refused, unless the caller
says `allow_unsafe`.

What it does not do: tell a program that cheats from one that does not. Ending early never counts as passing, for a
passed program has to send a random token after its last line; but a program that looks through the interpreter's own
frames finds the token, and one whose objects claim to equal everything passes every `assert`.
"""

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from puna.evaluate.sandbox import cell
from puna.runtime.devices import available_cores
from puna.runtime.errors import InputError

Status = Literal["passed", "failed", "timeout", "memory", "killed"]

_POLL_SECONDS = 0.05
_BLOCK = 4096
"""A file takes at least so many bytes of the disk."""


@dataclass(frozen=True)
class Limits:
    """What one program may use up."""

    wall_seconds: float = 10.0
    """Time on the clock, the interpreter's start included."""
    cpu_seconds: int = 5
    """Processor time, of all threads together."""
    memory_bytes: int = 512 * 2**20
    """Address space. The interpreter alone takes about 40 MB, and each thread 8 MB for its stack."""
    file_bytes: int = 2**20
    """Largest file."""
    output_bytes: int = 2**16
    """Output that is kept, standard output and errors together; the rest is dropped."""
    folder_bytes: int = 16 * 2**20
    """All files together; a program that writes more is killed."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise ValueError(f"{name} is {value}; a limit has to be above 0.")
        if self.memory_bytes < 64 * 2**20:
            raise ValueError(f"memory_bytes is {self.memory_bytes}; the interpreter alone needs {64 * 2**20}.")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one program."""

    status: Status
    """Whether it came to its end ("passed"), and else why not: an exception or an early exit ("failed"), too long
    ("timeout"), too much memory, or a signal ("killed": a crash, or more files than allowed)."""
    output: str
    """The beginning of what it printed, errors included."""
    seconds: float
    """Time on the clock, the interpreter's start included."""


def run_python(program: str, limits: Limits = Limits(), *, allow_unsafe: bool = False) -> Outcome:
    """Run one program to its end, or to a limit.

    Args:
        program: source; it passes when its last line has been run without an exception.
        limits: what it may use up.
        allow_unsafe: go on where this machine lacks a protection (`check_protections`). Limits hold all the same.

    Raises:
        InputError: this machine lacks a protection, or cannot start the process, so the program was not run.
    """
    outcome, missing = _run(program, limits, allow_unsafe)
    if missing and not allow_unsafe:
        raise _refusal(missing)
    return outcome


def run_all(
    programs: Sequence[str], limits: Limits = Limits(), workers: int = 0, *, allow_unsafe: bool = False
) -> list[Outcome]:
    """`run_python` over many programs, `workers` at a time (0: as many as there are processors), in their order."""
    with ThreadPoolExecutor(workers or available_cores()) as pool:
        return list(pool.map(partial(run_python, limits=limits, allow_unsafe=allow_unsafe), programs))


def check_protections() -> str:
    """The protections of this machine, in one line.

    Raises:
        InputError: one is missing, so that programs would be refused; it says which.
    """
    if missing := _run("", Limits(), False)[1]:
        raise _refusal(missing)
    return "Programs run without network and other processes (seccomp) and may write to one folder only (Landlock)."


def with_tests(solution: str, tests: str) -> str:
    """A program that runs a solution and then its tests.

    The two are compiled apart, so that no open bracket or string of the solution swallows the tests, and the solution
    is imported rather than run: code under `if __name__ == "__main__"` stays away.
    """
    # In lines of its own, for a traceback shows the line that calls.
    return f"""__name__ = "solution"
_solution = {solution!r}
exec(compile(_solution, "solution.py", "exec"))
{tests}
"""


def _refusal(missing: Sequence[str]) -> InputError:
    return InputError(
        f"Programs that a model wrote cannot be run safely here: {'; '.join(missing)}. Use Linux 5.13 or newer with"
        " Landlock, and install libseccomp (libseccomp2 on Debian). To run them all the same, with limits on time and"
        " memory, say allow_unsafe; do that on a throw-away machine."
    )


def _run(program: str, limits: Limits, allow_unsafe: bool) -> tuple[Outcome, list[str]]:
    """What became of a program, and which protections could not be had."""
    token = secrets.token_hex(16)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="puna-sandbox-") as folder, _pipe() as (reports, report):
        task = {
            "program": program,
            "folder": folder,
            "limits": asdict(limits),
            "allow_unsafe": allow_unsafe,
            "parent": os.getpid(),
            "report": report,
            "token": token,
        }
        process = subprocess.Popen(
            [sys.executable, "-S", "-s", "-P", cell.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
            pass_fds=(report,),
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(json.dumps(task).encode())
        stopped, output = _watch(process, Path(folder), limits, started + limits.wall_seconds)
        process.stdout.close()
        reported = _read_reports(reports)
    if not reported and stopped is None:
        raise InputError(f"The sandbox's own process broke down before the program: {output.decode(errors='replace')}")
    missing: list[str] = reported[0]["missing"] if reported else []
    ended = [message["status"] for message in reported[1:] if message.get("token") == token]
    status: Status
    if stopped is not None:
        status = stopped
    elif ended:
        status = ended[-1]
    elif process.returncode < 0:
        status = "timeout" if process.returncode == -signal.SIGXCPU else "killed"
    else:
        status = "failed"
    return Outcome(status, output.decode(errors="replace"), time.monotonic() - started), missing


def _watch(
    process: subprocess.Popen[bytes], folder: Path, limits: Limits, deadline: float
) -> tuple[Status | None, bytes]:
    """Read a program's output until it ends; end it where it exceeds a limit, and say which."""
    assert process.stdout is not None
    source = process.stdout.fileno()
    os.set_blocking(source, False)
    output = bytearray()
    stopped: Status | None = None
    look = time.monotonic() + _POLL_SECONDS
    is_open = True
    # It is not waited for before all of its session are dead: until then its number cannot be another's.
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if is_open:
            select.select([source], [], [], _POLL_SECONDS)
            is_open = _take(source, output, limits.output_bytes)
        else:
            time.sleep(_POLL_SECONDS / 10)
        now = time.monotonic()
        if now > deadline:
            stopped = "timeout"
        elif now > look and _used(folder) > limits.folder_bytes:
            stopped = "killed"
        if stopped is not None:
            break
        look = look if now <= look else now + _POLL_SECONDS
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if stopped is None and _used(folder) > limits.folder_bytes:
        stopped = "killed"
    while is_open and len(output) < limits.output_bytes and select.select([source], [], [], 0)[0]:
        is_open = _take(source, output, limits.output_bytes)
    return stopped, bytes(output)


def _take(source: int, output: bytearray, most: int) -> bool:
    """Read what is there, and keep what there is room for; False at the end."""
    try:
        chunk = os.read(source, 2**16)
    except BlockingIOError:
        return True
    output += chunk[: most - len(output)]
    return bool(chunk)


def _used(folder: Path) -> int:
    """Bytes that the files of a flat folder take on the disk."""
    used = 0
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            used += max(entry.stat(follow_symlinks=False).st_blocks * 512, _BLOCK)
    return used


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def _read_reports(source: int) -> list[dict[str, Any]]:
    """The messages in a pipe; what a program wrote there itself is dropped unless it looks like one."""
    os.set_blocking(source, False)
    try:
        lines = os.read(source, 2**16).splitlines()
    except BlockingIOError:
        return []
    messages = []
    for line in lines:
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict):
                messages.append(message)
    return messages
