"""From files to documents and questions."""

import json
from pathlib import Path

import pytest

from puna.curate.document import Document, Rejected
from puna.curate.main import CurateConfig, main
from puna.curate.questions import QuestionsConfig, draw_questions
from puna.curate.questions import main as write_questions
from puna.curate.readers import read_folder, read_python_library
from puna.runtime.errors import InputError
from puna.runtime.files import read_documents, read_jsonl
from puna.runtime.manifest import Manifest

SOURCE = '''"""Tools for llamas.

More about them.
"""

def shear(llama):
    """Take the wool off
    one llama."""

def _hidden():
    """Nobody asks about this one."""

class Herd:
    """A group of llamas that know each other."""

    def lead(self):
        """Walk in front of the herd, slowly and with confidence."""

    def short(self):
        """Too short."""
'''


def test_docstrings_answer_questions() -> None:
    questions = {q.about: q for q in draw_questions(Document(SOURCE, "farm/tools.py"))}
    assert {about: q.answer for about, q in questions.items()} == {
        "farm.tools": "Tools for llamas.",
        "farm.tools.shear": "Take the wool off one llama.",
        "farm.tools.Herd": "A group of llamas that know each other.",
        "farm.tools.Herd.lead": "Walk in front of the herd, slowly and with confidence.",
    }
    assert questions["farm.tools.shear"].wordings[0] == "What does farm.tools.shear do?"


def test_headings_and_prose_answer_questions() -> None:
    markdown = "# Care\n\nLlamas need hay and water.\n\nMore.\n\n## Shearing\nOnce a year, in spring, in the shade.\n"
    assert [q.answer for q in draw_questions(Document(markdown, "care.md"))] == [
        "Llamas need hay and water.",
        "Once a year, in spring, in the shade.",
    ]
    prose = "The llama looked at the mountain for a while. Then it went up the path without a word."
    (question,) = draw_questions(Document(prose, "story.txt"))
    assert "looked at the mountain" in question.wordings[0]
    assert question.answer == "Then it went up the path without a word."


def test_broken_sources_ask_nothing() -> None:
    assert list(draw_questions(Document("def broken(:", "a.py"))) == []


def test_reader_says_why_a_file_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x").write_text("secret")
    (tmp_path / "sub" / "good.txt").write_bytes("\ufeffone\r\ntwo".encode())
    (tmp_path / "binary").write_bytes(b"a\0b")
    (tmp_path / "latin").write_bytes("Ärger".encode("latin-1"))
    (tmp_path / "blank").write_text(" \n")
    (tmp_path / "long").write_text("x" * 101)
    read = list(read_folder(tmp_path, max_bytes=100))
    assert [item for item in read if isinstance(item, Document)] == [Document("one\ntwo", "sub/good.txt")]
    assert {item.id: item.reason for item in read if isinstance(item, Rejected)} == {
        "binary": "binary",
        "latin": "not UTF-8",
        "blank": "empty",
        "long": "larger than max_file_bytes",
    }


def test_the_library_is_read_without_its_tests() -> None:
    ids = {item.id for item in read_python_library(1_000_000) if isinstance(item, Document)}
    assert "antigravity.py" in ids
    assert "topics/lambda.rst" in ids
    assert not any({"test", "tests", "site-packages"} & set(name.split("/")) for name in ids)


def test_a_folder_becomes_documents_and_questions(tmp_path: Path) -> None:
    """The two commands of the quickstart, with nothing set."""
    source, out, questions = tmp_path / "raw", tmp_path / "out", tmp_path / "questions"
    source.mkdir()
    for n in range(20):
        (source / f"m{n}.py").write_text(SOURCE.replace("one llama.", f"llama number {n}."))
    (source / "zz_copy.py").write_text((source / "m3.py").read_text())
    (source / "image.png").write_bytes(b"\x89PNG\0")
    main(CurateConfig(source=str(source), output=out, held_out_share=0.1, workers=1))
    train, held = ([row["id"] for row in read_documents(out / name)] for name in ("documents", "held_out"))
    assert len(train) + len(held) == 20
    assert train
    assert held
    assert {row["source"] for row in read_documents(out / "documents")} == {"raw"}
    results = Manifest.read(out).results
    assert results["rejected"] == {"binary": 1, "same text as an earlier document": 1}
    assert (results["num_documents"], results["num_held_out_documents"]) == (20, len(held))
    assert list(Manifest.read(out).inputs) == [str(source)]

    write_questions(QuestionsConfig(documents=out / "documents", output=questions, held_out_share=0.1))

    def answers(name: str) -> set[str]:
        return {row["messages"][1]["content"] for row in read_jsonl(questions / name)}

    assert not answers("questions_train.jsonl") & answers("questions_held_out.jsonl")
    assert answers("questions_reworded.jsonl") <= answers("questions_train.jsonl")

    def asked(name: str) -> set[str]:
        return {row["messages"][0]["content"] for row in read_jsonl(questions / name)}

    assert asked("questions_reworded.jsonl")
    assert not asked("questions_reworded.jsonl") & asked("questions_train.jsonl")
    assert Manifest.read(questions).results["num_questions"] == 4 * len(train)
    first = json.loads((questions / "questions_train.jsonl").read_text().splitlines()[0])
    assert [message["role"] for message in first["messages"]] == ["user", "assistant"]

    again = tmp_path / "again"
    write_questions(QuestionsConfig(documents=out / "documents", output=again, held_out_share=0.1))
    for file in questions.glob("*.jsonl"):
        assert (again / file.name).read_bytes() == file.read_bytes()


def test_questions_need_texts(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "one"}')
    with pytest.raises(InputError, match="needs a string"):
        write_questions(QuestionsConfig(documents=tmp_path / "d.jsonl", output=tmp_path / "out"))
    (tmp_path / "d.jsonl").write_text("")
    write_questions(QuestionsConfig(documents=tmp_path / "d.jsonl", output=tmp_path / "out"))
    assert Manifest.read(tmp_path / "out").results["num_questions"] == 0


def test_an_unusable_folder_is_explained_and_nothing_is_lost(tmp_path: Path) -> None:
    source, out = tmp_path / "raw", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(InputError, match=r"0 usable document.*there is no document"):
        main(CurateConfig(source=str(source), output=out))
    (source / "a").write_bytes(b"\0")
    with pytest.raises(InputError, match="1 binary"):
        main(CurateConfig(source=str(source), output=out))
    assert [p.name for p in out.iterdir()] == ["old"]
