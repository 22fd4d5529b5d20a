"""Texts without labels: chosen to be labelled, or labelled by the model itself."""

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.config import load_config
from puna.finetune.tasks.classification import Classification
from puna.finetune.tasks.head import predict
from puna.finetune.tasks.task import Example
from puna.finetune.unlabelled.active import ActiveConfig
from puna.finetune.unlabelled.active import main as active
from puna.finetune.unlabelled.choose import choose, k_centre, k_means, uncertainty
from puna.finetune.unlabelled.predictions import predict_rows, read_unlabelled, trained_classification
from puna.finetune.unlabelled.self_training import Guess, SelfTrainConfig, take
from puna.finetune.unlabelled.self_training import main as self_train
from puna.peft.heads import load_head_model
from puna.runtime.errors import InputError
from puna.runtime.files import read_jsonl, write_jsonl
from puna.runtime.manifest import Manifest

# Uncertainty and diversity


def test_uncertainty_by_hand() -> None:
    p_NC = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [1.0, 0.0, 0.0]])
    torch.testing.assert_close(uncertainty(p_NC, "least_confidence"), torch.tensor([0.5, 0.6, 0.0]))
    torch.testing.assert_close(uncertainty(p_NC, "margin"), torch.tensor([0.8, 1.0, 0.0]))
    wanted = torch.distributions.Categorical(probs=p_NC).entropy()
    torch.testing.assert_close(uncertainty(p_NC, "entropy"), wanted, atol=1e-5, rtol=1e-5)


def test_k_centre_by_hand() -> None:
    """On a line: with 0 labelled, 10 is the farthest, then 4 (4 away from 0), then 7 (3 away from 10 and 4)."""
    line = torch.tensor([[1.0], [4.0], [7.0], [10.0]])
    assert k_centre(line, 3, torch.zeros(1, 1)) == [3, 1, 2]
    assert k_centre(line, 2, torch.empty(0, 1)) == [0, 3]
    assert sorted(k_centre(line, 9, torch.zeros(1, 1))) == [0, 1, 2, 3]
    assert sorted(k_centre(torch.zeros(3, 1), 3, torch.zeros(1, 1))) == [0, 1, 2]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), count=st.integers(1, 6), num_labelled=st.integers(0, 3))
def test_k_centre_is_the_farthest_first_traversal(seed: int, count: int, num_labelled: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    states_ND = torch.randn(8, 3, generator=generator)
    labelled_MD = torch.randn(num_labelled, 3, generator=generator)
    chosen: list[int] = [] if num_labelled else [0]
    while len(chosen) < count:
        known = [*labelled_MD, *states_ND[chosen]]
        distances = [min(float((state - other).norm()) for other in known) for state in states_ND]
        chosen.append(max((n for n in range(8) if n not in chosen), key=lambda n: distances[n]))
    assert k_centre(states_ND, count, labelled_MD) == chosen


def test_k_means_takes_one_of_each_cluster() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    states_ND = torch.cat([centre + torch.randn(5, 2, generator=generator) * 0.1 for centre in centres])
    chosen = k_means(states_ND, 3, torch.rand(15, generator=generator), seed=1)
    assert sorted(number // 5 for number in chosen) == [0, 1, 2]
    assert sorted(k_means(states_ND[:2], 5, torch.zeros(2), seed=1)) == [0, 1]
    # With weights the centre moves to where the model is unsure.
    pair = torch.tensor([[0.0], [1.0], [1.2]])
    assert k_means(pair, 1, torch.tensor([100.0, 1.0, 1.0]), seed=0) == [0]
    assert k_means(pair, 1, torch.tensor([1.0, 1.0, 1.0]), seed=0) == [1]


def test_choice_is_among_the_least_sure() -> None:
    p_NC = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.55, 0.45], [0.5, 0.5]])
    states_ND = torch.tensor([[0.0], [5.0], [5.1], [9.0]])
    options: dict[str, Any] = {"by": "margin", "labelled_MD": torch.empty(0, 1), "seed": 0}
    assert choose(p_NC, states_ND, 2, diversity="none", candidates=1, **options) == [3, 2]
    assert choose(p_NC, states_ND, 2, diversity="k_centre", candidates=2, **options) == [3, 0]
    assert choose(p_NC, states_ND, 2, diversity="k_centre", candidates=1, **options) == [3, 2]
    assert set(choose(p_NC, states_ND, 2, diversity="k_means", candidates=2, **options)) < {0, 1, 2, 3}


