"""Verdicts on texts: probabilities by hand, long texts, and heads that give none."""

from pathlib import Path
from typing import Any

import pytest
import torch

from puna.peft.heads import HeadSpec, add_head, save_head_model
from puna.peft.text_classifier import TextClassifier
from puna.runtime.errors import InputError
from puna.runtime.files import read_json, write_json
from puna.runtime.manifest import Manifest
from puna.tokenizer.load import load_tokenizer
from puna.weights.load import load_model

CPU = torch.device("cpu")
LABELS = ("calm", "wild", "rude")


def make(
    base_model: Path, directory: Path, problem: str, task: dict[str, Any] | None, labels: tuple[str, ...] = LABELS
) -> Path:
    """A head of random weights, large enough for probabilities to differ."""
    model = load_model(base_model, dtype=torch.float32)
    spec = HeadSpec("ForSequenceClassification", "score", False, labels, {"problem_type": problem})
    add_head(model, spec, seed=3)
    with torch.no_grad():
        model.get_submodule("score").weight.mul_(30)
    manifest = Manifest("finetune", {} if task is None else {"task": task, "train": {"row_length": 20}}, {})
    save_head_model(model, spec, "causal", load_tokenizer(base_model), directory, torch.float32, manifest)
    return directory


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_probabilities_are_those_of_the_last_token(base_model: Path, tmp_path: Path, problem: str) -> None:
    directory = make(base_model, tmp_path / "head", problem, {"second_text": ""})
    classifier = TextClassifier(directory, CPU)
    texts = ["the llama", "a bad city in Peru", "", "hay"]
    found_NC = classifier.probabilities(texts)
    model, tokenizer = classifier._head.model, load_tokenizer(base_model)
    head = model.get_submodule("score")
    for text, found_C in zip(texts, found_NC, strict=True):
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)]])
        with torch.no_grad():
            logits_C = model(ids, head=lambda h_BTD, _: head(h_BTD))[0, -1]
        wanted_C = logits_C.softmax(-1) if problem.startswith("single") else logits_C.sigmoid()
        torch.testing.assert_close(found_C, wanted_C, atol=1e-5, rtol=0)
    if problem.startswith("single"):
        torch.testing.assert_close(found_NC.sum(-1), torch.ones(4))
    assert classifier.columns(["rude", "calm"]) == [2, 0]


def test_a_long_text_has_the_highest_probability_of_its_windows(base_model: Path, tmp_path: Path) -> None:
    classifier = TextClassifier(make(base_model, tmp_path / "head", "multi_label_classification", {}), CPU)
    assert classifier.max_tokens == 20
    tokenizer = load_tokenizer(base_model)
    text = "the llama walks to a good bad city in Peru and sleeps while the herd of Lima eats hay" * 2
    ids = tokenizer.encode(text)
    windows = classifier._windows(text)
    assert {token for own in windows for token in own[1:]} == set(ids)
    assert windows[0][1:] == ids[:19]
    assert windows[1][1:] == ids[9:28]
    assert windows[-1][1:] == ids[9 * (len(windows) - 1) :]
    whole_C = classifier.probabilities([text])[0]
    singles_NC = torch.stack([_of_ids(classifier, own) for own in windows])
    torch.testing.assert_close(whole_C, singles_NC.amax(0), atol=1e-5, rtol=0)


def _of_ids(classifier: TextClassifier, ids: list[int]) -> torch.Tensor:
    model = classifier._head.model
    head = model.get_submodule("score")
    with torch.no_grad():
        logits_C: torch.Tensor = model(torch.tensor([ids]), head=lambda h_BTD, _: head(h_BTD))[0, -1]
    return logits_C.sigmoid()


def test_a_head_from_elsewhere_reads_its_whole_context(base_model: Path, tmp_path: Path) -> None:
    directory = make(base_model, tmp_path / "head", "single_label_classification", {})
    (directory / "puna.json").unlink()
    config = read_json(directory / "config.json")
    del config["problem_type"]  # which transformers writes only after a training
    write_json(directory / "config.json", config)
    classifier = TextClassifier(directory, CPU)
    assert classifier.max_tokens == 128
    torch.testing.assert_close(classifier.probabilities(["hay"]).sum(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("problem", "task", "labels", "message"),
    [
        ("regression", {}, ("number",), "ForSequenceClassification, regression, and no classifier of single texts"),
        ("single_label_classification", {"second_text": "other"}, LABELS, "is for pairs of texts"),
    ],
)
def test_what_gives_no_verdict_is_refused(
    base_model: Path, tmp_path: Path, problem: str, task: dict[str, Any], labels: tuple[str, ...], message: str
) -> None:
    directory = make(base_model, tmp_path / "head", problem, task, labels)
    with pytest.raises(InputError, match=message):
        TextClassifier(directory, CPU)
    with pytest.raises(InputError, match="no class 'mild'; its classes are calm, wild, rude"):
        TextClassifier(make(base_model, tmp_path / "own", "multi_label_classification", {}), CPU).columns(["mild"])
