"""Simulated raters: what they prefer, how often they err, what is written, and that it can be learnt from."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.align.scoring import answer_rewards, open_reward_model
from puna.align.simulate import SimulateConfig, compared
from puna.align.simulate import main as simulate
from puna.batches.preferences import STRENGTHS, Preference, read_preferences
from puna.config import load_config
from puna.runtime.errors import InputError
from puna.runtime.files import read_jsonl, write_jsonl
from puna.runtime.manifest import Manifest

LEVELS = (0.1, 0.5, 1.0, 2.0)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    write_jsonl(path, [{"prompt": f"What is {n}?"} for n in range(6)])
    return path


def run(base_model: Path, prompts: Path, output: Path, *settings: str) -> list[dict[str, Any]]:
    given = [f'models=["{base_model}"]', f"prompts={prompts}", f"output={output}"]
    engine = ["engine.device=cpu", "engine.num_threads=1", "sampling.max_tokens=60"]
    engine.append(f"sampling.stop_ids={list(range(0, 300, 15))}")  # random weights hardly ever end an answer
    simulate(load_config(SimulateConfig, None, [*given, *engine, *settings]))
    return list(read_jsonl(output / "preferences.jsonl"))


@given(st.lists(st.floats(-5, 5), max_size=5), st.floats(0, 2), st.integers(0, 9))
def test_the_order_is_of_scores_with_noise(scores: list[float], noise: float, seed: int) -> None:
    order, strength = compared(scores, noise, LEVELS, np.random.default_rng(seed))
    seen = np.array(scores) + noise * np.random.default_rng(seed).gumbel(size=len(scores))
    assert len(set(order)) == len(order)
    gaps = -np.diff(seen[order])
    assert (gaps >= LEVELS[0]).all(), "what can hardly be told apart is no preference"
    assert (strength is None) == (len(order) < 2)
    if strength is not None:
        assert order[0] == seen.argmax()
        assert LEVELS[strength] <= gaps[0] < [*LEVELS, np.inf][strength + 1]


def test_an_inconstant_rater_is_the_bradley_terry_model() -> None:
    """Within five standard errors of sigmoid(difference / noise), ties apart."""
    generator = np.random.default_rng(0)
    count, noise, difference = 4000, 0.5, 0.6
    first = sum(compared([difference, 0.0], noise, (0, 0, 0, 0), generator)[0][0] == 0 for _ in range(count))
    expected = 1 / (1 + np.exp(-difference / noise))
    assert abs(first / count - expected) < 5 * np.sqrt(expected * (1 - expected) / count)


def test_a_rule_compares(base_model: Path, prompts: Path, tmp_path: Path) -> None:
    """A rater that counts words, without noise: the shorter is always chosen."""
    rater = 'rater={kind="rule",points_per_word=-1.0}'
    rows = run(base_model, prompts, tmp_path / "out", rater, "noise=0", "samples=2")
    for row in rows:
        apart = len(row["rejected"].split()) - len(row["chosen"].split())
        assert apart >= 1
        assert row["strength"] == STRENGTHS[2 if apart == 1 else 3]
        assert row["models"] == [str(base_model)] * 2
        assert row["scores"] == [-float(len(row[side].split())) for side in ("chosen", "rejected")]
    results = Manifest.read(tmp_path / "out").results
    assert results["num_preferences"] == len(rows) > 0
    assert results["num_against_scores"] == 0
    assert results["num_preferences"] + results["num_ties"] + results["num_without_two_answers"] == 6
    again = run(base_model, prompts, tmp_path / "again", rater, "noise=0", "samples=2")
    assert again == rows, "the same seed gives the same preferences"


def test_a_reward_model_ranks_what_several_models_answer(
    base_model: Path, reward_model: Path, prompts: Path, tmp_path: Path
) -> None:
    rater = f'rater={{kind="reward",path="{reward_model}"}}'
    both = f'models=["{base_model}","{base_model}"]'
    rows = run(base_model, prompts, tmp_path / "out", rater, both, "noise=0", "levels=[0.0,0.5,1.0,2.0]")
    read = list(read_preferences(tmp_path / "out" / "preferences.jsonl"))
    assert any("answers" in row for row in rows)
    head = open_reward_model(reward_model)
    for row, preference in zip(rows, read, strict=True):
        assert isinstance(preference, Preference)
        texts = [str(answer[0]["content"]) for answer in preference.answers]
        scores = answer_rewards(head, [preference.prompt], [texts])[0]
        assert scores == pytest.approx(row["scores"], abs=1e-4)
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (['rater={kind="rule"}'], "needs points or points_per_word"),
        (['rater={kind="rule",points={"("=1.0}}'], "no regular expression"),
        (['rater={kind="rul"}'], "Did you mean 'rule'"),
        (["samples=1"], "nothing to compare it with"),
        (["levels=[1.0,0.5,1.0,2.0]"], "have to rise"),
        (["sampling.max_tokens=1"], "None of the 6 prompts has a comparison"),
        (["levels=[1e9,1e9,1e9,1e9]"], "are ties"),
    ],
)
def test_what_cannot_work_is_explained(
    base_model: Path, prompts: Path, tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(base_model, prompts, tmp_path / "out", 'rater={kind="rule",points_per_word=-1.0}', *settings)
    assert not (tmp_path / "out").exists()
