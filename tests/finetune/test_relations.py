"""Relations are read, learnt, scored as the official scorer does, and load in transformers."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.config import load_config
from puna.finetune.config import FinetuneConfig
from puna.finetune.main import main as finetune
from puna.finetune.tasks.relations import entities_of, read_relations, relation_f1
from puna.runtime.errors import InputError
from puna.runtime.manifest import Manifest
from puna.tokenizer.load import load_tokenizer

SEMEVAL = """1\t"The <e1>llama</e1> walks to the <e2>city</e2>."
Entity-Destination(e1,e2)
Comment: none

2\t"To a <e2>city</e2> walks the <e1>herd</e1>."
Entity-Destination(e1,e2)
Comment:

3\t"A <e1>city</e1> of the <e2>herd</e2>."
Entity-Destination(e2,e1)

4\t"<e1>Peru</e1> and <e2>hay</e2>"
Other
"""

TRAIN = [
    "train.steps=40", "train.batch_rows=4", "train.micro_batch_rows=4", "train.row_length=64", "train.log_every=20",
    "train.device=cpu", "train.num_threads=1", "train.tensorboard=false", "train.optimizer.learning_rate=1e-2",
    "train.schedule.warmup_steps=2",
]  # fmt: skip


def tune(base_model: Path, folder: Path, text: str, *more: str) -> Path:
    (folder / "data.txt").write_text(text)
    pairs = [f"model={base_model}", f"output={folder / 'out'}", "task.kind=relations"]
    data = [f"data.train={folder / 'data.txt'}", f"data.held_out={folder / 'data.txt'}"]
    finetune(load_config(FinetuneConfig, None, [*pairs, *data, *TRAIN, *more]))
    return folder / "out"


def test_relations_are_learnt_and_transformers_agrees(base_model: Path, tmp_path: Path) -> None:
    output = tune(base_model, tmp_path, SEMEVAL, "task.attention=causal")
    results = Manifest.read(output / "model").results
    assert (results["validation/f1"], results["validation/accuracy"]) == (1.0, 1.0)
    assert "Entity-Destination  F1 1.000" in (output / "report.txt").read_text()

    from transformers import LlamaForSequenceClassification

    theirs = LlamaForSequenceClassification.from_pretrained(output / "model").eval()
    tokenizer = load_tokenizer(output / "model")
    for row in read_relations(tmp_path / "data.txt", (), "text", "label"):
        text, pair = tokenizer.encode(row.values["text"]), tokenizer.encode(entities_of(row, "text"))
        with torch.no_grad():
            logits = theirs(torch.tensor([[tokenizer.bos_id, *text, tokenizer.eos_id, *pair]])).logits[0]
        assert theirs.config.id2label[int(logits.argmax())] == row.values["label"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x\n", "line 1: expected a number, a tab and a sentence"),
        (SEMEVAL + '\n5\t"<e1>a</e1> <e2>b</e2>"\n', "line 15: there is no relation below"),
        (SEMEVAL.replace("</e1>", "", 1), "line 1: the column 'text' has to mark one entity by <e1> and </e1>"),
        (SEMEVAL.replace("Other", ""), "line 12: there is no relation"),
        (SEMEVAL[: SEMEVAL.index("2\t")], "has the label 'Entity-Destination"),
    ],
)
def test_relations_that_cannot_be_learnt(base_model: Path, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tune(base_model, tmp_path, text)
    assert not (tmp_path / "out").exists()


LABELS = ["A(e1,e2)", "A(e2,e1)", "B(e1,e2)", "B(e2,e1)", "Other"]


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=20))
def test_f1_is_counted_as_the_official_scorer_does(pairs: list[tuple[str, str]]) -> None:
    """By hand: a wrong direction is both an answer too many and an answer too few of that relation."""
    wanted, given_ = zip(*pairs, strict=True)
    scores = relation_f1(wanted, given_, LABELS, "Other")
    assert list(scores) == ["A", "B"]
    for name, score in scores.items():
        right = sum(want == give and want.startswith(name) for want, give in pairs)
        too_many = sum(want != give and give.startswith(name) for want, give in pairs)
        too_few = sum(want != give and want.startswith(name) for want, give in pairs)
        precision = right / (right + too_many) if right else 0.0
        recall = right / (right + too_few) if right else 0.0
        assert score == pytest.approx(2 * precision * recall / (precision + recall) if right else 0.0)


def test_published_relations(real_data: Path) -> None:
    rows = list(read_relations(real_data / "tasks/semeval2010_task8/TRAIN_FILE.TXT.gz", (), "text", "label"))
    assert len(rows) == 8000
    assert len({row.values["label"] for row in rows}) == 19
    assert entities_of(rows[0], "text") == "configuration, elements"
    assert all(entities_of(row, "text") for row in rows)
