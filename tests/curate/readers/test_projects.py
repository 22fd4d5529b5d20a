"""Folders, repositories, papers and books."""

import gzip
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest

from puna.curate.document import Document, Rejected
from puna.curate.readers import files
from puna.curate.readers.arxiv import ArxivReader, flatten
from puna.curate.readers.books import EpubReader
from puna.curate.readers.bounds import Unreadable
from puna.curate.readers.files import runs, walk
from puna.curate.readers.folder import FolderReader, PythonReader
from puna.curate.readers.git import GitReader
from puna.curate.readers.hub import HubReader
from puna.curate.sources.licence_texts import MIT
from puna.runtime.errors import InputError


def tar(members: dict[str, bytes], compress: bool = False) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return gzip.compress(packed.getvalue()) if compress else packed.getvalue()


def read(reader) -> list[Document | Rejected]:  # type: ignore[no-untyped-def]
    assert pickle.loads(pickle.dumps(reader)) == reader
    return [item for unit in reader.units() for item in reader.read(unit)]


def test_folder_in_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_FILES", 3)
    names = ["a/z.txt", "a/b/1.txt", "a-b.txt", "a.txt", "b/2.txt", "c.txt", "d/e/f/3.txt", "d/e.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    reader = FolderReader(path=tmp_path)
    assert reader.units() == ["a/b/1.txt//a-b.txt", "a.txt//c.txt", "d/e/f/3.txt//d/e.txt"]
    items = read(reader)
    assert [item.id for item in items] == sorted(names, key=lambda name: name.split("/"))
    assert [path for unit in reader.units() for path in reader.files(unit)] == [tmp_path / item.id for item in items]
    (tmp_path / "a" / "y.txt").write_text("new")
    assert [item.id for item in reader.read("d/e/f/3.txt//d/e.txt")] == ["d/e/f/3.txt", "d/e.txt"]


def test_folder_with_other_encodings_and_compressed_files(tmp_path: Path) -> None:
    german = "Schöne Grüße aus den Bergen über den Wäldern. " * 3
    (tmp_path / "a.txt").write_bytes(german.encode("cp1252"))
    (tmp_path / "b.txt").write_bytes(german.encode("utf-16"))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(german.encode()))
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(bytes(5000)))
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(german.encode())[:-9])
    (tmp_path / "f.png").write_bytes(b"\x89PNG\0\0\0")
    assert read(FolderReader(path=tmp_path, encoding="detect", max_file_bytes=1000)) == [
        Document(german, "a.txt"),
        Document(german, "b.txt"),
        Document(german, "c.txt.gz"),
        Rejected("d.txt.gz", "larger than max_file_bytes"),
        Rejected("e.txt.gz", "damaged or cut-off compression"),
        Rejected("f.png", "binary"),
    ]
    with pytest.raises(InputError, match="is not a folder"):
        FolderReader(path=tmp_path / "absent").units()


