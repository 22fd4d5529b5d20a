"""`puna rate`: people compare the answers of models blindly; which model is better, at what, and how sure that is."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path

from puna.config import to_plain
from puna.evaluate.judge import JudgeConfig
from puna.evaluate.rating.answers import Question, compare_all, read_questions
from puna.evaluate.rating.ask import RATINGS_FILE, AskConfig, ask, inputs_of, open_answers, open_page
from puna.evaluate.rating.findings import find
from puna.evaluate.rating.judged import judge_comparisons
from puna.evaluate.rating.records import Rating, read_ratings
from puna.evaluate.rating.report import print_tables, write_report
from puna.evaluate.rating.session import Comparison
from puna.runtime.errors import InputError
from puna.runtime.files import write_json, write_jsonl
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say

_JUDGED_FILE = "judge_ratings.jsonl"
_JUDGE_ANSWERS_FILE = "judge.answers"


@dataclass(frozen=True, kw_only=True)
class RateConfig(AskConfig):
    """Which models people compare, and where. `output` gets report.html, results.json, and what a rating session keeps.

    Without `prompts` the models answer 60 of ours, five for each of twelve kinds of request, some in Chinese; the first
    12 are of one kind each.
    """

    ratings: Path | None = None
    """Ratings that are there already, in the form of ratings.jsonl, of people or of a model that judges: nobody is
    asked, and what follows from these is written."""
    judge: JudgeConfig | None = None
    """A model that judges in the place of people: each comparison in both orders, as two raters, into
    judge_ratings.jsonl. The page is not served then."""
    resamples: int = 1000
    """How often prompts are drawn anew for the intervals of strengths and of win rates at equal length."""

    def __post_init__(self) -> None:
        if self.resamples < 100:
            raise ValueError(f"resamples is {self.resamples}; intervals of 95 % need at least 100.")
        if self.ratings is None:
            super().__post_init__()
            if self.answers is None and len(self.models) < 2:
                raise ValueError("Comparing needs at least two models: set models.NAME for each.")
        elif self.models or self.answers is not None or self.prompts is not None or self.judge is not None:
            raise ValueError("ratings are there already; leave models, prompts, answers and judge out.")


def main(config: RateConfig) -> None:
    """Draw answers, have them rated until Ctrl-C, and write what was found.

    Raises:
        InputError: a model, the prompts, the answers or the ratings are wrong; or nothing has been rated.
        KeyboardInterrupt: it was stopped before everything had been rated; the report is of what had been.
    """
    if config.ratings is not None:
        inputs = {str(config.ratings): content_hash(config.ratings)}
        _write(config, "Ratings of answers", read_ratings(config.ratings), inputs, {})
        return
    if config.judge is not None:
        _judge(config, config.judge, *_comparisons(config))
        return
    with closing(open_page(config)) as listener:
        comparisons, same = _comparisons(config)
        session = ask(config, comparisons, listener)
    counts = {
        "num_comparisons": session.num_comparisons,
        "num_comparisons_finished": session.num_finished,
        "num_same_answers": same,
    }
    if session.log.ratings:
        ratings = config.output / RATINGS_FILE
        inputs = {**inputs_of(config), str(ratings): content_hash(ratings)}
        _write(config, "Human evaluation", session.log.ratings, inputs, counts)
    if session.num_finished < session.num_comparisons:
        raise KeyboardInterrupt


def _comparisons(config: RateConfig) -> tuple[list[Comparison], int]:
    """What there is to rate, and how many pairs of answers are left out."""
    answered = open_answers(
        config, lambda: _questions(config), samples=1, temperatures=[config.sampling.temperature], whole=False
    )
    comparisons, same = compare_all(answered)
    if same:
        say(f"{same:,} pairs of answers are left out: both are the same.")
    return comparisons, same


def _judge(config: RateConfig, judge: JudgeConfig, comparisons: Sequence[Comparison], same: int) -> None:
    if not comparisons:
        raise InputError("There is nothing to compare: no prompt has two different answers.")
    ratings = judge_comparisons(comparisons, judge, config.output / _JUDGE_ANSWERS_FILE)
    config.output.mkdir(parents=True, exist_ok=True)
    write_jsonl(config.output / _JUDGED_FILE, map(asdict, ratings))
    inputs = inputs_of(config)
    if judge.model is not None:
        inputs[str(judge.model)] = content_hash(judge.model)
    counts = {
        "num_comparisons": len(comparisons),
        "num_comparisons_finished": len({rating.item for rating in ratings}),
        "num_same_answers": same,
        "num_unreadable_verdicts": 2 * len(comparisons) - len(ratings),
    }
    _write(config, "Evaluation by a judge", ratings, inputs, counts)


def _questions(config: RateConfig) -> list[Question]:
    if config.prompts is not None:
        return read_questions(config.prompts, config.max_prompts)
    with as_file(files("puna.evaluate.rating").joinpath("prompts.jsonl")) as path:
        return read_questions(path, config.max_prompts)


def _write(
    config: RateConfig, title: str, ratings: Sequence[Rating], inputs: dict[str, str], counts: dict[str, int]
) -> None:
    findings = find(ratings, config.resamples, config.seed)
    config.output.mkdir(parents=True, exist_ok=True)
    manifest = Manifest("rate", to_plain(config), inputs, {**counts, **findings.numbers()})
    write_json(config.output / "results.json", findings.plain())
    write_report(config.output / "report.html", title, findings, counts, manifest.created)
    manifest.write(config.output)
    print_tables(findings)
    say(f"Wrote {config.output / 'report.html'}")
