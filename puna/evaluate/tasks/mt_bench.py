"""MT-Bench: conversations of two turns, judged by a language model (Zheng et al. 2023, arXiv:2306.05685)."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal, cast

from puna.evaluate.judge import JudgeConfig, Messages, judge_all, read_rating, read_winner, win_of_first
from puna.evaluate.tasks.data import data_file, read_rows
from puna.evaluate.tasks.generation import CUT_OFF, lower_is_better
from puna.evaluate.tasks.request import Answer, Generated, Generation, Request
from puna.evaluate.tasks.task import Example, Metric, Score, Task, mean_metric
from puna.runtime.errors import InputError
from puna.runtime.seeds import derive_seed
from puna.weights.load import resolve

_WITH_REFERENCE = ("math", "reasoning", "coding")
_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""FastChat's, by category; 0 in the others."""
_UNREADABLE = "unreadable"

Turns = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class TwoTurns(Task):
    """What rating and comparing share: the questions, and how they are asked."""

    judge: JudgeConfig
    """Who judges."""
    max_tokens: int = 1024
    """Cut each answer off here."""
    chat: bool = True
    """Ask through the model's chat template; there is no other way to ask for two turns."""

    judge_prompts: ClassVar[tuple[str, str, str, str]]
    """Names of the judge's prompts: for the first and the second turn, then the same with a reference answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shots or not self.chat:
            raise ValueError("MT-Bench is a conversation of two turns: leave out shots and chat.")
        if self.max_tokens < 1:
            raise ValueError("max_tokens has to be at least 1.")

    def read(self, data: Path | None) -> list[Example]:
        """The questions, each with what its judge is to be shown."""
        if self.judge.model is not None:
            resolve(self.judge.model)  # Whether it is there at all is better known before anything is asked.
        prompts = {row.get("name", str): row for row in read_rows(data_file(data, "mt_bench/judge_prompts.jsonl"))}
        if missing := [name for name in self.judge_prompts if name not in prompts]:
            raise InputError(f"mt_bench/judge_prompts.jsonl has no prompt {missing[0]!r}.")
        references = read_answers(data_file(data, "mt_bench/reference_gpt-4.jsonl"))
        examples = []
        for row in read_rows(data_file(data, "mt_bench/question.jsonl")):
            number, category = str(row.get("question_id", int)), row.get("category", str)
            chosen = self.judge_prompts[:2]
            if category in _WITH_REFERENCE:
                chosen = self.judge_prompts[2:]
                if number not in references:
                    raise InputError(f"{row.where}: {category} needs a reference answer; question {number} has none.")
            turns = _two(row.texts("turns"), row.where)
            extra = {
                "turns": turns,
                "judge_prompts": [
                    (prompts[name].get("system_prompt", str), prompts[name].get("prompt_template", str))
                    for name in chosen
                ],
                "reference": references.get(number, ("", "")),
            }
            examples.append(
                Example(id=number, where=row.where, prompt=turns[0], target="", group=category, extra=extra)
            )
        return examples

    def requests(self, example: Example, shots: Sequence[Example]) -> list[Request]:
        """The first turn."""
        return [self._turn(example, ())]

    def follow_up(self, example: Example, answers: Sequence[Answer]) -> list[Request]:
        """The second turn."""
        return [self._turn(example, answers)] if len(answers) == 1 else []

    def _turn(self, example: Example, answers: Sequence[Answer]) -> Generation:
        """At FastChat's temperature for the category."""
        first, second = example.extra["turns"]
        messages = [{"role": "user", "content": first}]
        for answer in cast(Sequence[Generated], answers):
            messages += [{"role": "assistant", "content": answer.text.strip()}, {"role": "user", "content": second}]
        return Generation(
            tuple(messages),
            self.max_tokens,
            temperature=_TEMPERATURES.get(example.group, 0.0),
            seed=derive_seed(self.seed, "answer", example.id),
        )

    def score(self, example: Example, answers: Sequence[Answer]) -> Score:
        """Asks the judge about one conversation."""
        (score,) = self.score_all([example], [answers])
        return score

    @abstractmethod
    def score_all(
        self, examples: Sequence[Example], answers: Sequence[Sequence[Answer]], kept: Path | None = None
    ) -> list[Score]:
        """All conversations go to the judge at once.

        Raises:
            InputError: see `judge_all`; or no turn of a question has a verdict that can be read.
        """

    def metrics(self, examples: Sequence[Example], scores: Sequence[Score]) -> dict[str, Metric]:
        """Means over questions, and the first value of each turn for itself, over those that could be read."""
        found = lower_is_better(super().metrics(examples, scores), CUT_OFF, _UNREADABLE)
        first = next(iter(found))
        for turn in (0, 1):
            pairs = zip(examples, scores, strict=True)
            read = {one.id: score.record["verdicts"][turn] for one, score in pairs}
            values = {name: value for name, value in read.items() if value is not None}
            if values:
                found[f"{first}_turn_{turn + 1}"] = mean_metric(list(values.values()), list(values))
        return found


