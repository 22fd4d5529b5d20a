"""Learning rates that fall from the head down to the embedding."""

import re

from puna.model.transformer import Transformer

_LAYER = re.compile(r"layers\.(\d+)\.")


def layer_rates(model: Transformer, decay: float) -> dict[str, float]:
    """Factor of each trained parameter's learning rate: decay ** (layers above it, itself included).

    That is Howard and Ruder 2018 (arXiv:1801.06146, section 3.2) with the head as the last layer: the topmost layer of
    the trunk learns at `decay` times the head's rate, the embedding at decay ** (layers + 1). Adapters count as part of
    the layer that they are in. An output projection that shares its weight with the embedding learns as that.
    """
    depth = len(model.layers)
    rates = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if found := _LAYER.match(name):
                rates[name] = decay ** (depth - int(found[1]))
            elif name.startswith("embedding."):
                rates[name] = decay ** (depth + 1)
    return rates
