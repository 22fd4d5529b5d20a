"""Trained keys and values before every document, in all layers (Li and Liang 2021, arXiv:2101.00190, section 4).

The keys and values are trained themselves, without the network of section 4.3 that makes them.

Shapes: B batch, T tokens, P prefix, S = P + T, L layers, G key/value heads, K head dimension, H query heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from puna.model.attend import scaled_dot_product
from puna.model.config import LlamaConfig
from puna.model.transformer import Transformer
from puna.peft.method import VirtualMethod, VirtualTokens
from puna.peft.virtual import check_number, documents_of, forward_arguments, read_number


@dataclass(frozen=True)
class PrefixConfig(VirtualMethod):
    """Prefix tuning: trained keys and values that every token of every document sees, in every layer."""

    PEFT_TYPE: ClassVar[str] = "PREFIX_TUNING"

    kind: Literal["prefix"] = "prefix"
    """The method."""
    num_virtual_tokens: int = 20
    """Keys and values before each document, in each layer and head."""
    whole: tuple[str, ...] = ()
    """Parameters of the model to train beside them, by name with wildcards: "output", "*norm"."""

    def __post_init__(self) -> None:
        check_number(self.num_virtual_tokens)

    def width(self, config: LlamaConfig) -> int:
        """See `VirtualMethod.width`."""
        return config.num_layers * 2 * config.num_kv_heads * config.head_dim

    def put_on(self, model: Transformer, generator: torch.Generator) -> None:
        """See `VirtualMethod.put_on`."""
        vectors = torch.empty(self.num_virtual_tokens, self.width(model.config)).normal_(generator=generator)
        Prefix(model, vectors.to(model.norm.weight.device))

    def to_peft(self, config: LlamaConfig, maps: Sequence[str]) -> dict[str, Any]:
        """See `Method.to_peft`."""
        return {
            "num_virtual_tokens": self.num_virtual_tokens,
            "token_dim": config.num_kv_heads * config.head_dim,
            "num_transformer_submodules": 1,
            "num_attention_heads": config.num_kv_heads,
            "num_layers": config.num_layers,
            "encoder_hidden_size": config.dim,
            "prefix_projection": False,
        }

    @classmethod
    def from_peft(
        cls, values: Mapping[str, Any], maps: tuple[str, ...], whole: tuple[str, ...], where: str
    ) -> "PrefixConfig":
        """See `Method.from_peft`. PEFT stores what the network made, if there was one."""
        return cls(num_virtual_tokens=read_number(values, where), whole=whole)


class Prefix(VirtualTokens):
    """The keys and values, in a model as `model.prefix`; takes part in its forward through a hook.

    Attributes:
        vectors: [P, L * 2 * G * K], in float32: of each layer its keys, not rotated any further, and its values.
    """

    def __init__(self, model: Transformer, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors)
        self.num_kv_heads, self.head_dim = model.config.num_kv_heads, model.config.head_dim
        model.add_module("prefix", self)
        self.hook = model.register_forward_pre_hook(self._prepend, with_kwargs=True)

    def take_off(self, model: Transformer) -> None:
        """See `VirtualTokens.take_off`."""
        self.hook.remove()
        del model.prefix

    def _prepend(
        self, model: Transformer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids_BT, positions_BT, attend, head = forward_arguments(*args, **kwargs)
        documents_BT, is_causal = documents_of(attend, ids_BT)
        mask_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
        if isinstance(is_causal, Tensor):
            mask_BTT = mask_BTT.tril() | (mask_BTT & ~is_causal[:, None, None])
        elif is_causal:
            mask_BTT = mask_BTT.tril()
        seen_BTP = mask_BTT.new_ones(*ids_BT.shape, len(self.vectors))
        prefixed = PrefixAttend(torch.cat((seen_BTP, mask_BTT), dim=2), self.keys_and_values())
        return (), {
            "ids_BT": ids_BT,
            "positions_BT": positions_BT + len(self.vectors),
            "attend": prefixed,
            "head": head,
        }

    def keys_and_values(self) -> Tensor:
        """[L, 2, P, G, K]."""
        return self.vectors.view(len(self.vectors), -1, 2, self.num_kv_heads, self.head_dim).permute(1, 2, 0, 3, 4)


class PrefixAttend:
    """Attention over a prefix and what the mask allows of the row; a mask over whole rows, however they are packed."""

    def __init__(self, mask_BTS: Tensor, prefix_L2PGK: Tensor) -> None:
        self.mask_BTS, self.prefix_L2PGK = mask_BTS, prefix_L2PGK

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        keys_PGK, values_PGK = self.prefix_L2PGK[layer].to(q_BTHK.dtype)
        rows = len(q_BTHK)
        k_BSGK = torch.cat((keys_PGK.expand(rows, -1, -1, -1), k_BTGK), dim=1)
        v_BSGK = torch.cat((values_PGK.expand(rows, -1, -1, -1), v_BTGK), dim=1)
        return scaled_dot_product(q_BTHK, k_BSGK, v_BSGK, mask_BTS=self.mask_BTS)
