"""Keys and values of tokens seen before, and the attention context that reads and writes them.

Shapes: B rows of a forward, T new tokens in each, S slots, H query heads, G key/value heads, J query heads per
key/value head (H / G), K head dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from puna.model.accounting import kv_bytes_per_token
from puna.model.attend import scaled_dot_product
from puna.model.config import LlamaConfig
from puna.runtime.errors import InputError


class KVCache:
    """Room for `rows` sequences of up to `slots` tokens, taken once.

    A token's slot is its position, and a query at position p sees slots 0 to p of its row. What lies behind a row's
    newest token (padding of a prefill, leftovers of the row's last owner) is therefore never seen: it is
    overwritten before a query gets that far.

    Attributes:
        keys, values: for each layer a tensor [rows, slots, G, K].

    Raises:
        InputError: the device has not enough memory.
    """

    def __init__(self, config: LlamaConfig, *, rows: int, slots: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (rows, slots, config.num_kv_heads, config.head_dim)

        def room() -> list[Tensor]:
            # Zeros, as a masked slot still counts with weight 0, and 0 times an uninitialised NaN is NaN.
            return [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]

        try:
            self.keys, self.values = room(), room()
        except (RuntimeError, MemoryError) as error:
            gigabytes = rows * slots * kv_bytes_per_token(config, dtype.itemsize) / 1e9
            raise InputError(
                f"The cache for {rows} sequences of {slots} tokens takes {gigabytes:.1f} GB, more than {device} has "
                "free. Lower the context length or the number of rows."
            ) from error

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` slots of row `source` to row `target`."""
        for cached in (*self.keys, *self.values):
            cached[target, :length] = cached[source, :length]


class CachedAttend:
    """Causal attention of new tokens to themselves and to what the cache holds of their rows; an `Attend`.

    It is made for one forward: the new tokens of the i-th sequence stand at positions starts[i] to
    starts[i] + num_tokens - 1 and belong to cache row first_row + i.

    Attributes:
        positions_BT: those positions, which the forward needs as well.

    Example:
        attend = CachedAttend(cache, 0, [0, 0], ids_BT.shape[1])
        logits_BTV = model(ids_BT, attend.positions_BT, attend)
    """

    def __init__(self, cache: KVCache, first_row: int, starts: Sequence[int], num_tokens: int) -> None:
        self._cache = cache
        self._rows = slice(first_row, first_row + len(starts))
        self._used = max(starts) + num_tokens
        device = cache.keys[0].device
        starts_B1 = torch.tensor(starts, device=device)[:, None]
        self.positions_BT = starts_B1 + torch.arange(num_tokens, device=device)

        self._aligned = min(starts) == max(starts)
        self._from_zero = max(starts) == 0
        self._mask_BTS: Tensor | None = None
        if not self._aligned or (num_tokens > 1 and not self._from_zero):
            slots_S = torch.arange(self._used, device=device)
            self._mask_BTS = slots_S <= self.positions_BT[:, :, None]
        if not self._aligned:
            self._rows_B1 = torch.arange(self._rows.start, self._rows.stop, device=device)[:, None]

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        keys_BSGK = self._remember(self._cache.keys[layer], k_BTGK)
        values_BSGK = self._remember(self._cache.values[layer], v_BTGK)
        if self._from_zero:
            return scaled_dot_product(q_BTHK, k_BTGK, v_BTGK, causal=True)
        if q_BTHK.shape[1] > 1:
            return scaled_dot_product(q_BTHK, keys_BSGK, values_BSGK, mask_BTS=self._mask_BTS)
        # The one query of each of a group's heads sees the same slots, so they can pass for J queries of one head,
        # and the cache need not be repeated for each.
        _, _, num_groups, head_dim = keys_BSGK.shape
        q_BJGK = q_BTHK.reshape(len(q_BTHK), num_groups, -1, head_dim).transpose(1, 2)
        o_BJGK = scaled_dot_product(q_BJGK, keys_BSGK, values_BSGK, mask_BTS=self._mask_BTS)
        return o_BJGK.transpose(1, 2).flatten(1, 2).unsqueeze(1)

    def _remember(self, cached: Tensor, new_BTGK: Tensor) -> Tensor:
        """Write new keys or values to their slots; return the used part of these rows."""
        if self._aligned:
            cached[self._rows, self._used - new_BTGK.shape[1] : self._used] = new_BTGK
        else:
            cached[self._rows_B1, self.positions_BT] = new_BTGK
        return cached[self._rows, : self._used]
