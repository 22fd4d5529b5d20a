"""Evaluation: questions per second of `puna evaluate` beside lm-eval with its own model class (`--model hf`).

The same model of random weights, the same requests (MMLU with 5 shots, HellaSwag, WinoGrande, LAMBADA, from the folder
of benchmark data), from texts to log-likelihoods, both on the same threads. The other side gets its best batch size:
each of BATCH_SIZES is timed, and the fastest counts. The two then run three times, in turn; medians count.
The largest difference between the log-likelihoods of both is printed beside.

    python benchmarks/evaluate_vs_lm_eval.py --data FOLDER [--quick] [--json]
"""

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from figures import command_line, figure, show
from small_models import SHAPES, write_model

from puna.runtime.devices import available_cores

CPU_SHAPES = ("15M, 8k vocabulary", "100M, 20k vocabulary")
TASKS: dict[str, tuple[dict[str, Any], int, int]] = {
    "mmlu, 5 shots": ({"kind": "mmlu", "shots": 5, "subjects": ["anatomy", "marketing"]}, 12, 4),
    "hellaswag": ({"kind": "hellaswag"}, 40, 12),
    "winogrande": ({"kind": "winogrande"}, 80, 20),
    "lambada": ({"kind": "lambada"}, 60, 20),
}
"""Name -> task, and questions (of each subject): all, and with --quick."""
BATCH_SIZES, QUICK_BATCH_SIZES = (1, 8, 32, 64), (1, 16)
CONTEXT = 2048
ROUNDS = 3


def read_requests(data: Path, quick: bool) -> tuple[dict[str, Any], list[str]]:
    """Task -> how many questions, and their requests: prompts and continuations, as texts; and all there are."""
    from puna.evaluate.harness.run import prepare as prepare_task
    from puna.evaluate.tasks.table import TASKS as KINDS
    from puna.evaluate.tasks.table import TaskKinds

    found, texts = {}, []
    for name, (settings, all_questions, few) in TASKS.items():
        task = TaskKinds("task", KINDS).parse({**settings, "limit": few if quick else all_questions}, name)
        prepared = prepare_task(task, data)
        pairs = [(request.prompt, request.text) for requests in prepared.requests for request in requests]  # type: ignore[union-attr]
        found[name] = {"num_questions": len(prepared.examples), "pairs": pairs}
        texts += [example.prompt + example.target for example in task.read(data)]
    return found, texts


class Puna:
    """Our side."""

    def __init__(self, folder: Path, num_threads: int) -> None:
        from puna.evaluate.harness.engine import EvaluationEngineConfig
        from puna.infer.load import load_engine

        self.folder = folder
        self.engine = load_engine(folder / "model", EvaluationEngineConfig(num_threads=num_threads))

    def seconds(self, pairs: list[tuple[str, str]], batch_size: int) -> tuple[float, list[float]]:
        """Time and log-likelihoods; the engine fills its batches itself."""
        from puna.evaluate.harness.ask import Asker
        from puna.evaluate.harness.cache import AnswerCache
        from puna.evaluate.tasks.request import Continuation

        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            cache = AnswerCache(Path(scratch) / "answers", "model")
            started = time.perf_counter()
            answers = Asker(self.engine, cache).ask([Continuation(*pair) for pair in pairs])
            taken = time.perf_counter() - started
            cache.close()
        return taken, [answer.log_likelihood for answer in answers]  # type: ignore[union-attr]


class LmEval:
    """The other side."""

    def __init__(self, folder: Path, num_threads: int) -> None:
        import torch
        from lm_eval.models.huggingface import HFLM

        torch.set_num_threads(num_threads)
        self.model = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", max_length=CONTEXT)

    def seconds(self, pairs: list[tuple[str, str]], batch_size: int) -> tuple[float, list[float]]:
        """Time and log-likelihoods."""
        from lm_eval.api.instance import Instance

        requests = [Instance("loglikelihood", {}, tuple(pair), number) for number, pair in enumerate(pairs)]
        self.model.batch_size_per_gpu = batch_size
        started = time.perf_counter()
        answers = self.model.loglikelihood(requests, disable_tqdm=True)
        return time.perf_counter() - started, [log_likelihood for log_likelihood, _ in answers]


def serve(side: str, folder: Path, num_threads: int) -> None:
    """Answer lines of standard input: a task's name and a batch size."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    requests = json.loads((folder / "requests.json").read_text())
    runner = (Puna if side == "puna" else LmEval)(folder, num_threads)
    runner.seconds(requests["winogrande"]["pairs"][:16], 8)  # what is only slow the first time
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, batch_size = json.loads(line)
        print(json.dumps(runner.seconds(requests[name]["pairs"], batch_size)), flush=True)


class Side:
    """A side in a process of its own, so that neither warms up or slows down the other."""

    def __init__(self, side: str, folder: Path, num_threads: int) -> None:
        command = [sys.executable, __file__, "--serve", side, "--folder", str(folder), "--threads", str(num_threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def answer(self) -> Any:
        """What it says next."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("One side has ended early: is lm-eval installed (pip install 'puna[dev]')?")
        return json.loads(line)

    def seconds(self, name: str, batch_size: int) -> tuple[float, list[float]]:
        """Time and log-likelihoods of a task."""
        assert self._process.stdin is not None
        print(json.dumps([name, batch_size]), file=self._process.stdin, flush=True)
        seconds, log_likelihoods = self.answer()
        return seconds, log_likelihoods

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def measure(shape: str, requests: dict[str, Any], texts: list[str], options: argparse.Namespace) -> None:
    """All tasks with one model."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(SHAPES[shape], texts, CONTEXT, folder)
        (folder / "requests.json").write_text(json.dumps(requests))
        ours, theirs = (Side(side, folder, options.threads) for side in ("puna", "lm-eval"))
        for side in (ours, theirs):
            side.answer()
        for name, task in requests.items():
            tried = {size: theirs.seconds(name, size) for size in (QUICK_BATCH_SIZES if options.quick else BATCH_SIZES)}
            best = min(tried, key=lambda size: tried[size][0])
            our_times, their_times = [], []
            for _ in range(ROUNDS):
                seconds, log_likelihoods = ours.seconds(name, best)
                our_times.append(seconds)
                their_times.append(theirs.seconds(name, best)[0])
            speeds = [task["num_questions"] / statistics.median(times) for times in (our_times, their_times)]
            apart = max(abs(a - b) for a, b in zip(log_likelihoods, tried[best][1], strict=True))
            found = figure(
                f"evaluate {name}, {shape}",
                *speeds,
                "questions/s",
                questions=task["num_questions"],
                best_batch_size=best,
                largest_difference_nats=apart,
            )
            show(found, options.json)
        for side in (ours, theirs):
            side.close()


def main() -> None:
    """Measure every task with every model."""
    parser = command_line(__doc__, "few questions and the smallest model; under 50 s")
    parser.add_argument("--data", type=Path, help="folder of benchmark data, as `puna evaluate` reads it")
    parser.add_argument("--threads", type=int, default=available_cores(), help="of each side; every core where absent")
    parser.add_argument("--serve", choices=("puna", "lm-eval"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.folder, options.threads)
        return
    if options.data is None:
        parser.error("--data FOLDER is needed")
    requests, texts = read_requests(options.data, options.quick)
    for shape in CPU_SHAPES[: 1 if options.quick else None]:
        measure(shape, requests, texts, options)


if __name__ == "__main__":
    main()
