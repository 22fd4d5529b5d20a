"""The two stages that learn what filters compare with."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from puna.curate.filters.classifier import Classifier
from puna.curate.filters.linear import Features
from puna.curate.filters.ngram_model import load_ngram_model
from puna.curate.filters.perplexity import Perplexity
from puna.curate.filters.token_divergence import TokenDivergence
from puna.curate.filters.train_classifier import ClassifierConfig, Examples
from puna.curate.filters.train_classifier import main as train_classifier
from puna.curate.filters.train_reference import ReferenceConfig
from puna.curate.filters.train_reference import main as train_reference
from puna.runtime.errors import InputError
from puna.runtime.files import write_jsonl
from puna.runtime.manifest import Manifest

Table = Callable[..., pa.Table]

GOOD = [
    f"The {noun} of the {place} was described in {year} by a historian."
    for noun in ("fall", "rise", "art")
    for place in ("empire", "city", "church")
    for year in range(1900, 1910)
]
BAD = [
    f"Buy cheap {thing} now, click {number} times for free deals!!"
    for thing in ("pills", "watches", "loans")
    for number in range(30)
]


@pytest.fixture
def documents(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    for path, texts in zip(paths, (GOOD, BAD), strict=True):
        write_jsonl(
            path,
            ({"id": f"{path.stem} {number}", "text": text, "kind": path.stem} for number, text in enumerate(texts)),
        )
    return paths


def test_a_classifier_from_labelled_documents(documents: tuple[Path, Path], tmp_path: Path, table: Table) -> None:
    good, bad = documents
    examples = Examples(documents=good, label="good"), Examples(documents=bad, label_column="kind", max_documents=60)
    config = ClassifierConfig(examples=examples, output=tmp_path / "model", features=Features(num_rows=1 << 12))
    train_classifier(config)
    results = Manifest.read(tmp_path / "model").results
    assert results["labels"] == {"bad": 60, "good": 90}
    assert results["accuracy"] == 1
    assert 0.3 < results["accuracy_of_the_commonest_label"] < 0.9
    step = Classifier(model=tmp_path / "model", label="good", min_score=0.5)
    outcome = step(table(["The history of the city.", "Click for free pills now!!"]))
    assert outcome.rejected["reason"].to_pylist() == ["good score under 0.5"]
    first = (tmp_path / "model" / "classifier.safetensors").read_bytes()
    train_classifier(config)
    assert (tmp_path / "model" / "classifier.safetensors").read_bytes() == first


def test_wrong_examples(documents: tuple[Path, Path], tmp_path: Path) -> None:
    good, _ = documents
    with pytest.raises(ValueError, match="either label"):
        Examples(documents=good)
    with pytest.raises(InputError, match="has no 'quality'"):
        train_classifier(
            ClassifierConfig(examples=(Examples(documents=good, label_column="quality"),), output=tmp_path / "m")
        )
    with pytest.raises(InputError, match="at least two different labels"):
        train_classifier(ClassifierConfig(examples=(Examples(documents=good, label="x"),), output=tmp_path / "m"))
    assert not (tmp_path / "m").exists()


def test_a_reference_from_good_documents(documents: tuple[Path, Path], tmp_path: Path, table: Table) -> None:
    config = ReferenceConfig(documents=documents[0], output=tmp_path / "model", vocab_size=320, held_out_share=0.1)
    train_reference(config)
    results = Manifest.read(tmp_path / "model").results
    assert results["num_documents"] + results["num_held_out_documents"] == len(GOOD)
    assert results["median_perplexity_of_held_out_documents"] < 10
    texts = table([GOOD[0], BAD[0]])
    low, high = Perplexity(model=tmp_path / "model")(texts).kept["perplexity"].to_pylist()
    assert 3 * low < high
    step = TokenDivergence(reference=tmp_path / "model", min_words=5, max_divergence=50)
    low, high = step(texts).kept["token_divergence"].to_pylist()
    assert low < high
    again = ReferenceConfig(documents=documents[0], output=tmp_path / "other", tokenizer=tmp_path / "model", order=2)
    train_reference(again)
    both = [load_ngram_model(tmp_path / name) for name in ("model", "other")]
    assert [model.order for model in both] == [5, 2]
    assert both[0].tokenizer.hash == both[1].tokenizer.hash


def test_a_reference_needs_text(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "none.jsonl", [{"id": "1"}])
    with pytest.raises(InputError, match='needs a string "text"'):
        train_reference(ReferenceConfig(documents=tmp_path / "none.jsonl", output=tmp_path / "m"))
    with pytest.raises(ValueError, match="order must be"):
        ReferenceConfig(documents=tmp_path, output=tmp_path, order=0)
