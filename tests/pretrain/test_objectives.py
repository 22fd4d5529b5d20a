"""Objectives: what is hidden and paired, what the loss is, and that a mixed run leaves a model that others can load."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from puna.batches.mixture import MixtureConfig, MixtureSource, open_mixture
from puna.batches.packing import IGNORE, PADDING, PackedRows
from puna.batches.shards import TokenShards
from puna.config import parse_config, to_plain
from puna.model.initialize import initialize
from puna.model.transformer import Transformer
from puna.pretrain.main import PretrainConfig, main
from puna.pretrain.masking import Masker, Masking
from puna.pretrain.objectives import (
    PAIR_FILE,
    CausalObjective,
    MaskedObjective,
    Objective,
    ObjectiveBatch,
    ObjectiveRows,
    PairObjective,
    add_pair_head,
    objective_loss,
    with_mask_tokens,
)
from puna.runtime.errors import InputError
from puna.tokenizer.load import load_tokenizer
from puna.train.loss import causal_lm_loss
from puna.train.metrics import read_metrics
from puna.weights.load import load_model, save_model

ALL: tuple[Objective, ...] = (
    CausalObjective(share=2),
    MaskedObjective(weight=3),
    PairObjective(masking=Masking(rate=0.3), weight=5),
    PairObjective(kind="sentence_order"),
)


def make_rows(config: PretrainConfig, objectives: Sequence[Objective], seed: int = 0) -> ObjectiveRows:
    assert config.tokens is not None
    assert config.tokenizer is not None
    tokenizer = load_tokenizer(config.tokenizer)
    text = PackedRows(TokenShards(config.tokens), 32, 0, "cut", tokenizer.pad_id)
    return ObjectiveRows(text, objectives, with_mask_tokens(tokenizer, objectives), 32, seed)


def make_model(config: PretrainConfig) -> Transformer:
    model = Transformer(config.model)
    initialize(model, 0)
    add_pair_head(model, 0)
    return model


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=60),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.integers(0, 100),
    st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_what_is_hidden(ids: list[int], rate: float, mask_share: float, padding: int, seed: int) -> None:
    masking = Masking(rate=rate, mask_share=mask_share, random_share=1 - mask_share)
    masker = Masker(masking, mask_id=20, ordinary_ids=np.arange(5, 20))
    row, real = np.array(ids), np.arange(len(ids)) < max(1, len(ids) - padding)
    hidden, labels = masker.hide(row, real, np.random.default_rng(seed))
    candidates = real & (row >= 5) & (row < 20)
    chosen = labels != IGNORE
    assert chosen.sum() == (max(1, round(rate * candidates.sum())) if candidates.any() else 0)
    assert not (chosen & ~candidates).any()
    assert (labels[chosen] == row[chosen]).all()
    assert (hidden[~chosen] == row[~chosen]).all()
    assert ((hidden[chosen] >= 5) & (hidden[chosen] <= 20)).all()


def test_shares_are_bert_s() -> None:
    masker = Masker(Masking(), mask_id=0, ordinary_ids=np.arange(5, 1000))
    row = np.full(200_000, 7)
    hidden, labels = masker.hide(row, np.ones(len(row), dtype=bool), np.random.default_rng(0))
    assert (labels != IGNORE).mean() == 0.15
    fate = hidden[labels != IGNORE]
    # 30,000 draws: 0.005 is more than two standard deviations (0.0023, 0.0017) of each share
    assert (fate == 0).mean() == pytest.approx(0.8, abs=0.005)
    assert ((fate != 0) & (fate != 7)).mean() == pytest.approx(0.1, abs=0.005)
    plain = Masker(Masking(mask_share=1, random_share=0), 0, np.arange(5, 1000))
    hidden, labels = plain.hide(row, np.ones(len(row), dtype=bool), np.random.default_rng(0))
    assert (hidden[labels != IGNORE] == 0).all()


def test_a_row_is_a_pure_function_of_its_number(config: PretrainConfig) -> None:
    numbers = [5, 0, 131, 7, 6, 42]
    together = make_rows(config, ALL).batch(numbers)
    assert len(set(make_rows(config, ALL).batch(range(5)).objectives_B.tolist())) == 4
    for place, number in enumerate(numbers):
        alone = make_rows(config, ALL).batch([number])
        for name in ObjectiveBatch.__dataclass_fields__:
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[place]), name
    other = make_rows(config, (MaskedObjective(),), seed=1).batch([0])
    assert not torch.equal(other.ids_BT, make_rows(config, (MaskedObjective(),)).batch([0]).ids_BT)


def test_a_mixture_gives_pairs_of_one_source(config: PretrainConfig, tmp_path: Path) -> None:
    assert config.tokenizer is not None
    tokenizer = load_tokenizer(config.tokenizer)
    sources = (MixtureSource("a", tmp_path / "a", 1), MixtureSource("b", tmp_path / "b", 1))
    mixed = open_mixture(MixtureConfig(sources), tokenizer=tokenizer, row_length=32, seed=0, steps=8, batch_rows=4)
    rows = ObjectiveRows(mixed, (PairObjective(kind="sentence_order"),), tokenizer, 32, 0)
    of = {name: {tuple(ids.tolist()) for ids in map(TokenShards(tmp_path / name).ids, range(60))} for name in "ab"}
    for number in range(12):
        row = rows.batch([number])
        length = int((row.documents_BT != PADDING).sum())
        text = row.ids_BT[0, 1 : length - 1].tolist()
        cut = text.index(tokenizer.eos_id)
        first, second = text[:cut], text[cut + 1 :]
        whole = tuple(first + second if row.pair_labels_B == 0 else second + first)
        source = mixed.ingredients[mixed.locate(number)[0]].name
        assert any(_holds(document, whole) for document in of[source])


def _holds(document: Sequence[int], part: Sequence[int]) -> bool:
    return any(tuple(document[n : n + len(part)]) == tuple(part) for n in range(len(document) - len(part) + 1))


def test_next_sentences_follow_or_come_from_elsewhere(config: PretrainConfig) -> None:
    assert config.tokens is not None
    assert config.tokenizer is not None
    eos = load_tokenizer(config.tokenizer).eos_id
    shards = TokenShards(config.tokens)
    documents = [tuple(shards.ids(n).tolist()) for n in range(len(shards))]
    rows = make_rows(config, (PairObjective(),))
    batch = rows.batch(range(60))
    assert [len(rows.origins(number)) - 1 for number in range(60)] == batch.pair_labels_B.tolist()
    assert 20 <= int(batch.pair_labels_B.sum()) <= 40
    for ids, label, real in zip(batch.ids_BT.tolist(), batch.pair_labels_B, batch.documents_BT != PADDING, strict=True):
        text = ids[1 : int(real.sum()) - 1]
        cut = text.index(eos)
        first, second = text[:cut], text[cut + 1 :]
        assert len(first) + len(second) == 29
        follows = any(_holds(document, first + second) for document in documents)
        assert follows == (label == 0)
        assert any(_holds(document, second) for document in documents)
    assert _holds(documents[rows.origins(0)[0][1]], batch.ids_BT[0, 1:4].tolist())


def test_masked_and_pair_losses_against_transformers(config: PretrainConfig, tmp_path: Path) -> None:
    """transformers' Llama is made bidirectional by a mask of its own; 1e-5: float32 sums in another order."""
    import transformers

    model = make_model(config)
    objectives = (MaskedObjective(), PairObjective(weight=7, masking=Masking()))
    batch = make_rows(config, objectives).batch(range(6))
    ours = objective_loss(objectives)(model, batch)
    ours.total.backward()
    head = model.pair_head
    del model.pair_head
    save_model(model, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    same = batch.documents_BT[:, :, None] == batch.documents_BT[:, None, :]
    mask = torch.zeros(same.shape).masked_fill(~same, torch.finfo(torch.float32).min)[:, None]
    out = theirs(batch.ids_BT, attention_mask=mask, position_ids=batch.positions_BT, output_hidden_states=True)
    tokens = F.cross_entropy(out.logits.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORE, reduction="sum")
    pairs = F.cross_entropy(
        out.hidden_states[-1][:, 0] @ head.weight.T, batch.pair_labels_B, ignore_index=IGNORE, reduction="sum"
    )
    expected = tokens + 7 * pairs
    expected.backward()
    assert ours.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert ours.count == (batch.labels_BT != IGNORE).sum() + 3
    gradient = theirs.model.layers[0].self_attn.q_proj.weight.grad
    assert torch.allclose(model.layers[0].attention.query.weight.grad, gradient, atol=1e-5 * gradient.abs().max())


def test_a_mixed_batch_is_the_sum_of_its_objectives(config: PretrainConfig) -> None:
    model = make_model(config)
    batch = make_rows(config, ALL).batch(range(10))
    mixed = objective_loss(ALL)(model, batch)
    total, count = 0.0, 0
    for row in batch.split(1):
        objective = ALL[int(row.objectives_B)]
        part = objective_loss((objective,))(model, replace(row, objectives_B=torch.tensor([0])))
        if isinstance(objective, CausalObjective):
            assert part.total.item() == causal_lm_loss(model, row).total.item()
        total, count = total + part.total.item(), count + part.count
    assert mixed.total.item() == pytest.approx(total, rel=1e-5)
    assert mixed.count == count


def test_a_mixed_run_leaves_a_model_directory(config: PretrainConfig, tmp_path: Path) -> None:
    import transformers

    config = replace(config, objectives=ALL, held_out_tokens=tmp_path / "b")
    assert parse_config(PretrainConfig, to_plain(config), "round trip") == config
    main(config)
    trained = config.output / "model"
    values = json.loads((config.output / "model" / "puna.json").read_text())["results"]
    assert values["validation_loss"] > 0
    tokenizer = load_tokenizer(trained)
    assert tokenizer.special_tokens["<|mask|>"] == tokenizer.vocab_size - 1
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(trained)(torch.arange(9)[None]).logits
        assert torch.allclose(load_model(trained)(torch.arange(9)[None]), theirs, atol=1e-5)
    assert load_file(trained / PAIR_FILE)["weight"].shape == (2, 16)

    # Going on from there: the first loss is that of the finished model, its classifier included.
    more = replace(config, init_from=trained, model=type(config.model)(), output=tmp_path / "more")
    main(more)
    resumed = load_model(trained)
    add_pair_head(resumed, 99, trained)
    batch = make_rows(config, ALL).batch(range(4))
    first = objective_loss(ALL)(resumed, batch)
    logged = read_metrics(more.output / "metrics.jsonl")[0]["train/loss"]
    assert logged == pytest.approx(first.total.item() / first.count, rel=1e-5)


def test_masked_training_learns(config: PretrainConfig) -> None:
    main(replace(config, objectives=(MaskedObjective(),), train=replace(config.train, steps=20)))
    curve = [row["train/loss"] for row in read_metrics(config.output / "metrics.jsonl")]
    assert np.mean(curve[-4:]) < np.mean(curve[:4])


def test_mistakes_are_explained(config: PretrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rate is 0"):
        Masking(rate=0)
    with pytest.raises(ValueError, match="1 at most together"):
        Masking(mask_share=0.8, random_share=0.3)
    with pytest.raises(ValueError, match="have to be above 0"):
        CausalObjective(share=0)
    with pytest.raises(ValueError, match="objectives is empty"):
        replace(config, objectives=())
    with pytest.raises(ValueError, match="Set tokenizer"):
        replace(config, tokenizer=None)
    with pytest.raises(ValueError, match="leave the table model out"):
        replace(config, init_from=tmp_path)
    with pytest.raises(InputError, match=r"has 271 ids with the objectives' mask tokens"):
        main(replace(config, objectives=(MaskedObjective(),), model=replace(config.model, vocab_size=270)))
    with pytest.raises(InputError, match="needs rows of at least 11 tokens"):
        main(replace(config, objectives=(PairObjective(),), train=replace(config.train, row_length=8)))
    with pytest.raises(InputError, match="Kinds of objective: causal, masked, next_sentence, sentence_order"):
        parse_config(PretrainConfig, to_plain(config) | {"objectives": [{"kind": "sentence"}]}, "recipe")
