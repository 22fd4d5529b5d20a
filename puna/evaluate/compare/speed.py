"""Speed and memory of a model on this machine, each measured in a process of its own.

    python -m puna.evaluate.compare.speed '{"model": "runs/a/model", "settings": {...}}'

prints one line of JSON. What a process has at most held in memory is known for the whole process only, and nothing that
another model left behind shall count.
"""

import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from puna.config import parse_config, to_plain
from puna.evaluate.compare.candidates import Candidate
from puna.evaluate.compare.section import Figure, Section, Sheet, not_measured
from puna.infer.config import EngineConfig
from puna.runtime.errors import InputError
from puna.runtime.page import new_figure, plain_label, to_svg
from puna.runtime.progress import progress


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """How speed is measured."""

    measure: bool = True
    """Whether it is measured at all."""
    prompt_tokens: int = 256
    """Tokens of the prompt; fewer where the context is too short for prompt and answer."""
    new_tokens: int = 64
    """Tokens generated after it."""
    repeats: int = 5
    """Measurements of each, of which the median counts."""
    rounds: int = 2
    """Processes for each model, the models in turn, of which the fastest counts, as a busy machine only slows."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Where and in what precision."""

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.repeats, self.rounds) < 1 or self.new_tokens < 2:
            raise ValueError("prompt_tokens, repeats and rounds have to be at least 1, and new_tokens at least 2.")


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured."""

    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float
    """Reading a prompt, one text at a time."""
    decode_tokens_per_second: float
    """Writing an answer, one text at a time."""
    batch_decode_tokens_per_second: float
    """Writing as many answers at once as the engine has rows."""
    peak_memory_bytes: int
    """Most memory that the process held: weights, cache, and the program itself."""
    load_seconds: float


def measure(model: Path, config: SpeedConfig) -> Speed:
    """Measure in this process.

    Raises:
        InputError: the model cannot be loaded, or its context is too short to measure in.
    """
    from puna.infer.load import load_engine
    from puna.infer.sampling import SamplingParams

    started = time.perf_counter()
    engine = load_engine(model, config.engine)
    load_seconds = time.perf_counter() - started
    new_tokens = min(config.new_tokens, engine.max_context // 2)
    prompt_tokens = min(config.prompt_tokens, engine.max_context - new_tokens)
    if new_tokens < 2:
        raise InputError(f"{model} has a context of {engine.max_context} tokens, in which nothing can be measured.")
    draw = random.Random(0)

    def seconds(rows: int, answer_tokens: int) -> float:
        prompts = [[draw.randrange(engine.tokenizer.vocab_size) for _ in range(prompt_tokens)] for _ in range(rows)]
        params = SamplingParams(max_tokens=answer_tokens, temperature=0, ignore_eos=True)
        started = time.perf_counter()
        engine.generate(prompts, params)
        return time.perf_counter() - started

    def median(rows: int, answer_tokens: int) -> float:
        return statistics.median(seconds(rows, answer_tokens) for _ in range(config.repeats))

    rows = config.engine.max_rows
    seconds(rows, new_tokens)  # warms up
    prefill, single = median(1, 1), median(1, new_tokens)
    batch = max(median(rows, new_tokens) - median(rows, 1), 1e-9)
    return Speed(
        prompt_tokens,
        new_tokens,
        prompt_tokens / prefill,
        (new_tokens - 1) / max(single - prefill, 1e-9),
        rows * (new_tokens - 1) / batch,
        _peak_memory_bytes(),
        load_seconds,
    )


def speed_section(candidates: Sequence[Candidate], config: SpeedConfig) -> Section:
    """Measure all models with weights, one after another."""
    text = (
        f"On this machine, in a process for each model: a prompt of {config.prompt_tokens} tokens read, "
        f"{config.new_tokens} written greedily. Tokens of different tokenizers carry different amounts of text, see "
        "above. Memory is the most that the process held, the program's own few hundred megabytes included."
    )
    missing = [f"{c.name}: {not_measured('no weights')}" for c in candidates if c.directory is None]
    measured = [c for c in candidates if c.directory is not None]
    if not config.measure:
        return Section("Speed and memory", text, missing=[not_measured("switched off (speed.measure)")])
    speeds: dict[str, Speed] = {}
    with progress("Measuring speed", total=config.rounds * len(measured)) as advance:
        for _ in range(config.rounds):
            for candidate in measured:
                found = _measure_apart(candidate, config)
                before = speeds.get(candidate.name)
                if before is None or found.decode_tokens_per_second > before.decode_tokens_per_second:
                    speeds[candidate.name] = found
                advance()
    columns = [
        "",
        "prefill, tokens/s",
        "decode, tokens/s",
        f"decode, {config.engine.max_rows} texts",
        "peak memory, MB",
    ]
    rows = [
        [
            name,
            f"{speed.prefill_tokens_per_second:,.0f}",
            f"{speed.decode_tokens_per_second:,.0f}",
            f"{speed.batch_decode_tokens_per_second:,.0f}",
            f"{speed.peak_memory_bytes / 1e6:,.0f}",
        ]
        for name, speed in speeds.items()
    ]
    figures = [_figure(speeds)] if speeds else []
    sheets = [Sheet("", columns, rows)] if rows else []
    data = {"speeds": {name: asdict(speed) for name, speed in speeds.items()}}
    return Section("Speed and memory", text, sheets, figures, missing, data=data)


def _measure_apart(candidate: Candidate, config: SpeedConfig) -> Speed:
    task = json.dumps({"model": str(candidate.directory), "settings": to_plain(config)})
    command = [sys.executable, "-m", "puna.evaluate.compare.speed", task]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise InputError(f"The speed of {candidate.name} could not be measured: {reason[0]}")
    return Speed(**json.loads(done.stdout.splitlines()[-1]))


def _peak_memory_bytes() -> int:
    """Of this process. `ru_maxrss` alone would count what the process that started this one held (getrusage(2))."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _figure(speeds: dict[str, Speed]) -> Figure:
    figure = new_figure(9, 0.35 * len(speeds) + 1.1)
    names = [plain_label(name) for name in speeds]
    panels: list[tuple[str, list[float]]] = [
        ("prefill, tokens/s", [speed.prefill_tokens_per_second for speed in speeds.values()]),
        ("decode, tokens/s", [speed.decode_tokens_per_second for speed in speeds.values()]),
        ("peak memory, MB", [speed.peak_memory_bytes / 1e6 for speed in speeds.values()]),
    ]
    axes: Any = figure.subplots(1, len(panels), sharey=True)
    for axis, (label, values) in zip(axes, panels, strict=True):
        drawn = axis.barh(names, values, color="tab:orange" if "tokens" in label else "tab:gray", height=0.6)
        axis.bar_label(drawn, fmt="{:,.0f}", padding=3, fontsize=9)
        axis.margins(x=0.25)
        axis.set(xlabel=label)
    axes[0].invert_yaxis()
    figure.tight_layout()
    return Figure("Speed of one text at a time, and memory.", to_svg(figure))


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    try:
        settings = parse_config(SpeedConfig, asked["settings"], "speed")
        print(json.dumps(asdict(measure(Path(asked["model"]), settings))))
    except InputError as error:
        sys.exit(str(error))
