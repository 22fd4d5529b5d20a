"""A model that can be asked in no time, and lm-eval's own tasks over the same questions."""

import csv
import gzip
import io
import json
import logging
import os
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from puna.evaluate.harness.ask import Asker
from puna.evaluate.harness.cache import AnswerCache
from puna.evaluate.harness.engine import EvaluationEngineConfig
from puna.evaluate.tasks.table import TASKS, TaskKinds
from puna.infer.load import load_engine
from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.tokenizer.load import load_tokenizer
from puna.weights.load import save_model

Rows = list[dict[str, Any]]

SHAPE = {"dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "hidden_dim": 64}


@pytest.fixture(scope="session")
def kinds() -> TaskKinds:
    return TaskKinds("task", TASKS)


@pytest.fixture(scope="session")
def make_model(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A model directory with a context of so many tokens. Its logits are spread, so that rounding decides nothing."""

    def make(context_length: int) -> Path:
        directory = tmp_path_factory.mktemp("model")
        tokenizer = load_tokenizer(base_model)
        # No padded rows: transformers generates ids that stand for nothing, we do not.
        model = Transformer(LlamaConfig(**SHAPE, vocab_size=tokenizer.vocab_size, context_length=context_length))
        initialize(model, seed=1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(4)
        save_model(model, directory / "model", tokenizer=tokenizer)
        return directory / "model"

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[[int], Path]) -> Path:
    """With room for five shots in 300 ids."""
    return make_model(8192)


@pytest.fixture
def open_asker(tmp_path: Path) -> Iterator[Callable[..., Asker]]:
    """Ask a model; `settings` are its engine's."""
    caches = []

    def open_(model: Path, cache: Path | None = None, **settings: Any) -> Asker:
        config = EvaluationEngineConfig(**{"max_context": None, "num_threads": 1, "device": "cpu", **settings})
        caches.append(AnswerCache(cache or tmp_path / f"answers{len(caches)}", "model"))
        return Asker(load_engine(model, config), caches[-1])

    yield open_
    for cache in caches:
        cache.close()


@pytest.fixture(scope="session")
def lm_eval_model() -> Callable[..., Any]:
    """lm-eval's own class for a model directory."""
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("lm_eval")
        from lm_eval.models.huggingface import HFLM
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    def make(model: Path, **settings: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=4, **settings)

    return make


@pytest.fixture(scope="session")
def lm_eval_task() -> Callable[..., Any]:
    """One of lm-eval's tasks as its own file describes it, over rows in the columns that it knows."""

    def make(file: str | None, questions: Rows, shots: Rows | None = None, **changes: Any) -> Any:
        import datasets
        import lm_eval
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.tasks._yaml_loader import load_yaml

        splits = {"questions": datasets.Dataset.from_list(questions)}
        if shots is not None:
            splits["shots"] = datasets.Dataset.from_list(shots)
        config = {} if file is None else load_yaml(Path(lm_eval.__file__).parent / "tasks" / file)
        for key in ("tag", "group", "task_alias", "dataset_name", "training_split", "validation_split"):
            config.pop(key, None)
        config |= {
            "task": "task",
            "custom_dataset": lambda **_: datasets.DatasetDict(splits),
            "test_split": "questions",
            "num_fewshot": 0 if shots is None else len(shots),
            "metadata": None,
            **({} if shots is None else {"fewshot_split": "shots", "fewshot_config": {"sampler": "first_n"}}),
            **changes,
        }
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        return ConfigurableTask(config=config)

    return make


@pytest.fixture(scope="session")
def run_lm_eval() -> Callable[[Any, Any], dict[str, Any]]:
    """Its results and its answers to each question."""

    def run(model: Any, task: Any) -> dict[str, Any]:
        from lm_eval.evaluator import evaluate

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = evaluate(model, {"tasks": {"task": task}}, bootstrap_iters=0)
        assert found is not None
        results = {name.removesuffix(",none"): value for name, value in found["results"]["task"].items()}
        return {"results": results, "samples": sorted(found["samples"]["task"], key=lambda sample: sample["doc_id"])}

    return run


def _lines(path: Path) -> Rows:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return [json.loads(line) for line in file]


def _archive(path: Path, member: str) -> list[list[str]]:
    with tarfile.open(path) as archive:
        file = archive.extractfile(member)
        assert file is not None
        return list(csv.reader(io.StringIO(file.read().decode("utf-8-sig"), newline="")))


def _winogrande(row: dict[str, Any]) -> dict[str, Any]:
    first, second = row["context_options"]
    differs = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    place = next(differs, min(len(first), len(second)))
    before = first[:place]
    return {
        "sentence": f"{before}_ {row['continuation']}",
        "option1": first.removeprefix(before),
        "option2": second.removeprefix(before),
        "answer": str(row["gold"] + 1),
    }


def _copa(row: dict[str, Any]) -> dict[str, Any]:
    premise, _, connector = row["query"].rpartition(" ")
    return {
        "premise": f"{premise}.",
        "question": {"because": "cause", "therefore": "effect"}[connector],
        "choice1": row["choices"][0],
        "choice2": row["choices"][1],
        "label": row["gold"],
    }


def _hellaswag(row: dict[str, Any]) -> dict[str, Any]:
    label, _, scene = row["ctx"].partition(": ")
    return {"activity_label": label, "ctx_a": scene, "ctx_b": "", "endings": row["endings"], "label": str(row["label"])}


def _piqa(row: dict[str, Any]) -> dict[str, Any]:
    goal = row["query"].removeprefix("Question: ").removesuffix("\n")
    return {"goal": goal, "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["gold"]}


def _mmlu(row: list[str]) -> dict[str, Any]:
    return {"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5])}


@pytest.fixture
def published_rows(real_data: Path) -> Callable[[str], tuple[str, Rows, Rows | None]]:
    """lm-eval's file of a task, and its questions and shots in the columns of the set as it was published."""
    data = real_data / "eval"
    mmlu, cmmlu = data / "mmlu/mmlu_dev_val.tar.gz", data / "cmmlu/cmmlu_dev_and_6_test_subjects.tar.gz"

    def table(member: str) -> Rows:
        names, *rows = _archive(cmmlu, member)
        return [dict(zip(names, row, strict=True)) for row in rows]

    def find(name: str) -> tuple[str, Rows, Rows | None]:
        match name.split():
            case ["hellaswag"]:
                rows = [_hellaswag(row) for row in _lines(data / "hellaswag/val_0_2500.jsonl.gz")]
                return "hellaswag/hellaswag.yaml", rows, None
            case ["piqa"]:
                return "piqa/piqa.yaml", [_piqa(row) for row in _lines(data / "piqa.jsonl")], None
            case ["winogrande"]:
                rows = [_winogrande(row) for row in _lines(data / "winogrande.jsonl")]
                return "winogrande/default.yaml", rows, None
            case ["copa"]:
                return "super_glue/copa/default.yaml", [_copa(row) for row in _lines(data / "copa.jsonl")], None
            case ["lambada"]:
                rows = _lines(data / "lambada_openai.jsonl.gz")
                texts = [{"text": f"{row['context']} {row['continuation']}"} for row in rows]
                return "lambada/lambada_openai.yaml", texts, None
            case ["mmlu", subject]:
                questions, shots = (_archive(mmlu, f"{part}/{subject}_{part}.csv") for part in ("val", "dev"))
                return f"mmlu/default/mmlu_{subject}.yaml", list(map(_mmlu, questions)), list(map(_mmlu, shots))
            case ["cmmlu", subject]:
                return (
                    f"cmmlu/cmmlu_{subject}.yaml",
                    table(f"test/{subject}.csv"),
                    table(f"dev/{subject}.csv"),
                )
            case ["gsm8k"]:
                questions, shots = (_lines(data / f"gsm8k/{part}.jsonl.gz") for part in ("test", "train"))
                return "gsm8k/gsm8k.yaml", questions, shots
            case ["triviaqa"]:
                rows = _lines(data / "triviaqa_sm_sub.jsonl.gz")
                questions = [
                    {
                        "question": row["context"].removeprefix("Question: ").removesuffix("?\nAnswer:"),
                        "answer": {"aliases": [row["answer"], *row["aliases"]]},
                    }
                    for row in rows
                ]
                return "triviaqa/default.yaml", questions, None
            case ["math"]:
                rows = _lines(data / "math.jsonl.gz")
                questions = [{"problem": row["context"], "solution": row["chain_of_thought"]} for row in rows]
                return "hendrycks_math/hendrycks_math_algebra.yaml", questions, None
            case ["perplexity"]:
                rows = _lines(data / "lambada_openai.jsonl.gz")
                return "", [{"text": row["context"]} for row in rows], None
        raise AssertionError(name)

    return find
