"""The whole model on one process again, to be written."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from puna.model.transformer import Transformer
from puna.parallel.mesh import is_first_process


@torch.no_grad()
def gather_parameters(model: Transformer) -> None:
    """Give the first process all of `model`, on the CPU, parameter by parameter; alone, do nothing.

    Every process has to call. The first one can write the model then, or read its parameters; to run it, load it again.
    The others keep their parts.
    """
    if not dist.is_initialized():
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    own = dict(model.named_parameters())
    held: list[dict[str, tuple[torch.Size, torch.dtype]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(held, {name: (value.shape, value.dtype) for name, value in own.items()})
    if is_first_process():
        _restore_absent(model)
    device = next(iter(own.values())).device
    for name in {name: None for names in held for name in names}:
        holder = next(rank for rank, names in enumerate(held) if name in names)
        value: Tensor | None = own.get(name)
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if holder and dist.get_rank() == holder:
            assert value is not None
            dist.send(value.detach().contiguous(), 0)
        if is_first_process():
            if value is None:
                shape, dtype = held[holder][name]
                value = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(value, holder)
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent).register_parameter(leaf, nn.Parameter(value.to("cpu")))
    if is_first_process() and model.config.tie_embeddings:
        model.output.weight = model.embedding.weight


def _restore_absent(model: Transformer) -> None:
    """Empty modules in place of those that other stages of a pipeline hold."""
    with torch.device("meta"):
        empty = Transformer(model.config)
    for name, child in empty.named_children():
        if isinstance(child, nn.ModuleList):
            for number, layer in enumerate(child):
                if next(model.layers[number].parameters(), None) is None:
                    model.layers[number] = layer
        elif next(model.get_submodule(name).parameters(), None) is None:
            setattr(model, name, child)
