"""Which device computes, with how many threads, and how its memory is handed out."""

import ctypes
import os
import sys
import time
from typing import Literal

import torch

from puna.runtime.errors import InputError

DeviceName = Literal["auto", "cpu", "cuda"]

_PEAK_BF16_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 tensor-core peaks from NVIDIA's data sheets, by a part of the device's name."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT_BYTES = 2**30
_HUGE_PAGE_BYTES = 2**21
_MADV_HUGEPAGE = 14


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
    """Ask glibc to keep large freed blocks instead of returning them to the kernel, and to keep them in huge pages.

    A training step allocates and frees the same large activations every time; by default each comes from the
    kernel as fresh zeroed pages of 4 KiB, which on a CPU costs about a fifth of the step (`docs/benchmarks.md`).
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    # Grow the heap once by addresses, which cost nothing until they are used, so that the advice covers what comes.
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    size = _LARGEST_KEPT_BYTES - _HUGE_PAGE_BYTES
    if block := libc.malloc(ctypes.c_size_t(size)):
        start = -(-block // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(block + size - start), _MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(block))


def prefer_huge_pages(tensor: torch.Tensor) -> None:
    """Ask the kernel to put a large tensor that has not been written yet into pages of 2 MiB.

    Reading weights once for every token is then up to twice as fast on a virtual machine, where finding the place of a
    page of 4 KiB costs as much as reading it.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    start = -(-tensor.data_ptr() // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    size = (tensor.data_ptr() + tensor.nbytes - start) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_HUGEPAGE)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second that the device could do at best in matrix products of `dtype`.

    A GPU's bfloat16 peak is its data sheet's. For everything else it is the best of a few large products, timed here
    in about half a second.
    """
    if device.type == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in _PEAK_BF16_FLOPS.items():
            if part in name:
                return peak
    size = 8192 if device.type == "cuda" else 1024
    left, right = torch.ones(size, size, dtype=dtype, device=device), torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
