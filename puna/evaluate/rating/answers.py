"""Answers to compare: drawn from models, or read from a file."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

from puna.batches.preferences import Messages, prompt_of
from puna.batches.tables import read_table
from puna.evaluate.rating.session import Answer, Comparison
from puna.infer.config import EngineConfig
from puna.infer.draw import Drawn, draw_answers
from puna.infer.engine import Engine
from puna.infer.load import load_engine
from puna.infer.sampling import SamplingParams
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, read_jsonl, write_jsonl
from puna.runtime.manifest import FILE_NAME, Manifest
from puna.runtime.progress import say
from puna.runtime.seeds import derive_seed

_ANSWERS_FILE = "answers.jsonl"
_AT_ONCE = 64
"""Prompts that are answered together; then the answers are kept."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and what kind of request it is."""

    id: str
    """Where it stands, such as file and line."""
    category: str
    """May be empty."""
    prompt: Messages
    """Ends with what is to be answered."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A question, and answers to it."""

    question: Question
    answers: tuple[Answer, ...]


def read_questions(path: Path, most: int = 0) -> list[Question]:
    """The prompts of a file or folder (see `puna.batches.preferences.read_prompts`), with "id" and "category" if any.

    Args:
        most: take at most so many, from the first on; 0 takes all.

    Raises:
        InputError: a row has no prompt, or there is none.
    """
    found = []
    for row in read_table(path):
        category = str(row.values.get("category", ""))
        found.append(Question(str(row.values.get("id", row.where)), category, prompt_of(row)))
        if len(found) == most:
            break
    if not found:
        raise InputError(f"There is no prompt in {path}.")
    return found


def draw(
    models: Mapping[str, Path],
    questions: Sequence[Question],
    *,
    samples: int,
    temperatures: Sequence[float],
    sampling: SamplingParams,
    engine: EngineConfig,
    seed: int,
    whole: bool,
    drawn: Path,
) -> list[Answered]:
    """Every model's different answers to every question, one model in memory after the other.

    Args:
        whole: leave out answers that were cut off, and empty ones.
        drawn: folder for what is done; what is there already is not drawn again.

    Raises:
        InputError: a model cannot be loaded, has no chat template, or a prompt is too long for it.
    """
    found: list[list[Answer]] = [[] for _ in questions]
    for number, (name, directory) in enumerate(models.items()):
        loaded: Engine | None = None
        for start in range(0, len(questions), _AT_ONCE):
            part = questions[start : start + _AT_ONCE]
            file = drawn / f"{number}-{start}.jsonl"
            if not file.exists():
                say(f"{name} answers prompts {start + 1:,} to {start + len(part):,} of {len(questions):,}.")
                loaded = loaded or load_engine(directory, engine)
                answers = draw_answers(
                    loaded,
                    [question.prompt for question in part],
                    samples=samples,
                    temperatures=temperatures,
                    sampling=sampling,
                    seed=derive_seed(seed, "model", name, start),
                )
                write_jsonl(file, ({"texts": _different(own, whole)} for own in answers))
            for own, row in zip(found[start:], read_jsonl(file), strict=False):
                own += [Answer(name, text) for text in row["texts"]]
    return [Answered(question, tuple(own)) for question, own in zip(questions, found, strict=True)]


def _different(answers: Sequence[Drawn], whole: bool) -> list[str]:
    return list(dict.fromkeys(each.text for each in answers if not whole or (each.finished and each.text)))


