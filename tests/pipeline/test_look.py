"""`puna inspect data`: figures that are right, text that is escaped, and the way back from a token."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from puna.batches.shards import TokenShards
from puna.batches.tokenize import TokenizeConfig
from puna.batches.tokenize import main as tokenize
from puna.curate.main import CurateConfig
from puna.curate.main import main as curate
from puna.pipeline.data import _set_off, find_tokens, gather
from puna.pipeline.look import show_data
from puna.pipeline.token_lineage import show_token, trace
from puna.runtime.errors import InputError
from puna.runtime.files import write_json, write_jsonl
from puna.runtime.manifest import Manifest
from puna.tokenizer.load import load_tokenizer
from puna.tokenizer.train import TokenizerConfig
from puna.tokenizer.train import main as train_tokenizer

EVIL = "<script>alert('llama')</script> & <b>über</b> 高原 $x$"


def line(step: str, before: int, after: int, **more: Any) -> dict[str, Any]:
    values = {"documents_in": before, "documents_out": after, "bytes_in": 100 * before, "bytes_out": 100 * after}
    return {"step": step, **values, "reasons": {}, "counts": {}, "seconds": 0.1, **more}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """What `puna curate` leaves, made by hand: 20 documents of two sources, rejects, a cluster of three."""
    folder = tmp_path / "corpus"
    rows = [
        {
            "id": f"d{n}",
            "source": "web" if n % 4 else "<books>",
            "text": EVIL if n == 1 else "é" * 2 ** (n % 8),
            "language": ("en", "de", None)[n % 3],
            "language_score": n / 20,
            "near_duplicates_cluster": 7 if n in (5, 6) else None,
        }
        for n in range(20)
    ]
    (folder / "documents").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows[:9]), folder / "documents" / "part-00000.parquet")
    # A column that another part lacks is null there.
    more = pa.Table.from_pylist(rows[9:18]).drop_columns("near_duplicates_cluster")
    pq.write_table(more, folder / "documents" / "part-00001.parquet")
    (folder / "held_out").mkdir()
    pq.write_table(pa.Table.from_pylist(rows[18:]), folder / "held_out" / "part-00000.parquet")
    (folder / "rejected").mkdir()
    rejects = [
        {"id": f"r{n}", "source": "web", "step": "c4", "reason": "no <sentence>", "text": EVIL} for n in range(5)
    ]
    rejects.append({"id": "b", "source": "web", "step": "read", "reason": "binary", "text": None})
    twin = {"id": "twin", "source": "web", "step": "near_duplicates", "reason": "near-duplicate of an earlier document"}
    rejects.append(twin | {"text": "é " + EVIL, "near_duplicates_cluster": 7})
    columns = ["id", "source", "step", "reason", "text", "near_duplicates_cluster"]
    table = pa.table({column: [row.get(column) for row in rejects] for column in columns})
    pq.write_table(table, folder / "rejected" / "part-00000.parquet")
    total = [line("read", 27, 26), line("c4", 26, 21, reasons={"no <sentence>": 5}), line("near_duplicates", 21, 20)]
    write_json(folder / "ledger.json", {"sources": [{"name": "web", "steps": total}], "total": total})
    Manifest("curate", {}, {}).write(folder)
    return folder


def test_the_figures_are_right(corpus: Path) -> None:
    facts = gather(corpus)
    books, web = sorted(facts.sources, key=lambda source: source.name)
    assert (books.name, books.documents, books.held_out, books.tokens) == ("<books>", 5, 0, None)
    assert (web.documents, web.held_out) == (13, 2)
    assert books.num_bytes == sum(2 * 2 ** (n % 8) for n in range(0, 18, 4))
    assert {name: documents for name, documents, _ in facts.languages} == {"en": 6, "de": 6, "unknown": 6}
    assert facts.lengths is not None
    assert sum(facts.lengths.counts) == 18
    # Documents of 2, 4, ..., 256 bytes, two of each and one more of the first two; one became EVIL.
    assert facts.lengths.counts[facts.lengths.edges.index(256)] == 2
    [scores] = facts.scores
    assert (scores.name, scores.edges[0], sum(scores.counts)) == ("language_score", 0.0, 18)
    assert scores.edges[-1] == pytest.approx(17 / 20)
    assert [row["step"] for row in facts.funnel] == ["read", "c4", "near_duplicates"]


def test_rejects_and_clusters_come_with_examples(corpus: Path) -> None:
    facts = gather(corpus)
    assert [(row.step, row.reason, row.count) for row in facts.rejects] == [
        ("c4", "no <sentence>", 5),
        ("near_duplicates", "near-duplicate of an earlier document", 1),
        ("read", "binary", 1),
    ]
    assert len(facts.rejects[0].examples) == 3
    assert facts.rejects[0].examples[0].pieces == [(EVIL, False)]
    assert facts.cluster_counts == [("near_duplicates", 1, 3)]
    [cluster] = facts.clusters
    assert cluster.size == 3
    assert [(member.id, member.kept) for member in cluster.members] == [("d5", True), ("d6", True), ("twin", False)]
    assert "".join(piece for piece, _ in cluster.members[2].pieces) == "é " + EVIL


def test_what_is_new_in_a_member_is_set_off() -> None:
    for first, other in (("a b  c d", "a x  c\nd e"), ("", "a b"), ("a b", ""), (" a", "a \n\n b ")):
        pieces = _set_off(first, other)
        assert "".join(text for text, _ in pieces).strip() == other.strip()
        new = " ".join(text for text, is_new in pieces if is_new).split()
        assert new == [word for word in other.split() if word not in first.split()]
    assert _set_off("same", "same") == []


def test_the_page_escapes_what_it_shows(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_data(corpus, None, None)
    page = corpus.with_name("corpus.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert" in page
    assert "no &lt;sentence&gt;" in page
    assert "<mark>" in page
    assert page.count("<svg") == 5  # sources, languages, lengths, one score, steps
    assert sorted(path.name for path in corpus.iterdir()) == [
        "documents",
        "held_out",
        "ledger.json",
        "puna.json",
        "rejected",
    ]
    shown = capsys.readouterr().out
    assert "<books>" in shown
    assert "near_duplicates: 1 clusters of 3 documents" in shown


def test_any_documents_will_do(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "d.jsonl", [{"id": str(n), "text": "x" * n} for n in range(10)])
    facts = gather(tmp_path / "d.jsonl")
    assert [(source.name, source.documents, source.num_bytes) for source in facts.sources] == [("", 10, 45)]
    show_data(tmp_path / "d.jsonl", tmp_path / "page.html", None)
    assert (tmp_path / "page.html").exists()


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        gather(tmp_path / "absent")
    write_jsonl(tmp_path / "d.jsonl", [{"id": "1"}])
    with pytest.raises(InputError, match="no documents with a text"):
        gather(tmp_path)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="cannot be read"):
        gather(tmp_path / "p")


def make_run(folder: Path) -> Path:
    """Curated, tokenised, by the real stages."""
    raw = folder / "raw"
    raw.mkdir()
    for n in range(12):
        (raw / f"f{n}.txt").write_text("\n".join(f"llama {n} walks line {k} of the high puna" for k in range(30)))
    (raw / "twin.txt").write_text((raw / "f3.txt").read_text())
    out = folder / "out"
    curate(CurateConfig(output=out / "corpus", source=str(raw), held_out_share=0.1, workers=1))
    documents = out / "corpus" / "documents"
    train_tokenizer(TokenizerConfig(documents=documents, output=out / "tokenizer", vocab_size=290))
    tokenize(TokenizeConfig(documents, out / "tokenizer", out / "tokens", workers=1))
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


def test_from_a_token_back_to_its_line_and_its_steps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards, tokenizer = TokenShards(run / "tokens"), load_tokenizer(run / "tokenizer")
    document = 5
    ids = shards.ids(document).tolist()
    place = next(p for p in range(1, len(ids)) if tokenizer.decode(ids[1:p]).endswith("line 17"))
    origin = trace(run / "tokens", int(shards.offsets[document]) + place)
    assert origin.document_id == shards.document_ids()[document]
    assert (origin.document, origin.place, origin.token_id) == (document, place, ids[place])
    assert origin.before.endswith("line 17")
    assert (origin.text + origin.after).startswith(" of the high puna")
    assert origin.line == 18
    assert origin.file is not None
    assert origin.reader == {"source": str(run.parent / "raw")}
    assert [step["step"] for step in origin.steps] == ["read", "exact_duplicates"]
    assert origin.steps[1]["settings"]["kind"] == "exact_duplicates"
    assert origin.steps[1]["documents_out"] == 12

    show_token(run / "tokens", int(shards.offsets[document]) + place)
    shown = capsys.readouterr().out
    assert origin.document_id in shown
    assert "exact_duplicates" in shown
    assert "line 18" in shown


def test_lineage_that_is_gone_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    with pytest.raises(InputError, match="has no token"):
        trace(run / "tokens", 10**9)
    file = next((run / "corpus" / "documents").glob("*.parquet"))
    table = pq.read_table(file)
    changed = pa.array([text.upper() for text in table["text"].to_pylist()])
    pq.write_table(table.set_column(table.column_names.index("text"), "text", changed), file)
    assert trace(run / "tokens", 3).line is None
    file.unlink()
    (run / "corpus" / "documents").rmdir()
    show_token(run / "tokens", 3)
    assert "any more" in capsys.readouterr().out


def test_tokens_are_found_beside_the_documents(run: Path) -> None:
    assert find_tokens(run / "corpus") == [run / "tokens"]
    [source] = gather(run / "corpus").sources
    assert source.tokens == TokenShards(run / "tokens").num_tokens
    assert gather(run / "corpus", run / "tokens").sources == [source]
    assert json.loads((run / "corpus" / "ledger.json").read_text())["sources"][0]["name"] == source.name