# Self-training


def test_what_is_taken_by_hand() -> None:
    given = [("a", 0.95), ("b", 0.92), ("a", 0.97), ("a", 0.91), ("b", 0.5), ("a", 0.99), ("a", 0.93)]
    guesses = [Guess(number, label, confidence) for number, (label, confidence) in enumerate(given)]
    assert [each.number for each in take(guesses, 0.9, None)] == [0, 1, 2, 3, 5, 6]
    # One b; the labelled have three a for each b: the three surest a.
    assert [each.number for each in take(guesses, 0.9, Counter(a=6, b=2))] == [0, 1, 2, 5]
    assert [each.number for each in take(guesses, 0.9, Counter(a=2, b=2))] == [1, 5]
    assert [each.number for each in take(guesses, 0.925, Counter(a=2, b=2))] == [0, 2, 5, 6]  # of b there is none
    assert take(guesses, 1.0, Counter(a=1, b=1)) == []


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled, unlabelled and held-out texts, and a recipe."""
    folder = tmp_path_factory.mktemp("data")
    nouns = ["llama", "city", "herd", "hay", "Peru", "Lima"]
    rows = [{"text": f"the {word} {noun}", "label": word} for noun in nouns for word in ("good", "bad")]
    write_jsonl(folder / "labelled.jsonl", rows[:4])
    write_jsonl(folder / "held_out.jsonl", rows[4:8])
    with (folder / "texts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "id"), *((row["text"], n) for n, row in enumerate(rows[4:]))])
    (folder / "recipe.toml").write_text(
        f"""
        model = "unused"
        output = "unused"
        task.kind = "classification"
        data.train = "unused"
        data.held_out = "{folder / "held_out.jsonl"}"
        [train]
        steps = 24
        batch_rows = 4
        micro_batch_rows = 4
        row_length = 32
        log_every = 12
        device = "cpu"
        num_threads = 1
        tensorboard = false
        optimizer.learning_rate = 1e-2
        schedule.warmup_steps = 2
        """
    )
    return folder


@pytest.fixture(scope="module")
def trained(base_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of two rounds of self-training."""
    output = tmp_path_factory.mktemp("self") / "out"
    pairs = [
        f"recipe={data / 'recipe.toml'}",
        f"model={base_model}",
        f"labelled={data / 'labelled.jsonl'}",
        f"unlabelled={data / 'texts.csv'}",
        f"output={output}",
    ]
    self_train(load_config(SelfTrainConfig, None, [*pairs, "threshold=0.6", "rounds=2"]))
    return output


def test_rounds_learn_from_their_own_labels(data: Path, trained: Path) -> None:
    manifest = Manifest.read(trained)
    rounds = manifest.results["rounds"]
    assert rounds[0] == {**rounds[0], "round": 0, "num_own_labels": 0}
    assert len(rounds) >= 2
    examples = list(read_jsonl(trained / "round-1" / "examples.jsonl"))
    own = [row for row in examples if "labelled_by" in row]
    assert len(own) == rounds[1]["num_own_labels"] > 0
    assert examples[:4] == list(read_jsonl(data / "labelled.jsonl"))

    directory = trained / "round-0" / "model"
    head = load_head_model(directory)
    task, max_tokens = trained_classification(head, directory)
    rows = read_unlabelled(data / "texts.csv", (), task)
    p_NC = predict_rows(head, task, rows, max_tokens).probabilities_NC
    by_where = {row.where: p_C for row, p_C in zip(rows, p_NC, strict=True)}
    for row in own:
        p_C = by_where[row["from"]]
        assert row["labelled_by"] == "model of round 0"
        assert row["label"] == head.spec.labels[int(p_C.argmax())]
        assert row["confidence"] == pytest.approx(float(p_C.max()), abs=1e-4)
        assert row["confidence"] >= 0.6
    counts = Counter(row["label"] for row in own)
    assert len(set(counts.values())) == 1  # as many of each, as among the labelled
    best = manifest.results["best_round"]
    wanted = (trained / f"round-{best}" / "model" / "model.safetensors").read_bytes()
    assert (trained / "model" / "model.safetensors").read_bytes() == wanted
    assert max(each["validation/accuracy"] for each in rounds) == rounds[best]["validation/accuracy"]


