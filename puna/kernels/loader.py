"""Finding and loading the native library."""

import ctypes
import functools
import importlib.machinery
import os
from pathlib import Path

import torch
from torch import Tensor

from puna.runtime.progress import say

LEVELS = ("portable", "avx2", "avx512")
"""Instruction sets that the kernels are compiled for, worst first."""


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where the installation had no C++ compiler (said once) or `PUNA_NATIVE=0` is set.

    The library leaves OpenMP's symbols open: they are found in the copy that torch has loaded, so that both work with
    one pool of threads and never compete for cores.
    """
    if os.environ.get("PUNA_NATIVE") == "0":
        return None
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).parent / f"_native{suffix}"
        if path.exists():
            assert torch.get_num_threads()  # torch, and with it OpenMP, is loaded
            return ctypes.CDLL(str(path))
    say("Puna was installed without a C++ compiler, so its native kernels are missing and training is slower on a CPU.")
    return None


def loaded_library() -> ctypes.CDLL:
    """The library, where `native_library` has found one."""
    library = native_library()
    assert library is not None
    return library


@functools.cache
def level() -> int:
    """The best instruction set of this processor, as an index of `LEVELS`; `PUNA_NATIVE=avx2` asks for a lesser one."""
    best = int(loaded_library().puna_level())
    asked = os.environ.get("PUNA_NATIVE", "")
    return min(best, LEVELS.index(asked)) if asked in LEVELS else best


def address(tensor: Tensor) -> ctypes.c_void_p:
    """Where a tensor's first element lies."""
    return ctypes.c_void_p(tensor.data_ptr())
