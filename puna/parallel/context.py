"""Context parallelism: each process holds some positions of every row, and keys and values are gathered for attention.

This is what Llama 3 was trained with (arXiv:2407.21783, section 3.3.2). Rows are cut into twice as many chunks as
processes; a process takes one from each end, so that causal attention is the same work for all. Gathering all keys at
once, and not passing them round a ring, makes any mask possible, and with grouped heads they are small.

torch's own `context_parallel` has no CPU form, and knows no documents.

Shapes: B rows, T positions of a row on this process, S positions of the whole row, C positions of a chunk, H query
heads, G key/value heads, K head dimension.
"""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from puna.batches.packing import TokenBatch
from puna.kernels.attend import NativeDocumentAttend
from puna.model.attend import Attend, DocumentAttend, bidirectional, causal, scaled_dot_product
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError


def own_chunks(rank: int, size: int) -> tuple[int, int]:
    """The two chunks of 2 * `size` that a process holds."""
    return rank, 2 * size - 1 - rank


def own_positions(batch: TokenBatch, rank: int, size: int) -> TokenBatch:
    """The positions of each row that belong to process `rank` of `size`; rows divide by 2 * `size`.

    Raises:
        InputError: the batch has columns that are not by position.
    """
    columns = {field.name: getattr(batch, field.name) for field in fields(batch)}
    if strange := [name for name, column in columns.items() if column.shape != batch.ids_BT.shape]:
        raise InputError(
            f"The run's batches have {', '.join(strange)} for each row, not for each position, so that "
            "processes cannot share rows: set train.parallel.context to 1."
        )
    length = batch.ids_BT.shape[1] // (2 * size)
    spans = [slice(length * chunk, length * (chunk + 1)) for chunk in own_chunks(rank, size)]

    def cut(x: Tensor) -> Tensor:
        return torch.cat([x[:, span] for span in spans], 1)

    return replace(batch, **{name: cut(column) for name, column in columns.items()})


class GatheredAttend:
    """Attention of this process's queries to the keys of all positions, for any context that training uses.

    Args:
        inner: the context as a loss gave it, which knows only this process's positions.
        mesh: the processes that share each row.
    """

    def __init__(self, inner: Attend, mesh: DeviceMesh) -> None:
        if not (inner in (causal, bidirectional) or isinstance(inner, DocumentAttend | NativeDocumentAttend)):
            raise TypeError(f"Context parallelism does not know the attention context {inner!r}.")
        self._mesh, self._rank, self._size = mesh, mesh.get_local_rank(), mesh.size()
        self._causal = inner is causal or (inner is not bidirectional and inner.causal)  # type: ignore[attr-defined]
        self._documents_BT = getattr(inner, "documents_BT", None)
        self._documents_BS = None if self._documents_BT is None else self._gather(self._documents_BT)

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        k_BSGK, v_BSGK = self._gather(k_BTGK), self._gather(v_BTGK)
        length = q_BTHK.shape[1] // 2
        parts = []
        for n, chunk in enumerate(own_chunks(self._rank, self._size)):
            own = slice(n * length, (n + 1) * length)
            start = chunk * length
            visible = start + length if self._causal else k_BSGK.shape[1]
            mask_BCS = self._mask(own, start, visible, q_BTHK)
            parts.append(
                scaled_dot_product(q_BTHK[:, own], k_BSGK[:, :visible], v_BSGK[:, :visible], mask_BTS=mask_BCS)
            )
        return torch.cat(parts, 1)

    def _mask(self, own: slice, start: int, visible: int, q_BTHK: Tensor) -> Tensor | None:
        """Which of the first `visible` keys each query of a chunk may look at; none when it is all of them."""
        queries = torch.arange(start, start + own.stop - own.start, device=q_BTHK.device)
        mask = None
        if self._causal:
            mask = (queries[:, None] >= torch.arange(visible, device=q_BTHK.device)).expand(len(q_BTHK), -1, -1)
        if self._documents_BT is not None and self._documents_BS is not None:
            same = self._documents_BT[:, own, None] == self._documents_BS[:, None, :visible]
            mask = same if mask is None else mask & same
        return mask

    def _gather(self, x: Tensor) -> Tensor:
        """What all processes hold along dim 1, in the order of the row; gradients are summed on the way back."""
        shared = DTensor.from_local(x.contiguous(), self._mesh, [Shard(1)], run_check=False)
        gathered: Tensor = shared.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        held = [chunk for rank in range(self._size) for chunk in own_chunks(rank, self._size)]
        chunks = gathered.chunk(len(held), 1)
        return torch.cat([chunks[held.index(n)] for n in range(len(held))], 1)


def gather_context(model: Transformer, mesh: DeviceMesh) -> None:
    """Make every call of `model` attend to all positions of its rows, of which it is given this process's."""

    def adapt(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = ("ids_BT", "positions_BT", "attend", "head")
        given = dict(zip(names, args, strict=False)) | kwargs
        if given.get("positions_BT") is None:
            raise TypeError("Context parallelism needs positions_BT: a process cannot tell which positions it holds.")
        given["attend"] = GatheredAttend(given.get("attend", causal), mesh)
        return (), given

    model.register_forward_pre_hook(adapt, with_kwargs=True)