def test_predictions_are_those_of_the_head(data: Path, trained: Path) -> None:
    directory = trained / "round-0" / "model"
    head = load_head_model(directory)
    task, max_tokens = trained_classification(head, directory)
    rows = read_unlabelled(data / "texts.csv", (), task)
    found = predict_rows(head, task, rows, max_tokens)
    ids = [[head.tokenizer.bos_id, *head.tokenizer.encode(row.values["text"])] for row in rows]
    examples = [Example(each, [0] * len(each)) for each in ids]
    logits = predict(head.model, examples, head.spec.module, head.attention, head.tokenizer.pad_id)
    wanted = torch.stack([each_TC[-1] for each_TC in logits]).softmax(-1)
    torch.testing.assert_close(found.probabilities_NC, wanted)
    again = head.model.get_submodule("score")(found.states_ND).softmax(-1)
    torch.testing.assert_close(again.detach(), wanted)


@pytest.mark.parametrize("diversity", ["none", "k_centre", "k_means"])
def test_the_next_to_label(data: Path, trained: Path, tmp_path: Path, diversity: str) -> None:
    pairs = [f"model={trained / 'model'}", f"data={data / 'texts.csv'}", f"output={tmp_path / 'next'}", "count=3"]
    labelled = [f"labelled={data / 'labelled.jsonl'}"] if diversity == "k_centre" else []
    active(load_config(ActiveConfig, None, [*pairs, f"diversity={diversity}", "uncertainty=entropy", *labelled]))
    with (tmp_path / "next" / "to_label.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["text"] for row in rows}) == 3
    for row in rows:
        assert row["label"] == ""
        assert row["predicted"] in ("good", "bad")
        assert 0.5 <= float(row["confidence"]) <= 1
        assert 0 <= float(row["entropy"]) <= 0.6932
        assert row["from"].startswith(str(data / "texts.csv"))
        assert row["id"].isdigit()
    results = Manifest.read(tmp_path / "next").results
    assert results["num_chosen"] == 3
    if diversity == "none":
        assert results["mean_entropy_of_chosen"] > results["mean_entropy"]
    # Filled in, it is data to train on; empty, it is data to choose from.
    assert len(read_unlabelled(tmp_path / "next" / "to_label.csv", (), Classification())) == 3


def test_what_does_not_work(base_model: Path, data: Path, trained: Path, tmp_path: Path) -> None:
    pairs = [f"data={data / 'texts.csv'}", f"output={tmp_path / 'next'}"]
    with pytest.raises(InputError, match="a model with a head is one of"):
        active(load_config(ActiveConfig, None, [f"model={base_model}", *pairs]))
    all_known = f"data={data / 'labelled.jsonl'}"
    with pytest.raises(InputError, match="holds no text without a label"):
        active(load_config(ActiveConfig, None, [f"model={trained / 'model'}", all_known, pairs[1]]))
    for option, message in (
        ("count=0", "at least 1"),
        ("labelled=x", "is for diversity"),
    ):
        with pytest.raises(InputError, match=message):
            load_config(ActiveConfig, None, ["model=x", *pairs, option])
    rounds = [f"recipe={data / 'recipe.toml'}", f"unlabelled={data / 'texts.csv'}", f"output={tmp_path / 'out'}"]
    for option, message in (
        ("threshold=0", "above 0 and at most 1"),
        ("rounds=0", "at least 1"),
        ('set=["task.problem=number"]', "classification with one class"),
        ('set=["data.held_out_share=0.5"]', "set examples aside"),
    ):
        with pytest.raises(InputError, match=message):
            self_train(load_config(SelfTrainConfig, None, [*rounds, option]))
    assert not (tmp_path / "out").exists()
