"""Several variants of two sides, each run in a process of its own: who is fastest, and what the fastest take."""

import argparse
import contextlib
import json
import logging
import resource
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from figures import figure, show


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `race` hands to the script that it starts."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    for name, kind in (("--variant", str), ("--folder", Path), ("--steps", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)


def race(
    script: str,
    title: str,
    ours: Sequence[str],
    theirs: Sequence[str],
    folder: str,
    arguments: argparse.Namespace,
    steps: int = 12,
) -> None:
    """Every variant once, the fastest of each side twice more in turn; print both sides' speed and peak memory.

    Args:
        script: whose process `--variant NAME` runs `in_own_process`.
        folder: what both sides read.
        steps: that are timed in each run, unless it is to be quick.
    """
    rounds, steps = (1, 2) if arguments.quick else (3, steps)
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in (*ours, *theirs)}
    running = list(found)
    for _ in range(rounds):
        for variant in running:
            command = [sys.executable, script, "--variant", variant, "--folder", folder, "--steps", str(steps)]
            done = subprocess.run([*command, "--device", arguments.device], capture_output=True, text=True)
            if done.returncode:
                print(f"{variant} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                continue
            found[variant].append(json.loads(done.stdout.splitlines()[-1]))
        speeds = {name: statistics.median(run["speed"] for run in runs) for name, runs in found.items() if runs}
        if not any(name in ours for name in speeds) or not any(name in theirs for name in speeds):
            raise SystemExit("nothing to compare: see above")
        best = max((name for name in speeds if name in ours), key=speeds.__getitem__)
        other = max((name for name in speeds if name in theirs), key=speeds.__getitem__)
        running = [best, other]
    if not arguments.json:
        for name, speed in sorted(speeds.items(), key=lambda item: -item[1]):
            print(f"  {name:<28} {speed:>9,.0f} tokens/s {max(run['megabytes'] for run in found[name]):>9,.0f} MB")
    title = f"{title}: {best} / {other}"
    turns = [one["speed"] / two["speed"] for one, two in zip(found[best], found[other], strict=False)]
    show(figure(title, speeds[best], speeds[other], "tokens/s", ratio=statistics.median(turns)), arguments.json)
    peaks = [max(run["megabytes"] for run in found[name]) for name in (best, other)]
    show(figure(f"{title}, peak memory", *peaks, "MB", less_is_better=True), arguments.json)


def in_own_process(run: Callable[[], float], device: str) -> None:
    """Print the tokens per second that `run` gives, and the process's peak memory, libraries included."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    # What training says goes to the other stream; the figures are all that is read.
    with contextlib.redirect_stdout(sys.stderr):
        speed = run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
    if device != "cpu":
        import torch

        peak = torch.cuda.max_memory_allocated() / 1e6
    print(json.dumps({"speed": speed, "megabytes": peak}))


def timed_trainer(kind: Any, device: str, warm_up: int, tokens_of: Callable[[Any], int], **arguments: Any) -> float:
    """Tokens per second of a trainer of `transformers`, from the end of the last step of warm-up on.

    Args:
        tokens_of: how many tokens an example has; padding does not count.
        arguments: of the trainer.
    """
    import time

    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if device != "cpu":
                import torch

                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    trainer = kind(callbacks=[Clock()], **arguments)
    collate, counts = trainer.data_collator, []

    def counting(examples: list[dict[str, Any]]) -> Any:
        """Batches are made in the order of the steps, some ahead of them."""
        counts.append(sum(map(tokens_of, examples)))
        return collate(examples)

    trainer.data_collator = counting
    trainer.train()
    return sum(counts[warm_up : len(ends)]) / (ends[-1] - ends[warm_up - 1])
