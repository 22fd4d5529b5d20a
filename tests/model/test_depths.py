"""Mixture-of-Depths: gated layers against a token-by-token loop; the predictor is causal; what is saved is what was."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.model.attend import Attend, DocumentAttend, bidirectional, causal
from puna.model.config import LlamaConfig
from puna.model.depths import Depths, GatedLayer, depths_of, gate_layers
from puna.model.rope import frequencies, rotation
from puna.model.transformer import Layer, Transformer
from puna.runtime.errors import InputError
from puna.weights.convert import ConvertConfig
from puna.weights.convert import main as convert
from puna.weights.load import load_model, save_model

TINY = LlamaConfig(
    vocab_size=64, dim=24, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=12, hidden_dim=32, context_length=64
)
Make = Callable[..., Transformer]


@pytest.fixture
def gated(make_model: Make) -> Transformer:
    model = make_model(TINY)
    gate_layers(model, Depths((1,), 0.25), seed=0)
    return model


def plain_gated_layer(layer: GatedLayer, x_BTD: Tensor, positions_BT: Tensor, allowed_BTS: Tensor) -> Tensor:
    """The readable twin: every token through the layer, each seeing only chosen tokens, then thrown away or not."""
    n_BTD = layer.attention_norm(x_BTD)
    weights_BT = layer.router(n_BTD).squeeze(-1)
    if layer.training:
        count = math.ceil(layer.capacity * x_BTD.shape[1])
        chosen_BT = torch.zeros_like(weights_BT, dtype=torch.bool)
        for row, weights in enumerate(weights_BT):
            for place in weights.argsort(descending=True)[:count]:
                chosen_BT[row, place] = True
    else:
        chosen_BT = layer.predictor(n_BTD).squeeze(-1) > 0
    allowed_BTS = (allowed_BTS & chosen_BT[:, None, :]) | torch.eye(x_BTD.shape[1], dtype=torch.bool)

    def attend(number: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        k_BTHK, v_BTHK = (part.repeat_interleave(q_BTHK.shape[2] // part.shape[2], 2) for part in (k_BTGK, v_BTGK))
        scores = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK) / q_BTHK.shape[3] ** 0.5
        return torch.einsum("bhts,bshk->bthk", scores.masked_fill(~allowed_BTS[:, None], -1e30).softmax(-1), v_BTHK)

    turn = rotation(positions_BT, frequencies(TINY), x_BTD.dtype)
    change_BTD = Layer.forward(layer, x_BTD, turn, attend) - x_BTD
    return x_BTD + weights_BT.unsqueeze(-1) * change_BTD * chosen_BT.unsqueeze(-1)


@given(
    st.booleans(),
    st.sampled_from(["causal", "both ways", "documents", "by row"]),
    st.integers(1, 20),
    st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_a_gated_layer_against_a_plain_one(make_model: Make, training: bool, kind: str, length: int, seed: int) -> None:
    model = make_model(TINY, seed)
    gate_layers(model, Depths((1,), 0.3), seed=seed)
    layer = model.layers[1].train(training)
    generator = torch.Generator().manual_seed(seed)
    x_BTD = torch.randn(3, length, 24, generator=generator)
    documents_BT = (torch.rand(3, length, generator=generator) < 0.2).cumsum(1)
    positions_BT = torch.arange(length).expand(3, -1)
    same, tril = documents_BT[:, :, None] == documents_BT[:, None, :], torch.ones(length, length).tril().bool()
    by_row = torch.tensor([True, False, True])
    attend, allowed = {
        "causal": (causal, tril.expand(3, -1, -1)),
        "both ways": (DocumentAttend(torch.zeros_like(documents_BT), causal=False), torch.ones_like(same)),
        "documents": (DocumentAttend(documents_BT), same & tril),
        "by row": (DocumentAttend(documents_BT, causal=by_row), same & (tril | ~by_row[:, None, None])),
    }[kind]
    turn = rotation(positions_BT, frequencies(TINY), x_BTD.dtype)
    ours = layer(x_BTD, turn, attend)
    theirs = plain_gated_layer(layer, x_BTD, positions_BT, allowed)
    assert torch.allclose(ours, theirs, atol=1e-5 * float(theirs.detach().abs().max()))  # float32 sums in another order


def test_the_predictor_learns_and_nothing_else_learns_from_it(gated: Transformer) -> None:
    gated.train()
    layer = gated.layers[1]
    ids_BT = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))
    states: list[Tensor] = []
    layer.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    gated(ids_BT).sum().mul(0).backward()  # a loss without a gradient of its own
    n_BTD = layer.attention_norm(states[0]).detach()
    weights_BT = layer.router(n_BTD).squeeze(-1)
    largest_BT = torch.zeros_like(weights_BT).scatter(1, weights_BT.topk(4, dim=1).indices, 1.0)
    expected = F.binary_cross_entropy_with_logits(layer.predictor(n_BTD).squeeze(-1), largest_BT, reduction="sum")
    wanted = torch.autograd.grad(expected, list(layer.predictor.parameters()))
    for parameter, gradient in zip(layer.predictor.parameters(), wanted, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-5)
        assert gradient.abs().max() > 0
    for name, parameter in gated.named_parameters():
        if "predictor" not in name:
            assert parameter.grad is None or not parameter.grad.any(), name


def test_generation_sees_nothing_of_what_comes_later(gated: Transformer) -> None:
    ids_BT = torch.randint(64, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = gated.eval()(ids_BT)
        assert 0 < gated.layers[1].passed_share < 1
        for length in (1, 2, 7, 19):
            part = gated(ids_BT[:, :length])
            assert torch.allclose(part, whole[:, :length], atol=1e-5)


def test_one_layer_with_every_token_and_weight_one_is_the_plain_layer(make_model: Make) -> None:
    plain, model = make_model(TINY), make_model(TINY)
    gate_layers(model, Depths((0, 2), 1.0), seed=0)
    ids_BT = torch.arange(20)[None]
    for number in (0, 2):
        router = model.layers[number].router
        router.forward = lambda n_BTD: torch.ones_like(n_BTD[..., :1])
    with torch.no_grad():
        assert torch.allclose(model.train()(ids_BT), plain(ids_BT), atol=1e-5)


def test_saved_and_loaded(gated: Transformer, tmp_path: Path) -> None:
    save_model(gated, tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert values["model_type"] == "llama_mixture_of_depths"
    assert values["mixture_of_depths"] == {"layers": [1], "capacity": 0.25}
    again = load_model(tmp_path / "model")
    assert depths_of(again) == Depths((1,), 0.25)
    ids_BT = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids_BT), gated.eval()(ids_BT))

    # Nobody takes it for a plain model.
    import transformers

    with pytest.raises(ValueError, match="llama_mixture_of_depths"):
        transformers.AutoConfig.from_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="for which gguf has no form"):
        convert(ConvertConfig(source=str(tmp_path / "model"), destination=tmp_path / "gguf", to="gguf"))
    (tmp_path / "model" / "config.json").write_text(json.dumps(values | {"mixture_of_depths": {"layers": [7]}}))
    with pytest.raises(InputError, match="lacks mixture_of_depths"):
        load_model(tmp_path / "model")
    wrong = values | {"mixture_of_depths": {"layers": [7], "capacity": 0.5}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(InputError, match="Layer 7 cannot be gated: the model has 3 layers"):
        load_model(tmp_path / "model")


def test_other_contexts_are_refused(gated: Transformer) -> None:
    class Cache:
        def __call__(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
            return bidirectional(layer, q_BTHK, k_BTGK, v_BTGK)

    attend: Attend = Cache()
    with pytest.raises(ValueError, match="cannot narrow Cache"):
        gated.train()(torch.arange(9)[None], attend=attend)
    with pytest.raises(ValueError, match="Layer 1 cannot be gated"):
        gate_layers(gated, Depths((1,), 0.5), seed=0)
