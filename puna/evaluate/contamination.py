"""`puna contamination`: do the questions of a benchmark stand in what a model was trained on?

A question that shares a run of 13 words with the training text (Brown et al. 2020, arXiv:2005.14165, appendix C) may
have been learnt by heart. 8 words find more, and more by chance; they are what is left for short questions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from puna.batches.shards import TokenShards
from puna.config import to_plain
from puna.evaluate.compare.samples import first_values, read_samples
from puna.evaluate.statistics.intervals import estimate, wilson
from puna.evaluate.tasks.table import AnyTask
from puna.evaluate.tasks.task import Example, checked
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, read_documents, read_json, read_jsonl, write_json, write_jsonl
from puna.runtime.manifest import FILE_NAME, Manifest, content_hash
from puna.runtime.progress import Advance, progress, say
from puna.tokenizer.load import load_tokenizer

if TYPE_CHECKING:
    from puna.evaluate.overlap import Overlap

NOT_CHECKED = "contamination: not checked, so there is no clean score"
_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class ContaminationConfig:
    """Look for the questions of tasks in a corpus."""

    tasks: tuple[AnyTask, ...]
    """Tasks, as `puna evaluate` has them; all their questions are looked for, whatever `limit` says."""
    against: tuple[Path, ...]
    """What the model was trained on: token shards, or documents with "text" and "id" (Parquet or JSON Lines)."""
    output: Path
    """Folder to write contamination.json and questions.jsonl to; replaced when it exists."""
    data: Path | None = None
    """Folder of benchmark data, or "hub:"; see `puna config evaluate`."""
    tokenizer: Path | None = None
    """Of the token shards; absent, where `puna tokenize` found it."""
    evaluation: Path | None = None
    """Output of `puna evaluate` on these tasks: how the model does on the clean and on the other questions."""
    ngram_words: tuple[int, ...] = (13, 8)
    """Words in a run. The first of these that a question is long enough for decides whether it is clean."""

    def __post_init__(self) -> None:
        if not self.tasks or not self.against or not self.ngram_words or min(self.ngram_words) < 1:
            raise ValueError("tasks, against and ngram_words each need something in them, and a run at least one word.")


@dataclass(frozen=True, slots=True)
class Contamination:
    """What `puna contamination` found, for those who report scores."""

    against: tuple[str, ...]
    """What the questions were looked for in."""
    clean: Mapping[str, frozenset[str]]
    """Task -> ids of the questions that share no run with it."""
    contaminated: Mapping[str, frozenset[str]]
    """Task -> ids of those that do; questions too short to tell are in neither."""

    @classmethod
    def read(cls, folder: Path) -> "Contamination":
        """The output of `puna contamination`.

        Raises:
            InputError: `folder` is not that.
        """
        if not (folder / "contamination.json").exists():
            raise InputError(f"{folder} is not an output of `puna contamination`: it has no contamination.json.")
        rows = list(read_jsonl(folder / "questions.jsonl"))
        tasks = dict.fromkeys(row["task"] for row in rows)

        def ids(clean: bool) -> dict[str, frozenset[str]]:
            return {
                task: frozenset(row["id"] for row in rows if row["task"] == task and row["clean"] is clean)
                for task in tasks
            }

        return cls(tuple(read_json(folder / "contamination.json")["against"]), ids(True), ids(False))


def contamination_line(found: Contamination | None, task: str, values: Mapping[str, float]) -> str:
    """What a report has to say beside the score of a task.

    Args:
        found: what `puna contamination` found; None where it was not run.
        task: its title.
        values: question's id -> its value, for the questions that were asked.
    """
    if found is None or task not in found.clean:
        return NOT_CHECKED
    parts = []
    for name, ids in (("clean", found.clean[task]), ("contaminated", found.contaminated[task])):
        if part := [value for key, value in values.items() if key in ids]:
            mean = estimate(part)
            spread = "" if len(part) == 1 else f" ± {mean.standard_error:.3f}"
            parts.append(f"{mean.mean:.3f}{spread} on {len(part):,} {name}")
    unknown = sum(key not in found.clean[task] | found.contaminated[task] for key in values)
    if unknown:
        parts.append(f"{unknown:,} too short to tell, or not looked for")
    return f"contamination, against {', '.join(found.against)}: {'; '.join(parts)}"


def main(config: ContaminationConfig) -> None:
    """Write contamination.json, questions.jsonl (each question's verdict) and the manifest; print a summary."""
    try:
        from puna.evaluate.overlap import find_overlaps
    except ImportError as error:
        raise InputError("Looking for runs of words needs numba and pyarrow: pip install 'puna[curate]'.") from error

    titles = [task.title for task in config.tasks]
    if len(set(titles)) < len(titles):
        raise InputError(f"Two tasks have the same name ({', '.join(titles)}); set the name of one.")
    samples = {} if config.evaluation is None else read_samples(config.evaluation)
    if config.evaluation is not None and (unasked := [title for title in titles if title not in samples]):
        raise InputError(f"{config.evaluation} has no answers to {unasked[0]}, only to {', '.join(samples)}.")
    examples = [
        (task.title, example)
        for task in config.tasks
        for example in checked(replace(task, limit=None), task.read(config.data))
    ]
    with progress("Reading the corpus", None) as advance:
        overlaps = find_overlaps(
            [(example.prompt, example.target) for _, example in examples],
            _documents(config.against, config.tokenizer, advance),
            config.ngram_words,
        )
    rows = [
        _row(title, example, dict(zip(config.ngram_words, found, strict=True)))
        for (title, example), *found in zip(examples, *overlaps, strict=True)
    ]
    summary: dict[str, Any] = {"against": [str(path) for path in config.against], "tasks": {}}
    for title in titles:
        of_task = [row for row in rows if row["task"] == title]
        summary["tasks"][title] = {str(length): _counts(of_task, str(length)) for length in config.ngram_words}
    of_tasks = {path for task in config.tasks for path in task.inputs(config.data)}
    evaluation = [] if config.evaluation is None else [config.evaluation]
    inputs = {str(path): content_hash(path) for path in (*config.against, *evaluation, *sorted(of_tasks))}
    with atomic_path(config.output) as folder:
        folder.mkdir()
        write_json(folder / "contamination.json", summary)
        write_jsonl(folder / "questions.jsonl", rows)
        Manifest("contamination", to_plain(config), inputs, summary).write(folder)
    _show(summary["tasks"], rows)
    verdicts = Contamination.read(config.output)
    for title in titles if samples else ():
        say(f"{title}: {contamination_line(verdicts, title, first_values(samples[title]))}")


def _documents(paths: tuple[Path, ...], tokenizer_path: Path | None, advance: Advance) -> Iterator[tuple[str, str]]:
    """Id and text of all documents, of token shards or as they are."""
    for path in paths:
        manifest = Manifest.read(path) if (path / FILE_NAME).exists() else None
        if manifest is None or manifest.stage != "tokenize":
            for number, row in enumerate(read_documents(path)):
                if not isinstance(row.get("text"), str):
                    raise InputError(f'{path}, document {number}: it has no "text".')
                yield str(row.get("id", number)), row["text"]
                advance()
            continue
        source = tokenizer_path or Path(manifest.config["tokenizer"])
        if not source.exists():
            raise InputError(
                f"{path} was made with the tokenizer {source}, which is not there. Set tokenizer to where it is now."
            )
        tokenizer = load_tokenizer(source)
        shards = TokenShards(path, tokenizer.hash)
        for number, name in enumerate(shards.document_ids()):
            yield name, tokenizer.decode(shards.ids(number).tolist(), skip_special=True)
            advance()


def _row(task: str, example: Example, found: Mapping[int, "Overlap | float | None"]) -> dict[str, Any]:
    verdict = next((overlap == 0.0 for overlap in found.values() if overlap is not None), None)
    overlaps = {
        str(length): overlap if isinstance(overlap, float | None) else asdict(overlap)
        for length, overlap in found.items()
    }
    return {"task": task, "id": example.id, "where": example.where, "clean": verdict, "overlaps": overlaps}


def _counts(rows: list[dict[str, Any]], length: str) -> dict[str, Any]:
    overlaps = [row["overlaps"][length] for row in rows if row["overlaps"][length] is not None]
    hits = [overlap for overlap in overlaps if overlap != 0.0]
    counts = {
        "questions": len(rows),
        "long_enough": len(overlaps),
        "contaminated": len(hits),
        "contaminated_in_answer": sum(hit["in_answer"] for hit in hits),
    }
    share = {"share": len(hits) / len(overlaps), "interval": wilson(len(hits), len(overlaps))} if overlaps else {}
    return counts | share


def _show(tasks: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    table = Table("task", "words", "long enough", "contaminated", "share, 95 %", "also the answer")
    for title, lengths in tasks.items():
        for length, counts in lengths.items():
            share = "unknown"
            if counts["long_enough"]:
                low, high = counts["interval"]
                share = f"{counts['share']:.1%} ({low:.1%} to {high:.1%})"
            table.add_row(
                title,
                length,
                f"{counts['long_enough']:,} of {counts['questions']:,}",
                f"{counts['contaminated']:,}",
                share,
                f"{counts['contaminated_in_answer']:,}",
            )
    console = Console()
    console.print(table)
    for row in [row for row in rows if row["clean"] is False][:_EXAMPLES]:
        overlap = next(overlap for overlap in row["overlaps"].values() if overlap)
        console.print(
            f'{row["where"]}: "{overlap["run"]}" stands in {overlap["document"]}', markup=False, highlight=False
        )
