"""`puna evaluate`: benchmark tasks; bits per byte on held-out text and on the answers to held-out questions."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from puna.batches.encode import tokenize_documents
from puna.batches.shards import TokenShards
from puna.config import to_plain
from puna.evaluate.answers import answer_bits_per_byte, ask, shuffled_word_f1
from puna.evaluate.baselines import KneserNey, gzip_bits_per_byte
from puna.evaluate.contamination import Contamination, contamination_line
from puna.evaluate.harness.ask import Asker
from puna.evaluate.harness.cache import AnswerCache
from puna.evaluate.harness.engine import EvaluationEngineConfig
from puna.evaluate.harness.run import Prepared, Result, evaluate, prepare
from puna.evaluate.harness.table import print_results
from puna.evaluate.likelihood import bits_per_byte, total_nats
from puna.evaluate.tasks.table import AnyTask
from puna.infer.engine import Engine
from puna.infer.load import load_engine
from puna.infer.sampling import SamplingParams
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, read_documents, read_jsonl, write_json, write_jsonl
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a model on benchmark tasks, and on text and questions that it was not trained on."""

    model: Path
    """Model directory."""
    output: Path
    """Folder to write results.json, samples.jsonl (a line for each question of a task), answers.jsonl (of `questions`)
    and continuations.jsonl (of `documents`) to; replaced when it exists."""
    tasks: tuple[AnyTask, ...] = ()
    """Benchmark tasks: a kind such as "hellaswag", a table such as {kind = "mmlu", shots = 5}, or a TOML file with such
    a table, for questions of your own."""
    data: Path | None = None
    """Folder of benchmark data, from which tasks read their questions; "hub:" downloads those that the Hugging Face hub
    has, once."""
    cache: Path | None = None
    """File of answers to tasks' questions, which are not asked again of the same model; OUTPUT.answers where absent. A
    run that was interrupted goes on from there."""
    contamination: Path | None = None
    """Output of `puna contamination` on these tasks; without it scores are marked as not checked, and none as clean."""
    documents: Path | None = None
    """Held-out documents with "text" and "id": Parquet or JSON Lines, a file or a folder of them."""
    questions: Path | None = None
    """Held-out questions: JSON Lines with "messages", the last of them the reference answer."""
    max_questions: int = 200
    """Ask at most this many of them, from the beginning."""
    max_answer_tokens: int = 100
    """Cut answers off here."""
    num_samples: int = 3
    """Continue the beginnings of this many held-out documents, to look at."""
    baseline_tokens: Path | None = None
    """Token shards to train the n-gram baseline on, made by this model's tokenizer; none without."""
    baseline_order: int = 5
    """n of the n-gram baseline."""
    engine: EvaluationEngineConfig = field(default_factory=EvaluationEngineConfig)
    """Where and how the model runs."""

    def __post_init__(self) -> None:
        if self.max_questions < 1 or self.max_answer_tokens < 1 or self.baseline_order < 1:
            raise ValueError("max_questions, max_answer_tokens and baseline_order have to be at least 1.")
        titles = [task.title for task in self.tasks]
        if twice := sorted({title for title in titles if titles.count(title) > 1}):
            raise ValueError(f"two tasks are called {twice[0]!r}: give each a name of its own, such as name = ...")


