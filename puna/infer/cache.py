"""Keys and values of tokens seen before, in blocks, and the attention context that reads and writes them.

Shapes: N tokens of a forward, B sequences, T tokens of each, S slots that a query may see, H query heads, G key/value
heads, J query heads per key/value head (H / G), K head dimension; in gated layers C tokens that are computed, and R of
them that pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from puna.kernels.attend import document_attend
from puna.model.accounting import kv_bytes_per_token
from puna.model.attend import Attend, causal, scaled_dot_product
from puna.model.config import LlamaConfig
from puna.runtime.errors import InputError

_FEW = 16
"""At most so many new tokens a sequence, equally many each, are computed for several sequences together: what decodes,
and what checks guesses."""

LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""Of the types that need scales, the largest number that is used."""

_SPREAD = 256
"""Sequences share a padded gather where the longest has at most twice the shortest's tokens, and this many more."""


class KVPool:
    """Room for `num_blocks` blocks of `block_size` tokens each, taken once, and one more for what nobody reads.

    Args:
        dtype: in which keys and values are stored. As int8 or float8_e4m3fn they have a scale for each token and head
            (`quantize`).
        activations: the dtype of the queries that meet them; `dtype` where absent.

    Attributes:
        keys, values: for each layer a tensor [num_blocks + 1, block_size, G, K].
        key_scales, value_scales: for each layer [num_blocks + 1, block_size, G], where there are scales.
        passed: for each gated layer (`puna.model.depths`) that has written, by its number: which slots, in a row, hold
            a token that went through it. The others hold nothing of that layer.

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
        self.dtype = dtype
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self.passed: dict[int, Tensor] = {}
        shape = (num_blocks + 1, block_size, config.num_kv_heads, config.head_dim)

        scaled = dtype in LARGEST_CODE

        def room(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
            # Zeros, as a masked slot still counts with weight 0, and 0 times an uninitialised NaN is NaN.
            return [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]

        try:
            self.keys, self.values = room(shape, dtype), room(shape, dtype)
            self.key_scales = room(shape[:-1], torch.bfloat16) if scaled else []
            self.value_scales = room(shape[:-1], torch.bfloat16) if scaled else []
        except (RuntimeError, MemoryError) as error:
            gigabytes = num_blocks * block_size * kv_bytes_per_token(config, dtype.itemsize) / 1e9
            raise InputError(
                f"The cache for {num_blocks * block_size:,} tokens takes {gigabytes:.1f} GB, more than {device} has "
                "free. Lower the context length, the number of rows, or cache_tokens."
            ) from error

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return sum(x.nbytes for x in (*self.keys, *self.values, *self.key_scales, *self.value_scales))

    def write(self, layer: int, slots_N: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values of new tokens; returns them as they will be read, in `activations`."""
        k_NGK = self._store(self.keys[layer], self.key_scales[layer : layer + 1], slots_N, k_NGK)
        return k_NGK, self._store(self.values[layer], self.value_scales[layer : layer + 1], slots_N, v_NGK)

    def write_passed(self, layer: int, slots_R: Tensor, k_RGK: Tensor, v_RGK: Tensor) -> Tensor:
        """Store keys and values of the tokens that go through a gated layer; returns its row of `passed`."""
        self.write(layer, slots_R, k_RGK, v_RGK)
        passed = self.passed.get(layer)
        if passed is None:
            num_slots = (self.num_blocks + 1) * self.block_size
            passed = self.passed[layer] = torch.zeros(num_slots, dtype=torch.bool, device=self.device)
        passed[slots_R] = True
        return passed

    def _store(self, stored: Tensor, scales: list[Tensor], slots_N: Tensor, x_NGK: Tensor) -> Tensor:
        if not scales:
            codes_NGK = x_NGK.to(self.dtype)
            stored.flatten(0, 1).index_copy_(0, slots_N, codes_NGK)
            return codes_NGK.to(self.activations)
        codes_NGK, scales_NG = quantize(x_NGK, self.dtype)
        # As bytes, because few operations know float8.
        stored.view(torch.uint8).flatten(0, 1).index_copy_(0, slots_N, codes_NGK.view(torch.uint8))
        scales[0].flatten(0, 1).index_copy_(0, slots_N, scales_NG)
        return dequantize(codes_NGK, scales_NG, self.activations)

    def read(self, layer: int, choose: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values in `activations`.

        Args:
            choose: takes what is wanted out of a tensor [num_blocks + 1, block_size, ...].
        """
        k, v = self.keys[layer], self.values[layer]
        if not self.key_scales:
            return choose(k).to(self.activations), choose(v).to(self.activations)
        k_codes, v_codes = (choose(codes.view(torch.uint8)).view(self.dtype) for codes in (k, v))
        k_scales, v_scales = choose(self.key_scales[layer]), choose(self.value_scales[layer])
        return dequantize(k_codes, k_scales, self.activations), dequantize(v_codes, v_scales, self.activations)


def quantize(x_NGK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [N, G, K] in int8 or float8_e4m3fn, and their scales [N, G] in bfloat16: x is about code times scale.

    A head's largest magnitude gets about the largest code. The scale is rounded first, so that its rounding costs no
    precision: an int8 code is off by at most half a unit.
    """
    largest = LARGEST_CODE[dtype]
    scales_NG = (x_NGK.float().abs().amax(-1) / largest).bfloat16()
    wide_NG1 = scales_NG.float()[..., None]
    scaled_NGK = torch.where(wide_NG1 > 0, x_NGK.float() / wide_NG1, 0).clamp(-largest, largest)
    return (scaled_NGK.round() if dtype is torch.int8 else scaled_NGK).to(dtype), scales_NG


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes times scales, in `dtype`."""
    return codes.to(dtype) * scales.to(dtype)[..., None]


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
        keeps_shape: whether gated layers compute every token (`puna.model.depths.Narrowable`).

    Attributes:
        positions_1N: the position of each token, which the forward needs as well.
        pool, tables, starts, counts, num_padding, alone, keeps_shape: as given; `alone` implies `keeps_shape`.

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
        keeps_shape: bool = False,
    ) -> None:
        self.pool = pool
        self.tables, self.starts, self.counts = tables, starts, counts
        self.num_padding, self.alone, self.keeps_shape = num_padding, alone, alone or keeps_shape
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
        for passed in pool.passed.values():
            passed[self._slots_N] = False  # until they do
        self._parts = list(_parts(pool, tables, starts, counts, alone))
        self._whole = len(self._parts) == 1 and not num_padding

    def __call__(self, layer: int, q_1NHK: Tensor, k_1NGK: Tensor, v_1NGK: Tensor) -> Tensor:
        # Whether it comes from the cache or is new, a token is seen as it is stored.
        k_NGK, v_NGK = self.pool.write(layer, self._slots_N, k_1NGK[0], v_1NGK[0])
        k_1NGK, v_1NGK = k_NGK[None], v_NGK[None]
        if self._whole:
            return self._parts[0].attend(layer, q_1NHK, k_1NGK, v_1NGK, self.pool)
        o_1NHK = torch.zeros_like(q_1NHK)
        for part in self._parts:
            # Copies, because results depend on how the memory is aligned, if only in their last bit.
            q, k, v = (x[:, part.tokens].clone() for x in (q_1NHK, k_1NGK, v_1NGK))
            o_1NHK[:, part.tokens] = part.attend(layer, q, k, v, self.pool)
        return o_1NHK

    def narrow(self, chosen_1C: Tensor, real_1C: Tensor) -> Attend:
        """The context of a gated layer, see `puna.model.depths.attend_to_chosen`."""
        ends_B = np.cumsum(self.counts)
        real_C = real_1C[0] & (chosen_1C[0] < int(ends_B[-1]))  # no padding
        rows_R = real_C.nonzero()[:, 0]
        places_R = chosen_1C[0, rows_R]
        firsts = [0, *np.searchsorted(places_R.cpu().numpy(), ends_B)]
        size, parts = self.pool.block_size, []
        for number, (first, last) in enumerate(pairwise(firsts)):
            if first < last:
                end = self.starts[number] + self.counts[number]
                slots_S = self.tables[number, np.arange(end) // size] * size + np.arange(end) % size
                parts.append((rows_R[first:last], torch.from_numpy(slots_S).to(self.pool.device)))
        return _PassedAttend(self.pool, self._slots_N[places_R], rows_R, parts)


@dataclass
class _PassedAttend:
    """`PagedAttend` in a gated layer: tokens that pass see those that passed before them.

    Sequence by sequence, because each has another number of them.

    Args:
        slots_R: where the tokens that pass are stored; `rows_R` which of the computed tokens they are.
        parts: for each sequence of which some token passes those of its tokens, and the slots of all of them.
    """

    pool: KVPool
    slots_R: Tensor
    rows_R: Tensor
    parts: list[tuple[Tensor, Tensor]]

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        passed = self.pool.write_passed(layer, self.slots_R, k_BTGK[0, self.rows_R], v_BTGK[0, self.rows_R])
        o_BTHK = torch.zeros_like(q_BTHK)
        for rows_T, slots_S in self.parts:
            seen_S = slots_S[passed[slots_S]]
            k_1SGK, v_1SGK = self.pool.read(layer, partial(_take, seen_S))
            mask_TS = torch.ones(len(rows_T), len(seen_S), dtype=torch.bool, device=seen_S.device)
            mask_1TS = mask_TS.tril(len(seen_S) - len(rows_T))[None]
            o_BTHK[:, rows_T] = scaled_dot_product(q_BTHK[:, rows_T], k_1SGK, v_1SGK, mask_BTS=mask_1TS)
        return o_BTHK


def _take(slots_S: Tensor, cached: Tensor) -> Tensor:
    """Some slots of a tensor [num_blocks + 1, block_size, ...], in a row."""
    return cached.flatten(0, 1)[slots_S].unsqueeze(0)


@dataclass
class _Fresh:
    """Beginnings of sequences: nothing of them is in the cache yet, so nothing is read from it."""

    tokens: slice
    context: Attend

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, pool: KVPool) -> Tensor:
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

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, pool: KVPool) -> Tensor:
        q_BTHK = q.view(self.num_sequences, -1, *q.shape[2:])
        k_BGSK, v_BGSK = (x_BSGK.transpose(1, 2) for x_BSGK in pool.read(layer, self._choose))
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

    def _choose(self, cached: Tensor) -> Tensor:
        if isinstance(self.source, slice):
            return cached.flatten(0, 1)[self.source].unsqueeze(0)
        gathered = cached.index_select(0, self.source)
        return gathered.view(self.num_sequences, -1, *cached.shape[2:])[:, : self.num_slots]


def _parts(
    pool: KVPool, tables: NDArray[np.int64], starts: Sequence[int], counts: Sequence[int], alone: bool
) -> "list[_Fresh | _Cached]":
    """What to compute together. Sequences with equally many new tokens are best given sorted by length."""
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
    fresh = counts[first] > 1 and starts[first] == 0, counts[other] > 1 and starts[other] == 0
    if any(fresh):
        return all(fresh)
    near = max(starts[first], starts[other]) <= 2 * min(starts[first], starts[other]) + _SPREAD
    return counts[first] == counts[other] <= _FEW and near


def _cached(pool: KVPool, tables: NDArray[np.int64], tokens: slice, ends: Sequence[int], num_tokens: int) -> _Cached:
    num_slots, size = max(ends), pool.block_size
    blocks = tables[:, : -(-num_slots // size)]
    device = pool.device
    mask = None
    if num_tokens > 1 or min(ends) < num_slots:
        seen_BT = np.array(ends)[:, None] - np.arange(num_tokens)[::-1]
        scores = np.zeros((len(ends), 1, num_tokens, num_slots), dtype=np.float32)
        scores[np.arange(num_slots) >= seen_BT[:, None, :, None]] = -np.inf
        mask = torch.from_numpy(scores).to(device, pool.activations)
    if len(blocks) == 1 and (np.diff(blocks[0]) == 1).all():
        begin = int(blocks[0, 0]) * size
        return _Cached(tokens, 1, num_slots, slice(begin, begin + num_slots), mask)
    return _Cached(tokens, len(ends), num_slots, torch.from_numpy(blocks.flatten()).to(device), mask)
