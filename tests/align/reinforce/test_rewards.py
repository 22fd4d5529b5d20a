"""Rewards: what each gives, how they add up, and what the checks before the first step say of them."""

from pathlib import Path

import pytest
import torch

from puna.align.reinforce import rewards
from puna.align.reinforce.config import ReinforceConfig
from puna.align.reinforce.main import main as reinforce
from puna.align.reinforce.rewards import (
    ExactReward,
    MathsReward,
    ModelReward,
    NumberReward,
    Prompt,
    RegexReward,
    Reward,
    SafeHelpfulReward,
    SchemaReward,
    Scorer,
    code_of,
)
from puna.config import load_config
from puna.runtime.errors import InputError
from puna.runtime.files import write_jsonl

CPU = torch.device("cpu")


def given(reward: Reward, answers: list[str], **columns: object) -> list[float]:
    prompts = [Prompt("", [{"role": "user", "content": "What is 1?"}], (), columns)] * len(answers)
    return reward.open(CPU)(prompts, answers)


def test_comparisons() -> None:
    assert given(ExactReward(), ["Lima", "Cuzco"], answer="lima") == [1, 0]
    assert given(NumberReward(), ["2 + 3 = 5", "5 or 6", "none"], answer=5) == [1, 0, 0]
    assert given(MathsReward(), ["\\boxed{\\frac{1}{2}}", "\\boxed{2}"], answer="\\frac{1}{2}") == [1, 0]
    assert given(RegexReward(pattern=r"\Ayes\b"), ["yes, it is", "oh yes"]) == [1, 0]
    with pytest.raises(ValueError, match="no regular expression"):
        RegexReward(pattern="(")


def test_schema(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}')
    assert given(SchemaReward(schema=schema), ['{"name": "Lima"}', '{"name": 1}', "Lima"]) == [1, 0, 0]
    schema.write_text('{"type": "nothing"}')
    with pytest.raises(InputError, match="no JSON schema"):
        given(SchemaReward(schema=schema), [])


def test_unit_tests() -> None:
    answers = ["Here:\n```python\ndef double(x):\n    return 2 * x\n```\nDone.", "def double(x):\n    return x"]
    assert code_of(answers[0]) == "def double(x):\n    return 2 * x\n"
    assert given(rewards.TestsReward(), answers, tests=["assert double(2) == 4", "assert double(0) == 0"]) == [1, 0]


def test_sum_and_unfinished() -> None:
    prompts = [Prompt("", [], (), {"answer": "5"})] * 3
    scorer = Scorer([NumberReward(weight=2.0), RegexReward(pattern="so", weight=0.5)], CPU, -1.0)
    totals, means = scorer(prompts, ["so 5", "5", "so 5"], [True, True, False])
    assert totals == [2.5, 2.0, -1.0]
    assert means == {"number_0": 1.0, "regex_1": pytest.approx(2 / 3)}


def test_models(reward_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama, city = given(ModelReward(path=reward_model), ["a llama 1", "a city 1"])
    assert llama > city

    # Rewards of the two models, by their place: the third answer is unsafe, the fourth's prompt is marked so.
    helpful, safe = [3.0, 1.0, 5.0, 4.0], [0.0, 2.0, -2.0, 1.0]
    values = {Path("one"): helpful, Path("other"): safe}
    monkeypatch.setattr(rewards, "_opened", lambda path, device: lambda prompts, answers: values[path])
    judge = SafeHelpfulReward(helpfulness=Path("one"), safety=Path("other")).open(CPU)
    prompts = [Prompt("", [], (), {"unsafe": number == 3}) for number in range(4)]
    # sigmoid(-2) = 0.12 is below the threshold of 0.15.
    assert judge(prompts, [""] * 4) == [3.0, 1.0, -2.0, 1.0]


def test_reward_model_that_disagrees_with_people_is_refused(
    base_model: Path, reward_model: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"What is {n}?", "chosen": f"a city {n}", "rejected": f"a llama {n}"} for n in range(30)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    config = load_config(
        ReinforceConfig,
        None,
        [
            f"model={base_model}",
            f"prompts={tmp_path / 'pairs.jsonl'}",
            f"held_out_preferences={tmp_path / 'pairs.jsonl'}",
            f"output={tmp_path / 'out'}",
            "method.kind=ppo",
            f"method.critic={reward_model}",
            f'rewards=[{{kind = "model", path = "{reward_model}"}}]',
            "prompts_per_rollout=4",
            "sampling.max_tokens=4",
            "train.steps=4",
            "train.batch_rows=4",
            "train.micro_batch_rows=4",
            "train.row_length=128",
            "train.schedule.warmup_steps=1",
            "train.device=cpu",
            "train.num_threads=1",
            "train.tensorboard=false",
        ],
    )
    with pytest.raises(InputError, match=r"prefer the better answer in \d+ of 30 pairs"):
        reinforce(config)
    assert not (tmp_path / "out" / "model").exists()
