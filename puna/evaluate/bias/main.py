"""`puna bias`: what a model finds likelier of one group of people than of another, and how it writes about them."""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from puna.config import to_plain
from puna.evaluate.bias.measure import (
    Continued,
    Finding,
    Scorer,
    compare,
    continuations,
    hostility,
    likelihoods,
    word_scorer,
)
from puna.evaluate.bias.templates import Templates, Words, read_templates
from puna.evaluate.harness.ask import Asker
from puna.evaluate.harness.cache import AnswerCache
from puna.infer.load import EngineConfig, load_engine
from puna.peft.text_classifier import TextClassifier
from puna.runtime.devices import open_device
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, write_json, write_jsonl, write_text
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.page import new_figure, to_svg, write_page
from puna.runtime.progress import say
from puna.weights.load import resolve

_NO_BLANKS = ("zh", "ja", "th")
"""Languages that put no blanks between words."""

_MOST_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class BiasConfig:
    """Measure by templates what changes where only the group of people in a sentence changes."""

    model: Path
    """Model directory."""
    output: Path
    """Folder for report.txt, report.html, results.json (every comparison), items.jsonl (every sentence) and
    continuations.jsonl; replaced when it exists."""
    templates: Path | None = None
    """Groups, sentences and words, as puna/evaluate/bias/templates.toml, which is taken when absent. It has the axes
    gender, nationality, religion, age and profession, in English (en) and Chinese (zh)."""
    languages: tuple[str, ...] = ("en",)
    """Take the templates in these languages."""
    axes: tuple[str, ...] = ()
    """Take these axes; all when empty."""
    samples: int = 4
    """How often the model goes on with each opening about each group; 0 leaves continuations out."""
    max_tokens: int = 24
    """The most tokens that it writes."""
    temperature: float = 1.0
    """How freely it writes."""
    classifier: Path | None = None
    """Directory of a classifier of texts that says how hostile a continuation is, such as one of sentiment or toxicity
    (`puna finetune`). Absent, a continuation is hostile if it has a word of the templates' list."""
    hostile: tuple[str, ...] = ("unsafe",)
    """The classifier's classes whose probability counts."""
    confidence: float = 0.95
    """Of the intervals of each comparison by itself."""
    false_discovery_rate: float = 0.05
    """Which share of the findings that stand may be chance, over all comparisons together."""
    seed: int = 0
    """Of the continuations; they are drawn alike for all groups."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Where and how the model runs."""

    def __post_init__(self) -> None:
        if self.samples < 0 or self.max_tokens < 1 or self.temperature < 0:
            raise ValueError("samples and temperature cannot be negative, and max_tokens has to be at least 1.")
        if not (0 < self.confidence < 1 and 0 < self.false_discovery_rate < 1):
            raise ValueError("confidence and false_discovery_rate have to be between 0 and 1.")
        if not self.languages:
            raise ValueError("There has to be a language.")


def main(config: BiasConfig) -> None:
    """Measure, compare, print, and write; whole or not at all.

    Raises:
        InputError: the model, the classifier or the templates cannot be read, or fit each other not.
    """
    templates = read_templates(config.templates, config.languages, config.axes)
    scorers = _scorers(config, templates)
    engine = load_engine(config.model, config.engine)
    with closing(AnswerCache(Path(":memory:"), str(config.model))) as cache:
        asker = Asker(engine, cache)
        tables = likelihoods(asker, templates)
        drawn = continuations(
            asker,
            templates,
            samples=config.samples,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            seed=config.seed,
        )
    continued = _scored(drawn, scorers)
    tables += hostility(continued, templates.axis)
    if not tables:
        raise InputError("There is nothing to measure: the templates have no contrast, and no opening is gone on with.")
    findings = compare(tables, config.confidence)
    standing = sum(finding.q <= config.false_discovery_rate for finding in findings)
    results = {"num_comparisons": len(findings), "num_standing": standing}
    report = _report(findings, config)
    paths = [resolve(config.model), config.templates, config.classifier]
    inputs = {str(path): content_hash(path) for path in paths if path is not None}
    with atomic_path(config.output) as folder:
        folder.mkdir()
        write_json(folder / "results.json", [asdict(finding) for finding in findings])
        write_jsonl(
            folder / "items.jsonl",
            (
                {"measure": table.measure, "language": table.axis.language, "axis": table.axis.name, "text": item.text,
                 "values": dict(zip(table.axis.groups, item.values, strict=True))}
                for table in tables
                for item in table.items
            ),
        )  # fmt: skip
        write_jsonl(folder / "continuations.jsonl", (asdict(each) for each in continued))
        write_text(folder / "report.txt", report + "\n")
        _write_page(folder / "report.html", findings, continued, config)
        Manifest("bias", to_plain(config), inputs, results).write(folder)
    say(report)
    say(f"Page: {config.output / 'report.html'}")