def main(config: EvaluateConfig) -> None:
    """Measure, print, and write results.json, samples.jsonl, answers.jsonl, continuations.jsonl and the manifest.

    Raises:
        InputError: there is nothing to measure, something cannot be read, or a task's questions cannot be asked.
    """
    if config.documents is None and config.questions is None and not config.tasks:
        raise InputError("There is nothing to evaluate: set tasks, documents or questions.")
    prepared = [prepare(task, config.data) for task in config.tasks]
    check = None if config.contamination is None else Contamination.read(config.contamination)
    engine = load_engine(config.model, config.engine)
    of_tasks = {path for task in config.tasks for path in task.inputs(config.data)}
    paths = (config.model, config.documents, config.questions, config.baseline_tokens, config.contamination)
    inputs = {str(path): content_hash(path) for path in (*paths, *sorted(of_tasks)) if path is not None}
    results: dict[str, Any] = {}
    answers: list[dict[str, Any]] = []
    continuations: list[dict[str, Any]] = []
    found = _evaluate_tasks(engine, prepared, inputs[str(config.model)], config) if prepared else []
    if config.documents is not None:
        results |= _evaluate_documents(engine, config.documents, config)
        continuations = _continue_documents(engine, config.documents, config.num_samples)
    if config.questions is not None:
        questions = list(islice(read_jsonl(config.questions), config.max_questions))
        if not questions:
            raise InputError(f"{config.questions} holds no question.")
        started = time.monotonic()
        asked = ask(engine, questions, config.max_answer_tokens)
        seconds = time.monotonic() - started
        answers = [asdict(answer) for answer in asked]
        results |= {
            "num_questions": len(asked),
            "answer_bits_per_byte": answer_bits_per_byte(engine, questions),
            "answer_word_f1": sum(answer.word_f1 for answer in asked) / len(asked),
            "answer_word_f1_by_chance": shuffled_word_f1(asked),
            "generation_tokens_per_second": sum(answer.num_tokens for answer in asked) / seconds,
        }
    notes = {result.task.title: contamination_line(check, result.task.title, _first_values(result)) for result in found}
    with atomic_path(config.output) as folder:
        folder.mkdir()
        tasks = {result.task.title: result.to_json() | {"contamination": notes[result.task.title]} for result in found}
        by_task = {"tasks": tasks} if found else {}
        write_json(folder / "results.json", results | by_task)
        write_jsonl(folder / "samples.jsonl", (sample for result in found for sample in result.samples))
        write_jsonl(folder / "answers.jsonl", answers)
        write_jsonl(folder / "continuations.jsonl", continuations)
        flat = {
            f"{result.task.title}_{name}": metric.value for result in found for name, metric in result.metrics.items()
        }
        Manifest("evaluate", to_plain(config), inputs, results | flat).write(folder)
    if found:
        print_results(found)
    for title, note in notes.items():
        say(f"{title}: {note}")
    for name, value in results.items():
        say(f"{name:<40} {value:,.4g}" if isinstance(value, float) else f"{name:<40} {value:,}")


def _first_values(result: Result) -> dict[str, float]:
    """Question's id -> the number of the task's first metric."""
    return {row["id"]: next(iter(row["values"].values())) for row in result.samples}


def _evaluate_tasks(
    engine: Engine, prepared: Sequence[Prepared], model_hash: str, config: EvaluateConfig
) -> list[Result]:
    """Ask every task. Answers depend on the model and on the precision in which it computes."""
    computed = [str(engine.pool.keys[0].device.type), config.engine.dtype, config.engine.cache_dtype]
    path = config.cache or config.output.with_name(f"{config.output.name}.answers")
    cache = AnswerCache(path, " ".join([model_hash, *computed]))
    asker = Asker(engine, cache)
    try:
        return [evaluate(asker, task) for task in prepared]
    finally:
        cache.close()


def _evaluate_documents(engine: Engine, path: Path, config: EvaluateConfig) -> dict[str, Any]:
    tokenizer = engine.tokenizer
    tokenized = list(tokenize_documents(tokenizer, read_documents(path)))
    if not tokenized:
        raise InputError(f"{path} holds no text.")
    if tokenizer.bos_id is None:
        raise InputError("This model's tokenizer has no BOS token, so a document's first token cannot be predicted.")
    texts = [document["text"] for _, document in tokenized]
    num_bytes = sum(len(text.encode()) for text in texts)
    nats, num_tokens = total_nats(engine.model, [(ids, None) for ids, _ in tokenized], window=engine.max_context)
    results = {
        "num_held_out_bytes": num_bytes,
        "num_held_out_tokens": num_tokens,
        "bits_per_byte": bits_per_byte(nats, num_bytes),
        "gzip_bits_per_byte": gzip_bits_per_byte(texts),
    }
    if config.baseline_tokens is not None:
        shards = TokenShards(config.baseline_tokens, tokenizer.hash)
        ngrams = KneserNey([shards.ids(n) for n in range(len(shards))], config.baseline_order, tokenizer.vocab_size)
        baseline_nats = ngrams.total_nats([np.array(ids) for ids, _ in tokenized])
        results[f"{config.baseline_order}gram_bits_per_byte"] = bits_per_byte(baseline_nats, num_bytes)
    return results


def _continue_documents(engine: Engine, path: Path, count: int) -> list[dict[str, Any]]:
    """The first lines of some documents, and how the model goes on from there."""
    prompts = ["".join(row["text"].splitlines(keepends=True)[:12])[:400] for row in islice(read_documents(path), count)]
    sampling = SamplingParams(max_tokens=120, temperature=0.7, top_p=0.95, seed=0)
    completions = engine.generate([engine.encode(prompt) for prompt in prompts], sampling)
    return [
        {"prompt": prompt, "continuation": completion.text}
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
