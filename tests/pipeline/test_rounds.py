"""Rounds of a recipe: what references mean, what another round makes again, and what the report says of each."""

from pathlib import Path

import pytest

from puna.config import apply_overrides
from puna.pipeline.run import plan, run_recipe
from puna.runtime.errors import InputError
from puna.runtime.files import write_jsonl
from puna.runtime.manifest import Manifest

TUNE = {"stage": "finetune", "conversations": "{answers}/conversations.jsonl"}
FIRST = "{previous.tuned or assistant}/model"
ROUNDS = {
    "output": "runs/x",
    "rounds": 2,
    "assistant": {"stage": "finetune", "model": "base", "conversations": "data"},
    "round": {
        "answers": {"stage": "reject", "model": FIRST, "reward": "r", "prompts": "prompts_{round}.jsonl"},
        "reward": {
            "model": "{assistant}/model",
            "mixture": [
                {"name": "new", "preferences": "{answers}/preferences.jsonl"},
                {"name": "earlier", "preferences": "{previous.answers}/preferences.jsonl"},
            ],
        },
        "tuned": {**TUNE, "model": FIRST, "held_out_conversations": "{previous.answers}/conversations.jsonl"},
    },
    "after": {**TUNE, "conversations": "data", "model": "{previous.tuned}/model"},
}


def test_references_within_and_between_rounds() -> None:
    _, stages = plan(dict(ROUNDS), "recipe")
    found = {stage.name: stage for stage in stages}
    in_rounds = [f"round{n}/{name}" for n in (1, 2) for name in ("answers", "reward", "tuned")]
    assert list(found) == ["assistant", *in_rounds, "after"]
    assert found["round1/answers"].config.model == Path("runs/x/assistant/model")
    assert found["round2/answers"].config.model == Path("runs/x/round1/tuned/model")
    assert found["round2/answers"].needs == ("round1/tuned",)
    assert [found[f"round{n}/answers"].config.prompts for n in (1, 2)] == [Path(f"prompts_{n}.jsonl") for n in (1, 2)]
    assert found["round2/tuned"].config.conversations == Path("runs/x/round2/answers/conversations.jsonl")
    assert found["round2/tuned"].output == Path("runs/x/round2/tuned")
    assert found["round1/tuned"].config.held_out_conversations is None, "there is no round before the first"
    assert found["round2/tuned"].config.held_out_conversations == Path("runs/x/round1/answers/conversations.jsonl")
    mixtures = [found[f"round{n}/reward"].config.mixture for n in (1, 2)]
    assert [[source.name for source in mixture] for mixture in mixtures] == [["new"], ["new", "earlier"]]
    assert mixtures[1][1].preferences == Path("runs/x/round1/answers/preferences.jsonl")
    assert found["after"].config.model == Path("runs/x/round2/tuned/model")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=0", "rounds is 0"),
        ("rounds=true", "rounds is True"),
        ('rounds="2"', "rounds is '2'"),
        ("round.assistant.stage=reject", "have the same name"),
        ("round.steps=3", "round.steps is not a table"),
        ("round.answers.model={previous.tune or assistant}", "refers to {previous.tune}, but no stage"),
        ("round.answers.model={previous.tuned or assistent}", "refers to {assistent}, but no stage"),
        ("round.answers.model={tuned}", "refers to {tuned}, but no stage"),
        ("assistant.model={round}", "refers to {round}, but no stage"),
        ("after.model={tuned}", "refers to {tuned}, but no stage"),
        ("round.answers.output=there", r"writes to runs/x/round1/answers"),
        ("round.answers.model={previous.tuned}", "answers.*model"),  # the first round is left without
    ],
)
def test_wrong_rounds_are_explained(override: str, message: str) -> None:
    values = {**ROUNDS, "round": {name: dict(table) for name, table in ROUNDS["round"].items()}}  # type: ignore[attr-defined]
    values |= {name: dict(ROUNDS[name]) for name in ("assistant", "after")}  # type: ignore[call-overload]
    apply_overrides(values, [override])
    with pytest.raises(InputError, match=message):
        plan(values, "recipe")


