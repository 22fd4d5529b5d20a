"""What a model makes of texts inside: the hidden states of its layers.

Shapes: N tokens of all texts side by side, T tokens of one, L layers asked for, D model dimension.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from puna.kernels.attend import document_attend
from puna.model.transformer import Linear, Transformer
from puna.runtime.errors import InputError


@torch.inference_mode()
def hidden_states(model: Transformer, texts: Sequence[Sequence[int]], layers: Sequence[int]) -> list[Tensor]:
    """The states of each text's tokens, [L, T, D] in float32 on the model's device, by one forward over all texts.

    Args:
        texts: ids of each; none is empty.
        layers: 0 is what the embedding gives, i the output of the i-th layer, and the number of layers the states
            after the last norm, which the output projection reads. So does `transformers` count.

    Raises:
        InputError: states between layers are asked for, but the layers are not one by one in this process's memory.
    """
    if set(layers) - {0, model.config.num_layers} and len(model.layers) < model.config.num_layers:
        raise InputError(
            "The states between layers are not to be had where the layers are read from the disk at every step, or "
            "spread over several processes."
        )
    states: dict[int, Tensor] = {}
    last = model.config.num_layers

    def keep(number: int, module: nn.Module, inputs: object, output: Tensor) -> None:
        states[number] = output[0].float()

    def head(h_1ND: Tensor, output: Linear) -> None:
        states[last] = h_1ND[0].float()

    device = model.norm.weight.device
    lengths = [len(ids) for ids in texts]
    documents_1N = torch.arange(len(texts)).repeat_interleave(torch.tensor(lengths))[None].to(device)
    positions_1N = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    ids_1N = torch.tensor([[token_id for ids in texts for token_id in ids]], device=device)
    modules = [model.embedding, *model.layers]
    with ExitStack() as hooks:
        for number in set(layers) - {last}:
            hooks.enter_context(modules[number].register_forward_hook(partial(keep, number)))
        model(ids_1N, positions_1N, document_attend(documents_1N), head)
    h_LND = torch.stack([states[number] for number in layers])
    return list(torch.split(h_LND, lengths, dim=1))
