"""Bias by template: what is asked, how groups are compared, and that a planted difference is found."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from puna.config import load_config
from puna.evaluate.bias.main import BiasConfig, main
from puna.evaluate.bias.measure import (
    Continued,
    Item,
    Table,
    compare,
    continuations,
    hostility,
    likelihoods,
    word_scorer,
)
from puna.evaluate.bias.templates import Axis, Contrast, Opening, Templates, read_templates
from puna.evaluate.tasks.request import Answer, Continuation, Generated, Generation, Likelihood, Request
from puna.peft.heads import HeadSpec, add_head, save_head_model
from puna.runtime.errors import InputError
from puna.runtime.files import read_json, read_jsonl
from puna.runtime.manifest import Manifest
from puna.tokenizer.load import load_tokenizer
from puna.weights.load import load_model

AXIS = Axis("kind", "en", ("llamas", "cities", "herds"))
CONTRAST = Contrast("esteem", "en", ("All {group} are {attribute}.", "My {group} stay {attribute}"),
                    (("good", "bad"), ("kind", "cruel"), ("calm", "wild"), ("clean", "dirty")))  # fmt: skip
OPENING = Opening("en", ("Most {group} are", "The {group} will", "In {group} there is"))
TEMPLATES = Templates((AXIS,), (CONTRAST,), (OPENING,))

OWN = """
[[axis]]
name = "kind"
language = "en"
groups = ["llamas", "cities", "herds"]

[[contrast]]
name = "esteem"
language = "en"
templates = ["the {group} is {attribute}."]
pairs = [["good", "bad"], ["Lima", "Peru"], ["hay", "city"]]

[[opening]]
language = "en"
texts = ["the {group} walks", "a {group} sleeps"]

[[words]]
language = "en"
words = ["bad", "city"]
"""


class PlantedAsker:
    """A model that finds pleasant words likelier of llamas by one nat, and writes worse of cities."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def ask(self, requests: Sequence[Request], title: str) -> list[Answer]:
        return [self.one(request) for request in requests]

    def one(self, request: Request) -> Answer:
        assert isinstance(request.prompt, str)
        if isinstance(request, Generation):
            return Generated("bad" if "cities" in request.prompt else "good", True, 1)
        assert isinstance(request, Continuation)
        pleasant = any(request.text.startswith(first) for first, _ in CONTRAST.pairs)
        planted = 1.0 if pleasant and "llamas" in request.prompt else 0.0
        # How likely a group is, and how long a word, has to cancel.
        return Likelihood(planted - len(request.prompt) - self.random.normal(scale=0.1), False, 1)


def test_a_planted_difference_is_found_and_no_other() -> None:
    asker: Any = PlantedAsker(0)
    tables = likelihoods(asker, TEMPLATES)
    [table] = tables
    assert [item.cluster for item in table.items] == ["good", "kind", "calm", "clean"] * 2
    drawn = continuations(asker, TEMPLATES, samples=2, max_tokens=4, temperature=1.0, seed=0)
    assert len(drawn) == 3 * 3 * 2
    scorer = word_scorer(["bad"], spaced=True)
    scored = [Continued(c.language, c.axis, c.group, c.opening, c.text, scorer([c.text])[0]) for c in drawn]
    findings = {(each.measure, each.group): each for each in compare(tables + hostility(scored, TEMPLATES.axis))}
    assert len(findings) == 6
    llamas = findings["esteem", "llamas"]
    assert llamas.value.mean == pytest.approx(1, abs=0.2)
    assert llamas.difference.mean == pytest.approx(1, abs=0.2)
    assert llamas.difference.interval.low < 1 < llamas.difference.interval.high
    assert llamas.effect > 3
    assert llamas.q < 0.05
    # Beside a mean with llamas in it, the others are half a nat behind.
    for other in ("cities", "herds"):
        assert findings["esteem", other].difference.mean == pytest.approx(-0.5, abs=0.2)
    assert findings["hostility", "cities"].difference.mean == 1
    assert findings["hostility", "cities"].q == 0
    assert findings["hostility", "herds"].difference.mean == -0.5


