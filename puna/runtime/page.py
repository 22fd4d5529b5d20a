"""Self-contained HTML pages: one style, every text escaped, figures as SVG inside the page."""

import io
import platform
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from puna import __version__
from puna.runtime.errors import InputError
from puna.runtime.files import write_text


def write_page(destination: Path, template: str, *, title: str, created: str, **values: Any) -> None:
    """Render a page and write it atomically.

    Args:
        destination: the .html file.
        template: Jinja source that begins with `{% extends "page" %}` and fills `{% block content %}`.
        title: of the page.
        created: when what it shows was made.
        values: for the template.
    """
    layout = files("puna.runtime").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({"page": layout}), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    machine = f"{platform.platform()}, Python {platform.python_version()}"
    page = environment.from_string(template)
    write_text(destination, page.render(title=title, created=created, version=__version__, machine=machine, **values))


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of that many inches.

    Raises:
        InputError: matplotlib is absent.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("Plots need matplotlib: pip install 'puna[report]'.") from error
    return Figure(figsize=(width, height))


def plain_label(name: str) -> str:
    """A label for a figure, without what matplotlib would take for mathematics, or has no glyph for."""
    return name[:60].replace("$", r"\$").encode("ascii", "backslashreplace").decode()


def to_svg(figure: Any) -> str:
    """A matplotlib figure as an <svg> element; the same figure gives the same text."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "puna"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
