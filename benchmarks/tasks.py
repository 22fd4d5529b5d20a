"""Every task, full tuning against each parameter-efficient method and a classical baseline: the table of docs/tasks.md.

    puna run recipes/trunk.toml
    python benchmarks/tasks.py --model runs/trunk/pretrain/model --data ../shared/data/tasks [--quick] [--json]

A cell is a data set and a method: all cells of a set see the same slice, for the same number of steps, from the same
model, with one seed; only the learning rate is the method's own (METHODS). Each cell runs in a process of its own, on
one thread, and is written to OUTPUT/cells.jsonl when it is done; cells that stand there are not run again, so the table
can be made in pieces: --sets, --methods and --minutes choose what to do now. Whoever else uses the machine changes
seconds, and nothing else; --busy notes it. --write puts the table between the markers of docs/tasks.md.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from figures import command_line, figure, hardware, show
from task_baselines import baseline
from task_data import DATA_SETS, DataSet, read_slice, write_slices

from puna.runtime.manifest import content_hash


class Method(NamedTuple):
    """How a row of the table is trained."""

    peft: dict[str, Any] | None
    """Settings of the method; none: all parameters."""
    learning_rate: float
    optimizer: str = "adamw"


_LORA = {"kind": "lora", "rank": 8, "alpha": 16.0}
METHODS = {
    "full": Method(None, 5e-3, "muon"),
    "lora": Method(_LORA, 5e-3),
    "rslora": Method(_LORA | {"alpha": 8.0, "rank_stabilized": True}, 5e-3),
    "dora": Method(_LORA | {"weight_decomposed": True}, 5e-3),
    "qlora": Method(_LORA | {"four_bits": {}}, 5e-3),
    "adalora": Method({"kind": "adalora", "initial_rank": 12, "target_rank": 8}, 1e-2),
    "bottleneck": Method({"kind": "bottleneck", "size": 16}, 5e-3),
    "ia3": Method({"kind": "ia3"}, 3e-2),
    "bitfit": Method({"kind": "bitfit", "targets": ["layers.*"]}, 2e-2),
    "prefix": Method({"kind": "prefix", "num_virtual_tokens": 10}, 3e-2),
    "prompt": Method({"kind": "prompt", "num_virtual_tokens": 10}, 3e-2),
    "partial": Method({"kind": "partial", "top_layers": 1}, 5e-3, "muon"),
}
"""By the names of rows. Muon is for the model's own matrices; learning rates are those usual for a method, times ten,
for small models bear large steps."""
BASELINE = "baseline"
Cells = dict[tuple[str, str], dict[str, Any]]
"""By data set and method."""
STEPS = 200
NUM_TRAIN, NUM_HELD_OUT = 1000, 500
MARKERS = ("<!-- table of benchmarks/tasks.py -->", "<!-- end of the table -->")


def run_cell(
    data_set: DataSet, method: str, model: Path, files: dict[str, Path], steps: int, work: Path
) -> dict[str, Any]:
    """One cell's figures, in this process."""
    started = time.perf_counter()
    if method == BASELINE:
        name, value = baseline(data_set, read_slice(files["train"]), read_slice(files["held_out"]))
        return {"value": value, "seconds": time.perf_counter() - started, "note": name}
    import torch

    from puna.config import parse_config
    from puna.finetune.config import FinetuneConfig
    from puna.finetune.main import main as finetune

    torch.set_num_threads(1)
    how = METHODS[method]
    settings: dict[str, Any] = {
        "model": str(model),
        "output": str(work),
        "task": data_set.task,
        "data": {side: str(path) for side, path in files.items()},
        "train": {
            "steps": steps,
            "batch_rows": data_set.rows,
            "micro_batch_rows": data_set.rows,
            "row_length": data_set.row_length,
            "num_threads": 1,
            "tensorboard": False,
            "log_every": 10,
            "optimizer": {"kind": how.optimizer, "learning_rate": how.learning_rate},
            "schedule": {"warmup_steps": steps // 10},
        },
    }
    if how.peft is not None:
        settings["peft"] = how.peft
    config = parse_config(FinetuneConfig, settings, f"{data_set.name}, {method}")
    before = _peak_megabytes()
    finetune(config)
    megabytes = _peak_megabytes() - before
    written = next(path for name in ("model", "adapter") if (path := work / name / "puna.json").exists())
    facts = json.loads(written.read_text(encoding="utf-8"))["results"]
    return {
        "value": facts[data_set.metric] / data_set.full_marks,
        "trained_parameters": num_trained(config),
        "seconds": facts["seconds"],
        "megabytes": megabytes,
    }


def num_trained(config: Any) -> int:
    """How many parameters such a run trains, the head's among them."""
    from puna.finetune.tasks.head import open_tasks
    from puna.finetune.text.task import TextTask
    from puna.peft.heads import add_head
    from puna.peft.tuning import adapt
    from puna.tokenizer.load import load_tokenizer
    from puna.weights.load import load_model

    model = load_model(config.model)
    adapt(model, config.peft, config.train.steps, config.train.seed)
    if not isinstance(config.task, TextTask):
        add_head(model, open_tasks(config, load_tokenizer(config.model)).head, config.train.seed)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _peak_megabytes() -> float:
    """Most memory that this process has had; Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)


def _child(sender: Any, *arguments: Any) -> None:
    log = arguments[-1].with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sender.send(run_cell(*arguments))


def in_own_process(*arguments: Any) -> dict[str, Any]:
    """`run_cell` in a process of its own, which has imported everything before its memory is first looked at."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["puna.finetune.main", "puna.peft.methods", "sklearn.metrics", "seqeval.metrics"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, *arguments))
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv()
    except EOFError:
        log = arguments[-1].with_suffix(".log")
        raise RuntimeError(f"the cell failed:\n{log.read_text()[-2000:]}") from None
    finally:
        process.join()
    return found


def fingerprint(trunk: str, data_set: DataSet, method: str) -> str:
    """Changes with all that a cell's figure follows from; `trunk` is the hash of the model."""
    slices = (NUM_TRAIN, NUM_HELD_OUT, data_set.form, data_set.task)
    how = (trunk, STEPS, METHODS[method], data_set.row_length, data_set.rows) if method != BASELINE else ()
    return hashlib.sha256(repr((slices, how)).encode()).hexdigest()[:16]


def read_cells(path: Path, trunk: str) -> Cells:
    """Cells that are done, by data set and method, without those of another trunk or other settings."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done = {(cell["set"], cell["method"]): cell for cell in map(json.loads, lines)}
    now = {(each.name, method): fingerprint(trunk, each, method) for each, method in wanted([], [])}
    return {key: cell for key, cell in done.items() if cell["fingerprint"] == now.get(key)}


def table(cells: Cells) -> str:
    """Two tables in Markdown: the figures, and what each method costs."""
    sets = [each for each in DATA_SETS if any(name == each.name for name, _ in cells)]
    methods = [m for m in (BASELINE, *METHODS) if any(method == m for _, method in cells)]
    lines = [f"| | {' | '.join(each.name for each in sets)} |", "| --- |" + " --- |" * len(sets)]
    lines += [f"| *metric* | {' | '.join(f'*{each.metric_title}*' for each in sets)} |"]
    for method in methods:
        found = [cells.get((each.name, method)) for each in sets]
        lines += [f"| {method} | {' | '.join(_number(cell, cells) for cell in found)} |"]
    busy = "; others used the machine meanwhile" if any(cell["busy"] for cell in cells.values()) else ""
    costs = "Trained parameters (the head's among them), peak memory beyond the libraries', and seconds of training"
    lines += ["", f"{costs} on one thread{busy}, over all sets:", ""]
    lines += ["| | trained parameters | optimiser | peak MB | seconds |", "| --- |" + " --- |" * 4]
    for method in (m for m in methods if m != BASELINE):
        of_method = [cell for (_, name), cell in cells.items() if name == method]
        lines += [
            f"| {method} | {_range(of_method, 'trained_parameters')} "
            f"| {METHODS[method].optimizer}, {METHODS[method].learning_rate:g} "
            f"| {_range(of_method, 'megabytes')} | {_range(of_method, 'seconds')} |"
        ]
    return "\n".join(lines)


def _number(cell: dict[str, Any] | None, cells: Cells) -> str:
    """In percent; bold where it is at least the baseline's."""
    if cell is None:
        return ""
    shown = f"{100 * cell['value']:.1f}"
    standard = cells.get((cell["set"], BASELINE))
    beats = standard is not None and cell["method"] != BASELINE and cell["value"] >= standard["value"]
    return f"**{shown}**" if beats else shown


def _range(cells: list[dict[str, Any]], key: str) -> str:
    values = [cell[key] for cell in cells]
    low, high = min(values), max(values)
    return f"{low:,.0f}" if round(low) == round(high) else f"{low:,.0f} to {high:,.0f}"


def write_page(page: Path, text: str) -> None:
    """Put `text` between the markers."""
    before, rest = page.read_text(encoding="utf-8").split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    page.write_text(f"{before}{MARKERS[0]}\n\n{text}\n\n{MARKERS[1]}{after}", encoding="utf-8")


def wanted(sets: list[str], methods: list[str]) -> Iterator[tuple[DataSet, str]]:
    """The baselines first, then method by method."""
    for method in (BASELINE, *METHODS):
        for data_set in DATA_SETS:
            if (not methods or method in methods) and (not sets or data_set.name in sets):
                yield data_set, method


def main() -> None:
    parser = command_line(__doc__, "one set, three cells, ten steps; nothing is kept: under 50 s")
    parser.add_argument("--model", type=Path, default=Path("runs/trunk/pretrain/model"), help="the trunk")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/tasks"), help="folder of public task data")
    parser.add_argument("--output", type=Path, default=Path("runs/tasks"), help="gets cells.jsonl")
    parser.add_argument("--sets", nargs="*", default=[], choices=[each.name for each in DATA_SETS])
    parser.add_argument("--methods", nargs="*", default=[], choices=[BASELINE, *METHODS])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so long")
    parser.add_argument("--busy", action="store_true", help="others use the machine: seconds are not to be compared")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table of what is done into this page")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sets, arguments.methods = ["SST-2"], [BASELINE, "full", "lora"]
    trunk = content_hash(arguments.model)
    done = {} if arguments.quick else read_cells(arguments.output / "cells.jsonl", trunk)
    started = time.monotonic()
    for data_set, method in wanted(arguments.sets, arguments.methods):
        if (data_set.name, method) in done:
            continue
        if time.monotonic() - started > 60 * arguments.minutes:
            break
        cell = measure(arguments, data_set, method) | {"fingerprint": fingerprint(trunk, data_set, method)}
        done[data_set.name, method] = cell
        report(cell, done, arguments.json)
        if not arguments.quick:
            with (arguments.output / "cells.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(cell) + "\n")
    if arguments.write:
        write_page(arguments.write, table(done))


def measure(arguments: argparse.Namespace, data_set: DataSet, method: str) -> dict[str, Any]:
    """Run one cell, and leave nothing of it but its log and figures."""
    sizes = (160, 40) if arguments.quick else (NUM_TRAIN, NUM_HELD_OUT)
    name = data_set.name.replace(" ", "_")
    files = write_slices(data_set, arguments.data, arguments.output / "slices" / name, *sizes)
    work = arguments.output / f"{name}-{method}"
    shutil.rmtree(work, ignore_errors=True)
    found = in_own_process(data_set, method, arguments.model, files, 10 if arguments.quick else STEPS, work)
    shutil.rmtree(work, ignore_errors=True)
    return {"set": data_set.name, "method": method, **found, "busy": arguments.busy, "hardware": hardware()}


def report(cell: dict[str, Any], done: Cells, as_json: bool) -> None:
    """Say what a cell has given, beside the baseline."""
    standard = done.get((cell["set"], BASELINE))
    theirs = None if standard is None or cell["method"] == BASELINE else standard["value"]
    metric = next(each.metric_title for each in DATA_SETS if each.name == cell["set"])
    more = {key: cell[key] for key in ("trained_parameters", "megabytes", "seconds", "note") if key in cell}
    show(figure(f"{cell['set']}: {cell['method']}", cell["value"], theirs, metric, **more), as_json)


if __name__ == "__main__":
    main()