def keep_answers(
    folder: Path, settings: dict[str, Any], inputs: dict[str, str], make: Callable[[Path], list[Answered]]
) -> list[Answered]:
    """Answers that were made before with the same settings and inputs; else make them, and keep them for the next time.

    Args:
        make: is given a folder for what it has done so far, which stays if it is broken off, until it has done all.

    Raises:
        InputError: those there were made in another way.
    """
    if not (folder / FILE_NAME).exists():
        digest = hashlib.sha256(json.dumps([settings, inputs], sort_keys=True).encode()).hexdigest()
        so_far = folder.parent / f".{folder.name}-{digest[:16]}"
        answered = make(so_far)
        with atomic_path(folder) as fresh:
            fresh.mkdir()
            write_jsonl(fresh / _ANSWERS_FILE, map(_to_row, answered))
            Manifest("answers", settings, inputs, {"num_prompts": len(answered)}).write(fresh)
        shutil.rmtree(so_far, ignore_errors=True)
        return answered
    before = Manifest.read(folder)
    changed = [name for name in settings if settings[name] != before.config.get(name)]
    changed += sorted({path for path, _ in set(inputs.items()) ^ set(before.inputs.items())})
    if changed:
        raise InputError(
            f"The answers in {folder} were made with other settings ({', '.join(changed)} changed). Name another "
            "output, put the settings back, or remove that folder with what was rated of it."
        )
    return read_answers(folder / _ANSWERS_FILE)


def read_answers(path: Path) -> list[Answered]:
    """A file of answers, a prompt a line: {"prompt": text or messages, "answers": [{"model", "text"}, ...]}, with "id"
    and "category" where there are.

    Raises:
        InputError: nothing there, or a line is something else; names it.
    """
    found = []
    for number, row in enumerate(read_jsonl(path), start=1):
        where = f"{path}, line {number}"
        try:
            prompt = row["prompt"]
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            answers = tuple(Answer(**answer) for answer in row["answers"])
            question = Question(str(row.get("id", number)), str(row.get("category", "")), messages)
            fine = all(isinstance(part, str) for answer in answers for part in (answer.model, answer.text))
            if not fine or not messages or messages[-1]["role"] == "assistant":
                raise ValueError("a prompt has to end with something to answer, and an answer has texts")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f'{where} does not read {{"prompt": ..., "answers": [{{"model": ..., "text": ...}}, ...]}}: {error}.'
            ) from error
        found.append(Answered(question, answers))
    if not found:
        raise InputError(f"There are no answers in {path}.")
    return found


def compare(answered: Answered, first: Answer, second: Answer) -> Comparison:
    """Two of the answers as a comparison, whose name is drawn from what it is about."""
    question = answered.question
    content = [
        part for answer in sorted((first, second), key=lambda a: (a.model, a.text)) for part in asdict(answer).values()
    ]
    item = f"{derive_seed('item', question.id, repr(question.prompt), *content):016x}"
    return Comparison(item, question.prompt, question.category, (first, second))


def compare_all(answered: Iterable[Answered]) -> tuple[list[Comparison], int]:
    """Every two models' first answers to every question, and how many such pairs are left out for being the same."""
    pairs = [
        (each, first, second)
        for each in answered
        for first, second in combinations(_first_of_each_model(each.answers), 2)
    ]
    found = [compare(*pair) for pair in pairs if pair[1].text.strip() != pair[2].text.strip()]
    return found, len(pairs) - len(found)


def compare_two(answered: Iterable[Answered], seed: int) -> tuple[list[Comparison], int]:
    """Two different answers to every question, of different models where there are, and how many questions have none.

    Which of a model's answers are taken is drawn by seed.
    """
    found, missing = [], 0
    for each in answered:
        question = each.question
        drawn = sorted(
            each.answers, key=lambda answer: derive_seed(seed, "pair", question.id, answer.model, answer.text)
        )
        pairs = [pair for pair in combinations(drawn, 2) if pair[0].text.strip() != pair[1].text.strip()]
        between = [pair for pair in pairs if pair[0].model != pair[1].model]
        if pairs:
            found.append(compare(each, *(between or pairs)[0]))
        else:
            missing += 1
    return found, missing


def _first_of_each_model(answers: Iterable[Answer]) -> Iterator[Answer]:
    for _, own in groupby(sorted(answers, key=lambda answer: answer.model), key=lambda answer: answer.model):
        yield next(own)


def _to_row(answered: Answered) -> dict[str, Any]:
    return {**asdict(answered.question), "answers": [asdict(answer) for answer in answered.answers]}
