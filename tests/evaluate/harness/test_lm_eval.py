"""Scores beside lm-eval's: its own task files, its own model class, the same model directory and questions.

Log-likelihoods may differ by rounding, as the two multiply matrices of other shapes: sums of some 50 float32 numbers of
about 10, so within 1e-3. Everything that follows from them is equal. All tests that load lm-eval stand here, so that
one process does.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.evaluate.harness.encode import rolling_windows
from puna.evaluate.harness.run import Result, evaluate, prepare
from puna.evaluate.tasks.request import Generation
from puna.runtime.errors import InputError
from puna.runtime.files import read_json, write_jsonl

CLOSE = pytest.approx

NAMES = {"acc": "accuracy", "acc_norm": "accuracy_by_characters", "acc_bytes": "accuracy_by_bytes"}


@pytest.fixture
def both(
    model: Path,
    kinds: Any,
    open_asker: Any,
    real_data: Path,
    lm_eval_model: Any,
    lm_eval_task: Any,
    run_lm_eval: Any,
    published_rows: Any,
) -> Callable[..., tuple[Result, dict[str, Any]]]:
    """The results of both for one task."""

    def run(name: str, limit: int, shots: int = 0, **changes: Any) -> tuple[Result, dict[str, Any]]:
        kind, *subject = name.split()
        settings = {"kind": kind, "limit": limit, "shots": shots, **({"subjects": subject} if subject else {})}
        settings |= {"max_tokens": 256} if kind == "triviaqa" else {}  # lm-eval's default; ours is shorter
        prepared = prepare(kinds.parse(settings, name), real_data / "eval")
        ours = evaluate(open_asker(model, max_context=8192), prepared)
        file, questions, published = published_rows(name)
        examples = None if published is None else published[:shots]
        asked = questions[:limit]
        if name == "math":  # so many of each of its categories
            asked = [questions[int(example.id) - 1] for example in prepared.examples]
        task = lm_eval_task(file, asked, examples, **changes)
        return ours, run_lm_eval(lm_eval_model(model, max_length=8192), task)

    return run


CHOICES = [
    ("hellaswag", 0),
    ("piqa", 0),
    ("winogrande", 0),
    ("copa", 0),
    ("mmlu anatomy", 5),
    ("mmlu marketing", 0),
    ("cmmlu agronomy", 5),
    ("cmmlu elementary_chinese", 2),
]


def check_choices(both: Any, name: str, limit: int, shots: int) -> None:
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in NAMES]
    ours, theirs = both(name, limit, shots, metric_list=metrics)
    assert len(ours.samples) == len(theirs["samples"]) > 0
    for sample, other in zip(ours.samples, theirs["samples"], strict=True):
        assert sample["log_likelihoods"] == CLOSE([answer[0] for answer in other["filtered_resps"]], abs=1e-3)
        assert all(sample["values"].get(own, other[metric]) == other[metric] for metric, own in NAMES.items())
    for metric, own in NAMES.items():
        if own in ours.metrics:
            assert ours.metrics[own].value == CLOSE(theirs["results"][metric], abs=1e-12)
    assert "accuracy" in ours.metrics


@pytest.mark.parametrize(("name", "shots"), [CHOICES[0], CHOICES[2], CHOICES[4]])
def test_choices_equal_those_of_lm_eval(both, name, shots):
    check_choices(both, name, 3, shots)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shots"), CHOICES)
def test_all_choices_equal_those_of_lm_eval(both, name, shots):
    check_choices(both, name, 100, shots)


@pytest.mark.parametrize("limit", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_last_words_equal_those_of_lm_eval(both, limit):
    ours, theirs = both("lambada", limit)
    for sample, other in zip(ours.samples, theirs["samples"], strict=True):
        log_likelihood, greedy = other["filtered_resps"][0]
        assert sample["values"] == {"accuracy": float(greedy), "log_likelihood": CLOSE(log_likelihood, abs=1e-3)}
    assert ours.metrics["accuracy"].value == theirs["results"]["acc"]
    assert ours.metrics["perplexity"].value == CLOSE(theirs["results"]["perplexity"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shots", "metrics"),
    [
        ("gsm8k", 5, {"exact_match,strict-match": "strict_match", "exact_match,flexible-extract": "flexible_match"}),
        ("triviaqa", 0, {"exact_match,remove_whitespace": "exact_match"}),
        ("math", 0, {"exact_match": "exact_match"}),
    ],
)
def test_written_answers_equal_those_of_lm_eval(both, name, shots, metrics):
    ours, theirs = both(name, 6 if name == "math" else 40, shots)
    answers = [sample["resps"][0][0] for sample in theirs["samples"][:: len(metrics)]]
    same = sum(sample["answers"][0] == answer for sample, answer in zip(ours.samples, answers, strict=True))
    assert same >= 0.9 * len(answers)  # some 10,000 tokens: a few times, two are as good as equally likely
    for metric, own in metrics.items():
        assert ours.metrics[own].value == theirs["results"][metric]


@pytest.mark.parametrize("limit", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_perplexities_equal_those_of_lm_eval(
    limit, make_model, kinds, open_asker, tmp_path, lm_eval_model, lm_eval_task, run_lm_eval, published_rows
):
    """Documents longer than the context, in windows that do not overlap."""
    directory = make_model(128)
    rows = published_rows("perplexity")[1][:limit]
    write_jsonl(tmp_path / "documents.jsonl", rows)
    prepared = prepare(kinds.read({"kind": "perplexity", "file": str(tmp_path / "documents.jsonl")}), None)
    ours = evaluate(open_asker(directory), prepared)
    names = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    task = lm_eval_task(None, rows, metric_list=[{"metric": name} for name in names], dataset_path="none", **rolling)
    # lm-eval puts a BOS before the one that the tokenizer puts, and would predict the latter, too.
    theirs = run_lm_eval(lm_eval_model(directory, add_bos_token=False), task)
    for name in names:
        assert ours.metrics[name].value == CLOSE(theirs["results"][name], rel=1e-5)


@given(length=st.integers(2, 60), context=st.integers(1, 20), data=st.data())
def test_windows_are_those_of_lm_eval_and_predict_each_token_once(length: int, context: int, data: Any) -> None:
    stride = data.draw(st.integers(1, context))
    ids = list(range(length))
    windows = rolling_windows(ids, context, stride)
    assert [i for w in windows for i in [*w.ids, w.next][w.first :]] == ids[1:]
    assert all(1 <= w.first <= len(w.ids) <= context for w in windows)
    theirs = pytest.importorskip("lm_eval.utils").get_rolling_token_windows(ids[1:], 0, context, context - stride + 1)
    assert [([*w.ids], [*w.ids, w.next][-w.num_scored :]) for w in windows] == list(theirs)


def test_puna_as_a_model_of_lm_eval(make_model, lm_eval_model):
    """Everything that its tasks ask for, beside its own class, also where the context is too short."""
    directory = make_model(64)
    theirs = lm_eval_model(directory, add_bos_token=None)
    from lm_eval.api.registry import get_model

    from puna.evaluate.harness import lm_eval_model as module

    assert get_model("puna") is module.PunaLM
    ours = module.PunaLM.create_from_arg_string(
        f"pretrained={directory},num_threads=1", {"batch_size": 4, "device": "cpu"}
    )

    def instances(*args: tuple[Any, ...]) -> list[Any]:
        return [SimpleNamespace(args=each) for each in args]

    pairs = instances(
        ("the llama", " walks"), ("", "the llama"), ("the llama walks to a " * 20, " good city"), ("a ", "b")
    )
    expected = theirs.loglikelihood(pairs, disable_tqdm=True)
    for (log_likelihood, greedy), (other, other_greedy) in zip(ours.loglikelihood(pairs), expected, strict=True):
        assert (log_likelihood, greedy) == (pytest.approx(other, abs=1e-3), other_greedy)
    # lm-eval puts a BOS before the BOS that the tokenizer puts: without the latter, both predict the same tokens.
    theirs.add_bos_token = False
    texts = instances(("the llama walks to a good city in Peru " * 10,), ("x",))
    rolling = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(rolling, abs=1e-3)
    theirs.add_bos_token = None
    greedy = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0}
    asked = instances(("the llama walks", greedy), ("a good bad city", greedy))
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)
    with pytest.raises(InputError, match="'num_beams'"):
        ours.generate_until(instances(("the llama", {**greedy, "num_beams": 2})))
    drawn = {"do_sample": True, "max_gen_toks": 8}
    assert len(set(ours.generate_until(instances(*[("the llama", drawn)] * 4)))) > 1
    chat = ours.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert chat == theirs.apply_chat_template([{"role": "user", "content": "Hi"}]).removeprefix("<|begin_of_text|>")
    assert ours._asker._encoder.prompt(Generation(chat, 1))[0] == theirs.tok_encode("<|begin_of_text|>" + chat)


@pytest.mark.slow
def test_lm_eval_runs_puna_from_its_command_line(model, tmp_path, lm_eval_model):
    """Its own task loader, its own evaluation, our engine: the results are those of its own model class."""
    write_jsonl(
        tmp_path / "rows.jsonl", [{"q": f"{n} llamas walk", "c": [" far", " away"], "a": n % 2} for n in range(8)]
    )
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{c}}"\ndoc_to_target: a\n'
    )
    found = []
    for name, settings in (("puna", ",max_context=256,num_threads=1"), ("hf", "")):
        options = f"--model {name} --model_args pretrained={model}{settings} --tasks mine --device cpu"
        options += f" --include_path {tmp_path} --output_path {tmp_path / name / 'results.json'}"
        subprocess.run(
            [sys.executable, "-m", "puna.evaluate.harness.lm_eval_model", "run", *options.split()],
            check=True,
            capture_output=True,
            env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        )
        (file,) = (tmp_path / name).rglob("*.json")
        found.append(read_json(file)["results"]["mine"])
    for results in found:
        results.pop("name", None)
    assert found[0] == found[1]
