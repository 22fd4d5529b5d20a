"""LayerSkip: the paper's formulas, the loss against a plain loop, early layers that predict; gated layers in a run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.batches.packing import IGNORE, PackedRows
from puna.batches.shards import TokenShards
from puna.infer.load import EngineConfig, load_engine
from puna.infer.sampling import SamplingParams
from puna.model.attend import DocumentAttend
from puna.model.config import LlamaConfig
from puna.model.depths import Depths, depths_of, gate_layers
from puna.model.initialize import initialize
from puna.model.rope import frequencies, rotation
from puna.model.transformer import Transformer
from puna.pretrain.layer_skip import LayerSkip, SkipPlan, install
from puna.pretrain.main import MixtureOfDepths, PretrainConfig, main
from puna.pretrain.objectives import CausalObjective, ObjectiveBatch, ObjectiveRows, objective_loss
from puna.runtime.errors import InputError
from puna.runtime.seeds import derive_seed
from puna.tokenizer.load import load_tokenizer
from puna.weights.load import load_model


def plan(config: LayerSkip, num_layers: int = 4, steps: int = 11, batch_rows: int = 4) -> SkipPlan:
    return SkipPlan(config, num_layers, steps, batch_rows, seed=0)


def test_the_paper_s_formulas_worked_by_hand() -> None:
    some = plan(LayerSkip(dropout=0.2))
    assert [some.dropout(layer, 5) for layer in (0, 3)] == pytest.approx([0, 0.2])
    assert some.dropout(1, 0) == pytest.approx(0.2 * (2 ** (1 / 3) - 1))
    growing = plan(LayerSkip(dropout=0.2, growing_dropout=True))
    assert [growing.dropout(3, step) for step in (0, 10)] == pytest.approx([0, 0.2])
    assert growing.dropout(3, 5) == pytest.approx(0.2 * (2**0.5 - 1))
    # e(0..3) = 0, 0.5 * 1, 0.5 * 3, 3 + 0.5 * 3
    everywhere = plan(LayerSkip(exit_scale=0.5, exit_every=1))
    assert everywhere.exit_weights(7) == pytest.approx({1: 0.5 / 6.5, 2: 1.5 / 6.5, 3: 4.5 / 6.5})
    turning = plan(LayerSkip(exit_scale=0.5, exit_every=2))
    assert turning.exit_weights(0) == pytest.approx({2: 1.5 / 6, 3: 4.5 / 6})
    assert turning.exit_weights(1) == pytest.approx({1: 0.5 / 5, 3: 4.5 / 5})
    assert plan(LayerSkip(exit_scale=0)).exit_weights(0) == {3: 1}
    assert plan(LayerSkip(), num_layers=1).exit_weights(0) == {0: 1}


@given(st.floats(0, 0.99), st.integers(1, 6), st.lists(st.integers(0, 43), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_what_is_left_out_depends_on_the_row_alone(dropout: float, num_layers: int, rows: list[int]) -> None:
    some = plan(LayerSkip(dropout=dropout), num_layers)
    kept = some.kept(rows)
    assert kept.shape == (num_layers, len(rows))
    for place, row in enumerate(rows):
        assert (some.kept([row])[:, 0] == kept[:, place]).all()
    assert num_layers == 1 or kept[0].all()


def test_how_often_layers_are_left_out() -> None:
    kept = plan(LayerSkip(dropout=0.5)).kept(list(range(4000)))
    wanted = [1 - plan(LayerSkip(dropout=0.5)).dropout(layer, 0) for layer in range(4)]
    assert kept.mean(1) == pytest.approx(wanted, abs=0.025)  # three standard deviations of 4,000 draws


def rows_of(config: PretrainConfig) -> ObjectiveRows:
    assert config.tokens is not None
    assert config.tokenizer is not None
    tokenizer = load_tokenizer(config.tokenizer)
    text = PackedRows(TokenShards(config.tokens), 32, 0, "cut", tokenizer.pad_id)
    return ObjectiveRows(text, (CausalObjective(),), tokenizer, 32, 0)


def plain_loss(model: Transformer, batch: ObjectiveBatch, some: SkipPlan) -> Tensor:
    """The readable twin: one loop over layers."""
    x_BTD = model.embedding(batch.ids_BT)
    turn = rotation(batch.positions_BT, frequencies(model.config), x_BTD.dtype)
    kept = some.kept(batch.rows_B.tolist())
    weights = some.exit_weights(int(batch.rows_B[0]) // some.batch_rows)
    total = torch.zeros(())
    for number, layer in enumerate(model.layers):
        after_BTD = layer(x_BTD, turn, DocumentAttend(batch.documents_BT))
        x_BTD = torch.stack([after_BTD[r] if kept[number, r] else x_BTD[r] for r in range(len(x_BTD))])
        if number in weights:
            logits = model.output(model.norm(x_BTD)).flatten(0, 1)
            nats = F.cross_entropy(logits, batch.labels_BT.flatten(), ignore_index=IGNORE, reduction="sum")
            total = total + weights[number] * nats
    return total


def test_the_loss_and_its_gradient_against_a_plain_loop(config: PretrainConfig) -> None:
    model = Transformer(replace(config.model, num_layers=4))
    initialize(model, 0)
    twin = Transformer(model.config)
    twin.load_state_dict(model.state_dict())
    install(model)
    some = plan(LayerSkip(dropout=0.6, exit_scale=0.5, exit_every=2))
    batch = rows_of(config).batch(range(8, 12))
    ours = objective_loss((CausalObjective(),), some)(model, batch)
    theirs = plain_loss(twin, batch, some)
    assert not some.kept([8, 9, 10, 11]).all()
    ours.total.backward()
    theirs.backward()
    assert ours.total.item() == pytest.approx(theirs.item(), rel=1e-5)  # float32 sums in another order
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-5 * float(other.grad.abs().max()))

    # Measured, not trained: nothing is left out, and only the last layer predicts.
    model.eval()
    plain = objective_loss((CausalObjective(),))(twin.eval(), batch)
    assert objective_loss((CausalObjective(),), some)(model, batch).total.item() == plain.total.item()


def test_early_layers_learn_to_predict(config: PretrainConfig, tmp_path: Path) -> None:
    fast = replace(config.train.optimizer, learning_rate=1e-2)
    train = replace(config.train, steps=25, checkpoint_every=0, optimizer=fast)
    config = replace(config, model=replace(config.model, num_layers=3), train=train)
    main(replace(config, output=tmp_path / "plain"))
    main(replace(config, output=tmp_path / "skip", layer_skip=LayerSkip(exit_every=1, exit_scale=1)))
    batch = rows_of(config).batch(range(100, 120))
    nats = {}
    for name in ("plain", "skip"):
        model = load_model(tmp_path / name / "model")
        model.layers = model.layers[:2]
        with torch.no_grad():
            part = objective_loss((CausalObjective(),))(model, batch)
        nats[name] = part.total.item() / part.count
    assert nats["skip"] < nats["plain"] - 0.05


def test_mistakes_are_explained(config: PretrainConfig) -> None:
    with pytest.raises(ValueError, match="dropout is 1"):
        LayerSkip(dropout=1)
    with pytest.raises(ValueError, match="exit_every at least 1"):
        LayerSkip(exit_every=0)
    pipeline = replace(config.train, parallel=replace(config.train.parallel, pipeline=2))
    with pytest.raises(ValueError, match="layer_skip works with the layouts data and shard only"):
        replace(config, layer_skip=LayerSkip(), train=pipeline)


def test_gated_layers_are_trained_and_saved(config: PretrainConfig, tmp_path: Path) -> None:
    """From random weights, and put into a model that was trained without them."""
    depths = MixtureOfDepths(every=2, capacity=0.25)
    fast = replace(config.train.optimizer, learning_rate=1e-2)
    train = replace(config.train, steps=4, checkpoint_every=0, optimizer=fast)
    config = replace(config, model=replace(config.model, num_layers=2), train=train)
    main(replace(config, output=tmp_path / "fresh", mixture_of_depths=depths))
    trained = load_model(tmp_path / "fresh" / "model")
    assert depths_of(trained) == Depths((1,), 0.25)
    untrained = Transformer(config.model)
    gate_layers(untrained, Depths((1,), 0.25), derive_seed(0, "mixture of depths"))
    for name in ("router.weight", "predictor.0.weight", "predictor.2.weight"):
        moved = trained.get_parameter(f"layers.1.{name}") - untrained.get_parameter(f"layers.1.{name}")
        assert 0 < moved.norm() < 1, name

    main(replace(config, output=tmp_path / "plain"))
    later = replace(config, init_from=tmp_path / "plain" / "model", model=LlamaConfig(), output=tmp_path / "later")
    main(replace(later, mixture_of_depths=depths))
    gated = tmp_path / "later" / "model"
    assert depths_of(load_model(gated)) == Depths((1,), 0.25)
    again = replace(later, init_from=gated, output=tmp_path / "again")
    main(again)
    assert depths_of(load_model(tmp_path / "again" / "model")) == Depths((1,), 0.25)

    with pytest.raises(InputError, match="gated layers already"):
        main(replace(again, mixture_of_depths=depths, output=tmp_path / "no"))
    with pytest.raises(InputError, match="none would be gated"):
        main(replace(config, mixture_of_depths=MixtureOfDepths(every=3), output=tmp_path / "no"))
    with pytest.raises(ValueError, match="do not go together"):
        replace(config, mixture_of_depths=depths, layer_skip=LayerSkip())
    engine = load_engine(gated, EngineConfig(device="cpu", num_threads=1))
    [done] = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(done.ids) == 4
