"""Programs that do harm, each held by what is meant to hold it; and programs that only compute, which are not."""

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.evaluate.sandbox import cell
from puna.evaluate.sandbox.run import (
    Limits,
    Outcome,
    check_protections,
    run_all,
    run_python,
    with_tests,
)
from puna.runtime.errors import InputError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the protections are Linux's")

# Time on the clock is long, for a busy machine; what ends a program is another limit, unless the test says otherwise.
LIMITS = Limits(wall_seconds=200.0, cpu_seconds=1, memory_bytes=256 * 2**20, folder_bytes=2**21)

USEFUL = """
import asyncio, collections, datetime, decimal, fractions, hashlib, itertools, json, math, random, re, statistics
import concurrent.futures, string, tempfile, threading, time, typing, unittest, heapq, bisect, functools
async def later():
    await asyncio.sleep(0.001)
    return 3
assert asyncio.run(later()) == 3
with concurrent.futures.ThreadPoolExecutor(2) as pool:
    assert list(pool.map(math.sqrt, [4, 9])) == [2, 3]
with tempfile.NamedTemporaryFile("w+") as file:
    file.write("text")
with open("notes.txt", "w") as file:
    file.write("kept while it runs")
assert open("notes.txt").read() == "kept while it runs"
assert hashlib.sha256(b"").hexdigest().startswith("e3b0c442")
if __name__ == "__main__":
    print("hällo")
"""


def test_a_program_that_computes_passes_and_is_heard() -> None:
    outcome = run_python(USEFUL, LIMITS)
    assert (outcome.status, outcome.output) == ("passed", "hällo\n")


def test_failed_tests_are_shown_as_python_shows_them() -> None:
    outcome = run_python(with_tests("def add(a, b):\n    return a - b", "assert add(1, 2) == 3"), LIMITS)
    assert outcome.status == "failed"
    assert "assert add(1, 2) == 3" in outcome.output
    assert "AssertionError" in outcome.output
    assert "cell.py" not in outcome.output


@pytest.mark.parametrize(
    "program",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess\nwhile True: subprocess.Popen(['/bin/sleep', '100'])",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
        "import os, signal\nos.killpg(0, signal.SIGKILL)",
        "import os\nos.mkdir('deep')",
        "import os\nos.chmod('/tmp', 0)",
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))",
        "import socket\nsocket.socket(socket.AF_UNIX)",
        "import ctypes\nassert ctypes.CDLL(None, use_errno=True).syscall(101, 16, 1, 0, 0) == 0, 'Permission (ptrace)'",
    ],
)
def test_what_concerns_others_is_refused(program: str) -> None:
    outcome = run_python(program, LIMITS)
    assert outcome.status == "failed"
    assert "Permission" in outcome.output or "not allowed" in outcome.output


def test_network_is_refused_though_somebody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = server.getsockname()
        program = f"import socket\nsocket.create_connection({address!r}).send(b'secret')"
        socket.create_connection(address).close()
        server.accept()[0].close()
        outcome = run_python(program, LIMITS)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert outcome.status == "failed"
    assert "PermissionError" in outcome.output


def test_files_elsewhere_are_neither_read_nor_written(tmp_path: Path) -> None:
    ours = tmp_path / "ours.txt"
    ours.write_text("secret")
    fresh = tmp_path / "fresh.txt"
    homely = Path.home() / ".puna-sandbox-test"
    programs = [
        f"print(open({str(ours)!r}).read())",
        f"open({str(ours)!r}, 'a').write('spoilt')",
        f"import os\nos.truncate({str(ours)!r}, 0)",
        f"import os\nos.remove({str(ours)!r})",
        f"open({str(fresh)!r}, 'w')",
        f"open({str(homely)!r}, 'w')",
        f"import os\nos.symlink({str(ours)!r}, 'link')",
        f"import os\nos.link({str(ours)!r}, 'link')",
        f"print(open('/proc/{os.getpid()}/environ').read())",
    ]
    for program, outcome in zip(programs, run_all(programs, LIMITS, workers=2), strict=True):
        assert outcome.status == "failed", program
        assert "PermissionError" in outcome.output, program
    assert ours.read_text() == "secret"
    assert not fresh.exists()
    assert not homely.exists()


def test_nothing_is_inherited_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUNA_TEST_SECRET", "secret")
    program = "import os, sys\nprint(os.getcwd())\nprint(dict(os.environ), repr(sys.stdin.read()))\nopen('left', 'w')"
    outcome = run_python(program, LIMITS)
    folder, _, rest = outcome.output.partition("\n")
    assert outcome.status == "passed"
    assert "secret" not in rest
    assert "''" in rest
    assert not Path(folder).exists()


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("while True: pass", "timeout"),
        ("while True: print('again ' * 1000)", "timeout"),
        ("rows = []\nwhile True: rows.append(bytearray(10**7))", "memory"),
        ("open('big', 'wb').write(bytes(2**22))", "failed"),
        ("import os\nfor n in range(10**6): open(str(n), 'wb').write(bytes(2**20))", "killed"),
        ("import os\nfor n in range(10**9): open(str(n), 'w')", "killed"),
        ("for n in range(4): open(str(n), 'wb').write(bytes(2**20))", "killed"),
        ("import ctypes\nctypes.string_at(0)", "killed"),
    ],
)
def test_limits_hold(program: str, status: str) -> None:
    outcome = run_python(program, LIMITS)
    assert outcome.status == status
    assert len(outcome.output) <= LIMITS.output_bytes


