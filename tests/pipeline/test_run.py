"""`puna run`: order, references, what is skipped and what is not; and the whole job on a tiny folder."""

import json
from pathlib import Path

import pytest

from puna.config import load_config
from puna.pipeline import run as run_module
from puna.pipeline.run import plan, run_recipe
from puna.pipeline.stages import load_stage
from puna.runtime.errors import InputError
from puna.runtime.files import read_jsonl, write_jsonl
from puna.runtime.manifest import Manifest

TINY = """
output = "{output}"

[corpus]
stage = "curate"
source = "{source}"
held_out_share = 0.2

[questions]
documents = "{{corpus}}/documents"

[tokenizer]
documents = "{{corpus}}/documents"
vocab_size = 300

[tokens]
stage = "tokenize"
documents = "{{corpus}}/documents"
tokenizer = "{{tokenizer}}"

[pretrain]
tokens = "{{tokens}}"
tokenizer = "{{tokenizer}}"
model = {{ vocab_size = 320, dim = 16, num_layers = 1, num_heads = 2, num_kv_heads = 2, head_dim = 8, hidden_dim = 24 }}
[pretrain.train]
steps = 4
batch_rows = 2
micro_batch_rows = 2
row_length = 64
num_threads = 1
device = "cpu"
tensorboard = false
schedule.warmup_steps = 1

[assistant]
stage = "finetune"
model = "{{pretrain}}/model"
conversations = "{{questions}}/questions_train.jsonl"
held_out_conversations = "{{questions}}/questions_held_out.jsonl"
[assistant.train]
steps = 3
batch_rows = 2
micro_batch_rows = 2
row_length = 256
num_threads = 1
device = "cpu"
tensorboard = false
schedule.warmup_steps = 1

[quality]
stage = "evaluate"
model = "{{assistant}}/model"
documents = "{{corpus}}/held_out"
questions = "{{questions}}/questions_held_out.jsonl"
baseline_tokens = "{{tokens}}"
max_answer_tokens = 8
engine.num_threads = 1
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    source = tmp_path / "text"
    source.mkdir()
    for n in range(10):
        body = "".join(
            f'def task_{n}_{k}():\n    """Walk llama {n * 10 + k} up the mountain slowly."""\n\n' for k in range(8)
        )
        (source / f"farm{n}.py").write_text(body)
    path = tmp_path / "recipe.toml"
    path.write_text(TINY.format(output=tmp_path / "out", source=source))
    return path


def states(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """Stage -> "done" or "up to date" of the run just made."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    return {line.split("] ")[1].split(":")[0]: line.split(": ")[1].split(" in ")[0] for line in lines if ": " in line}


def test_the_whole_job_and_what_a_change_makes_again(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run_recipe(recipe, [])
    assert set(states(capsys).values()) == {"done"}
    assert (out / "assistant" / "model" / "model.safetensors").exists()
    results = json.loads((out / "quality" / "results.json").read_text())
    assert 0 < results["bits_per_byte"] < 20
    assert {"gzip_bits_per_byte", "5gram_bits_per_byte", "answer_word_f1"} <= set(results)
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert "bits/byte" in page
    assert "What does farm" in page
    lineage = Manifest.read(out / "assistant" / "model").inputs
    assert str(out / "pretrain" / "model") in lineage

    run_recipe(recipe, [])
    assert set(states(capsys).values()) == {"up to date"}

    run_recipe(recipe, ["quality.max_answer_tokens=9"])
    assert states(capsys) == dict.fromkeys(states_before_quality(), "up to date") | {"quality": "done"}

    run_recipe(recipe, ["assistant.train.steps=4", "quality.max_answer_tokens=9"])
    after = states(capsys)
    assert after["pretrain"] == "up to date"
    assert after["assistant"] == after["quality"] == "done"

    (tmp_path / "text" / "farm0.py").write_text('def new():\n    """Something else entirely, in words."""\n')
    run_recipe(recipe, ["assistant.train.steps=4", "quality.max_answer_tokens=9"])
    assert states(capsys)["corpus"] == "done"


def states_before_quality() -> list[str]:
    return ["corpus", "questions", "tokenizer", "tokens", "pretrain", "assistant"]


def test_a_failing_stage_keeps_the_earlier_artifact(recipe: Path, tmp_path: Path) -> None:
    values = ["assistant.train.steps=2"]
    run_recipe(recipe, values)
    model = tmp_path / "out" / "assistant" / "model" / "model.safetensors"
    before = model.read_bytes()
    with pytest.raises(InputError, match="cannot be trained on"):
        run_recipe(recipe, [*values, "assistant.chat_template=chatml"])
    assert model.read_bytes() == before
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="usable document"):
        run_recipe(recipe, [*values, f"corpus.source={empty}"])
    assert model.read_bytes() == before
    assert (tmp_path / "out" / "corpus" / "documents").exists()


