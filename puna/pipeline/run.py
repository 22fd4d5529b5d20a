"""`puna run`: the stages of a recipe in order, each only if something that it depends on has changed.

A recipe has one table a stage, run in the order in which they stand. The table's name is the stage's name in this
run; `stage` says which command it is, where that differs. `{corpus}` in a value stands for the output folder of the
stage named corpus, which has to stand before.

    output = "runs/mine"

    [corpus]
    stage = "curate"
    source = "python"

    [tokenizer]
    documents = "{corpus}/train.jsonl"
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.config import apply_overrides, parse_config, read_toml, to_plain
from puna.pipeline.record import StageRecord
from puna.pipeline.stages import load_stage
from puna.runtime.errors import InputError
from puna.runtime.files import read_json, write_json
from puna.runtime.manifest import code_version, content_hash
from puna.runtime.progress import duration, say

_REFERENCE = re.compile(r"\{([A-Za-z0-9_-]+)\}")
_RECORDS = ".run"


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a run, its configuration checked."""

    name: str
    """Within the run; the output's folder name too."""
    command: str
    """Such as "pretrain"."""
    config: Any
    """The stage's own dataclass."""
    main: Callable[[Any], None]
    """Does it."""
    needs: tuple[str, ...]
    """Names of the stages whose output it reads."""
    output: Path
    """Its folder."""


def run_recipe(recipe: Path, overrides: Iterable[str]) -> None:
    """Plan, run what is out of date, and write report.html.

    Raises:
        InputError: the recipe is wrong (found before anything runs), a stage's input is, or torchrun started several
            of these.
    """
    from puna.pipeline.report import print_summary, write_report

    if (num_processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise InputError(
            f"`puna run` brings the stages of {recipe} up to date one by one, and the {num_processes} processes of "
            "torchrun would do each of them at once. Start it without torchrun. A stage that is to train on several "
            "processes is started on its own, as in `torchrun --nproc-per-node 2 -m puna.cli pretrain RECIPE.toml`."
        )
    values = read_toml(recipe)
    apply_overrides(values, overrides)
    output, stages = plan(values, str(recipe))
    started = time.monotonic()
    records: dict[str, StageRecord] = {}
    for number, stage in enumerate(stages, start=1):
        records[stage.name] = _bring_up_to_date(stage, output, records, f"[{number}/{len(stages)}]")
    say(f"Everything is up to date after {duration(time.monotonic() - started)}.")
    print_summary(output, list(records.values()))
    say(f"Report: {write_report(output, list(records.values()))}")


def plan(values: dict[str, Any], source: str) -> tuple[Path, list[PlannedStage]]:
    """Check a whole recipe and resolve its references.

    Raises:
        InputError: no output, no stage, an unknown stage or key, or a reference to a stage that does not stand before.
    """
    output = values.pop("output", None)
    if not isinstance(output, str):
        raise InputError(f'{source} has no top-level output = "FOLDER".')
    root = Path(output).expanduser()
    stages: list[PlannedStage] = []
    for name, table in values.items():
        if not isinstance(table, dict):
            raise InputError(f"{source}: {name} is not a table. At the top stand `output` and one table a stage.")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise InputError(f"{source}: a stage's name is letters, digits, - and _; {name!r} is not.")
        if "output" in table:
            raise InputError(f"{source}: [{name}] sets output, but in a run a stage writes to {root / name}.")
        table = dict(table)
        command = table.pop("stage", name)
        kind, main = load_stage(command)
        folders = {stage.name: str(stage.output) for stage in stages}
        needs: list[str] = []
        resolved = _resolve(table, folders, needs, f"{source}: {name}")
        config = parse_config(kind, {"output": str(root / name)} | resolved, f"{source}, [{name}]")
        stages.append(PlannedStage(name, command, config, main, tuple(dict.fromkeys(needs)), root / name))
    if not stages:
        raise InputError(f"{source} has no stage.")
    return root, stages


def _resolve(value: Any, folders: dict[str, str], needs: list[str], where: str) -> Any:
    """`value` with every {name} replaced; `needs` collects the names."""

    def folder(match: re.Match[str]) -> str:
        if match[1] not in folders:
            before = ", ".join(folders) or "none"
            raise InputError(f"{where} refers to {match[0]}, but no stage of that name stands before it ({before}).")
        needs.append(match[1])
        return folders[match[1]]

    if isinstance(value, str):
        return _REFERENCE.sub(folder, value)
    if isinstance(value, dict):
        return {key: _resolve(part, folders, needs, where) for key, part in value.items()}
    if isinstance(value, list):
        return [_resolve(part, folders, needs, where) for part in value]
    return value


def _bring_up_to_date(stage: PlannedStage, root: Path, before: dict[str, StageRecord], position: str) -> StageRecord:
    path = root / _RECORDS / f"{stage.name}.json"
    fingerprint = _fingerprint(stage, before)
    old = StageRecord(**read_json(path)) if path.exists() else None
    same = old is not None and old.fingerprint == fingerprint and stage.output.exists()
    if old is not None and same and old.done:
        say(f"{position} {stage.name}: up to date")
        return old
    say(f"{position} {stage.name} (puna {stage.command})")
    started = time.monotonic()
    with contextlib.nullcontext() if same else _set_aside(stage.output, root / _RECORDS / "previous" / stage.name):
        write_json(path, vars(StageRecord(stage.name, stage.command, fingerprint, 0.0, done=False)))
        stage.main(stage.config)
    earlier = old.seconds if old is not None and same else 0.0
    record = StageRecord(stage.name, stage.command, fingerprint, earlier + time.monotonic() - started, done=True)
    write_json(path, vars(record))
    say(f"{position} {stage.name}: done in {duration(record.seconds)}")
    return record


@contextlib.contextmanager
def _set_aside(output: Path, place: Path) -> Iterator[None]:
    """Keep the outdated `output` at `place` for as long as the block runs; put it back if the block makes none."""
    if place.exists():
        shutil.rmtree(place)
    if output.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        output.rename(place)
    try:
        yield
    except BaseException:
        if place.exists() and not any((output / "checkpoints").glob("step-*")):
            shutil.rmtree(output, ignore_errors=True)
            place.rename(output)
        raise
    shutil.rmtree(place, ignore_errors=True)


def _fingerprint(stage: PlannedStage, before: dict[str, StageRecord]) -> str:
    made_here = [str(stage.output.parent / name) for name in stage.needs]
    config = to_plain(stage.config)
    outside = {
        text: content_hash(Path(text).expanduser())
        for text in _strings({key: value for key, value in config.items() if key != "output"})
        if not any(text == folder or text.startswith(f"{folder}/") for folder in made_here)
        and Path(text).expanduser().exists()
    }
    facts = {
        "command": stage.command,
        "config": config,
        "outside": outside,
        "needs": {name: before[name].fingerprint for name in stage.needs},
        "code": code_version(),
        "python": platform.python_version(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if value:
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
