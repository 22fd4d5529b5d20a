import math

import torch

from puna.model.config import LlamaConfig
from puna.model.initialize import initialize
from puna.model.transformer import Transformer

CONFIG = LlamaConfig(vocab_size=512, dim=128, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32, hidden_dim=352)


def initialized(seed, **changes):
    model = Transformer(LlamaConfig(**(vars(CONFIG) | changes)))
    initialize(model, seed)
    return dict(model.named_parameters())


def test_the_seed_decides_every_bit():
    first, again, other = initialized(1), initialized(1), initialized(2)
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        assert torch.equal(parameter, other[name]) == name.endswith("norm.weight")


def test_spread_is_as_stated():
    # A normal cut at three deviations keeps 0.9866 of the standard deviation.
    cut = 0.9866
    for name, parameter in initialized(0, qkv_bias=True, qk_norm=True).items():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            std = 0.02 if name == "embedding.weight" else 1 / math.sqrt(parameter.shape[1])
            if name.endswith(("attention.output.weight", "down.weight")):
                std /= math.sqrt(2 * CONFIG.num_layers)
            assert abs(parameter.std().item() / (cut * std) - 1) < 0.03, name
            assert abs(parameter.mean().item()) < 0.1 * std, name
            assert parameter.abs().max() <= 3 * std


def test_a_tied_output_keeps_the_embedding_s_spread():
    parameters = initialized(0, tie_embeddings=True)
    assert "output.weight" not in parameters
    assert abs(parameters["embedding.weight"].std().item() / (0.9866 * 0.02) - 1) < 0.03


def test_fresh_logits_are_about_uniform():
    model = Transformer(CONFIG)
    initialize(model, 0)
    ids_BT = torch.randint(512, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids_BT)[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    assert abs(loss.item() - math.log(512)) < 0.7
