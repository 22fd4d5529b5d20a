"""Explanations as pages and in the terminal."""

import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from puna.finetune.explain.generation import GenerationExplanation, GenerationSettings, Stretch
from puna.finetune.explain.heads import HeadExplanation, HeadSettings
from puna.peft.heads import Attention, HeadSpec
from puna.runtime.page import write_page

_BASELINES = {"padding": "the padding token", "bos": "the BOS token", "zero": "an embedding of zeros"}


def show_head(
    explanations: Sequence[HeadExplanation],
    spec: HeadSpec,
    attention: Attention,
    settings: HeadSettings,
    *,
    model: Path,
    destination: Path,
) -> None:
    """Write the heat maps, and print what was explained and whether it is complete."""
    is_number = spec.config.get("problem_type") == "regression"
    _write(
        destination,
        "heads.html.jinja",
        title="What the answers rest on",
        explanations=explanations,
        model=model,
        labels=spec.labels,
        attention=attention,
        join=settings.join,
        baseline=_BASELINES[settings.baseline],
        is_number=is_number,
        quantity="the number" if is_number else "an output's probability",
    )
    console = Console(highlight=False)
    console.print("Integrated gradients: contributions have to add up to the difference from the baseline.")
    for one in explanations:
        for part in one.contributions:
            what = f"{part.label} of {part.word}" if part.word else part.label
            console.print(
                Text(f"{one.name}: {what} {part.output:.4f}, baseline {part.baseline_output:.4f}, contributions ")
                + Text(f"{sum(cell.value for cell in part.cells):+.4f}, gap {part.gap:.1e}, bound {part.bound:.1e}, ")
                + Text(f"{part.num_points} points: ")
                + (Text("complete", "green") if part.complete else Text("NOT COMPLETE", "bold red")),
                soft_wrap=True,
            )


def show_generation(
    explanations: Sequence[GenerationExplanation],
    names: Sequence[str],
    settings: GenerationSettings,
    *,
    model: Path,
    destination: Path,
) -> None:
    """Write the texts with their probabilities, and print them."""
    _write(
        destination,
        "generation.html.jinja",
        title="How sure the model was",
        explanations=explanations,
        names=names,
        model=model,
        alternatives=settings.alternatives,
    )
    console = Console()
    for one in explanations:
        console.print(_coloured(one.stretches))
        table = Table()
        for column in ("token", "probability", "log-probability", "likeliest at its place"):
            table.add_column(column, justify="right" if "probability" in column else "left")
        for token in (token for part in one.stretches if not part.prompt for token in part.tokens):
            others = ", ".join(f"{text!r} {probability:.1%}" for text, probability in token.alternatives)
            table.add_row(Text(repr(token.text)), f"{token.probability:.1%}", f"{token.logprob:.3f}", Text(others))
        if table.rows:
            console.print(table)
        console.print(
            f"{one.num_tokens} tokens, mean log-probability {one.logprob:.3f} nats, perplexity {one.perplexity:.2f}"
        )


def _coloured(stretches: Sequence[Stretch]) -> Text:
    """The text, doubtful tokens on yellow and red, given ones faint."""
    text = Text()
    for part in stretches:
        colour = "black on red" if part.strength > 2 / 3 else "black on yellow" if part.strength > 1 / 3 else ""
        text.append(part.text, " ".join(filter(None, ("dim" if part.prompt or part.special else "", colour))))
    return text


def _write(destination: Path, template: str, **values: Any) -> None:
    source = files("puna.finetune.explain").joinpath(template).read_text(encoding="utf-8")
    write_page(destination, source, created=time.strftime("%Y-%m-%d %H:%M"), **values)
