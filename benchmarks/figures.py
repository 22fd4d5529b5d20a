"""What every benchmark prints: a figure of ours beside the same of the other side, and the machine it was taken on."""

import argparse
import functools
import json
import os
import platform
from pathlib import Path
from typing import Any

Figure = dict[str, Any]
"""name, ours, theirs, ratio, unit, hardware, and what else there is to say."""


def command_line(description: str | None, quick: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; `quick` says what `--quick` measures, and in what time."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", action="store_true", help="one JSON object per figure")
    return parser


def figure(
    name: str,
    ours: float,
    theirs: float | None,
    unit: str,
    *,
    less_is_better: bool = False,
    ratio: float | None = None,
    **more: Any,
) -> Figure:
    """One figure of both sides.

    Args:
        theirs: None where the other side could not be run.
        less_is_better: of times and memory. The ratio is above 1 where we do better, whatever the unit.
        ratio: in place of that of the two figures, such as the median of several.
        more: what a reader should know besides.
    """
    if ratio is None and theirs is not None:
        better, worse = (theirs, ours) if less_is_better else (ours, theirs)
        ratio = better / worse if worse else None
    return {
        "name": name,
        "ours": _short(ours),
        "theirs": None if theirs is None else _short(theirs),
        "ratio": None if ratio is None else round(ratio, 3),
        "unit": unit,
        "hardware": hardware(),
        **{key: _short(value) if isinstance(value, float) else value for key, value in more.items()},
    }


def show(found: Figure, as_json: bool) -> None:
    """Print a figure: an object in a line, or something to read."""
    if as_json:
        print(json.dumps(found), flush=True)
        return
    ours, theirs = (f"{found[side]:,}" if found[side] is not None else "-" for side in ("ours", "theirs"))
    ratio = "-" if found["ratio"] is None else f"{found['ratio']:.2f}"
    usual = ("name", "ours", "theirs", "ratio", "unit", "hardware")
    more = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found.items() if key not in usual)
    print(
        f"{found['name']:<76} {ours:>12} / {theirs:>12} {found['unit']:<12} = {ratio:>6}  {more}".rstrip(), flush=True
    )


@functools.cache
def hardware() -> str:
    """The GPU, where there is one, or the cores that this process may use and their kind."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    units = {"amx_tile": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}
    best = next((f" ({unit})" for flag, unit in units.items() if flag in flags), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {name}{best}"


def _short(value: float) -> float:
    """Five digits; counts are left as they are."""
    return value if isinstance(value, int) else float(f"{value:.5g}")
