"""Tasks from files to results, and what is wrong with files."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.config import load_config, render_defaults, render_kind
from puna.evaluate.harness.run import evaluate, prepare
from puna.evaluate.harness.shots import choose_shots
from puna.evaluate.main import EvaluateConfig, main
from puna.evaluate.tasks.custom import CustomChoice
from puna.evaluate.tasks.table import TASKS, TaskKinds
from puna.evaluate.tasks.task import Example
from puna.infer.load import load_engine
from puna.runtime.errors import InputError
from puna.runtime.files import read_json, read_jsonl, write_jsonl
from puna.runtime.manifest import Manifest

CAPITALS = """country,first,second,third,right,continent
Peru,Lima,Cusco,Puno,A,America
Bolivia,Oruro,Sucre,La Paz,1,America
Chile,Arica,Talca,Santiago,Santiago,America
Spain,Madrid,Toledo,Cadiz,0,Europe
"""

TASK = """
kind = "choice"
file = "capitals.csv"
prompt = "Question: What is the capital of {country}?\\nAnswer:"
choices = ["{first}", "{second}", "{third}"]
answer = "right"
group = "continent"
"""


@pytest.fixture
def capitals(tmp_path: Path) -> Path:
    (tmp_path / "capitals.csv").write_text(CAPITALS)
    (tmp_path / "capitals.toml").write_text(TASK)
    return tmp_path / "capitals.toml"


def test_a_task_of_ones_own_from_the_command_to_the_files(model, capitals, tmp_path):
    recipe = tmp_path / "recipe.toml"
    shown = f'{{kind = "choice", name = "with shots", shots = 1, file = "{tmp_path / "capitals.csv"}", '
    shown += 'prompt = "{country}:", choices = ["{first}", "{second}"], answer = "right_of_two"}'
    recipe.write_text(f"""
