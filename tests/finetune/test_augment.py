"""Other words, the same labels."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puna.config import load_config
from puna.finetune.augment.back_translation import BackTranslation
from puna.finetune.augment.main import AugmentConfig
from puna.finetune.augment.main import main as augment
from puna.finetune.augment.synonyms import Synonyms, in_case_of, read_synonyms, similar_words
from puna.finetune.tasks.tags import Sentence
from puna.infer.sampling import SamplingParams
from puna.runtime.errors import InputError
from puna.runtime.files import read_jsonl, write_jsonl
from puna.runtime.manifest import Manifest
from puna.tokenizer.load import load_tokenizer
from puna.weights.load import load_model, save_model


@pytest.fixture
def synonyms(tmp_path: Path) -> Path:
    path = tmp_path / "synonyms.txt"
    path.write_text("big, large, huge\ngood,fine\nPeru\tthe Andes\n\n", encoding="utf-8")
    return path


def run(data: Path, output: Path, *more: str) -> list[dict[str, object]]:
    """Run the stage as the command line does; returns the examples written."""
    augment(load_config(AugmentConfig, None, [f"data={data}", f"output={output}", *more]))
    return list(read_jsonl(output / "examples.jsonl"))


def test_a_file_of_synonyms(synonyms: Path) -> None:
    table = read_synonyms(synonyms)
    assert table["large"] == ["big", "huge"]
    assert table["peru"] == ["the andes"]
    synonyms.write_text("big, large\nlonely\n")
    with pytest.raises(InputError, match=r"synonyms.txt, line 2 has only 'lonely'"):
        read_synonyms(synonyms)
    synonyms.write_text("\n")
    with pytest.raises(InputError, match="holds no synonym"):
        read_synonyms(synonyms)


def test_texts_keep_their_labels_and_what_is_between_words(synonyms: Path, tmp_path: Path) -> None:
    rows = [
        {"text": "A BIG, good llama -- in Peru!", "label": "x", "id": 7},
        {"text": "Big isn't good.", "label": "y", "id": 8},
        {"text": "Nothing here", "label": "y", "id": 9},
    ]
    write_jsonl(tmp_path / "data.jsonl", rows)
    options = ["method.kind=synonyms", f"method.file={synonyms}", "method.share=1", "method.by_importance=false"]
    found = run(tmp_path / "data.jsonl", tmp_path / "out", *options, 'method.protected=["Good"]', "copies=5")
    originals = [row for row in found if "augmented_by" not in row]
    assert originals == rows
    new = [row for row in found if "augmented_by" in row]
    assert {row["text"] for row in new} == {
        "A LARGE, good llama -- in The andes!", "A HUGE, good llama -- in The andes!", "Large isn't good.",
        "Huge isn't good.",
    }  # fmt: skip
    assert len(new) == 4
    for row in new:
        assert row["augmented_by"] == "synonyms"
        line = 1 if row["label"] == "x" else 2
        assert row["augmented_from"] == f"{tmp_path / 'data.jsonl'}, line {line}"
        assert row["id"] == rows[line - 1]["id"]
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.results == {"num_examples": 3, "num_augmented": 4}
    assert str(synonyms) in manifest.inputs
    again = run(tmp_path / "data.jsonl", tmp_path / "again", *options, 'method.protected=["Good"]', "copies=5")
    assert again == found


words = st.lists(st.sampled_from(["big", "good", "llama", "Lima", "the"]), min_size=1, max_size=8)


@given(sentences=st.lists(words, min_size=1, max_size=4), entities=st.booleans(), seed=st.integers(0, 9))
def test_tags_stay_with_their_words(
    tmp_path_factory: pytest.TempPathFactory, sentences: list[list[str]], entities: bool, seed: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "known.txt"
    path.write_text("big, large\ngood, fine, not bad\nthe, a\nllama, alpaca\nLima, Cusco\n")
    tagged = [
        Sentence(each, ["B-LOC" if w == "Lima" else "O" for w in each], ["here"] * len(each)) for each in sentences
    ]
    method = Synonyms(file=path, share=0.5, entities=entities)
    for sentence, variants in zip(tagged, method.sentences(tagged, 3, seed), strict=True):
        for variant in variants:
            assert len(variant) == len(sentence.words)
            assert variant != sentence.words
            for new, old, tag in zip(variant, sentence.words, sentence.tags, strict=True):
                assert " " not in new
                assert new == old or tag == "O" or (entities and new == "Cusco")


def test_conll_is_read_and_written_with_tags(synonyms: Path, tmp_path: Path) -> None:
    (tmp_path / "data.conll").write_text("big O\nPeru B-LOC\n\nPeru B-LOC\n")
    options = ["method.kind=synonyms", f"method.file={synonyms}", "method.share=1", "method.by_importance=false"]
    found = run(tmp_path / "data.conll", tmp_path / "out", *options, "form=tagged_words", "keep_originals=false")
    [row] = found
    assert row["tokens"] in (["large", "Peru"], ["huge", "Peru"])
    assert row["tags"] == ["O", "B-LOC"]
    assert row["augmented_from"] == f"{tmp_path / 'data.conll'}, line 1"
    translation = BackTranslation(there=tmp_path, back=tmp_path)
    with pytest.raises(InputError, match="words have no tags"):
        translation.sentences([], 1, 0)


def test_importance_is_that_of_uda_by_hand(synonyms: Path) -> None:
    """TF-IDF 2/4 * 1, 1/4 * 4 and 0 (twice 'b'): C = 1, C - t = 0.5, 0, 0.5, 1; their mean is 0.5."""
    rarity, all_can = {"b": 1.0, "c": 4.0, "a": 0.0}, [True] * 4
    method = Synonyms(file=synonyms, share=0.2)
    chances = method.chances(["b", "c", "b", "a"], all_can, rarity)
    assert chances == pytest.approx([0.2, 0.0, 0.2, 0.4])
    # 0.8 words of four are replaced on average; with two that can be their mean of C - t is 0.75.
    chances = method.chances(["b", "c", "b", "a"], [True, False, False, True], rarity)
    assert chances == pytest.approx([0.4 * 0.5 / 0.75, 0.0, 0.0, 0.4 / 0.75])
    assert sum(chances) == pytest.approx(0.8)
    assert Synonyms(file=synonyms, share=0.9).chances(["b", "c", "b", "a"], all_can, rarity)[3] == 1.0
    alike = Synonyms(file=synonyms, share=0.2, by_importance=False)
    assert alike.chances(["b", "a"], [True, True], rarity) == [0.2, 0.2]
    assert alike.chances(["b", "a"], [True, False], rarity) == [0.4, 0.0]
    assert method.chances(["b", "b"], [True, True], rarity) == [0.2, 0.2]
    assert method.chances(["c"], [False], rarity) == [0.0]


def test_words_alike_for_a_model(base_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(base_model)
    candidates = ["the", "a", "bad", "zebra"]
    single = [word for word in candidates if len(tokenizer.encode(" " + word, continuation=True)) == 1]
    assert 2 <= len(single) < len(candidates)
    table = similar_words(base_model, candidates, neighbours=1, min_similarity=-1.0)
    rows = {word: tokenizer.encode(" " + word, continuation=True)[0] for word in single}
    embedding = load_model(base_model).embedding.weight.detach().numpy()
    centred = {word: embedding[row] - embedding[list(rows.values())].mean(0) for word, row in rows.items()}

    def cosine(one: str, other: str) -> float:
        a, b = centred[one], centred[other]
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    assert table == {
        word: [max((o for o in single if o != word), key=lambda other: cosine(word, other))] for word in single
    }
    with pytest.raises(InputError, match="Give a file of synonyms"):
        similar_words(base_model, ["zebra"], 1, 0.0)


def save_parrot(base_model: Path, folder: Path, answer: str) -> Path:
    """A model whose layers do nothing, and that says what follows each token: after a line break the answer."""
    model, tokenizer = load_model(base_model, dtype=torch.float32), load_tokenizer(base_model)
    [line_break] = tokenizer.encode("\n")
    chain = [line_break, *tokenizer.encode(answer, continuation=True), tokenizer.eos_id]
    assert len(set(chain)) == len(chain)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.output.weight.zero_()
            layer.feed_forward.down.weight.zero_()
        model.embedding.weight.zero_()
        model.output.weight.zero_()
        for place, (token, following) in enumerate(itertools.pairwise(chain)):
            model.embedding.weight[token, place] = 1.0
            model.output.weight[following, place] = 10.0
    save_model(model, folder, tokenizer=tokenizer)
    return folder


def test_back_translation_by_two_models(base_model: Path, tmp_path: Path) -> None:
    there, back = (save_parrot(base_model, tmp_path / answer, answer) for answer in ("Lima", "hay"))
    write_jsonl(tmp_path / "data.jsonl", [{"text": "good", "label": 1}, {"text": "hay", "label": 0}])
    options = [
        "method.kind=back_translation", f"method.there={there}", f"method.back={back}", "method.device=cpu",
        "method.max_tokens=16",
    ]  # fmt: skip
    found = run(tmp_path / "data.jsonl", tmp_path / "out", *options)
    new = [(row["text"], row["label"]) for row in found if "augmented_by" in row]
    assert new == [("hay", 1)]  # of "hay" itself the same came back, which is no other text
    method = BackTranslation(there=there, back=back, device="cpu")
    assert method._translate(there, "{text}\n", ["good", "bad"], SamplingParams(temperature=0), 1) == [["Lima"]] * 2
    # One token is no whole translation.
    assert BackTranslation(there=there, back=back, device="cpu", max_tokens=1).texts(["good"], 2, 0) == [[]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["method.kind=synonyms"], "one of file and model"),
        (["method.kind=synonyms", "method.file=a", "method.share=0"], "above 0 and at most 1"),
        (["method.kind=synonyms", "method.file=nowhere.txt"], "nowhere.txt does not exist"),
        (["method.kind=synonyms", "method.file=nowhere.txt", "text=body"], "no text in its column 'body'"),
        (["method.kind=back_translation", "method.there=a", "method.back=b", "method.back_prompt=x"], "needs {text}"),
        (["copies=0", "method.kind=synonyms", "method.file=a"], "copies is 0"),
    ],
)
def test_settings_that_do_not_work(tmp_path: Path, options: list[str], message: str) -> None:
    write_jsonl(tmp_path / "data.jsonl", [{"text": "good", "label": 1}])
    with pytest.raises(InputError, match=message):
        run(tmp_path / "data.jsonl", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_nothing_to_replace(synonyms: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data.jsonl", [{"text": "zebra", "label": 1}])
    with pytest.raises(InputError, match="No word of this data has a synonym"):
        run(tmp_path / "data.jsonl", tmp_path / "out", "method.kind=synonyms", f"method.file={synonyms}")


@pytest.mark.parametrize(
    ("original", "word", "wanted"), [("Big", "large", "Large"), ("BIG", "large", "LARGE"), ("I", "one", "One")]
)
def test_case(original: str, word: str, wanted: str) -> None:
    assert in_case_of(original, word) == wanted
