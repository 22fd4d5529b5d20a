"""Context distillation: which preprompt a prompt gets, which answers are kept, and that the preprompt is gone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from puna.align.context_distillation import (
    Answer,
    DistilContextConfig,
    _choose,
    _keep,
    _under,
    main,
    read_preprompts,
)
from puna.batches.conversations import read_conversations
from puna.batches.preferences import Preference, read_preferences
from puna.config import load_config
from puna.runtime.errors import InputError
from puna.runtime.files import read_jsonl, write_jsonl
from puna.runtime.manifest import Manifest

Run = Callable[..., list[dict[str, Any]]]

PREPROMPTS = """
[[preprompt]]
category = "general"
texts = ["Be kind.", "Be wise."]

[[preprompt]]
category = "hay"
texts = ["Be calm."]
"""


@pytest.fixture
def run(base_model: Path, tmp_path: Path) -> Run:
    rows = [{"prompt": f"What is {n}?", "risk": "hay" if n % 2 else None} for n in range(16)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    (tmp_path / "preprompts.toml").write_text(PREPROMPTS)

    def distil(*settings: str) -> list[dict[str, Any]]:
        given = [f"model={base_model}", f"prompts={tmp_path / 'prompts.jsonl'}", f"output={tmp_path / 'out'}"]
        given += [f"preprompts={tmp_path / 'preprompts.toml'}", "category_column=risk"]
        engine = ["engine.device=cpu", "engine.num_threads=1", "sampling.max_tokens=70"]
        main(load_config(DistilContextConfig, None, [*given, *engine, *settings]))
        return list(read_jsonl(tmp_path / "out" / "conversations.jsonl"))

    return distil


def test_answers_are_kept_where_a_reward_model_prefers_them(run: Run, reward_model: Path, tmp_path: Path) -> None:
    kept = run(f"reward={reward_model}", "samples=3")
    samples = list(read_jsonl(tmp_path / "out" / "samples.jsonl"))
    assert len(samples) == 16 * 4, "the original answer and three others"
    by_prompt = {each["id"]: [s for s in samples if s["id"] == each["id"]] for each in samples}
    kept_by_prompt = {line["id"]: line for line in kept}
    for where, (original, *others) in by_prompt.items():
        category = original["category"]
        assert original["preprompt"] == ""
        assert {each["preprompt"] for each in others} == (
            {"Be calm."} if category == "hay" else {"Be kind.", "Be wise."}
        )
        # The rule in words: the best whole answer, if it is better than a whole original.
        whole = [each for each in others if each["finished"]]
        best = max(whole, key=lambda each: each["reward"], default=None)
        if best is None or (original["finished"] and best["reward"] <= original["reward"]):
            assert where not in kept_by_prompt
            continue
        line = kept_by_prompt[where]
        assert line["messages"] == [*original["prompt"], {"role": "assistant", "content": best["answer"]}]
        assert line["preprompt"] == best["preprompt"]
        assert (line["reward"], line["original_reward"]) == (best["reward"], original["reward"])
    assert {len(each.messages) for each in read_conversations(tmp_path / "out" / "conversations.jsonl")} == {2}
    results = Manifest.read(tmp_path / "out").results
    assert results["num_kept"] == len(kept) == 16 - sum(results["num_left_out"].values())
    preferences = list(read_preferences(tmp_path / "out" / "preferences.jsonl"))
    assert len(preferences) == sum(line["original_reward"] is not None for line in kept)
    assert preferences
    for each in preferences:
        assert isinstance(each, Preference)
        assert each.prompt[0]["role"] == "user", "no preprompt in what is learnt from"


def test_without_a_reward_model_whole_answers_are_kept(run: Run, tmp_path: Path) -> None:
    kept = run("max_prompts=8")
    samples = list(read_jsonl(tmp_path / "out" / "samples.jsonl"))
    assert len(samples) == 8
    assert [line["id"] for line in kept] == [each["id"] for each in samples if each["finished"]]
    assert all(each["preprompt"] for each in samples)
    assert not (tmp_path / "out" / "preferences.jsonl").exists()
    assert run("max_prompts=8") == kept, "the same seed gives the same answers"


def test_the_preprompt_comes_before_a_system_message_of_the_prompt() -> None:
    user = {"role": "user", "content": "Hi"}
    assert _under("Be kind.", [user]) == [{"role": "system", "content": "Be kind."}, user]
    own = {"role": "system", "content": "Be short."}
    assert _under("Be kind.", [own, user]) == [{"role": "system", "content": "Be kind.\n\nBe short."}, user]
    assert _under("", [own, user]) == [own, user]


def test_preprompts_take_turns() -> None:
    config = DistilContextConfig(model=Path("m"), prompts=Path("p"), output=Path("o"), reward=Path("r"), samples=4)
    chosen = [_choose(["a", "b"], number, config) for number in range(20)]
    assert {tuple(each) for each in chosen} == {("a", "b", "a", "b"), ("b", "a", "b", "a")}


@pytest.mark.parametrize(
    ("original", "others", "least_gain", "kept"),
    [
        (("no", True, 1.0), [("yes", True, 1.5)], 0.0, "yes"),
        (("no", True, 1.0), [("yes", True, 1.5)], 0.6, None),
        (("no", True, 1.0), [("yes", True, 1.0)], 0.0, None),
        (("no", False, None), [("yes", True, -9.0)], 0.0, "yes"),
        (("no", True, 1.0), [("cut", False, None), ("yes", True, 1.2), ("more", True, 1.4)], 0.0, "more"),
        (("no", True, 1.0), [("cut", False, None)], 0.0, None),
    ],
)
def test_what_is_kept(
    original: tuple[str, bool, float | None],
    others: list[tuple[str, bool, float | None]],
    least_gain: float,
    kept: str | None,
) -> None:
    best, reason = _keep([Answer("", *original), *(Answer("pre", *each) for each in others)], least_gain)
    assert (best and best.text) == kept
    assert bool(reason) == (kept is None)


def test_the_preprompts_that_come_along() -> None:
    preprompts = read_preprompts(None)
    assert list(preprompts) == [
        "general",
        "illicit",
        "hateful",
        "self_harm",
        "unqualified_advice",
        "privacy",
        "children",
    ]
    texts = [text for own in preprompts.values() for text in own]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["samples=2"], "need a reward model to choose by"),
        (["sampling.seed=1"], "Set temperature and seed instead"),
        (["sampling.max_tokens=1"], r"None of the 16 prompts has an answer to keep \(16: no whole answer\)"),
        (["category_column=prompt"], "no preprompt for the category 'What is 0\\?', only for general, hay"),
        (["preprompts={folder}/prompts.jsonl"], "is not a file of preprompts"),
        (["preprompts={folder}/nothing.toml"], "No such file"),
        (["reward={base}"], "ForSequenceClassification"),
    ],
)
def test_what_cannot_work_is_explained(
    run: Run, base_model: Path, tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(*(setting.format(folder=tmp_path, base=base_model) for setting in settings))
    assert not (tmp_path / "out").exists()
