import pytest
import torch

from puna.model.config import LlamaConfig
from puna.model.transformer import Transformer
from puna.weights.huggingface import hf_config
from puna.weights.names import from_hf, from_meta, to_hf, to_meta


@pytest.mark.parametrize("flags", [{}, {"qkv_bias": True}, {"qk_norm": True}, {"tie_embeddings": True}])
def test_names_are_those_of_transformers(flags):
    import transformers

    config = LlamaConfig(num_layers=12, **flags)  # two digits
    with torch.device("meta"):
        ours = [name for name, _ in Transformer(config).named_parameters()]
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**hf_config(config, torch.float32))
        )
    assert {to_hf(name) for name in ours} == {name for name, _ in theirs.named_parameters()}
    assert [from_hf(to_hf(name)) for name in ours] == ours


def test_names_are_those_of_a_meta_checkpoint(real_data):
    path = real_data / "weights" / "tiny_meta_checkpoint" / "tiny_fair_checkpoint.pt"
    theirs = torch.load(path, weights_only=True)
    with torch.device("meta"):
        ours = [name for name, _ in Transformer(LlamaConfig(num_layers=2)).named_parameters()]
    assert {to_meta(name) for name in ours} == set(theirs)
    assert [from_meta(to_meta(name)) for name in ours] == ours


def test_unknown_names_are_an_error():
    for name in ("layers.0.attention.query.bias", "model.norm.weight"):
        with pytest.raises(KeyError):
            to_meta(name)
