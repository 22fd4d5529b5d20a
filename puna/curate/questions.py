"""Questions with answers, drawn from documents that explain themselves.

Python sources answer "What does shutil.copytree do?" by their docstrings; texts with headings answer "What does
guide.md say about Installation?" by the paragraph under the heading; other prose answers what comes after a sentence.
"""

import ast
import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from puna.curate.document import Document

_MAX_ANSWER_CHARACTERS = 240
_MIN_ANSWER_CHARACTERS = 15
_FUNCTION_FORMS = ("What does {name} do?", "What is {name} for?", "Explain {name}.")
_CLASS_FORMS = ("What is {name}?", "What is the class {name} for?", "Explain {name}.")
_MODULE_FORMS = ("What is the {name} module?", "What is the module {name} for?", "What does the {name} module do?")
_HEADING = re.compile(r"^#{1,4} +(?P<markdown>[^\n]+?) *#*$|^(?P<underlined>\S[^\n]*)\n(?:={3,}|-{3,}|~{3,})$", re.M)
_SENTENCE = re.compile(r"[A-ZÀ-Þ\u4e00-\u9fff][^.!?。！？\n]{20,200}[.!?。！？]")


@dataclass(frozen=True, slots=True)
class Question:
    """A question in several wordings, and its answer."""

    about: str
    """What it asks about, such as "shutil.copytree"; the same thing is asked about once."""
    wordings: tuple[str, ...]
    """Ways to ask."""
    answer: str
    """One paragraph on one line."""


def draw_questions(document: Document) -> Iterator[Question]:
    """The questions that `document` answers."""
    if document.id.endswith(".py"):
        yield from _docstring_questions(document)
    elif headings := list(_HEADING.finditer(document.text)):
        yield from _heading_questions(document, headings)
    else:
        yield from _continuation_questions(document)


def _docstring_questions(document: Document) -> Iterator[Question]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(document.text)
    except (SyntaxError, ValueError, RecursionError):
        return
    module = document.id.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    if any(part.startswith("_") for part in module.split(".")):
        return
    yield from _describe(module, tree, _MODULE_FORMS)
    yield from _docstrings_below(tree, module)


def _docstrings_below(node: ast.AST, prefix: str) -> Iterator[Question]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try):
            yield from _docstrings_below(child, prefix)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield from _describe(f"{prefix}.{child.name}", child, _FUNCTION_FORMS)
        elif isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from _describe(f"{prefix}.{child.name}", child, _CLASS_FORMS)
            yield from _docstrings_below(child, f"{prefix}.{child.name}")


def _describe(
    name: str, node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, forms: tuple[str, ...]
) -> Iterator[Question]:
    docstring = ast.get_docstring(node)
    if docstring and (answer := _first_paragraph(inspect.cleandoc(docstring))):
        yield Question(name, tuple(form.format(name=name) for form in forms), answer)


def _heading_questions(document: Document, headings: list[re.Match[str]]) -> Iterator[Question]:
    ends = [heading.start() for heading in headings[1:]] + [len(document.text)]
    for heading, end in zip(headings, ends, strict=True):
        title = heading["markdown"] or heading["underlined"]
        if answer := _first_paragraph(document.text[heading.end() : end].strip()):
            forms = (f"What does {document.id} say about {title}?", f"Tell me about {title}.", f"{title}?")
            yield Question(f"{document.id}: {title}", forms, answer)


def _continuation_questions(document: Document) -> Iterator[Question]:
    sentences = [match.group().strip() for match in _SENTENCE.finditer(" ".join(document.text.split()))]
    for number, (sentence, following) in enumerate(zip(sentences[::2], sentences[1::2], strict=False)):
        forms = (f'What comes after "{sentence}"?', f"How does this go on: {sentence}")
        yield Question(f"{document.id}: sentence {number}", forms, following)


def _first_paragraph(text: str) -> str | None:
    """The first paragraph on one line, cut after a sentence where it is long; None where it explains nothing."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    if len(paragraph) > _MAX_ANSWER_CHARACTERS:
        end = paragraph.rfind(". ", 0, _MAX_ANSWER_CHARACTERS)
        if end < 0:
            return None
        paragraph = paragraph[: end + 1]
    has_words = sum(character.isalpha() for character in paragraph) > len(paragraph) / 2
    return paragraph if has_words and len(paragraph) >= _MIN_ANSWER_CHARACTERS else None
