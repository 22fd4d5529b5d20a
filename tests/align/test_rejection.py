"""Rejection sampling: which answers are drawn, what they are worth, what is kept."""

from pathlib import Path
from typing import Any

import pytest
import torch

from puna.align.rejection import RejectConfig
from puna.align.rejection import main as reject
from puna.align.scoring import score
from puna.batches.conversations import read_conversations
from puna.config import load_config
from puna.peft.heads import load_head_model
from puna.runtime.errors import InputError
from puna.runtime.files import read_jsonl, write_jsonl
from puna.runtime.manifest import Manifest
from puna.tokenizer.chat import render_chat


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": f"What is {n}?"} for n in range(3)]
    rows.append({"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "in Lima"}]})
    rows.append({"prompt": "Who?", "chosen": "a llama", "rejected": "a city"})
    write_jsonl(path, rows)
    return path


def run(base_model: Path, reward_model: Path, prompts: Path, output: Path, *settings: str) -> list[dict[str, Any]]:
    given = [f"model={base_model}", f"reward={reward_model}", f"prompts={prompts}", f"output={output}"]
    engine = ["engine.device=cpu", "engine.num_threads=1", "sampling.max_tokens=80", "samples=6"]
    reject(load_config(RejectConfig, None, [*given, *engine, *settings]))
    return list(read_jsonl(output / "conversations.jsonl"))


def test_the_best_of_several_answers_is_kept(
    base_model: Path, reward_model: Path, prompts: Path, tmp_path: Path
) -> None:
    kept = run(base_model, reward_model, prompts, tmp_path / "out", "temperatures=[1.0,0.7]")
    samples = list(read_jsonl(tmp_path / "out" / "samples.jsonl"))
    head = load_head_model(reward_model)
    for line in kept:
        own = [sample for sample in samples if sample["id"] == line["id"]]
        assert len({sample["answer"] for sample in own}) == len(own) == line["samples"], "no answer twice"
        best = max(own, key=lambda sample: sample["reward"])
        assert line["messages"] == [*best["prompt"], {"role": "assistant", "content": best["answer"]}]
        assert line["reward"] == best["reward"]
        # The slow twin: one text alone, by the layers' result at its last token.
        ids = render_chat(head.tokenizer, line["messages"]).ids
        with torch.no_grad():
            score_head = head.model.get_submodule("score")
            alone = head.model(torch.tensor([ids]), head=lambda h_BTD, _, score=score_head: score(h_BTD))[0, -1, 0]
        assert alone.item() == pytest.approx(line["reward"], rel=1e-4, abs=1e-5)
    assert {line["messages"][0]["content"] for line in kept} <= {
        "What is 0?",
        "What is 1?",
        "What is 2?",
        "Where?",
        "Who?",
    }
    results = Manifest.read(tmp_path / "out").results
    assert results["mean_reward_kept"] > results["mean_reward"]
    assert results["num_kept"] == len(kept) >= 3
    assert [len(each.messages) for each in read_conversations(tmp_path / "out" / "conversations.jsonl")] == [2] * len(
        kept
    )
    again = run(base_model, reward_model, prompts, tmp_path / "again", "temperatures=[1.0,0.7]")
    assert again == kept, "the same seed gives the same answers"


def test_what_gains_too_little_is_left_out(base_model: Path, reward_model: Path, prompts: Path, tmp_path: Path) -> None:
    everything = run(base_model, reward_model, prompts, tmp_path / "all")
    gains = sorted(line["reward"] - line["mean_reward"] for line in everything)
    least = (gains[0] + gains[-1]) / 2
    kept = run(base_model, reward_model, prompts, tmp_path / "some", f"least_gain={least}")
    assert kept == [line for line in everything if line["reward"] - line["mean_reward"] >= least]
    assert 0 < len(kept) < len(everything)


def test_scores_do_not_depend_on_neighbours(reward_model: Path) -> None:
    head = load_head_model(reward_model)
    texts = [[1, 2, 3], list(range(40)), [7]]
    assert score(head, texts) == pytest.approx([score(head, [text])[0] for text in texts], abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["temperatures=[0.0]"], "have to be above 0"),
        (["sampling.temperature=0.5"], "Set temperatures and seed instead"),
        (["sampling.max_tokens=1"], "no answer ended by itself within 1 tokens"),
        (["reward={base}"], "ForSequenceClassification"),
    ],
)
def test_what_cannot_work_is_explained(
    base_model: Path, reward_model: Path, prompts: Path, tmp_path: Path, settings: list[str], message: str
) -> None:
    given = [setting.format(base=base_model) if "base" in setting else setting for setting in settings]
    with pytest.raises(InputError, match=message):
        run(base_model, reward_model, prompts, tmp_path / "out", *given)
    assert not (tmp_path / "out").exists()
