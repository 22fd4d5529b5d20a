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

What is done again and again stands in [round.NAME], and `rounds` at the top says how often. In there `{NAME}` is the
stage of the same round, `{previous.NAME}` that of the round before, and `{round}` the round's number. The first round
has none before: `{previous.NAME or start}` then stands for the stage `start`, and a setting that needs the round before
is left out; in a list of tables, the table with it. After the rounds, `{previous.NAME}` is that of the last. More
rounds leave the first ones as they are.

    rounds = 2

    [round.answers]
    stage = "reject"
    model = "{previous.tuned or assistant}/model"

    [round.tuned]
    stage = "finetune"
    model = "{previous.tuned or assistant}/model"
    conversations = "{answers}/conversations.jsonl"
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
from puna.pipeline.stages import STAGES, load_stage
from puna.runtime.errors import InputError
from puna.runtime.files import read_json, write_json
from puna.runtime.manifest import code_version, content_hash
from puna.runtime.progress import duration, say

_REFERENCE = re.compile(r"\{([A-Za-z0-9_.-]+)(?: or ([A-Za-z0-9_-]+))?\}")
_RECORDS = ".run"
_ROUND = "round"


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a run, its configuration checked."""

    name: str
    """Within the run; the output's folder too, as in "round2/tuned"."""
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
    rounds = values.pop("rounds", 0)
    if not isinstance(rounds, int) or isinstance(rounds, bool) or (rounds > 0) != (_ROUND in values):
        raise InputError(
            f"{source}: rounds is {rounds!r}. Tables [{_ROUND}.NAME] and rounds = NUMBER, from 1 on, belong together."
        )
    stages: list[PlannedStage] = []
    names: dict[str, str | None] = {}
    for name, table in values.items():
        if not isinstance(table, dict):
            raise InputError(f"{source}: {name} is not a table. At the top stand `output` and one table a stage.")
        if name != _ROUND:
            stages.append(_plan_stage(name, table, _Scope(root, source, names)))
            names[name] = name
            continue
        previous: dict[str, str | None] = {f"previous.{own}": None for own in table}
        for number in range(1, rounds + 1):
            here = names | previous
            for own, stage in table.items():
                if not isinstance(stage, dict):
                    raise InputError(f"{source}: {_ROUND}.{own} is not a table; [{_ROUND}] holds one table a stage.")
                if own in values:
                    raise InputError(f"{source}: [{_ROUND}.{own}] and [{own}] have the same name.")
                stages.append(_plan_stage(own, stage, _Scope(root, source, here, str(number))))
                here[own] = stages[-1].name
            previous = {f"previous.{own}": here[own] for own in table}
        names |= previous
    if not stages:
        raise InputError(f"{source} has no stage.")
    return root, stages


@dataclass(frozen=True)
class _Scope:
    """What references in a table may say."""

    root: Path
    source: str
    names: dict[str, str | None]
    """As written -> the stage's name in the run; None where the first round speaks of the one before."""
    number: str = ""
    """Of the round, within one."""

    def resolve(self, value: Any, needs: list[str], where: str) -> Any:
        """`value` with references replaced, and without what there is no round before for; `needs` collects stages."""
        if isinstance(value, dict):
            parts = {key: self.resolve(part, needs, where) for key, part in value.items()}
            return {key: part for key, part in parts.items() if part is not None}
        if isinstance(value, list):
            both = [(each, self.resolve(each, needs, where)) for each in value]
            return [part for each, part in both if part is not None and not _lacks(part, each)]
        if not isinstance(value, str):
            return value
        found = {match[0]: self._stage(match, where) for match in _REFERENCE.finditer(value)}
        if None in found.values():
            return None
        stages = {text: stage for text, stage in found.items() if stage}
        needs += stages.values()
        return _REFERENCE.sub(lambda m: str(self.root / stages[m[0]]) if m[0] in stages else self.number, value)

    def _stage(self, match: re.Match[str], where: str) -> str | None:
        """The stage's name in the run; "" for the round's number, None for a round before the first."""
        if match[0] == f"{{{_ROUND}}}" and self.number:
            return ""
        written = [name for name in match.groups() if name]
        if unknown := [name for name in written if name not in self.names]:
            before = ", ".join(self.names) or "none"
            raise InputError(
                f"{where} refers to {{{unknown[0]}}}, but no stage of that name stands before it ({before})."
            )
        return next((stage for name in written if (stage := self.names[name])), None)


def _lacks(part: Any, table: Any) -> bool:
    """Whether a table was left without a setting."""
    return isinstance(table, dict) and len(part) < len(table)


def _plan_stage(name: str, table: dict[str, Any], scope: _Scope) -> PlannedStage:
    """A table of the recipe as a stage."""
    source = scope.source
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise InputError(f"{source}: a stage's name is letters, digits, - and _; {name!r} is not.")
    full = f"{_ROUND}{scope.number}/{name}" if scope.number else name
    output = scope.root / full
    if "output" in table:
        raise InputError(f"{source}: [{name}] sets output, but in a run a stage writes to {output}.")
    table = dict(table)
    command = table.pop("stage", name)
    kind, main = load_stage(command)
    needs: list[str] = []
    resolved = scope.resolve(table, needs, f"{source}: {name}")
    config = parse_config(kind, {"output": str(output)} | resolved, f"{source}, [{name}]")
    return PlannedStage(full, command, config, main, tuple(dict.fromkeys(needs)), output)


def _bring_up_to_date(stage: PlannedStage, root: Path, before: dict[str, StageRecord], position: str) -> StageRecord:
    path = root / _RECORDS / f"{stage.name}.json"
    fingerprint = _fingerprint(stage, root, before)
    old = StageRecord(**read_json(path)) if path.exists() else None
    same = old is not None and old.fingerprint == fingerprint and stage.output.exists()
    if old is not None and same and old.done:
        say(f"{position} {stage.name}: up to date")
        return old
    say(f"{position} {stage.name} (puna {stage.command})")
    started = time.monotonic()
    stays = same or STAGES[stage.command].by_people
    with contextlib.nullcontext() if stays else _set_aside(stage.output, root / _RECORDS / "previous" / stage.name):
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


def _fingerprint(stage: PlannedStage, root: Path, before: dict[str, StageRecord]) -> str:
    made_here = [str(root / name) for name in stage.needs]
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
