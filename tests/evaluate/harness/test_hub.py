"""Questions of the hub, through a stub that lays its Parquet files out: the same as those of the local files."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from puna.config import parse_config
from puna.evaluate.main import EvaluateConfig
from puna.evaluate.tasks.data import HUB
from puna.evaluate.tasks.table import TaskKinds
from puna.evaluate.tasks.task import Example
from puna.runtime.errors import InputError

PLACES = {
    "hellaswag": "Rowan/hellaswag/default/validation",
    "piqa": "baber/piqa/default/validation",
    "winogrande": "allenai/winogrande/winogrande_xl/validation",
    "copa": "aps/super_glue/copa/validation",
    "lambada": "EleutherAI/lambada_openai/default/test",
    "gsm8k": "openai/gsm8k/main/test",
    "triviaqa": "mandarjoshi/trivia_qa/rc.nocontext/validation",
    "math": "EleutherAI/hendrycks_math/algebra/test",
    "mmlu anatomy": "cais/mmlu/all/validation",
    "cmmlu agronomy": "haonan-li/cmmlu/agronomy/test",
}
COUNT = 20


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data sets in the place of the hub's; what is not asked for is not there."""

    def snapshot_download(repository: str, *, repo_type: str, revision: str, allow_patterns: list[str]) -> str:
        assert (repo_type, revision) == ("dataset", "refs/convert/parquet")
        source, target = tmp_path / repository, tmp_path / "cache" / repository
        for file in itertools.chain.from_iterable(source.glob(pattern) for pattern in allow_patterns):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return tmp_path


def lay_out(folder: Path, rows: list[dict[str, Any]]) -> None:
    """In two files, as larger sets are."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate((rows[:7], rows[7:])):
        pq.write_table(pa.Table.from_pylist(part), folder / f"{number:04}.parquet")


def as_on_the_hub(name: str, row: dict[str, Any], number: int) -> dict[str, Any]:
    """What rows in lm-eval's columns lack."""
    match name.split():
        case ["hellaswag"]:
            return row | {"ind": number, "ctx": row["ctx_a"]}
        case ["copa"]:
            return row | {"premise": row["premise"].replace(",.", "."), "idx": number}
        case ["triviaqa"]:
            aliases, question = row["answer"]["aliases"], row["question"]
            # One of them ends in no question mark, which lm-eval's rows are without.
            question = question.removesuffix("\nAnswer:") if question.endswith(":") else f"{question}?"
            return {"question": question, "answer": {"value": aliases[0], "aliases": aliases[1:]}}
        case ["mmlu", subject]:
            return row | {"subject": subject}
    return row


def told(examples: list[Example]) -> list[Example]:
    """But for where they come from."""
    return [replace(example, id="", where="") for example in examples]


@pytest.mark.parametrize("name", PLACES)
def test_questions_are_those_of_the_local_file(
    name: str,
    hub: Path,
    real_data: Path,
    kinds: TaskKinds,
    published_rows: Callable[[str], Any],
) -> None:
    kind, *subjects = name.split()
    task = kinds.read({"kind": kind, **({"subjects": subjects} if subjects else {})})
    local = task.read(real_data / "eval")
    _, rows, shots = published_rows(name)
    if kind == "math":
        rows = [row for row, example in zip(rows, local, strict=True) if example.group == "algebra"]
        for other in {example.group for example in local} - {"algebra"}:
            lay_out(hub / "EleutherAI/hendrycks_math" / other / "test", [])
        local = [example for example in local if example.group == "algebra"]
    place = hub / PLACES[name]
    lay_out(place, [as_on_the_hub(name, row, number) for number, row in enumerate(rows[:COUNT])])
    found = task.read(HUB)
    assert told(found) == told(local[:COUNT])
    assert len({example.id for example in found}) == len(found) > 10
    if shots is not None:
        part = {"gsm8k": "train"}.get(kind, "dev")
        lay_out(place.with_name(part), [as_on_the_hub(name, row, n) for n, row in enumerate(shots[:COUNT])])
        assert told(task.read_shots(HUB) or []) == told((task.read_shots(real_data / "eval") or [])[:COUNT])
    assert task.inputs(HUB) == []


def test_without_a_network_it_says_what_to_do(kinds: TaskKinds, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"Rowan/hellaswag cannot be read .*copy hellaswag/val_0_2500\.jsonl\.gz into"):
        kinds.read("hellaswag").read(HUB)


def test_what_is_not_there_or_has_changed_is_said(kinds: TaskKinds, hub: Path) -> None:
    with pytest.raises(InputError, match=r"no split 'test' of configuration 'default' .* any more"):
        kinds.read("lambada").read(HUB)
    lay_out(hub / PLACES["winogrande"], [{"sentence": "_ sat.", "option1": "Ann", "option2": "Eve", "answer": ""}] * 9)
    with pytest.raises(InputError, match="winogrande_xl validation, row 1: not in the columns"):
        kinds.read("winogrande").read(HUB)
    with pytest.raises(InputError, match=r"mbpp_sanitized\.jsonl is not on the Hugging Face hub"):
        kinds.read({"kind": "mbpp", "allow_unsafe": True}).read(HUB)
    lay_out(hub / "haonan-li/cmmlu/anatomy/test", [dict.fromkeys(("Question", "A", "B", "C", "D", "Answer"), "A")])
    with pytest.raises(InputError, match="haonan-li/cmmlu holds no test file of 'nonsense'"):
        kinds.read({"kind": "cmmlu", "subjects": ["anatomy", "nonsense"]}).read(HUB)


def test_nothing_is_downloaded_unless_asked_for(kinds: TaskKinds) -> None:
    config = parse_config(EvaluateConfig, {"model": "m", "output": "o", "data": "hub:"}, "here")
    assert config.data == HUB
    with pytest.raises(InputError, match='or to "hub:" to download'):
        kinds.read("piqa").read(None)