def test_walk_is_a_slice_of_the_whole_walk(tmp_path: Path) -> None:
    for name in ("a/b/c", "a/b.x", "a.b", "ab", "b/a", "b/c/d/e", "b/z", "z"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    everything = [name for name, _ in walk(tmp_path)]
    assert len(everything) == 8
    for first in range(8):
        for last in range(first, 8):
            part = [name for name, _ in walk(tmp_path, everything[first], everything[last])]
            assert part == everything[first : last + 1]
    assert runs(iter([])) == []


def test_python_library() -> None:
    reader = PythonReader()
    names = {path.name for path in reader.files(reader.units()[0])}
    assert "antigravity.py" in names


def test_checkouts(tmp_path: Path) -> None:
    project = tmp_path / "shear"
    (project / ".git").mkdir(parents=True)
    (project / ".git" / "config").write_text("hidden")
    (project / "src").mkdir()
    (project / "LICENSE").write_text(MIT)
    (project / "src" / "a.py").write_text("print('wool')")
    (project / "image.png").write_bytes(b"\0")
    (tmp_path / "no repository").mkdir()
    mit = {"repository": "shear", "licence": "MIT"}
    wanted = [
        Document(MIT, "shear/LICENSE", {**mit, "path": "LICENSE"}),
        Rejected("shear/image.png", "binary"),
        Document("print('wool')", "shear/src/a.py", {**mit, "path": "src/a.py"}),
    ]
    assert read(GitReader(path=tmp_path)) == wanted
    assert read(GitReader(path=project)) == wanted
    assert read(GitReader(path=project, extensions=(".py",))) == wanted[2:]
    assert project / "LICENSE" in GitReader(path=project).files(GitReader(path=project).units()[0])
    with pytest.raises(InputError, match="neither a git checkout"):
        GitReader(path=tmp_path / "no repository").units()


def test_repositories_in_archives(tmp_path: Path) -> None:
    members = {
        "shear-1.0/a.py": b"x = 1",
        "shear-1.0/.github/hidden.yml": b"x",
        "shear-1.0/LICENSE": MIT.encode(),
        "shear-1.0/b.bin": b"\0",
        "shear-1.0/latin.txt": b"\xff",
        "shear-1.0/long.py": b"x" * 2000,
    }
    (tmp_path / "shear.tar.gz").write_bytes(tar(members, compress=True))
    items = read(GitReader(path=tmp_path, max_file_bytes=1900))
    assert [(item.id, item.reason if isinstance(item, Rejected) else item.metadata["licence"]) for item in items] == [
        ("shear/shear-1.0/a.py", "MIT"),
        ("shear/shear-1.0/LICENSE", "MIT"),
        ("shear/shear-1.0/b.bin", "binary"),
        ("shear/shear-1.0/latin.txt", "not UTF-8"),
        ("shear/shear-1.0/long.py", "larger than max_file_bytes"),
    ]
    (tmp_path / "shear.tar.gz").write_bytes(tar(members, compress=True)[:-40])
    assert read(GitReader(path=tmp_path))[-1] == Rejected("shear.tar.gz", "damaged or cut-off compression")


MAIN = r"\documentclass{article}\begin{document}\section{A}\input{sections/one}\include{two}\end{document}"


def test_papers_of_every_shape(tmp_path: Path) -> None:
    paper = {
        "main.tex": MAIN.encode(),
        "sections/one.tex": b"first % \\input{comment}\n\\input sections/deep \n",
        "sections/deep.tex": "schön".encode("latin-1"),
        "two.tex": b"second \\verb|\\%| \\input{amsmath}",
        "comment.tex": b"not to be seen",
        "figure.png": b"\0",
    }
    collection = {
        "2001/2001.00001.gz": tar(paper, compress=True),
        "2001/2001.00002.gz": gzip.compress(MAIN.encode()),
        "2001/2001.00003.pdf": b"%PDF",
        "2001/2001.00004.gz": gzip.compress(b"only words"),
        "2001/2001.00005.gz": tar(paper, compress=True)[:-50],
    }
    (tmp_path / "arXiv_src_2001_001.tar").write_bytes(tar(collection))
    items = read(ArxivReader(path=tmp_path))
    assert [(item.id, item.reason if isinstance(item, Rejected) else "kept") for item in items] == [
        ("2001.00001", "kept"),
        ("2001.00002", "kept"),
        ("2001.00003", "no LaTeX source"),
        ("2001.00004", "no LaTeX source"),
        ("2001.00005", "damaged or cut-off compression"),
    ]
    assert isinstance(items[0], Document)
    assert items[0].text == (
        r"\documentclass{article}\begin{document}\section{A}"
        "first % \\input{comment}\nschön \n"
        r"second \verb|\%| \input{amsmath}\end{document}"
    )
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "paper.tar.gz").write_bytes(tar(paper, compress=True))
    (alone / "single.tex").write_text(MAIN)
    assert [item.id for item in read(ArxivReader(path=alone))] == ["paper.tar.gz", "single.tex"]


