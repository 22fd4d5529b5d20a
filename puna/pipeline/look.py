"""`puna inspect data`: a page and a summary in the terminal about a folder of documents."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from puna.pipeline.data import DataFacts, Histogram, gather
from puna.runtime.errors import InputError
from puna.runtime.page import new_figure, plain_label, to_svg, write_page
from puna.runtime.progress import say

_MAX_BARS = 30


def show_data(folder: Path, page: Path | None, tokens: Path | None) -> None:
    """Print a summary of documents and write a page about them.

    Args:
        folder: output of `puna curate`, or any folder or file of Parquet or JSON Lines.
        page: where to write the page; beside `folder` where absent, so that the folder stays as it is.
        tokens: output of `puna tokenize` for these documents; looked for beside `folder` where absent.

    Raises:
        InputError: there is no document, or a file is broken.
    """
    facts = gather(folder, tokens)
    destination = page or folder.resolve().with_name(f"{folder.resolve().name}.html")
    write_page(
        destination,
        files("puna.pipeline").joinpath("look.html.jinja").read_text(encoding="utf-8"),
        title=f"Data in {folder.resolve().name}",
        created=facts.created,
        facts=facts,
        total=_total(facts),
        has_tokens=any(source.tokens is not None for source in facts.sources),
        figures=_figures(facts),
    )
    _print_summary(facts)
    say(f"Page: {destination}")


def _total(facts: DataFacts) -> dict[str, int]:
    return {
        "documents": sum(source.documents for source in facts.sources),
        "num_bytes": sum(source.num_bytes for source in facts.sources),
        "held_out": sum(source.held_out for source in facts.sources),
        "tokens": sum(source.tokens or 0 for source in facts.sources),
    }


def _print_summary(facts: DataFacts) -> None:
    console = Console()
    sources = _table("Sources", ["source", "documents", "MB", "held out", "tokens"])
    for source in facts.sources:
        tokens = "" if source.tokens is None else f"{source.tokens:,}"
        sources.add_row(
            Text(source.name or "(unnamed)"),
            f"{source.documents:,}",
            f"{source.num_bytes / 1e6:,.1f}",
            f"{source.held_out:,}",
            tokens,
        )
    console.print(sources)
    if facts.languages:
        languages = _table("Languages", ["language", "documents", "MB"])
        for name, documents, num_bytes in facts.languages[:10]:
            languages.add_row(Text(name), f"{documents:,}", f"{num_bytes / 1e6:,.1f}")
        console.print(languages)
    if facts.funnel:
        funnel = _table("Steps", ["step", "in", "out", "kept", "MB out"])
        for line in facts.funnel:
            funnel.add_row(
                Text(line["step"]),
                f"{line['documents_in']:,}",
                f"{line['documents_out']:,}",
                _share(line["documents_out"], line["documents_in"]),
                f"{line['bytes_out'] / 1e6:,.1f}",
            )
        console.print(funnel)
    if facts.rejects:
        rejects = _table("Rejected", ["step", "documents", "reason"])
        for row in facts.rejects[:15]:
            rejects.add_row(Text(row.step), f"{row.count:,}", Text(row.reason))
        console.print(rejects)
    for kind, clusters, documents in facts.cluster_counts:
        console.print(f"{kind}: {clusters:,} clusters of {documents:,} documents")


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        is_text = column in ("source", "language", "step", "reason")
        table.add_column(column, justify="left" if is_text else "right")
    return table


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _figures(facts: DataFacts) -> dict[str, str]:
    """Figures as SVG by where they go; none where matplotlib is absent."""
    try:
        new_figure(1, 1)
    except InputError as error:
        say(f"The page has no plots. {error}")
        return {}
    figures = {
        "sources": _bars(
            [source.name or "(unnamed)" for source in facts.sources],
            [source.num_bytes / 1e6 for source in facts.sources],
            "MB of text for training",
        )
    }
    if facts.languages:
        figures["languages"] = _bars(
            [name for name, _, _ in facts.languages],
            [num_bytes / 1e6 for _, _, num_bytes in facts.languages],
            "MB of text for training",
        )
    if facts.funnel:
        figures["funnel"] = _bars(
            [line["step"] for line in facts.funnel],
            [line["documents_out"] for line in facts.funnel],
            "documents left after each step",
        )
    if facts.lengths is not None:
        figures["lengths"] = _histogram(facts.lengths, "UTF-8 bytes of a document", logarithmic=True)
    for histogram in facts.scores:
        figures[histogram.name] = _histogram(histogram, histogram.name)
    return figures


def _bars(names: Sequence[str], values: Sequence[float], label: str) -> str:
    """Horizontal bars in the given order; what does not fit is summed up in the last one."""
    shown, rest = list(zip(names, values, strict=True))[:_MAX_BARS], values[_MAX_BARS:]
    if rest:
        shown.append((f"{len(rest)} more", sum(rest)))
    figure = new_figure(9, 0.32 * len(shown) + 0.8)
    axes = figure.subplots()
    drawn = axes.barh(range(len(shown)), [value for _, value in shown], color="tab:orange")
    axes.bar_label(drawn, labels=[_number(value) for _, value in shown], padding=3)
    axes.set_yticks(range(len(shown)), [plain_label(name) for name, _ in shown])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel=label)
    return to_svg(figure)


def _histogram(histogram: Histogram, label: str, logarithmic: bool = False) -> str:
    figure = new_figure(9, 2.6)
    axes = figure.subplots()
    axes.stairs(histogram.counts, histogram.edges, fill=True, color="tab:orange")
    if logarithmic:
        axes.set_xscale("log")
    axes.set(xlabel=plain_label(label), ylabel="documents")
    axes.grid(alpha=0.3)
    return to_svg(figure)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.2f}"
