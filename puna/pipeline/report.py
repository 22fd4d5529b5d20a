"""`report.html`: one page that shows what a run made, how, and how good it is."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from puna.pipeline.record import StageRecord
from puna.pipeline.rounds import round_lines
from puna.runtime.errors import InputError
from puna.runtime.files import read_jsonl
from puna.runtime.manifest import FILE_NAME, Manifest
from puna.runtime.page import new_figure, to_svg, write_page
from puna.runtime.progress import duration, say
from puna.train.metrics import read_metrics

_UNITS = {
    "num_documents": ("read", "documents"),
    "num_held_out_documents": ("held out", "documents"),
    "num_bytes": ("text", "bytes"),
    "num_questions": ("in all", "questions"),
    "num_held_out_questions": ("held out, nothing known about the subject", "questions"),
    "num_reworded_questions": ("held out, known in other words", "questions"),
    "num_tokens": ("text", "tokens"),
    "num_targets": ("training targets", "tokens"),
    "vocab_size": ("vocabulary", "ids"),
    "bytes_per_token": ("held-out bytes per token", "bytes/token"),
    "steps": ("optimiser", "steps"),
    "train_loss": ("training loss at the end", "nats/token"),
    "validation_loss": ("held-out loss at the end", "nats/token"),
    "tokens_per_second": ("training speed, median", "tokens/s"),
    "model_flops_utilisation": ("model FLOPs utilisation, median", "of the measured peak"),
    "seconds": ("training time", "s"),
    "num_held_out_bytes": ("held-out text", "bytes"),
    "num_held_out_tokens": ("held-out text", "tokens"),
    "bits_per_byte": ("this model on held-out files", "bits/byte"),
    "gzip_bits_per_byte": ("gzip -9 on held-out files", "bits/byte"),
    "answer_bits_per_byte": ("held-out answers, given the question", "bits/byte"),
    "answer_word_f1": ("overlap of answers with references", "word F1, 0 to 1"),
    "answer_word_f1_by_chance": ("the same with references shuffled", "word F1, 0 to 1"),
    "generation_tokens_per_second": ("answering speed, batched", "tokens/s"),
}
"""What the results in manifests are called and measured in; results without an entry are left out."""


@dataclass(frozen=True)
class _Figure:
    title: str
    caption: str
    svg: str


def write_report(output: Path, records: Sequence[StageRecord]) -> Path:
    """Write `output`/report.html from the manifests, curves and answers that the stages left there."""
    manifests = _manifests(output, records)
    write_page(
        output / "report.html",
        files("puna.pipeline").joinpath("report.html.jinja").read_text(encoding="utf-8"),
        title=output.resolve().name,
        created=max((manifest.created for manifest in manifests.values()), default=""),
        rounds=round_lines(manifests),
        numbers=_numbers(manifests),
        figures=_figures(output, records, manifests),
        answers=_answers(output, records),
        samples=_rows(output, records, "continuations.jsonl"),
        lineage=[
            {
                "name": record.name,
                "command": record.command,
                "seconds": duration(record.seconds),
                "inputs": manifests[record.name].inputs,
                "code_version": manifests[record.name].code_version,
                "created": manifests[record.name].created,
                "config": json.dumps(manifests[record.name].config, indent=2, ensure_ascii=False),
            }
            for record in records
            if record.name in manifests
        ],
    )
    return output / "report.html"


def print_summary(output: Path, records: Sequence[StageRecord]) -> None:
    """The few numbers and answers that one wants to see in the terminal."""
    manifests = _manifests(output, records)
    rounds, lines = round_lines(manifests)
    if lines:
        say("  " + " | ".join(("in each round", *rounds)))
    for stage, figure, *values in lines:
        say(f"  {stage:<12} {figure:<28} " + " | ".join(values))
    for row in _numbers(manifests):
        if row["unit"] in ("bits/byte", "word F1, 0 to 1", "tokens/s"):
            say(f"  {row['stage']:<12} {row['name']:<44} {row['value']:>10} {row['unit']}")
    for group in _answers(output, records):
        say(f"\n{group['title']}:")
        for row in group["rows"][:4]:
            say(f"  Q: {row['question']}\n  A: {row['answer']}\n     (reference: {row['reference']})")


def _manifests(output: Path, records: Sequence[StageRecord]) -> dict[str, Manifest]:
    """The manifest of each stage: in its folder, or with its model."""
    found = {}
    for record in records:
        for folder in (output / record.name, output / record.name / "model"):
            if (folder / FILE_NAME).exists():
                found[record.name] = Manifest.read(folder)
    return found


def _numbers(manifests: dict[str, Manifest]) -> list[dict[str, str]]:
    rows = []
    for stage, manifest in manifests.items():
        for key, value in manifest.results.items():
            name, unit = _UNITS.get(key, ("", ""))
            if key.endswith("gram_bits_per_byte"):
                name, unit = f"{key.removesuffix('_bits_per_byte')} model on held-out files", "bits/byte"
            if name and value is not None:
                text = f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if value >= 100 else f"{value:.3f}"
                rows.append({"stage": stage, "name": name, "value": text, "unit": unit})
    return rows


def _answers(output: Path, records: Sequence[StageRecord]) -> list[dict[str, Any]]:
    groups = []
    for record in records:
        if rows := _rows(output, [record], "answers.jsonl"):
            best = sorted(rows, key=lambda row: -row["word_f1"])
            groups += [
                {"title": f"{record.name}: nearest to the reference, of {len(rows)}", "rows": best[:10]},
                {"title": f"{record.name}: as they come", "rows": rows[:10]},
            ]
    return groups


def _rows(output: Path, records: Sequence[StageRecord], name: str) -> list[dict[str, Any]]:
    """The rows of a file that evaluations leave, all evaluations of the run together."""
    paths = [output / record.name / name for record in records if record.command == "evaluate"]
    return [row for path in paths if path.exists() for row in read_jsonl(path)]


def _figures(output: Path, records: Sequence[StageRecord], manifests: dict[str, Manifest]) -> list[_Figure]:
    try:
        new_figure(1, 1)
    except InputError as error:
        say(f"The report has no plots. {error}")
        return []

    figures = []
    for record in records:
        path = output / record.name / "metrics.jsonl"
        if not path.exists():
            continue
        figure = new_figure(9, 3.6)
        loss, rate = figure.subplots(1, 2, width_ratios=(2, 1))
        points = read_metrics(path)
        for key, label in (("train/loss", "training"), ("validation/loss", "held out")):
            curve = [(point["step"], point[key]) for point in points if key in point]
            if curve:
                loss.plot(*zip(*curve, strict=True), label=label, marker="o" if len(curve) < 20 else "")
        loss.set(xlabel="step", ylabel="loss, nats per token")
        loss.legend()
        loss.grid(alpha=0.3)
        rates = [(point["step"], point["train/learning_rate"]) for point in points if "train/learning_rate" in point]
        rate.plot(*zip(*rates, strict=True), color="tab:green")
        rate.set(xlabel="step", ylabel="learning rate")
        rate.grid(alpha=0.3)
        figure.tight_layout()
        figures.append(
            _Figure(f"Loss of {record.name}", "By optimiser step; held out is what was not trained on.", to_svg(figure))
        )

    for name, manifest in manifests.items():
        bars = {
            key.removesuffix("_bits_per_byte").replace("bits_per_byte", "this model"): value
            for key, value in manifest.results.items()
            if key.endswith("bits_per_byte") and not key.startswith("answer")
        }
        if len(bars) > 1:
            figure = new_figure(9, 0.5 * len(bars) + 1)
            axes = figure.subplots()
            drawn = axes.barh(list(bars), list(bars.values()), color=["tab:orange", *["tab:gray"] * (len(bars) - 1)])
            axes.bar_label(drawn, fmt="%.3f", padding=3)
            axes.invert_yaxis()
            axes.set(xlabel="bits per byte of held-out files (smaller is better)")
            axes.margins(x=0.12)
            figures.append(
                _Figure(
                    f"Prediction of held-out files ({name})",
                    "How many bits each needs for a byte of text that it was not trained on. The n-gram model "
                    "(interpolated Kneser-Ney) was trained on the whole training text, with the same tokens.",
                    to_svg(figure),
                )
            )
    return figures