def test_an_interrupted_stage_goes_on(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of pretraining: the next run starts from its checkpoint."""
    from puna.train import loop

    original, calls = loop.train_step, []

    def interrupted(*args):  # type: ignore[no-untyped-def]
        calls.append(args[0].step)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(loop, "train_step", interrupted)
    settings = ["pretrain.train.checkpoint_every=1"]
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, settings)
    run_recipe(recipe, settings)
    assert calls[:6] == [0, 1, 2, 2, 3, 0]  # step 2 again, then the assistant's steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[corpus]\nstage = "curate"', "no top-level output"),
        ('output = "o"', "has no stage"),
        ('output = "o"\nsteps = 3', "steps is not a table"),
        ('output = "o"\n[curat]\nsource = "x"', "did you mean 'curate'"),
        ('output = "o"\n[curate]\nsource = "{corpus}"', r"refers to \{corpus\}"),
        ('output = "o"\n[curate]\nsauce = "x"', r"\[curate\].*no key sauce.*Did you mean source"),
        ('output = "o"\n[curate]\nsource = "x"\noutput = "p"', r"\[curate\] sets output"),
    ],
)
def test_a_wrong_recipe_is_explained_before_anything_runs(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        run_recipe(path, [])
    assert [p.name for p in tmp_path.iterdir()] == ["r.toml"]


def test_several_processes_are_refused(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"2 processes of torchrun .* Start it without torchrun\."):
        run_recipe(recipe, [])
    assert not (tmp_path / "out").exists()


def test_references_and_outputs() -> None:
    output, (corpus, tokenizer) = plan(
        {
            "output": "runs/x",
            "corpus": {"stage": "curate", "source": "text"},
            "tokenizer": {"documents": "{corpus}/train.jsonl"},
        },
        "recipe",
    )
    assert output == Path("runs/x")
    assert corpus.output == Path("runs/x/corpus")
    assert tokenizer.config.documents == Path("runs/x/corpus/train.jsonl")
    assert tokenizer.needs == ("corpus",)


def test_shipped_recipes_are_valid() -> None:
    """All are for `puna run`, save those of one stage."""
    folder = Path(__file__).parents[2] / "recipes"
    recipes = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.toml"))}
    of_one_stage = {"plan.toml": "plan", "parallel.toml": "pretrain", "search.toml": "search"}
    of_one_stage |= {name: "finetune" for name in recipes if name.startswith("finetune/")}
    of_one_stage |= {name: "evaluate" for name in recipes if name.startswith("evaluate/")}
    of_one_stage |= {"align/dpo.toml": "align", "align/reward.toml": "reward", "align/rejection.toml": "reject"}
    of_one_stage |= {"align/simulate.toml": "simulate", "align/winrate.toml": "winrate"}
    of_one_stage |= {"align/grpo.toml": "reinforce", "align/ppo.toml": "reinforce"}
    of_one_stage |= {"align/collect.toml": "collect", "rate.toml": "rate"}
    of_one_stage |= {f"safety/{name}.toml": name for name in ("distil_context", "bias")} | {
        "safety/guard.toml": "finetune"
    }
    # What the recipes leave to the user.
    left = {"finetune": ["model=some"], "align": ["model=some", "preferences=some"]}
    left |= {"reward": left["align"], "reject": ["model=some", "reward=some", "prompts=some"]}
    left |= {"collect": ["models.now=some", "prompts=some"], "bias": ["model=some"], "distil_context": left["reject"]}
    left |= {"simulate": ['models=["some"]', "prompts=some"]}
    left |= {"winrate": ["model=some", "baseline=some", "judge=some", "prompts=some"]}
    left |= {"reinforce": ["model=some", "prompts=some"]}
    left |= {"evaluate": ["model=some"], "rate": ["models.ours=some", "models.theirs=other"]}
    assert of_one_stage.keys() < recipes.keys()
    for name, path in recipes.items():
        if name in of_one_stage:
            more = ["conversations=some"] if name == "finetune/lora.toml" else []
            load_config(load_stage(of_one_stage[name])[0], path, [*left.get(of_one_stage[name], []), *more])
        else:
            output, stages = plan(run_module.read_toml(path), str(path))
            assert output.parts[0] == "runs"
            assert stages


def test_inspect_shows_chat(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from puna.pipeline.inspect import show_chat

    rows = list(read_jsonl(Path(__file__).with_name("conversations.jsonl")))
    write_jsonl(tmp_path / "c.jsonl", rows)
    (tmp_path / "docs.jsonl").write_text(json.dumps({"text": "llama " * 2000 + "".join(map(chr, range(32, 127)))}))
    from puna.tokenizer.train import TokenizerConfig, main

    main(TokenizerConfig(documents=tmp_path / "docs.jsonl", output=tmp_path / "tok", vocab_size=269))
    show_chat(tmp_path / "tok", tmp_path / "c.jsonl", 0, None, False)
    shown = capsys.readouterr().out
    assert "Bring hay." in shown
    assert "supervised" in shown
    with pytest.raises(InputError, match="no conversation number 5"):
        show_chat(tmp_path / "tok", tmp_path / "c.jsonl", 5, None, False)


def test_peoples_work_is_gone_on_with_and_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as ratings, when code or settings have changed."""
    recipe = tmp_path / "rating.toml"
    recipe.write_text(f'output = "{tmp_path}/run"\n[collect]\nprompts = "p.jsonl"\nmodels.one = "m"\n')
    answers = tmp_path / "run" / "collect" / "ratings.jsonl"

    def rate(config: object) -> None:
        answers.parent.mkdir(parents=True, exist_ok=True)
        with answers.open("a") as file:
            file.write("one more\n")

    monkeypatch.setattr("puna.align.collect.main", rate)
    run_recipe(recipe, [])
    run_recipe(recipe, ["collect.seed=1"])
    assert answers.read_text() == "one more\n" * 2