@dataclass(frozen=True, kw_only=True)
class MtBench(TwoTurns):
    """MT-Bench with a rating from 1 to 10 for each turn. Reads question.jsonl, judge_prompts.jsonl and
    reference_gpt-4.jsonl of mt_bench/; groups are categories.

    Turn 1: Compose an engaging travel blog post about a recent trip to Hawaii, highlighting cultural experiences ...
    Turn 2: Rewrite your previous response. Start every sentence with the letter A.

    - rating: mean over both turns;
    - unreadable: share of verdicts without a rating, which count for nothing else.
    """

    kind: Literal["mt_bench"] = "mt_bench"
    """Its name."""

    judge_prompts: ClassVar = ("single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn")

    def score_all(
        self, examples: Sequence[Example], answers: Sequence[Sequence[Answer]], kept: Path | None = None
    ) -> list[Score]:
        """Two ratings for each conversation."""
        asked = []
        for example, given in zip(examples, answers, strict=True):
            first, second = _texts(given)
            fields = {"answer": first, "answer_1": first, "answer_2": second}
            asked += [_for_judge(example, turn, fields) for turn in (0, 1)]
        judged = judge_all(self.judge, asked, read_rating, kept)
        return [
            _scored("rating", example, given, [one.verdict for one in own], [[one.text] for one in own])
            for example, given, own in zip(examples, answers, _in_parts(judged, 2), strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class MtBenchPairs(TwoTurns):
    """MT-Bench against another model's answers, which the judge compares turn by turn, in both orders.

    Reads what `MtBench` does.

    - win_rate: share of turns won in both orders, and half of those that neither won;
    - unreadable: share of turns without two verdicts, which count for nothing else.
    """

    kind: Literal["mt_bench_pairs"] = "mt_bench_pairs"
    """Its name."""
    against: Path
    """The other model's answers: samples.jsonl of its own `puna evaluate`, or a file in FastChat's form."""

    judge_prompts: ClassVar = ("pair-v2", "pair-v2-multi-turn", "pair-math-v1", "pair-math-v1-multi-turn")

    def read(self, data: Path | None) -> list[Example]:
        """The questions, each with the other model's answers, where there are any."""
        known = read_answers(self.against)
        return [
            replace(example, extra={**example.extra, "theirs": known.get(example.id)}) for example in super().read(data)
        ]

    def requests(self, example: Example, shots: Sequence[Example]) -> list[Request]:
        """The first turn.

        Raises:
            InputError: the other model was not asked the same.
        """
        if example.extra["theirs"] is None:
            raise InputError(f"{self.against} has no answer to question {example.id} ({example.where}).")
        return super().requests(example, shots)

    def inputs(self, data: Path | None) -> list[Path]:
        """The data, and the other model's answers."""
        return [*super().inputs(data), self.against]

    def score_all(
        self, examples: Sequence[Example], answers: Sequence[Sequence[Answer]], kept: Path | None = None
    ) -> list[Score]:
        """Two comparisons for each conversation, each in both orders."""
        asked = []
        for example, given in zip(examples, answers, strict=True):
            ours, theirs = _texts(given), example.extra["theirs"]
            for turn in (0, 1):
                for a, b in ((ours, theirs), (theirs, ours)):
                    fields = {"answer_a": a[0], "answer_a_1": a[0], "answer_a_2": a[1]}
                    fields |= {"answer_b": b[0], "answer_b_1": b[0], "answer_b_2": b[1]}
                    asked.append(_for_judge(example, turn, fields))
        judged = judge_all(self.judge, asked, read_winner, kept)
        scores = []
        for example, given, own in zip(examples, answers, _in_parts(judged, 4), strict=True):
            turns = _in_parts(own, 2)
            wins = [win_of_first(one.verdict, other.verdict) for one, other in turns]
            scores.append(_scored("win_rate", example, given, wins, [[one.text for one in turn] for turn in turns]))
        return scores


def read_answers(path: Path) -> dict[str, Turns]:
    """Question -> a model's two answers: of samples.jsonl, or of a file in FastChat's form.

    Raises:
        InputError: the file is of another kind, or malformed.
    """
    found = {}
    for row in read_rows(path):
        if "question_id" in row.values:
            (choice, *_) = row.get("choices", list)
            turns = choice.get("turns") if isinstance(choice, dict) else None
            number = str(row.get("question_id", int))
        elif "task" in row.values:
            if "verdicts" not in row.values:  # Of another task in the same run.
                continue
            turns, number = row.texts("answers"), row.get("id", str)
        else:
            raise InputError(f'{row.where}: no answers to MT-Bench: neither "question_id" nor "task".')
        if not isinstance(turns, list | tuple) or not all(isinstance(turn, str) for turn in turns):
            raise InputError(f'{row.where}: "turns" of the first choice has to be a list of texts.')
        found[number] = _two(turns, row.where)
    return found


def _two(texts: Sequence[str], where: str) -> Turns:
    if len(texts) != 2:
        raise InputError(f"{where}: a conversation of MT-Bench has two turns, but here are {len(texts)}.")
    return texts[0], texts[1]


def _texts(answers: Sequence[Answer]) -> Turns:
    first, second = cast(Sequence[Generated], answers)
    return first.text.strip(), second.text.strip()


def _for_judge(example: Example, turn: int, answers: Mapping[str, str]) -> Messages:
    (first, second), (reference_1, reference_2) = example.extra["turns"], example.extra["reference"]
    system, template = example.extra["judge_prompts"][turn]
    questions = {"question": first, "question_1": first, "question_2": second}
    references = {"ref_answer_1": reference_1, "ref_answer_2": reference_2}
    try:
        content = template.format(**questions, **references, **answers)
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"A prompt in mt_bench/judge_prompts.jsonl cannot be filled in: {error}.") from error
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


def _scored(
    name: str, example: Example, answers: Sequence[Answer], verdicts: Sequence[float | None], said: list[list[str]]
) -> Score:
    """One conversation's score: the mean of the verdicts that could be read."""
    read = [verdict for verdict in verdicts if verdict is not None]
    if not read:
        raise InputError(
            f"The judge's verdicts on question {example.id} cannot be read, so it has no score. The last one ends: "
            f"{said[-1][-1][-200:]!r}. Take a judge that follows the form it is asked for."
        )
    given = cast(Sequence[Generated], answers)
    return Score(
        {
            name: fmean(read),
            _UNREADABLE: 1 - len(read) / len(verdicts),
            CUT_OFF: fmean(not answer.finished for answer in given),
        },
        {"answers": list(_texts(answers)), "verdicts": list(verdicts), "judge": said},
    )


def _in_parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
