"""Hidden states and embeddings beside transformers'."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from puna.infer.llm import LLM
from puna.runtime.errors import InputError

TEXTS: list[list[int]] = [[256, 1, 2, 3], [7], list(range(60, 150)), [9] * 200, [256, 1, 2, 3]]
"""More than fit into one forward."""


@pytest.fixture(scope="module")
def llm(model_directory: Path) -> LLM:
    return LLM(model_directory, device="cpu", num_threads=1)


@pytest.fixture(scope="module")
def theirs(model_directory: Path) -> list[torch.Tensor]:
    """[layers + 1, tokens, D] of each text."""
    model = AutoModel.from_pretrained(model_directory, dtype=torch.float32)
    with torch.inference_mode():
        outputs = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in TEXTS]
    return [torch.cat(states) for states in outputs]


def test_every_layer_equals_transformers(llm: LLM, theirs: list[torch.Tensor]) -> None:
    ours = llm.hidden_states(TEXTS)
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for one, other in zip(llm.hidden_states(TEXTS, layers=[2, 0]), theirs, strict=True):
        torch.testing.assert_close(one, other[[2, 0]], rtol=1e-5, atol=1e-5)
    assert not any(module._forward_hooks for module in llm.engine.model.modules())


@pytest.mark.parametrize("layer", [None, 0, 1, 2])
def test_embeddings_are_pooled_states(llm: LLM, theirs: list[torch.Tensor], layer: int | None) -> None:
    states = [h_LTD[-1 if layer is None else layer] for h_LTD in theirs]
    mean = torch.stack([h_TD.mean(0) for h_TD in states])
    last = torch.stack([h_TD[-1] for h_TD in states])
    torch.testing.assert_close(llm.embed(TEXTS, layer=layer, normalize=False), mean, rtol=1e-5, atol=1e-5)
    ours = llm.embed(TEXTS, layer=layer, pooling="last")
    torch.testing.assert_close(ours, torch.nn.functional.normalize(last, dim=-1), rtol=1e-5, atol=1e-5)


def test_layers_on_disk(model_directory: Path, theirs: list[torch.Tensor]) -> None:
    llm = LLM(model_directory, device="cpu", num_threads=1, weights="disk")
    for one, other in zip(llm.hidden_states(TEXTS, layers=[0, 2]), theirs, strict=True):
        torch.testing.assert_close(one, other[[0, 2]], rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="between layers are not to be had"):
        llm.hidden_states(TEXTS)
    with pytest.raises(InputError, match="cannot be replaced"):
        llm.engine.load_weights(model_directory)


def test_mistakes(llm: LLM) -> None:
    for layer in (-1, 3):
        with pytest.raises(InputError, match=rf"no layer {layer}: 0 is the embedding, and 2 the last"):
            llm.hidden_states(TEXTS, layers=[layer])
    with pytest.raises(InputError, match="pooling is 'max'"):
        llm.embed(TEXTS, pooling="max")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="prompt is empty"):
        llm.embed([[1], []])