def test_rounds_without_tables() -> None:
    with pytest.raises(InputError, match="belong together"):
        plan({"output": "runs/x", "rounds": 2, "curate": {"source": "x"}}, "recipe")
    with pytest.raises(InputError, match="belong together"):
        plan({"output": "runs/x", "round": {"curate": {"source": "x"}}}, "recipe")


RECIPE = """
output = "{output}"
rounds = 1

[round.comparisons]
stage = "simulate"
models = ["{{previous.dpo or start}}/model"]
prompts = "{prompts}"
rater = {{ kind = "rule", points_per_word = -1.0 }}
sampling = {{ max_tokens = 16, stop_ids = {stop_ids} }}
engine = {{ device = "cpu", num_threads = 1 }}

[round.reward]
model = "{{start}}/model"
preferences = "{{comparisons}}/preferences.jsonl"
train = {train}

[round.rejection]
stage = "reject"
model = "{{previous.dpo or start}}/model"
reward = "{{reward}}/model"
prompts = "{prompts}"
samples = 3
sampling = {{ max_tokens = 16, stop_ids = {stop_ids} }}
engine = {{ device = "cpu", num_threads = 1 }}

[round.tuned]
stage = "finetune"
model = "{{previous.dpo or start}}/model"
conversations = "{{rejection}}/conversations.jsonl"
train = {train}

[round.dpo]
stage = "align"
model = "{{tuned}}/model"
preferences = "{{comparisons}}/preferences.jsonl"
train = {train}

[round.win_rate]
stage = "winrate"
model = "{{dpo}}/model"
baseline = "{{start}}/model"
judge = "{{reward}}/model"
prompts = "{prompts}"
max_tokens = 12
engine = {{ device = "cpu", num_threads = 1 }}
"""
TRAIN = (
    "{ steps = 3, batch_rows = 2, micro_batch_rows = 2, row_length = 128, num_threads = 1, device = 'cpu', "
    "tensorboard = false, schedule.warmup_steps = 1 }"
)
START = """
[start]
stage = "finetune"
model = "{model}"
conversations = "{conversations}"
train = {train}
"""


@pytest.fixture
def recipe(base_model: Path, tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Who walks {n}?"} for n in range(6)])
    chat = [{"role": "user", "content": "Who walks?"}, {"role": "assistant", "content": "the llama"}]
    write_jsonl(tmp_path / "demonstrations.jsonl", [{"messages": chat}] * 3)
    start = START.format(model=base_model, conversations=tmp_path / "demonstrations.jsonl", train=TRAIN)
    # Random weights hardly ever end an answer by themselves.
    stop_ids = list(range(0, 300, 12))
    text = RECIPE.format(output=tmp_path / "out", prompts=tmp_path / "prompts.jsonl", train=TRAIN, stop_ids=stop_ids)
    path = tmp_path / "rounds.toml"
    path.write_text(text.replace("rounds = 1\n", "rounds = 1\n" + start))
    return path


def states(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Stage -> "done" or "up to date" of the run just made."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[") and ": " in line]
    return {line.split("] ")[1].split(":")[0]: line.split(": ")[1].split(" in ")[0] for line in lines}


def test_another_round_leaves_the_first_ones(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = ["comparisons", "reward", "rejection", "tuned", "dpo", "win_rate"]
    first = {f"round1/{name}" for name in stages} | {"start"}
    run_recipe(recipe, [])
    assert states(capsys) == dict.fromkeys(first, "done")
    run_recipe(recipe, ["rounds=2"])
    shown = capsys.readouterr().err
    assert shown.count(": up to date") == len(first)
    assert "in each round | 1 | 2" in shown
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Rounds</h2>" in page
    assert "<th>Round 2</th>" in page
    assert "<td>win_rate</td><td>win rate, greedy</td>" in page
    before = str(tmp_path / "out" / "round1" / "dpo" / "model")
    assert before in Manifest.read(tmp_path / "out" / "round2" / "comparisons").inputs
    assert before in Manifest.read(tmp_path / "out" / "round2" / "tuned" / "model").inputs
