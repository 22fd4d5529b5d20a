"""`puna compare`: models, published configurations and published results side by side, on one page."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.table import Table

from puna.config import to_plain
from puna.evaluate.compare.architecture import architecture_section
from puna.evaluate.compare.candidates import Candidate, read_candidates
from puna.evaluate.compare.generations import generate_all
from puna.evaluate.compare.published import published_section, read_published
from puna.evaluate.compare.quality import Samples, quality_section
from puna.evaluate.compare.samples import read_samples
from puna.evaluate.compare.section import Section, not_measured
from puna.evaluate.compare.speed import SpeedConfig, speed_section
from puna.evaluate.compare.tokenizers import tokenizer_section
from puna.evaluate.contamination import Contamination
from puna.evaluate.harness.engine import EvaluationEngineConfig
from puna.evaluate.main import EvaluateConfig
from puna.evaluate.main import main as evaluate
from puna.evaluate.tasks.perplexity import Perplexity
from puna.evaluate.tasks.table import AnyTask
from puna.runtime.errors import InputError
from puna.runtime.files import write_json
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.page import write_page
from puna.runtime.progress import say


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare models: what they are, what they know, how fast they are, what they say."""

    models: tuple[str, ...]
    """Model directories, hub:organisation/name, names of published configurations such as llama-3.1-8b, or of models in
    the tables of `published`. What there is no weights for is compared as far as it goes."""
    output: Path = Path("runs/compare")
    """Folder to write compare.html and compare.json to, and evaluations/NAME for what is asked."""
    names: tuple[str, ...] = ()
    """What to call the models; absent, the ends of their paths."""
    tokenizers: dict[str, Path] = field(default_factory=dict)
    """Model, as in `models` -> a tokenizer for it, for published configurations."""
    languages: Path | None = None
    """Sentences with "lang" and "text", for bytes per token by language."""
    documents: dict[str, Path] = field(default_factory=dict)
    """Name, such as a language -> documents that no model was trained on: bytes per token, and bits per byte."""
    max_documents: int = 500
    """Read so many of each, from the beginning."""
    tasks: tuple[AnyTask, ...] = ()
    """Tasks to ask every model, as in `puna evaluate`."""
    data: Path | None = None
    """Folder of benchmark data, or "hub:"; see `puna config evaluate`."""
    evaluations: dict[str, Path] = field(default_factory=dict)
    """Model, as in `models` -> output of `puna evaluate`, where it was asked already; nothing is asked here then."""
    contamination: Path | None = None
    """Output of `puna contamination` on these tasks; without it there are no clean scores."""
    published: Path | None = None
    """Tables of model cards, JSON; shown beside, marked as published."""
    prompts: tuple[str, ...] = ()
    """Prompts that every model goes on with."""
    chat: bool = False
    """Ask the prompts through the chat template."""
    max_new_tokens: int = 80
    """Cut the answers off here."""
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    """How speed is measured."""
    engine: EvaluationEngineConfig = field(default_factory=EvaluationEngineConfig)
    """Where and how the models run, for all but speed."""

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise ValueError("A comparison needs at least two models.")
        if self.evaluations and (self.tasks or self.documents):
            raise ValueError("Set tasks and documents to ask here, or evaluations where that was done, but not both.")
        if self.max_documents < 1 or self.max_new_tokens < 1:
            raise ValueError("max_documents and max_new_tokens have to be at least 1.")


def main(config: CompareConfig) -> None:
    """Measure, print tables, and write compare.json, compare.html and the manifest."""
    published = [] if config.published is None else read_published(config.published)
    candidates = read_candidates(config.models, config.names, config.tokenizers, published)
    sections = [
        architecture_section(candidates),
        tokenizer_section(candidates, config.languages, config.documents, config.max_documents),
        _quality(config, candidates),
        speed_section(candidates, config.speed),
        published_section(published, [c.source for c in candidates if c.directory is None]),
    ]
    generations = generate_all(candidates, config.prompts, config.chat, config.max_new_tokens, config.engine)
    data = {
        "models": [{"name": c.name, "source": c.source, "kind": c.kind} for c in candidates],
        "sections": {s.title: {**s.data, "missing": list(s.missing)} for s in sections},
        "generations": [asdict(row) for row in generations],
    }
    write_json(config.output / "compare.json", data)
    write_page(
        config.output / "compare.html",
        files("puna.evaluate.compare").joinpath("compare.html.jinja").read_text(encoding="utf-8"),
        title=" or ".join(candidate.name for candidate in candidates) + "?",
        created=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        models=[(candidate.name, candidate.kind) for candidate in candidates],
        sections=sections,
        summary=[sentence for section in sections for sentence in section.summary],
        generations=generations,
        max_tokens=config.max_new_tokens,
    )
    paths = [c.directory for c in candidates] + [config.languages, config.contamination, config.published]
    inputs = [*paths, *config.tokenizers.values(), *config.documents.values(), *config.evaluations.values()]
    hashes = {str(path): content_hash(path) for path in inputs if path is not None}
    Manifest("compare", to_plain(config), hashes, {"num_models": len(candidates)}).write(config.output)
    for section in sections:
        _show(section)
    for sentence in (sentence for section in sections for sentence in section.summary):
        say(sentence)
    say(f"Page: {config.output / 'compare.html'}")


def _quality(config: CompareConfig, candidates: Sequence[Candidate]) -> Section:
    if unknown := [model for model in config.evaluations if model not in config.models]:
        raise InputError(f"evaluations names {unknown[0]}, which is none of the models ({', '.join(config.models)}).")
    tasks = [
        *config.tasks,
        *(Perplexity(name=name, file=path, limit=config.max_documents) for name, path in config.documents.items()),
    ]
    samples: dict[str, Samples] = {}
    missing = []
    for candidate in candidates:
        folder = config.evaluations.get(candidate.source)
        if folder is None and candidate.directory is None:
            missing.append(f"{candidate.name}: {not_measured('no weights')}")
            continue
        if folder is None and not tasks:
            missing.append(f"{candidate.name}: {not_measured('no tasks, documents or evaluations were named')}")
            continue
        if folder is None:
            assert candidate.directory is not None
            folder = config.output / "evaluations" / candidate.name
            evaluate(
                EvaluateConfig(
                    model=candidate.directory,
                    output=folder,
                    tasks=tuple(tasks),
                    data=config.data,
                    contamination=config.contamination,
                    engine=config.engine,
                )
            )
        samples[candidate.name] = read_samples(folder)
    contamination = None if config.contamination is None else Contamination.read(config.contamination)
    return quality_section(samples, contamination, missing)


def _show(section: Section) -> None:
    console = Console()
    console.print(f"\n[bold]{section.title}[/bold]")
    for sheet in section.sheets:
        if sheet.terminal_columns != 0:
            table = Table(*sheet.columns[: sheet.terminal_columns], title=sheet.title or None, title_justify="left")
            for column in table.columns[1:]:
                column.justify = "right"
            for row in sheet.rows:
                table.add_row(*row[: sheet.terminal_columns])
            console.print(table)
        else:
            console.print(f"{sheet.title}: {len(sheet.rows)} rows on the page", style="dim", markup=False)
    for why in section.missing:
        console.print(why, style="yellow", markup=False)