model = "{model}"
output = "{tmp_path / "out"}"
tasks = ["{capitals}", {shown}]
""")
    with_two = [
        line + end for line, end in zip(CAPITALS.splitlines(), (",right_of_two", ",0", ",B", ",a", ",0"), strict=True)
    ]
    (tmp_path / "capitals.csv").write_text("\n".join(with_two))
    main(load_config(EvaluateConfig, recipe, ["engine.num_threads=1", "engine.device=cpu"]))
    found = read_json(tmp_path / "out/results.json")["tasks"]
    assert list(found) == ["capitals", "with shots"]
    accuracy = found["capitals"]["metrics"]["accuracy"]
    assert accuracy["count"] == 4
    assert 0 <= accuracy["low"] <= accuracy["value"] <= accuracy["high"] <= 1
    assert {group: metrics["accuracy"]["count"] for group, metrics in found["capitals"]["groups"].items()} == {
        "America": 3,
        "Europe": 1,
    }
    samples = list(read_jsonl(tmp_path / "out/samples.jsonl"))
    assert [(row["task"], row["id"], row["gold"]) for row in samples[:4]] == [
        ("capitals", "2", 0),
        ("capitals", "3", 1),
        ("capitals", "4", 2),
        ("capitals", "5", 0),
    ]
    assert [row["chosen"] for row in samples] == [
        max(range(len(row["log_likelihoods"])), key=row["log_likelihoods"].__getitem__) for row in samples
    ]
    right = [row["values"]["accuracy"] for row in samples[:4]]
    assert accuracy["value"] == sum(right) / 4
    assert len({row["prompt_hash"] for row in samples}) == len(samples)
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.results["capitals_accuracy"] == accuracy["value"]
    assert str(tmp_path / "capitals.csv") in manifest.inputs
    assert (tmp_path / "out.answers").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Peru,Lima,Lima,Puno,A,America", r"capitals.csv, line 2: the answer 'Lima' stands there twice"),
        ("Peru,Lima,Cusco,Puno,3,America", r"line 2: 'right' is '3', but there are only 3 answers"),
        ("Peru,Lima,Cusco,Puno,D,America", r"line 2: 'right' is 'D', but there are only 3 answers"),
        ("Peru,Lima,Cusco,Puno,Quito,America", r"line 2: 'right' is 'Quito', which is none of the answers"),
        ("Peru,Lima,Cusco,Puno,,America", r"line 2: 'right' is ''"),
        ("Peru,Lima,Cusco,,A,America", r"line 2: 'third' is ''"),
        ("Peru,Lima,Cusco,Puno,A", r"line 2: 5 cells, but there are 6 columns"),
        ('Peru,"Lima,Cusco,Puno,A,America', r"line 2: not valid CSV"),
    ],
)
def test_a_malformed_line_is_named(capitals, line, message):
    capitals.with_suffix(".csv").write_text(CAPITALS.splitlines()[0] + "\n" + line)
    with pytest.raises(InputError, match=message):
        prepare(TaskKinds("task", TASKS).read(str(capitals)), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "absent.csv"}, "absent.csv does not exist"),
        ({"file": "capitals.toml"}, "are read from .jsonl, .csv or .tsv"),
        ({"prompt": "{land}"}, r"line 2: there is no 'land', which '\{land\}' asks for, only 'country'"),
        ({"shots": 4}, "only 2 examples in 'America' to show before capitals.csv, line 2"),
        ({"limit": 0}, "limit 0"),
        ({"answr": "right"}, "answr"),
        ({"kind": "choise"}, "Did you mean 'choice'"),
        ({"choices": ["{first}"], "answer": "first"}, "at least two answers"),
    ],
)
def test_a_malformed_task_is_explained(capitals, changes, message):
    kinds = TaskKinds("task", TASKS)
    settings: dict[str, Any] = {
        "kind": "choice",
        "prompt": "{country}",
        "choices": ["{first}", "{second}", "{third}"],
        "answer": "right",
        "group": "continent",
        **changes,
    }
    settings["file"] = str(capitals.parent / settings.get("file", "capitals.csv"))
    with pytest.raises(InputError, match=message):
        prepare(kinds.read(settings), None)


def test_published_sets_that_are_not_there_or_broken_are_named(tmp_path, kinds):
    with pytest.raises(InputError, match="set data to that folder"):
        prepare(kinds.read("hellaswag"), None)
    with pytest.raises(InputError, match=r"piqa.jsonl does not exist"):
        prepare(kinds.read("piqa"), tmp_path)
    write_jsonl(tmp_path / "piqa.jsonl", [])
    with pytest.raises(InputError, match="Task piqa has no question"):
        prepare(kinds.read("piqa"), tmp_path)
    write_jsonl(tmp_path / "piqa.jsonl", [{"query": "Question: x\n", "choices": ["a", "b"], "gold": 2}])
    with pytest.raises(InputError, match=r"piqa.jsonl, line 1: 'gold' says that answer 2 is right"):
        prepare(kinds.read("piqa"), tmp_path)
    write_jsonl(tmp_path / "copa.jsonl", [{"query": "x", "choices": ["a", 3], "gold": True}])
    with pytest.raises(InputError, match=r"copa.jsonl, line 1: 'choices' holds 3"):
        prepare(kinds.read("copa"), tmp_path)
    (tmp_path / "mmlu").mkdir()
    (tmp_path / "mmlu/mmlu_dev_val.tar.gz").write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"not a whole .tar.gz archive"):
        prepare(kinds.read("mmlu"), tmp_path)


def test_two_tasks_of_one_name_are_refused(capitals, tmp_path):
    settings = [f'tasks=["{capitals}", "{capitals}"]', "model=m", f"output={tmp_path}"]
    with pytest.raises(InputError, match="two tasks are called 'capitals'"):
        load_config(EvaluateConfig, None, settings)


@given(
    groups=st.lists(st.sampled_from("ab"), min_size=4, max_size=12),
    prompts=st.integers(2, 12),
    shots=st.integers(1, 2),
    seed=st.integers(0, 3),
)
def test_a_question_is_never_its_own_shot(groups: list[str], prompts: int, shots: int, seed: int) -> None:
    examples = [
        Example(id=str(n), where=f"line {n}", prompt=f"{n % prompts}", target=" x", group=group)
        for n, group in enumerate(groups)
    ]
    task = CustomChoice(file=Path("f"), prompt="", choices="c", answer="a", shots=shots, seed=seed)
    try:
        chosen = choose_shots(task, examples, examples, None)
    except InputError:
        return
    assert chosen == choose_shots(task, examples, examples, None)
    for example, before in zip(examples, chosen, strict=True):
        assert len(before) == shots
        assert all(shot.group == example.group and shot.prompt != example.prompt for shot in before)
        assert len({shot.id for shot in before}) == shots
    for group in set(groups):
        of_group = [tuple(s.id for s in before) for e, before in zip(examples, chosen, strict=True) if e.group == group]
        # The same for all but those that would have been their own.
        assert len(set(of_group)) <= 1 + shots * sum(e.group == group for e in examples)
    pool = [Example(id=f"p{n}", where="", prompt=f"pool {n}", target=" x", group=g) for g in "ab" for n in range(3)]
    for example, before in zip(examples, choose_shots(task, examples, examples, pool), strict=True):
        assert before == [shot for shot in pool if shot.group == example.group][:shots]


def test_a_chat_asks_in_turns(model, capitals, open_asker):
    task = TaskKinds("task", TASKS).parse(
        {"kind": "choice", "file": str(capitals.with_suffix(".csv")), "prompt": "{country}?", "answer": "right"}
        | {"choices": ["{first}", "{second}", "{third}"], "shots": 1, "chat": True, "preamble": "Answer. "},
        "task",
    )
    prepared = prepare(task, None)
    request = prepared.requests[0][0]
    roles = [(message["role"], message["content"]) for message in request.prompt]
    assert [role for role, _ in roles] == ["user", "assistant", "user"]
    assert roles[0][1].startswith("Answer. ")
    assert roles[2][1] == "Peru?"
    assert request.text == "Lima"
    asker = open_asker(model, max_context=512)
    assert evaluate(asker, prepared).num_questions == 4
    asker.engine.tokenizer.chat_template = None
    with pytest.raises(InputError, match="the model has no chat template"):
        evaluate(asker, prepared)


def test_questions_that_were_cut_are_counted(make_model, capitals, open_asker):
    asker = open_asker(make_model(32))
    task = TaskKinds("task", TASKS).parse(
        {"kind": "choice", "file": str(capitals.with_suffix(".csv")), "prompt": "What is {country}? " * 10}
        | {"choices": ["{first}", "{second}", "{third}"], "answer": "right"},
        "task",
    )
    assert evaluate(asker, prepare(task, None)).num_truncated == 4


def test_every_task_prints_its_settings():
    for kind in TASKS:
        assert f'kind = "{kind}"' in render_kind(EvaluateConfig, kind)
    assert "block_size = 4" in render_defaults(EvaluateConfig)


def test_the_cache_of_the_engine_has_room_for_eight_contexts(model):
    from puna.evaluate.harness.engine import EvaluationEngineConfig

    engine = load_engine(model, EvaluationEngineConfig(max_context=256, num_threads=1, device="cpu"))
    assert engine.scheduler.blocks.num_blocks == 8 * 256 // 4 + 1
