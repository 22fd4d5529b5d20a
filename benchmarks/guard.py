"""The guard of `puna serve`: what a small classifier of prompts finds, on texts from elsewhere, and how long it takes.

"Unsafe" are the first words of people who tried to make an assistant do harm (HH-RLHF harmless-base); "safe" are
instructions and questions to be helped with (Alpaca, the seeds of self-instruct, Banking77, TriviaQA). These labels are
of sources, not of prompts: some of the first ask nothing bad, and the two are told apart by style, too. So what counts
are sets that neither came from: SimpleSafetyTests (all unsafe), MT-Bench (all safe), and harmless requests with words
that harmful ones use. Beside it: logistic regression on TF-IDF of words and pairs of words.

    python benchmarks/guard.py MODEL [--data FOLDER] [--output FOLDER] [--quick] [--json]
"""

import csv
import gzip
import json
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from figures import command_line, figure, show

import puna.evaluate.tasks
from puna.batches.tables import read_table
from puna.config import load_config
from puna.finetune.config import FinetuneConfig
from puna.finetune.main import main as finetune
from puna.runtime.files import write_jsonl
from puna.serve.guard import Guard, GuardConfig

STEPS, QUICK_STEPS = 200, 40
HELD_OUT_SHARE = 8
"""One in so many rows of the sources is held out, the first by text."""


def sources(data: Path) -> dict[str, list[str]]:
    """Label -> texts, each once."""
    with gzip.open(data / "preference/hh_rlhf_harmless_base.jsonl.gz", "rt", encoding="utf-8") as file:
        unsafe = [json.loads(line)["chosen"].split("\n\nHuman:")[1].split("\n\nAssistant:")[0] for line in file]
    safe = [row.values["instruction"] for row in read_table(data / "instruct/alpaca_en_demo.json.gz")]
    safe += [row.values["instruction"] for row in read_table(data / "instruct/self_instruct_seed_tasks.jsonl")]
    # Questions, too, or whatever asks would be unsafe.
    safe += [row.values["text"] for row in islice(read_table(data / "tasks/banking77/train.csv.gz"), None, None, 10)]
    asked = [row.values["context"] for row in islice(read_table(data / "eval/triviaqa_sm_sub.jsonl.gz"), 800)]
    safe += [text.removeprefix("Question: ").removesuffix("\nAnswer:") for text in asked]
    return {
        label: sorted({text.strip() for text in texts if text.strip()})
        for label, texts in (("unsafe", unsafe), ("safe", safe))
    }


def elsewhere(data: Path) -> dict[str, tuple[str, list[str]]]:
    """Name of a set -> the label of all of its texts, and they."""
    with (data / "eval/safety/simple_safety_tests.csv").open(encoding="utf-8", newline="") as file:
        unsafe = [row["prompts_final"] for row in csv.DictReader(file)]
    with (data / "eval/mt_bench/question.jsonl").open(encoding="utf-8") as file:
        questions = [json.loads(line)["turns"][0] for line in file]
    harmless = Path(puna.evaluate.tasks.__file__).with_name("harmless_requests.csv")
    with harmless.open(encoding="utf-8", newline="") as file:
        requests = [row["request"] for row in csv.DictReader(file)]
    return {
        "SimpleSafetyTests": ("unsafe", unsafe),
        "MT-Bench": ("safe", questions),
        "harmless requests": ("safe", requests),
    }


def train(model: Path, rows: dict[str, list[dict[str, str]]], folder: Path, steps: int) -> Path:
    """A classifier as recipes/safety/guard.toml makes it."""
    for split, own in rows.items():
        write_jsonl(folder / f"{split}.jsonl", own)
    recipe = Path(__file__).parents[1] / "recipes/safety/guard.toml"
    settings = [f"model={model}", f"output={folder / 'guard'}", f"data.train={folder / 'train.jsonl'}"]
    settings += [
        f"data.held_out={folder / 'held_out.jsonl'}",
        f"train.steps={steps}",
        "train.tensorboard=false",
        "train.row_length=96",
    ]
    finetune(load_config(FinetuneConfig, recipe, settings))
    return folder / "guard" / "model"


def main() -> None:
    parser = command_line(__doc__, f"{QUICK_STEPS} steps in place of {STEPS}: half a minute")
    parser.add_argument("model", type=Path, help="directory of a small pretrained model")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared/data")
    parser.add_argument("--output", type=Path, help="keep data and classifier here")
    given = parser.parse_args()
    labelled = [{"text": text, "label": label} for label, texts in sources(given.data).items() for text in texts]
    rows = {
        "train": [row for number, row in enumerate(labelled) if number % HELD_OUT_SHARE],
        "held_out": [row for number, row in enumerate(labelled) if not number % HELD_OUT_SHARE],
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.output or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        directory = train(given.model.resolve(), rows, folder, QUICK_STEPS if given.quick else STEPS)
        guard = Guard(GuardConfig(model=directory, device="cpu"))
        ask = classical(rows["train"])
        held_out = rows["held_out"]
        for label in ("unsafe", "safe"):
            texts = [row["text"] for row in held_out if row["label"] == label]
            show(_shares(f"held out, {label}", label, texts, guard, ask), given.json)
        for name, (label, texts) in elsewhere(given.data).items():
            show(_shares(name, label, texts, guard, ask), given.json)
        show(_seconds(guard, [row["text"] for row in held_out]), given.json)
        guard.close()


def classical(rows: list[dict[str, str]]) -> Any:
    """Which of some texts logistic regression takes for unsafe."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    pipeline = make_pipeline(TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)), LogisticRegression(C=10.0))
    pipeline.fit([row["text"] for row in rows], [row["label"] for row in rows])
    return lambda texts: [label == "unsafe" for label in pipeline.predict(texts)]


def _shares(name: str, label: str, texts: list[str], guard: Guard, ask: Any) -> dict[str, Any]:
    """The share that is refused, of texts that should be, or should not."""
    ours, theirs = (statistics.fmean(found) for found in (guard.is_unsafe(texts), ask(texts)))
    wanted = "should be all" if label == "unsafe" else "should be none"
    return figure(
        f"share refused of {name}", ours, theirs, f"of {len(texts)}; {wanted}", less_is_better=label == "safe"
    )


def _seconds(guard: Guard, texts: list[str]) -> dict[str, Any]:
    """Time for a verdict on one text after the other."""
    taken = []
    for text in texts:
        started = time.perf_counter()
        guard.is_unsafe([text])
        taken.append((time.perf_counter() - started) * 1000)
    ordered = sorted(taken)
    return figure(
        "verdict on one text, median", statistics.median(taken), None, "ms", less_is_better=True,
        ninety_fifth_percentile=ordered[int(0.95 * len(ordered))], num_threads=torch.get_num_threads(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
