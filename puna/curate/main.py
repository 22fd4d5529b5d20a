"""`puna curate`: a folder of raw files to documents, questions, and a held-out part of both."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.config import to_plain
from puna.curate.document import Document, Rejected
from puna.curate.questions import Question, draw_questions
from puna.curate.readers import read_folder, read_python_library
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, write_jsonl
from puna.runtime.manifest import Manifest
from puna.runtime.progress import progress, say
from puna.runtime.seeds import derive_seed


@dataclass(frozen=True)
class CurateConfig:
    """Read raw files into clean documents."""

    source: str
    """A folder of text files, or `python` for the sources and documentation of this machine's standard library."""
    output: Path
    """Folder to write to; replaced when it exists."""
    held_out_share: float = 0.05
    """Share of documents, and of questions, that are kept from training."""
    max_file_bytes: int = 2_000_000
    """Larger files are left out."""
    seed: int = 0
    """Of the choice of what is held out."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"held_out_share is {self.held_out_share}; it has to be between 0 and 1.")


def main(config: CurateConfig) -> None:
    """Write documents, questions, and what was rejected.

    train.jsonl and held_out.jsonl hold documents. questions_train.jsonl holds conversations; what they never ask about
    is in questions_held_out.jsonl, and what they ask about in other words only in questions_reworded.jsonl.
    """
    read = (
        read_python_library(config.max_file_bytes)
        if config.source == "python"
        else read_folder(Path(config.source).expanduser(), config.max_file_bytes)
    )
    documents: list[Document] = []
    rejected: list[Rejected] = []
    seen_texts: set[str] = set()
    with progress("Reading files", total=None) as advance:
        for item in read:
            if isinstance(item, Document) and item.text in seen_texts:
                item = Rejected(item.id, "same text as another file")
            if isinstance(item, Document):
                seen_texts.add(item.text)
                documents.append(item)
            else:
                rejected.append(item)
            advance()
    reasons = Counter(item.reason for item in rejected)
    if len(documents) < 2:
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "there is no file"
        raise InputError(
            f"{config.source} holds {len(documents)} usable text file(s) ({why}); at least two are needed, one to "
            "train on and one to measure on."
        )
    held_out = _choose([document.id for document in documents], config)
    questions = list(_unique(question for document in documents for question in draw_questions(document)))
    # Chosen by the answer, so that a text that answers two questions is not on both sides.
    held_out_answers = _choose([question.answer for question in questions], config)
    unseen = [question for question in questions if question.answer in held_out_answers]
    seen = [question for question in questions if question.answer not in held_out_answers]
    reworded = _choose([question.about for question in seen], config)

    with atomic_path(config.output) as folder:
        folder.mkdir()
        write_jsonl(folder / "train.jsonl", (_row(d) for d in documents if d.id not in held_out))
        write_jsonl(folder / "held_out.jsonl", (_row(d) for d in documents if d.id in held_out))
        write_jsonl(
            folder / "questions_train.jsonl",
            (row for q in seen for row in _conversations(q)[: -1 if q.about in reworded else None]),
        )
        write_jsonl(folder / "questions_held_out.jsonl", (_conversations(q)[0] for q in unseen))
        write_jsonl(folder / "questions_reworded.jsonl", (_conversations(q)[-1] for q in seen if q.about in reworded))
        write_jsonl(folder / "rejected.jsonl", ({"id": item.id, "reason": item.reason} for item in rejected))
        results: dict[str, Any] = {
            "num_documents": len(documents),
            "num_held_out_documents": len(held_out),
            "num_bytes": sum(len(document.text.encode()) for document in documents),
            "num_questions": len(questions),
            "num_held_out_questions": len(unseen),
            "num_reworded_questions": len(reworded),
            "rejected": dict(reasons),
        }
        Manifest("curate", to_plain(config), {}, results).write(folder)
    say(
        f"{results['num_documents']:,} documents, {results['num_bytes'] / 1e6:.1f} MB, {len(questions):,} questions; "
        f"{len(rejected):,} files left out ({', '.join(f'{n} {r}' for r, n in reasons.items()) or 'none'})"
    )


def _choose(names: list[str], config: CurateConfig) -> set[str]:
    """The names to hold out: those with the smallest hash, so that a new file moves no other to the other side."""
    if not names:
        return set()
    by_hash = sorted(set(names), key=lambda name: derive_seed(config.seed, "hold out", name))
    return set(by_hash[: max(1, round(len(by_hash) * config.held_out_share))])


def _unique(questions: Iterable[Question]) -> Iterator[Question]:
    seen: set[str] = set()
    for question in questions:
        if question.about not in seen:
            seen.add(question.about)
            yield question


def _row(document: Document) -> dict[str, Any]:
    return {"id": document.id, "text": document.text, **document.metadata}


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