def test_the_main_file() -> None:
    body = r"\begin{document}long text\end{document}"
    assert flatten({"a.tex": r"\input{b}", "b.tex": rf"\documentclass{{x}}{body}"}, 1000).startswith(r"\documentclass")
    assert flatten({"reply.tex": body, "main.tex": body + "and more"}, 1000).endswith("more")
    verbatim = {"m.tex": rf"{body}\begin{{verbatim}}\input{{m2}}\end{{verbatim}}", "m2.tex": "no"}
    assert r"\input{m2}" in flatten(verbatim, 1000)
    assert flatten({"d/m.tex": rf"{body}\import{{parts/}}{{p}}", "parts/p.tex": "P"}, 1000).endswith("P")
    with pytest.raises(Unreadable, match="larger than"):
        flatten({"m.tex": body + "x" * 1000}, 1000)


def test_real_book_in_several_files(real_data: Path) -> None:
    (book,) = read(ArxivReader(path=real_data / "corpora" / "latex" / "hott_book.tar.gz"))
    assert isinstance(book, Document)
    assert r"\input{introduction}" not in book.text
    assert book.text.count(r"\chapter") >= 4
    assert r"\newcommand{\jdeq}" in book.text


def epub(path: Path, parts: dict[str, str], spine: list[str]) -> None:
    manifest = "".join(f'<item id="{name}" href="text/{name}.xhtml"/>' for name in parts)
    order = "".join(f'<itemref idref="{name}"/>' for name in spine)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("META-INF/container.xml", '<container><rootfile full-path="OEBPS/b.opf"/></container>')
        archive.writestr(
            "OEBPS/b.opf",
            '<package xmlns:dc="x"><metadata><dc:title>Wool</dc:title><dc:language>en</dc:language></metadata>'
            f"<manifest>{manifest}</manifest><spine>{order}</spine></package>",
        )
        for name, content in parts.items():
            archive.writestr(f"OEBPS/text/{name}.xhtml", content)


def test_books(tmp_path: Path) -> None:
    parts = {"two": "<body><p>Second &amp; last.</p></body>", "one": "<body><h1>Wool</h1><p>First.</p></body>"}
    epub(tmp_path / "a.epub", parts, ["one", "absent", "two"])
    assert read(EpubReader(path=tmp_path)) == [
        Document("Wool\n\nFirst.\n\nSecond & last.", "a.epub", {"title": "Wool", "language": "en"})
    ]
    whole = (tmp_path / "a.epub").read_bytes()
    (tmp_path / "a.epub").write_bytes(whole[:-30])
    assert read(EpubReader(path=tmp_path)) == [Rejected("a.epub", "damaged archive")]
    with zipfile.ZipFile(tmp_path / "a.epub", "w") as archive:
        archive.writestr("META-INF/container.xml", "<container>")
    assert read(EpubReader(path=tmp_path)) == [Rejected("a.epub", "malformed XML")]


def test_the_hub_without_a_network_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(InputError, match=r"nobody/nothing \(revision main\) cannot be read.*copy the files here"):
        HubReader(repository="nobody/nothing").units()


def test_files_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "one"}\n{"text": "two", "id": "named"}\n')

    class Api:
        def list_repo_files(self, repository: str, revision: str, repo_type: str) -> list[str]:
            assert (repository, revision, repo_type) == ("who/what", "v1", "dataset")
            return ["README.md", "data/a.jsonl", "data/b.parquet"]

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, name, **_: str(tmp_path / name))
    reader = HubReader(repository="who/what", revision="v1", pattern="data/*.jsonl")
    assert reader.units() == ["data/a.jsonl"]
    assert list(reader.read("data/a.jsonl")) == [Document("one", "data/a.jsonl:0"), Document("two", "named")]
    with pytest.raises(InputError, match="no file that fits"):
        HubReader(repository="who/what", revision="v1", pattern="*.csv").units()