@settings(max_examples=25)
@given(st.integers(2, 5), st.integers(2, 6), st.integers(0, 999))
def test_comparisons_are_those_of_the_textbook(num_groups: int, num_items: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    axis = Axis("kind", "en", tuple(f"group {n}" for n in range(num_groups)))
    items = [Item(str(n), str(n), tuple(random.normal(size=num_groups))) for n in range(num_items)]
    findings = compare([Table("m", axis, tuple(items))])
    assert len(findings) == (1 if num_groups == 2 else num_groups)
    for number, finding in enumerate(findings):
        own = [item.values[number] for item in items]
        others = [np.mean([v for at, v in enumerate(item.values) if at != number]) for item in items]
        test = stats.ttest_rel(own, others)
        assert finding.difference.mean == pytest.approx(np.mean(own) - np.mean(others))
        assert finding.p == pytest.approx(test.pvalue)
        assert tuple(finding.difference.interval) == pytest.approx(tuple(test.confidence_interval()))
        assert finding.effect == pytest.approx(test.statistic / np.sqrt(num_items))
    # Benjamini and Hochberg, by the definition: the largest share of false ones at which a finding would be reported.
    for finding in findings:
        worse = [other.p for other in findings if other.p >= finding.p]
        ranks = [sum(each.p <= p for each in findings) for p in worse]
        wanted = min(p * len(findings) / rank for p, rank in zip(worse, ranks, strict=True))
        assert finding.q == pytest.approx(min(wanted, 1))


@pytest.mark.parametrize(
    ("words", "spaced", "text", "hostile"),
    [
        (["bad"], True, "That is Bad!", 1),
        (["bad"], True, "a badge", 0),
        (["坏"], False, "他很坏。", 1),
        (["坏"], True, "他很坏。", 0),
        (["a.b"], True, "axb", 0),
    ],
)
def test_words_in_a_text(words: list[str], spaced: bool, text: str, hostile: int) -> None:
    assert word_scorer(words, spaced=spaced)([text, ""]) == [hostile, 0]


def run(base_model: Path, folder: Path, *settings: str) -> Path:
    (folder / "own.toml").write_text(OWN)
    given = [f"model={base_model}", f"output={folder / 'out'}", f"templates={folder / 'own.toml'}", "samples=2"]
    given += ["max_tokens=8", "engine.device=cpu", "engine.num_threads=1", *settings]
    main(load_config(BiasConfig, None, given))
    return folder / "out"


def test_what_a_model_says_is_measured(base_model: Path, tmp_path: Path) -> None:
    out = run(base_model, tmp_path)
    items = list(read_jsonl(out / "items.jsonl"))
    model, tokenizer = load_model(base_model), load_tokenizer(base_model)

    def nats(text: str, start: str) -> float:
        """The slow twin: a forward over the whole text."""
        assert tokenizer.bos_id is not None
        first = len(tokenizer.encode(start)) + 1
        ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(text)])
        with torch.no_grad():
            logprobs = model(ids[None])[0].log_softmax(-1)
        return float(logprobs[first - 1 : -1].gather(1, ids[first:, None]).sum())

    for number, pair in enumerate([("good", "bad"), ("Lima", "Peru"), ("hay", "city")]):
        for group, value in items[number]["values"].items():
            start = f"the {group} is"
            expected = nats(f"{start} {pair[0]}.", start) - nats(f"{start} {pair[1]}.", start)
            assert value == pytest.approx(expected, abs=1e-3)
    continued = list(read_jsonl(out / "continuations.jsonl"))
    assert len(continued) == 3 * 2 * 2
    for each in continued:
        assert each["score"] == float(bool({"bad", "city"} & set(re.findall(r"\w+", each["text"].lower()))))
    findings = read_json(out / "results.json")
    assert [(each["measure"], each["group"]) for each in findings] == [
        (measure, group) for measure in ("esteem", "hostility") for group in ("llamas", "cities", "herds")
    ]
    results = Manifest.read(out).results
    assert results == {"num_comparisons": 6, "num_standing": sum(each["q"] <= 0.05 for each in findings)}
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert all(group in page for group in ("llamas", "cities", "herds"))
    assert "of 6 comparisons stand" in (out / "report.txt").read_text()


def test_a_classifier_says_what_is_hostile(base_model: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(base_model, dtype=torch.float32), load_tokenizer(base_model)
    spec = HeadSpec(
        "ForSequenceClassification", "score", False, ("fine", "rude"), {"problem_type": "single_label_classification"}
    )
    add_head(model, spec, seed=0)
    manifest = Manifest("finetune", {"task": {}, "train": {"row_length": 64}}, {})
    save_head_model(model, spec, "causal", tokenizer, tmp_path / "judge", torch.float32, manifest)
    with pytest.raises(InputError, match="no class 'unsafe'; its classes are fine, rude"):
        run(base_model, tmp_path, f"classifier={tmp_path / 'judge'}")
    out = run(base_model, tmp_path, f"classifier={tmp_path / 'judge'}", f"hostile={json.dumps(['rude'])}")
    for each in list(read_jsonl(out / "continuations.jsonl"))[:3]:
        ids = [tokenizer.bos_id, *tokenizer.encode(each["text"])]
        head = model.get_submodule("score")
        with torch.no_grad():
            logits = model(torch.tensor([ids]), head=lambda h_BTD, _: head(h_BTD))[0, -1]  # noqa: B023
        assert each["score"] == pytest.approx(float(logits.softmax(-1)[1]), abs=1e-4)


def test_the_templates_that_come_along() -> None:
    templates = read_templates(None, ["en", "zh"], [])
    for language in ("en", "zh"):
        axes = [axis.name for axis in templates.axis if axis.language == language]
        assert axes == ["gender", "nationality", "religion", "age", "profession"]
        assert {each.name for each in templates.contrast if each.language == language} == {"esteem", "power"}
        assert [each for each in templates.opening if each.language == language]
        assert [each for each in templates.words if each.language == language]
    assert {axis.language for axis in read_templates(None, ["zh"], ["age"]).axis} == {"zh"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (['languages=["zh"]'], "no templates in the language 'zh', only in en"),
        (['axes=["age"]'], "no axis 'age'; there are kind"),
        (["templates=/nowhere"], "holds no templates"),
        (["samples=-1"], "cannot be negative"),
        (["confidence=1"], "between 0 and 1"),
    ],
)
def test_what_cannot_be_measured_is_explained(
    base_model: Path, tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(base_model, tmp_path, *settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("the {group} is {attribute}.", "{attribute} is the {group}", "models read forward"),
        ('["good", "bad"], ["Lima", "Peru"], ', "", "at least two pairs"),
        ('"llamas", "cities", "herds"', '"llamas", "llamas"', "at least two groups, each once"),
        ("a {group} sleeps", "a llama sleeps", "each with {group}"),
        ('words = ["bad", "city"]', "words = 3", "words"),
    ],
)
def test_bad_templates_are_explained(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "templates.toml"
    path.write_text(OWN.replace(old, new))
    with pytest.raises(InputError, match=message):
        read_templates(path, ["en"], [])
