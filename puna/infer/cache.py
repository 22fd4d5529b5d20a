"""Keys and values of tokens seen before, in blocks, and the attention context that reads and writes them.

Shapes: N tokens of a forward, B sequences, T tokens of each, S slots that a query may see, H query heads, G key/value
heads, J query heads per key/value head (H / G), K head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from puna.kernels.attend import document_attend
from puna.model.accounting import kv_bytes_per_token
from puna.model.attend import Attend, causal
from puna.model.config import LlamaConfig
from puna.runtime.errors import InputError

_SPREAD = 256
"""Sequences share a padded gather where the longest has at most twice the shortest's tokens, and this many more."""


class KVPool:
    """Room for `num_blocks` blocks of `block_size` tokens each, taken once, and one more for what nobody reads.

    Args:
        dtype: in which keys and values are stored.
        activations: the dtype of the queries that meet them; `dtype` where absent.

    Attributes:
        keys, values: for each layer a tensor [num_blocks + 1, block_size, G, K].

    Raises:
        InputError: the device has not enough memory.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
        activations: torch.dtype | None = None,
    ) -> None:
        self.activations = activations or dtype
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        shape = (num_blocks + 1, block_size, config.num_kv_heads, config.head_dim)

        def room() -> list[Tensor]:
            # Zeros, as a masked slot still counts with weight 0, and 0 times an uninitialised NaN is NaN.
            return [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]

        try:
            self.keys, self.values = room(), room()
        except (RuntimeError, MemoryError) as error:
            gigabytes = num_blocks * block_size * kv_bytes_per_token(config, dtype.itemsize) / 1e9
            raise InputError(
                f"The cache for {num_blocks * block_size:,} tokens takes {gigabytes:.1f} GB, more than {device} has "
                "free. Lower the context length, the number of rows, or cache_tokens."
            ) from error


class PagedAttend:
    """Causal attention of new tokens to themselves and to what the cache holds of their sequences; an `Attend`.

    It is made for one forward over the new tokens of all sequences side by side, in one row.

    Args:
        pool: the cache; the blocks of the new tokens belong to their sequences.
        tables: for each sequence a row with its blocks, in order; int64.
        starts: for each sequence the position of its first new token.
        counts: how many new tokens it has.
        num_padding: tokens at the end that belong to no sequence, and whose results mean nothing.
        alone: compute each sequence by itself, so that its result does not depend on the others.

    Attributes:
        positions_1N: the position of each token, which the forward needs as well.

    Example:
        attend = PagedAttend(pool, tables, [7, 0], [1, 5])  # one sequence decodes, one prompt begins
        logits_1NV = model(ids_1N, attend.positions_1N, attend)
    """

    def __init__(
        self,
        pool: KVPool,
        tables: NDArray[np.int64],
        starts: Sequence[int],
        counts: Sequence[int],
        *,
        num_padding: int = 0,
        alone: bool = False,
    ) -> None:
        self._pool = pool
        size = pool.block_size
        if max(counts) == 1:
            rows_N = np.arange(len(starts))
            positions_N = np.array(starts, dtype=np.int64)
        else:
            rows_N = np.repeat(np.arange(len(starts)), counts)
            positions_N = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)])
        slots_N = tables[rows_N, positions_N // size] * size + positions_N % size
        if num_padding:
            positions_N = np.concatenate([positions_N, np.zeros(num_padding, np.int64)])
            spare = pool.num_blocks * size + np.arange(num_padding) % size
            slots_N = np.concatenate([slots_N, spare])
        self.positions_1N = torch.from_numpy(positions_N)[None].to(pool.device)
        self._slots_N = torch.from_numpy(slots_N).to(pool.device)
        self._parts = list(_parts(pool, tables, starts, counts, alone))
        self._whole = len(self._parts) == 1 and not num_padding

    def __call__(self, layer: int, q_1NHK: Tensor, k_1NGK: Tensor, v_1NGK: Tensor) -> Tensor:
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        keys.flatten(0, 1).index_copy_(0, self._slots_N, k_1NGK[0].to(keys.dtype))
        values.flatten(0, 1).index_copy_(0, self._slots_N, v_1NGK[0].to(values.dtype))
        if self._whole:
            return self._parts[0].attend(layer, q_1NHK, k_1NGK, v_1NGK, keys, values)
        o_1NHK = torch.zeros_like(q_1NHK)
        for part in self._parts:
            # Copies, because results depend on how the memory is aligned, if only in their last bit.
            q, k, v = (x[:, part.tokens].clone() for x in (q_1NHK, k_1NGK, v_1NGK))
            o_1NHK[:, part.tokens] = part.attend(layer, q, k, v, keys, values)
        return o_1NHK


@dataclass
class _Fresh:
    """Beginnings of sequences: nothing of them is in the cache yet, so nothing is read from it."""

    tokens: slice
    context: Attend

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.context(layer, q, k, v)


@dataclass
class _Cached:
    """Sequences with equally many new tokens (T), which see what the cache holds of them.

    `source` is either the slots of a single sequence, where they lie side by side and are read where they are, or the
    blocks to gather. `mask` is what to add to the scores, [B, 1, T, S], or None where all is seen.
    """

    tokens: slice
    num_sequences: int
    num_slots: int
    source: slice | Tensor
    mask: Tensor | None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q_BTHK = q.view(self.num_sequences, -1, *q.shape[2:])
        k_BGSK, v_BGSK = (self._read(x).to(q.dtype).transpose(1, 2) for x in (keys, values))
        num_groups = k_BGSK.shape[1]
        if q_BTHK.shape[1] > 1:
            o_BHTK = F.scaled_dot_product_attention(
                q_BTHK.transpose(1, 2), k_BGSK, v_BGSK, attn_mask=self.mask, enable_gqa=q.shape[2] != num_groups
            )
            return o_BHTK.transpose(1, 2).flatten(0, 1).unsqueeze(0)
        # The one query of each of a group's heads sees the same slots, so they can pass for J queries of one head,
        # and the cache need not be repeated for each.
        q_BGJK = q_BTHK.view(len(q_BTHK), num_groups, -1, q.shape[3])
        o_BGJK = F.scaled_dot_product_attention(q_BGJK, k_BGSK, v_BGSK, attn_mask=self.mask)
        return o_BGJK.flatten(1, 2).unsqueeze(0)

    def _read(self, cached: Tensor) -> Tensor:
        if isinstance(self.source, slice):
            return cached.flatten(0, 1)[self.source].unsqueeze(0)
        gathered = cached.index_select(0, self.source)
        return gathered.view(self.num_sequences, -1, *cached.shape[2:])[:, : self.num_slots]


def _parts(
    pool: KVPool, tables: NDArray[np.int64], starts: Sequence[int], counts: Sequence[int], alone: bool
) -> "list[_Fresh | _Cached]":
    """What to compute together. Sequences that decode are best given sorted by length."""
    parts: list[_Fresh | _Cached] = []
    first_token = first = 0
    while first < len(starts):
        last = first + 1
        fresh = counts[first] > 1 and starts[first] == 0
        if not alone:
            while last < len(starts) and _together(first, last, starts, counts):
                last += 1
        num_tokens = sum(counts[first:last])
        tokens = slice(first_token, first_token + num_tokens)
        if fresh:
            context = causal
            if last - first > 1:
                documents_N = np.repeat(np.arange(last - first), counts[first:last])
                context = document_attend(torch.from_numpy(documents_N)[None].to(pool.device))
            parts.append(_Fresh(tokens, context))
        else:
            ends = [s + n for s, n in zip(starts[first:last], counts[first:last], strict=True)]
            parts.append(_cached(pool, tables[first:last], tokens, ends, counts[first]))
        first, first_token = last, first_token + num_tokens
    return parts


def _together(first: int, other: int, starts: Sequence[int], counts: Sequence[int]) -> bool:
    if counts[first] > 1:
        return starts[first] == starts[other] == 0 and counts[other] > 1
    near = max(starts[first], starts[other]) <= 2 * min(starts[first], starts[other]) + _SPREAD
    return counts[other] == 1 and near


def _cached(pool: KVPool, tables: NDArray[np.int64], tokens: slice, ends: Sequence[int], num_tokens: int) -> _Cached:
    num_slots, size = max(ends), pool.block_size
    blocks = tables[:, : -(-num_slots // size)]
    device = pool.device
    mask = None
    if num_tokens > 1 or min(ends) < num_slots:
        seen_BT = np.array(ends)[:, None] - np.arange(num_tokens)[::-1]
        hidden = np.arange(num_slots) >= seen_BT[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=pool.activations, device=device)
        mask.masked_fill_(torch.from_numpy(hidden).to(device), -torch.inf)
    if len(blocks) == 1 and (np.diff(blocks[0]) == 1).all():
        begin = int(blocks[0, 0]) * size
        return _Cached(tokens, 1, num_slots, slice(begin, begin + num_slots), mask)
    return _Cached(tokens, len(ends), num_slots, torch.from_numpy(blocks.flatten()).to(device), mask)
