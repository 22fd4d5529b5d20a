"""`puna questions`: questions with answers, drawn from documents that explain themselves.

Python sources answer "What does shutil.copytree do?" by their docstrings; texts with headings answer "What does
guide.md say about Installation?" by the paragraph under the heading; other prose answers what comes after a sentence.
"""

import ast
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.config import to_plain
from puna.curate.document import Document
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, read_documents, write_jsonl
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say
from puna.runtime.seeds import derive_seed

_MAX_ANSWER_CHARACTERS = 240
_MIN_ANSWER_CHARACTERS = 15
_FUNCTION_FORMS = ("What does {name} do?", "What is {name} for?", "Explain {name}.")
_CLASS_FORMS = ("What is {name}?", "What is the class {name} for?", "Explain {name}.")
_MODULE_FORMS = ("What is the {name} module?", "What is the module {name} for?", "What does the {name} module do?")
_HEADING = re.compile(r"^#{1,4} +(?P<markdown>[^\n]+?) *#*$|^(?P<underlined>\S[^\n]*)\n(?:={3,}|-{3,}|~{3,})$", re.M)
_SENTENCE = re.compile(r"[A-ZÀ-Þ\u4e00-\u9fff][^.!?。！？\n]{20,200}[.!?。！？]")


@dataclass(frozen=True)
class QuestionsConfig:
    """Draw questions with answers from documents."""

    documents: Path
    """Documents with "text" and "id": Parquet or JSON Lines, a file or a folder of them."""
    output: Path
    """Folder to write to; replaced when it exists."""
    held_out_share: float = 0.05
    """Share of questions that are kept from training."""
    seed: int = 0
    """Of the choice of what is held out."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"held_out_share is {self.held_out_share}; it has to be between 0 and 1.")


def main(config: QuestionsConfig) -> None:
    """Write conversations of one question and its answer.

    What questions_train.jsonl never asks about is in questions_held_out.jsonl, and what it asks about in other words
    only in questions_reworded.jsonl.
    """
    inputs = {str(config.documents): content_hash(config.documents)}
    documents = (Document(row["text"], row["id"]) for row in _checked(config.documents))
    questions = list(_unique(question for document in documents for question in draw_questions(document)))
    # Chosen by the answer, so that a text that answers two questions is not on both sides.
    held_out_answers = _choose([question.answer for question in questions], config)
    unseen = [question for question in questions if question.answer in held_out_answers]
    seen = [question for question in questions if question.answer not in held_out_answers]
    reworded = _choose([question.about for question in seen], config)
    with atomic_path(config.output) as folder:
        folder.mkdir()
        write_jsonl(
            folder / "questions_train.jsonl",
            (row for q in seen for row in _conversations(q)[: -1 if q.about in reworded else None]),
        )
        write_jsonl(folder / "questions_held_out.jsonl", (_conversations(q)[0] for q in unseen))
        write_jsonl(folder / "questions_reworded.jsonl", (_conversations(q)[-1] for q in seen if q.about in reworded))
        results = {
            "num_questions": len(questions),
            "num_held_out_questions": len(unseen),
            "num_reworded_questions": len(reworded),
        }
        Manifest("questions", to_plain(config), inputs, results).write(folder)
    say(f"{len(questions):,} questions, {len(unseen):,} of them held out, in {config.output}")


def _checked(path: Path) -> Iterator[dict[str, Any]]:
    for row in read_documents(path):
        if not (isinstance(row.get("text"), str) and isinstance(row.get("id"), str)):
            raise InputError(f'{path}: every document needs a string "text" and "id"; one has {sorted(row)}.')
        yield row


def _choose(names: list[str], config: QuestionsConfig) -> set[str]:
    """The names to hold out: those with the smallest hash, so that a new one moves no other to the other side."""
    if not names:
        return set()
    by_hash = sorted(set(names), key=lambda name: derive_seed(config.seed, "hold out", name))
    return set(by_hash[: max(1, round(len(by_hash) * config.held_out_share))])


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


def _unique(questions: Iterable[Question]) -> Iterator[Question]:
    seen: set[str] = set()
    for question in questions:
        if question.about not in seen:
            seen.add(question.about)
            yield question


def _conversations(question: Question) -> list[dict[str, Any]]:
    """One conversation for each wording."""
    return [
        {
            "id": f"{question.about}#{number}",
            "messages": [
                {"role": "user", "content": wording},
                {"role": "assistant", "content": question.answer},
            ],
        }
        for number, wording in enumerate(question.wordings)
    ]
