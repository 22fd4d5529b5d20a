"""What runs in the child process: give everything up, for good, and then run the program.

This file is started by path, with the standard library alone (`run.py` beside it), and imports nothing of Puna. Three
things of the kernel hold the program, none of which needs privileges or can be undone by what runs after: resource
limits, a filter of system calls (seccomp), and rights on files (Landlock).
"""

import ctypes
import json
import linecache
import os
import resource
import signal
import stat
import sys
import traceback
from functools import partial
from typing import Any

ALLOWED_CALLS = """
read write readv writev pread64 pwrite64 preadv pwritev open openat close close_range lseek stat fstat lstat
newfstatat statx access faccessat faccessat2 readlink readlinkat getcwd chdir fchdir getdents getdents64 fsync
fdatasync ftruncate fadvise64 flock rename renameat renameat2 unlink unlinkat umask sendfile copy_file_range dup dup2
dup3 fcntl ioctl pipe pipe2 eventfd2 poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait
socketpair recvfrom shutdown getsockopt setsockopt getsockname getpeername mmap munmap mprotect mremap madvise msync
brk rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait sigaltstack restart_syscall
pause alarm getitimer setitimer futex set_robust_list get_robust_list rseq set_tid_address sched_yield membarrier
arch_prctl sched_getaffinity sched_getscheduler sched_getparam getpriority getcpu getpid gettid getppid getuid geteuid
getgid getegid getgroups getpgrp getpgid getsid getrusage getrlimit time times gettimeofday clock_gettime clock_getres
clock_nanosleep nanosleep uname sysinfo getrandom exit exit_group
"""
"""What an interpreter needs that computes, and reads and writes files. What is absent fails with EPERM: no program is
started, no socket made, no other process signalled, traced or limited, no file's mode, owner or time changed."""

_CLONE_THREAD = 0x00010000
_EPERM, _ENOSYS = 1, 38
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38

