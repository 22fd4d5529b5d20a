"""A search finds better settings, goes on when it was killed, and refuses what is wrong before the first trial."""

import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.config import load_config, read_toml, render_values
from puna.finetune.config import FinetuneConfig
from puna.finetune.main import main as finetune
from puna.finetune.search.config import ChoiceParameter, FloatParameter, SearchConfig
from puna.finetune.search.main import main as search
from puna.finetune.search.recipes import base_recipe, with_values
from puna.finetune.search.study import Search
from puna.runtime.errors import InputError
from puna.runtime.files import only_process, write_jsonl
from puna.train.metrics import read_metrics

RATE = "train.optimizer.learning_rate"

KEYS = st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=4)
SCALARS = (
    st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=6)
)
TABLES = st.recursive(
    st.dictionaries(KEYS, SCALARS | st.lists(SCALARS, max_size=3), max_size=3),
    lambda inner: st.dictionaries(KEYS, inner | st.lists(inner, min_size=1, max_size=2), max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(TABLES)
def test_values_come_back_from_toml(values: dict[str, Any]) -> None:
    assert tomllib.loads(render_values(values)) == values


@pytest.fixture(scope="module")
def recipe(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classification that is learnt at a good learning rate, and not at a tiny one."""
    folder = tmp_path_factory.mktemp("search")
    rows = ["text,label", *(f"{n} the {word} llama eats hay,{word}" for n in range(4) for word in ("good", "bad"))]
    (folder / "data.csv").write_text("\n".join(rows) + "\n")
    path = folder / "classify.toml"
    path.write_text(f"""
model = "{base_model}"
output = "unused"
task.kind = "classification"
data.train = "{folder}/data.csv"
data.held_out = "{folder}/data.csv"

[train]
steps = 12
batch_rows = 4
micro_batch_rows = 4
row_length = 32
log_every = 4
validate_every = 4
checkpoint_every = 4
device = "cpu"
num_threads = 1
tensorboard = false
schedule.warmup_steps = 2
""")
    return path


def search_file(recipe: Path, output: Path) -> Path:
    """A search whose first trial is good, whose second is hopeless, and whose third is the best."""
    file = recipe.parent / f"{output.name}.toml"
    file.write_text(f"""
recipe = "{recipe}"
output = "{output}"
trials = 3
sampler = "random"
seed = 95
pruning.startup_trials = 1

[[parameters]]
kind = "float"
key = "{RATE}"
low = 1e-6
high = 1e-2
log = true

[[parameters]]
kind = "choice"
key = "train.seed"
values = [0, 1]
""")
    return file


@pytest.fixture(scope="module")
def whole(recipe: Path) -> SearchConfig:
    """A search that was not interrupted."""
    config = load_config(SearchConfig, search_file(recipe, recipe.parent / "whole"))
    search(config)
    return config


def plan(recipe: Path, /, **changes: Any) -> SearchConfig:
    """A search that is not run, or that fails."""
    values: dict[str, Any] = {
        "recipe": recipe,
        "output": recipe.parent / "search",
        "parameters": (FloatParameter(key=RATE, low=1e-6, high=1e-2, log=True),),
    }
    return SearchConfig(**(values | changes))


def outcomes(config: SearchConfig) -> list[tuple[Any, ...]]:
    return [(t.number, t.state.name, t.params, t.value, t.last_step) for t in Search(config).finished]


def test_the_best_trial_is_kept_and_written_down(whole: SearchConfig) -> None:
    done = Search(whole)
    assert [trial.state.name for trial in done.finished] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert [trial.last_step for trial in done.finished] == [3, 2, 3]
    best = done.best
    assert best is not None
    assert best.number == 2
    kept = [folder.name for folder in sorted((whole.output / "trials").iterdir()) if (folder / "model").exists()]
    assert kept == ["0002"]
    curve = [point[whole.metric] for point in read_metrics(done.folder(2) / "metrics.jsonl") if whole.metric in point]
    assert best.value == min(curve)
    written = load_config(FinetuneConfig, whole.output / "best.toml")
    assert written.train.optimizer.learning_rate == best.params[RATE]
    assert written.train.seed == best.params["train.seed"]
    assert written.output == whole.output / "best"
    page = (whole.output / "search.html").read_text()
    assert page.count("<figure><svg") == 3
    assert f"<b>{best.value:.4f}</b> in trial 2" in page
    assert not re.search(r'(src|href)="https?:', page)


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(
    whole: SearchConfig, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C at the first validation of the second trial."""
    config = load_config(SearchConfig, search_file(recipe, recipe.parent / "interrupted"))
    hear = Search._hear

    def interrupted(self: Search, running: Any) -> bool:
        if running.trial.number == 1:
            raise KeyboardInterrupt
        return hear(self, running)

    monkeypatch.setattr(Search, "_hear", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(config)
    monkeypatch.undo()
    assert len(outcomes(config)) == 1
    search(config)
    assert outcomes(config) == outcomes(whole)
    before = (config.output / "study.db").read_bytes()
    search(config)
    assert (config.output / "study.db").read_bytes() == before
    with pytest.raises(InputError, match="another parameters and another seed, whose trials cannot be compared"):
        search(replace(config, parameters=config.parameters[:1], seed=5))


@pytest.mark.slow
def test_a_killed_search_takes_its_trials_with_it(whole: SearchConfig, recipe: Path) -> None:
    """Killed with no chance to tidy up; started again, it ends like the others, two trials at a time."""
    output = recipe.parent / "killed"
    command = [sys.executable, "-c", "from puna.cli import main; main()", "search", str(search_file(recipe, output))]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not (output / "trials" / "0001" / "log.txt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    config = load_config(SearchConfig, search_file(recipe, output), ["workers=2"])
    assert [outcome[0] for outcome in outcomes(config)] == [0]
    search(config)
    assert [(number, params) for number, _, params, *_ in outcomes(config)] == [
        (number, params) for number, _, params, *_ in outcomes(whole)
    ]


def test_what_all_trials_share_is_refused_by_the_first(recipe: Path) -> None:
    """And leaves nothing that would keep the same output from being used when it is mended."""
    config = plan(recipe, metric="validation/f7", trials=1)
    with pytest.raises(InputError, match=r"Trial 0 could not start. selection.metric is 'validation/f7', but what"):
        search(config)
    assert not outcomes(replace(config, metric="validation/loss"))


def test_two_searches_at_once_are_refused(recipe: Path) -> None:
    config = plan(recipe, output=recipe.parent / "twice")
    with only_process(config.output, "puna search"), pytest.raises(InputError, match="Another puna search is at work"):
        search(config)


def test_trials_that_cannot_be_done_are_noted(recipe: Path) -> None:
    """Five rows are no multiple of two; were all like that, the search would end."""
    odd = (ChoiceParameter(key="train.batch_rows", values=(5, 7)), ChoiceParameter(key="train.seed", values=(0, 1)))
    config = plan(
        recipe, output=recipe.parent / "odd", parameters=odd, settings={"train": {"micro_batch_rows": 1}}, trials=9
    )
    broken = Search(config)
    broken.recipe["train"]["micro_batch_rows"] = 2
    with pytest.raises(
        InputError, match=r"None of 3 trials ran to its end.*has to be a multiple of micro_batch_rows \(2\)"
    ):
        broken.run(lambda trial: None)
    assert [trial.state.name for trial in broken.finished] == ["FAIL"] * 3


def test_wrong_settings_are_refused_before_the_first_trial(recipe: Path, tmp_path: Path) -> None:
    def refused(reason: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=reason):
            search(plan(recipe, **changes))
        assert not (tmp_path / "search").exists()

    misspelt = FloatParameter(key="train.optimizer.learning_rat", low=1, high=2)
    refused(r"no key train.optimizer.learning_rat. Did you mean train.optimizer.learning_rate", parameters=(misspelt,))
    wrong = ChoiceParameter(key="train.precision", values=("fp32", "fp12"))
    refused("train.precision.*'fp12'", parameters=(wrong,))
    negative = FloatParameter(key=RATE, low=-1, high=1)
    refused("learning_rate is -1", parameters=(negative,))
    refused("There is no recipe", recipe=tmp_path / "absent.toml")
    refused("set train.validate_every", settings={"train": {"validate_every": 0}})


def test_a_setting_may_need_another(recipe: Path) -> None:
    """40 warm-up steps are too many for the recipe's own 12 steps, but not for 40."""
    both = (
        ChoiceParameter(key="train.steps", values=(40, 80)),
        ChoiceParameter(key="train.schedule.warmup_steps", values=(2, 40)),
    )
    base, _ = base_recipe(plan(recipe, parameters=both))
    changed = with_values(base, {"train.steps": 40, RATE: 1e-3})
    assert changed["train"]["optimizer"]["learning_rate"] == 1e-3
    assert base["train"]["steps"] == read_toml(recipe)["train"]["steps"] == 12


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"parameters": ()}, "nothing to search"),
        ({"parameters": (FloatParameter(key=RATE, low=1, high=2),) * 2}, "twice"),
        ({"parameters": (ChoiceParameter(key="output", values=("a", "b")),)}, "the search itself sets"),
        ({"settings": {"train": {"optimizer": {"learning_rate": 1e-3}}}}, "both in parameters and in settings"),
        ({"trials": 0}, "at least 1"),
    ],
)
def test_searches_that_make_no_sense(recipe: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        plan(recipe, **changes)


@pytest.mark.parametrize("kind", ["conversations", "text"])
def test_what_is_not_a_head_can_be_ended_too(base_model: Path, tmp_path: Path, kind: str) -> None:
    """At the second validation, by a judge who looks at the points of the curve."""
    settings_ = [f"model={base_model}", f"output={tmp_path / 'out'}", "selection.metric=validation/loss"]
    if kind == "text":
        rows = [{"text": f"a llama {n} eats", "summary": "hay"} for n in range(6)]
        settings_ += ["task.kind=summarisation", f"data.train={tmp_path / 'd.jsonl'}", "data.held_out_share=0.5"]
        settings_ += ["task.target_tokens=16"]
    else:
        rows = [{"prompt": f"eat {n}?", "completion": "hay"} for n in range(6)]
        settings_ += [f"conversations={tmp_path / 'd.jsonl'}", f"held_out_conversations={tmp_path / 'd.jsonl'}"]
    write_jsonl(tmp_path / "d.jsonl", rows)
    short = ["steps=6", "batch_rows=1", "micro_batch_rows=1", "row_length=96", "validate_every=2", "device=cpu"]
    short += ["num_threads=1", "tensorboard=false", "schedule.warmup_steps=2"]
    config = load_config(FinetuneConfig, None, [*settings_, *(f"train.{setting}" for setting in short)])
    seen: list[int] = []

    def judge(points: Sequence[Mapping[str, float]]) -> bool:
        seen.append(len(points))
        return len(points) == 2

    finetune(config, judge)
    assert seen == [0, 1, 2]
    assert read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]["step"] == 4
