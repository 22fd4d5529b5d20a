"""Values that changed without anyone computing them: a flipped bit in memory, a processor that miscalculates.

Large fleets see it (Dixit et al. 2021, arXiv:2102.11245), and so did the training of Llama 3 (arXiv:2407.21783, table
5). Two things are looked at: parameters that ranks hold copies of have to be the same bits everywhere, and a
micro-batch that is computed twice has to give the same bits twice.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate

from puna.train.ranks import gather

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """A 64-bit sum over the bits of what this rank holds of a tensor, on its device.

    It sums the numbers' bit patterns, with wrap-around: one flipped bit always changes it. To a weight that several
    words were changed in, it is blind with a chance of about 2^-32.
    """
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().contiguous()
    return local.view(_INTEGERS[local.element_size()]).sum(dtype=torch.int64)


@dataclass(frozen=True)
class Divergence:
    """Copies of a parameter that are not the same."""

    name: str
    """The parameter's."""
    ranks: tuple[int, ...]
    """The global ranks whose copies are not like most; all of them where there is no majority."""
    copies: int
    """How many copies there are."""

    def __str__(self) -> str:
        who = f"rank {self.ranks[0]}" if len(self.ranks) == 1 else f"ranks {', '.join(map(str, self.ranks))}"
        if len(self.ranks) == self.copies:
            return f"{self.name} is not the same on {who}"
        return f"{self.name} on {who} is not the same as on the other {self.copies - len(self.ranks)}"


def compare_copies(parameters: Mapping[str, Tensor]) -> list[Divergence]:
    """Compare copies across ranks; every rank has to call, and gets the divergences that any has found.

    Costs a pass over the parameters and, for each axis that holds copies, a message of one number per parameter.

    Args:
        parameters: by name. Which ranks hold copies follows from a DTensor's placements; a plain tensor has none.
    """
    axes: dict[ProcessGroup, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        for group in _groups(parameter):
            axes.setdefault(group, {})[name] = checksum(parameter)
    found: list[Divergence] = []
    for group, sums in axes.items():
        found += _odd_ones(list(sums), torch.stack(list(sums.values())), group)
    if not dist.is_initialized():
        return found
    everywhere = [divergence for part in gather(found, dist.group.WORLD) for divergence in part]
    return sorted(set(everywhere), key=lambda divergence: (divergence.name, divergence.ranks))


def _groups(parameter: Tensor) -> Iterable[ProcessGroup]:
    """The groups of ranks that hold the same values of a parameter."""
    if not isinstance(parameter, DTensor):
        return []
    mesh = parameter.device_mesh
    return [
        mesh.get_group(axis)
        for axis, placement in enumerate(parameter.placements)
        if isinstance(placement, Replicate) and mesh.size(axis) > 1
    ]


def _odd_ones(names: list[str], sums: Tensor, group: ProcessGroup) -> list[Divergence]:
    parts = [torch.empty_like(sums) for _ in range(group.size())]
    dist.all_gather(parts, sums, group=group)
    table = torch.stack(parts)
    unequal = (table != table[0]).any(dim=0).nonzero().flatten().tolist()
    ranks, found = dist.get_process_group_ranks(group), []
    for column in unequal:
        values = table[:, column].tolist()
        [(usual, number), *_] = Counter(values).most_common()
        odd = tuple(
            rank for rank, value in zip(ranks, values, strict=True) if value != usual or 2 * number <= len(values)
        )
        found.append(Divergence(names[column], odd, len(values)))
    return found


def compute_twice(compute: Callable[[], Tensor], parameters: Iterable[Tensor]) -> list[str]:
    """Compute a loss and its gradients twice; return what was not the same bits, by rank.

    On a GPU only the loss is compared: some kernels of backward passes add up in the order in which threads come.
    The gradients are gone afterwards. Every rank has to call, because `compute` may wait for the others.

    Args:
        compute: forward and backward pass of a micro-batch; returns what this rank computed of its loss.
        parameters: those that get gradients.
    """
    trained = list(parameters)
    first, second = _run(compute, trained), _run(compute, trained)
    what = "" if torch.equal(first, second) else "loss" if first[0] != second[0] else "gradient"
    differences = gather(what, dist.group.WORLD if dist.is_initialized() else None)
    # Ranks exchange gradients: where one has computed another loss, the gradients of others follow from that.
    shown = "loss" if "loss" in differences else "gradient"
    return [
        f"rank {rank} computed the same micro-batch twice and got another {shown}"
        for rank, difference in enumerate(differences)
        if difference == shown
    ]


def _run(compute: Callable[[], Tensor], parameters: list[Tensor]) -> Tensor:
    """Checksums of the loss and of every gradient."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        loss = compute()
    sums = [checksum(loss)]
    if loss.device.type == "cpu":
        sums += [checksum(parameter.grad) for parameter in parameters if parameter.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    return torch.stack(sums)