# linux/landlock.h
_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_FILE, _MAKE_REG, _TRUNCATE = (1 << bit for bit in (1, 2, 3, 5, 8, 14))
_HANDLED = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""By version of Landlock, all rights that it knows; those that no rule gives are denied."""
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READABLE = ("/usr", "/lib", "/lib64", "/etc/localtime", "/etc/ld.so.cache", "/dev/zero", "/dev/urandom")


class _Condition(ctypes.Structure):
    """`scmp_arg_cmp` of seccomp.h: which argument, how it is compared, and with what."""

    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    """`landlock_path_beneath_attr` of linux/landlock.h."""

    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


_EQUAL, _MASKED_EQUAL = 4, 7


def main() -> None:
    """Read the task from standard input (`run.py` writes it), obey, and report on the descriptor that it names."""
    task = json.load(sys.stdin)
    report = task["report"]
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "linux":
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != task["parent"]:
        os._exit(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(task["folder"])
    limit_resources(task["limits"])
    missing = []
    for lock in (partial(lock_files, folder=task["folder"]), lock_calls):
        try:
            lock(libc)
        except OSError as error:
            missing.append(error.strerror)
    _tell(report, {"missing": missing})
    if missing and not task["allow_unsafe"]:
        os._exit(1)
    status = run(task["program"])
    _tell(report, {"status": status, "token": task["token"]})
    os._exit(0)  # No thread is waited for.


def run(program: str) -> str:
    """Run a program as if it were the main one; errors are printed as Python prints them.

    Returns:
        "passed" where it came to its end, "memory" where it ran out of it, "failed" otherwise, sys.exit(0) included.
    """
    name = "program.py"
    linecache.cache[name] = (len(program), None, program.splitlines(keepends=True), name)
    status = "passed"
    try:
        exec(compile(program, name, "exec"), {"__name__": "__main__"})
    except MemoryError:
        status = "memory"
    except BaseException as error:
        status = "failed"
        sys.stdout.flush()
        inside = error.__traceback__.tb_next if error.__traceback__ else None
        traceback.print_exception(type(error), error, inside)
    else:
        sys.stdout.flush()
    return status


def limit_resources(limits: dict[str, Any]) -> None:
    """Hold this process to `puna.evaluate.sandbox.run.Limits`, as plain values."""
    cpu, memory, file = limits["cpu_seconds"], limits["memory_bytes"], limits["file_bytes"]
    # The soft limit's signal can be ignored, the hard one's cannot.
    for which, soft, hard in (
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, file, file),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        most = resource.getrlimit(which)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(which, (soft, hard))


def lock_calls(libc: ctypes.CDLL) -> None:
    """Deny all system calls but `ALLOWED_CALLS`, threads, and signals to this process, by libseccomp.

    Raises:
        OSError: libseccomp is not installed, or the kernel does not filter.
    """
    try:
        seccomp = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    except OSError as error:
        raise OSError(0, "libseccomp is not installed, which filters system calls") from error
    seccomp.seccomp_init.restype = ctypes.c_void_p
    act_allow, act_errno = 0x7FFF0000, 0x00050000
    rules = ctypes.c_void_p(seccomp.seccomp_init(act_errno | _EPERM))

    def rule(action: int, name: str, *conditions: _Condition) -> None:
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number == -1:  # Not known to this library; calls that another architecture has are below that.
            return
        array = (_Condition * len(conditions))(*conditions)
        code = seccomp.seccomp_rule_add_array(rules, action, number, len(conditions), array)
        if code != 0:
            raise OSError(-code, f"the rule for {name} was refused")

    for name in ALLOWED_CALLS.split():
        rule(act_allow, name)
    own_process = _Condition(0, _EQUAL, os.getpid(), 0)
    rule(act_allow, "kill", own_process)
    rule(act_allow, "tgkill", own_process)
    rule(act_allow, "sendto", _Condition(4, _EQUAL, 0, 0))  # To the other end of a pair, not to an address.
    rule(act_allow, "prlimit64", _Condition(0, _EQUAL, 0, 0), _Condition(2, _EQUAL, 0, 0))  # To look, not to set.
    rule(act_allow, "clone", _Condition(0, _MASKED_EQUAL, _CLONE_THREAD, _CLONE_THREAD))
    rule(act_errno | _ENOSYS, "clone3")  # Its flags are out of reach of a filter; the C library falls back to clone.
    _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    code = seccomp.seccomp_load(rules)
    if code != 0:
        raise OSError(-code, "the kernel takes no filter of system calls (seccomp)")


def lock_files(libc: ctypes.CDLL, folder: str) -> None:
    """Let libraries be read, plain files be made and removed in one folder, and nothing else, by Landlock.

    Raises:
        OSError: the kernel has no Landlock.
    """
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1) if sys.platform == "linux" else -1
    if version < 1:
        raise OSError(0, "the kernel has no Landlock, which guards files")
    handled = _HANDLED[max(known for known in _HANDLED if known <= version)]
    attributes = ctypes.c_uint64(handled)
    rules = _checked(libc.syscall(_CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(8), 0))
    given = dict.fromkeys((*_READABLE, sys.base_prefix, sys.base_exec_prefix), _READ_FILE | _READ_DIR)
    given[os.devnull] = _READ_FILE | _WRITE_FILE
    given[folder] = _READ_FILE | _READ_DIR | _WRITE_FILE | _TRUNCATE | _MAKE_REG | _REMOVE_FILE
    for path, rights in given.items():
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= ~_READ_DIR
        beneath = _PathBeneath(rights & handled, descriptor)
        _checked(libc.syscall(_ADD_RULE, rules, 1, ctypes.byref(beneath), 0))
        os.close(descriptor)
    _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked(libc.syscall(_RESTRICT_SELF, rules, 0))
    os.close(rules)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _tell(report: int, message: dict[str, Any]) -> None:
    os.write(report, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
