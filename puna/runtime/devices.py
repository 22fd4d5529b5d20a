"""Which device computes, with how many threads, and how its memory is handed out."""

import ctypes
import os
import sys
from typing import Literal

import torch

from puna.runtime.errors import InputError

DeviceName = Literal["auto", "cpu", "cuda"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def open_device(name: DeviceName = "auto", num_threads: int = 0) -> torch.device:
    """The torch device for a name; "auto" takes a GPU where there is one.

    Args:
        name: which device.
        num_threads: CPU threads for torch; 0 means every core that this process may run on.

    Raises:
        InputError: "cuda" on a machine without a usable GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device is 'cuda', but torch sees no usable GPU here. Use device = 'cpu' or 'auto'.")
    if name != "cpu" and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
        return torch.device("cuda")
    torch.set_num_threads(num_threads or available_cores())
    keep_freed_memory()
    return torch.device("cpu")


def available_cores() -> int:
    """Cores that this process may run on: fewer than the machine's under taskset or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Ask glibc to keep large freed blocks instead of returning them to the kernel.

    A training step allocates and frees the same large activations every time; by default each comes from the
    kernel as fresh zeroed pages, which on a CPU costs about a fifth of the step (`docs/benchmarks.md`).
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