def _scorers(config: BiasConfig, templates: Templates) -> Mapping[str, Scorer]:
    """Language -> what says how hostile a text is."""
    if not config.samples:
        return {}
    if config.classifier is not None:
        classifier = TextClassifier(config.classifier, open_device(config.engine.device, config.engine.num_threads))
        columns = classifier.columns(config.hostile)

        def score(texts: Sequence[str]) -> list[float]:
            return [float(value) for value in classifier.probabilities(texts)[:, columns].sum(-1)]

        return dict.fromkeys(config.languages, score)
    words: dict[str, Words] = {each.language: each for each in templates.words}
    if missing := [language for language in config.languages if language not in words]:
        raise InputError(
            f"The templates have no hostile words in the language {missing[0]!r}; give a classifier, or samples=0."
        )
    return {
        language: word_scorer(words[language].words, spaced=language not in _NO_BLANKS) for language in config.languages
    }


def _scored(continued: Sequence[Continued], scorers: Mapping[str, Scorer]) -> list[Continued]:
    scores = {
        language: iter(scorer([each.text for each in continued if each.language == language]))
        for language, scorer in scorers.items()
    }
    return [replace(each, score=next(scores[each.language])) for each in continued]


def _report(findings: Sequence[Finding], config: BiasConfig) -> str:
    """A table of all comparisons, the surest first."""
    lines = [
        f"{'measure':10} {'lang':4} {'axis':12} {'group':20} {'value':>8} {'difference':>10} {'interval':>19} "
        f"{'effect':>7} {'q':>8}"
    ]
    lines += [
        f"{'*' if each.q <= config.false_discovery_rate else ' '}{each.measure:9} {each.language:4} {each.axis:12} "
        f"{each.group:20} {each.value.mean:8.3f} {each.difference.mean:+10.3f} "
        f"{each.difference.interval.low:+9.3f} {each.difference.interval.high:+9.3f} {each.effect:+7.2f} {each.q:8.2g}"
        for each in sorted(findings, key=lambda each: each.q)
    ]
    standing = sum(each.q <= config.false_discovery_rate for each in findings)
    lines.append(
        f"{standing} of {len(findings)} comparisons stand (*) at a false discovery rate of "
        f"{config.false_discovery_rate:g}; differences are to the mean of the other groups."
    )
    return "\n".join(lines)


def _write_page(
    destination: Path, findings: Sequence[Finding], continued: Sequence[Continued], config: BiasConfig
) -> None:
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for each in findings:
        groups.setdefault((each.measure, each.language, each.axis), []).append(each)
    judged_by = f"by {config.classifier}" if config.classifier is not None else "share with a word of the list"
    write_page(
        destination,
        files("puna.evaluate.bias").joinpath("bias.html.jinja").read_text(encoding="utf-8"),
        title="Bias by template",
        created=time.strftime("%Y-%m-%d %H:%M"),
        config=config,
        findings=findings,
        groups=list(groups.items()),
        judged_by=judged_by,
        figure=_figure(findings, config),
        continued=sorted(continued, key=lambda each: -each.score)[:_MOST_SHOWN],
    )


def _figure(findings: Sequence[Finding], config: BiasConfig) -> str:
    """The effects of all comparisons as an SVG, those that stand filled; nothing where matplotlib is absent."""
    try:
        figure = new_figure(9, 0.22 * len(findings) + 1)
    except InputError as error:
        say(f"The page has no plot. {error}")
        return ""
    axes: Any = figure.subplots()
    for place, each in enumerate(reversed(findings)):
        stands = each.q <= config.false_discovery_rate
        axes.plot(each.effect, place, "o", color="#b3541e", fillstyle="full" if stands else "none")
    # Fonts with every script are not everywhere: the plot names measures and axes, the tables the groups.
    labels = [f"{each.measure}, {each.axis} ({each.language})" for each in reversed(findings)]
    axes.set_yticks(range(len(findings)), labels, fontsize=6)
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_xlabel("effect: difference to the other groups, in standard deviations")
    return to_svg(figure)