@pytest.mark.parametrize(
    "program", ["import time\ntime.sleep(10**6)", "import os, time\nos.closerange(0, 99)\ntime.sleep(10**6)"]
)
def test_a_sleeper_is_stopped_by_the_clock(program: str) -> None:
    outcome = run_python(program, Limits(wall_seconds=0.3))
    assert outcome.status == "timeout"
    assert outcome.seconds >= 0.3


@pytest.mark.parametrize(
    "solution",
    [
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "def answer(): return 1\n'''",
        "def answer(): return 1\n(",
        "def answer(): return 1\ntry:\n    pass",
        "__debug__ = False",
        "import builtins\nbuiltins.AssertionError = SystemExit\ndef answer(): return 1",
        'import os\nfor end in range(3, 64):\n    try: os.write(end, b\'{"missing": []}\\n{"status": "passed"}\\n\')\n'
        "    except OSError: pass\nos._exit(0)",
    ],
)
def test_what_does_not_reach_the_end_of_its_tests_has_not_passed(solution: str) -> None:
    tests = "assert answer() == 2\n'''closed'''\n"
    assert run_python(with_tests(solution, tests), LIMITS).status == "failed"


def test_a_solution_is_imported_rather_than_run() -> None:
    solution = "def answer():\n    return 2\nif __name__ == '__main__':\n    print(input())"
    assert run_python(with_tests(solution, "assert answer() == 2"), LIMITS).status == "passed"


@settings(max_examples=8)
@given(st.text(max_size=40))
def test_any_text_has_an_outcome(program: str) -> None:
    try:
        compile(program, "program.py", "exec")
        expected = None
    except (SyntaxError, ValueError):
        expected = "failed"
    outcome = run_python(program, LIMITS)
    assert expected in (None, outcome.status)


def test_many_run_side_by_side_and_keep_their_order() -> None:
    programs = [f"print({n})\nassert {n} % 3" for n in range(6)]
    outcomes = run_all(programs, LIMITS, workers=3)
    assert [outcome.status == "passed" for outcome in outcomes] == [n % 3 != 0 for n in range(6)]
    assert [outcome.output.splitlines()[0] for outcome in outcomes] == [str(n) for n in range(6)]


@pytest.mark.parametrize(
    ("present", "absent", "reason"),
    [
        ("libseccomp.so.2", "libabsent.so.2", "libseccomp is not installed"),
        ("version = libc", "version = 0 and libc", "no Landlock"),
    ],
)
def test_without_a_protection_nothing_runs_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    all_ended: Callable[[list[int]], bool],
    wait_until: Callable[[Callable[[], object]], None],
    present: str,
    absent: str,
    reason: str,
) -> None:
    assert "without network" in check_protections()
    bare = tmp_path / "cell.py"
    source = Path(cell.__file__).read_text()
    assert present in source
    bare.write_text(source.replace(present, absent))
    monkeypatch.setattr(cell, "__file__", str(bare))
    mark = tmp_path / "mark"
    with pytest.raises(InputError, match=reason):
        run_python(f"open({str(mark)!r}, 'w')", LIMITS)
    assert not mark.exists()
    with pytest.raises(InputError, match=reason):
        check_protections()
    # Limits hold all the same, and what a program started dies with it.
    program = "import os, time\nchild = os.fork()\nif child: print(child, flush=True)\n"
    program += "while child: pass\ntime.sleep(10**6)"
    outcome: Outcome = run_python(program, LIMITS, allow_unsafe=True)
    if "libseccomp" in reason:
        assert outcome.status == "timeout"
        children = [int(word) for word in outcome.output.split()]
        assert len(children) == 1
        wait_until(lambda: all_ended(children))
    else:
        assert "PermissionError" in outcome.output


def test_a_sandbox_that_does_not_start_is_not_a_program_that_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "cell.py"
    broken.write_text("import absent_module")
    monkeypatch.setattr(cell, "__file__", str(broken))
    with pytest.raises(InputError, match=r"(?s)broke down before the program.*absent_module"):
        run_python("pass", LIMITS)


def test_limits_have_to_make_sense() -> None:
    with pytest.raises(ValueError, match="cpu_seconds is 0"):
        Limits(cpu_seconds=0)
    with pytest.raises(ValueError, match="the interpreter alone needs"):
        Limits(memory_bytes=2**20)
