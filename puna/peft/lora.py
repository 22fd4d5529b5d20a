"""Low-rank adaptation: W x + s B A x with small A and B (Hu et al. 2021, arXiv:2106.09685, section 4.1).

Shapes: N outputs, K inputs, R rank.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.peft.method import AdaptedLinear, Base
from puna.runtime.errors import InputError


@dataclass(frozen=True)
class LoRAConfig:
    """How large the low-rank products are, and which maps get one."""

    PEFT_TYPE: ClassVar[str] = "LORA"

    rank: int = 16
    """Rank of the update of each weight."""
    alpha: float = 32.0
    """The update is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of the inputs to each update that is dropped in training."""
    rank_stabilized: bool = False
    """Multiply by alpha / sqrt(rank) instead, so that high ranks learn as fast as low ones (rsLoRA, Kalajdzievski 2023,
    arXiv:2312.03732)."""
    targets: tuple[str, ...] = ("layers.*",)
    """Linear maps to adapt, by name with wildcards: "layers.*" is all but the projection to the vocabulary,
    "layers.*.attention.query" the queries' of every layer."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank is {self.rank}; it has to be at least 1.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout}; it has to be at least 0 and below 1.")

    @property
    def scale(self) -> float:
        """What the low-rank product is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def wrap(self, base: Base, generator: torch.Generator) -> "LoRALinear":
        """See `Method.wrap`."""
        return LoRALinear(base, self, generator)

    def shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """See `Method.shapes`."""
        return {"lora_a": (self.rank, in_features), "lora_b": (out_features, self.rank)}

    def to_peft(self) -> dict[str, Any]:
        """See `Method.to_peft`."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rank_stabilized,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        }

    @classmethod
    def from_peft(cls, values: Mapping[str, Any], targets: tuple[str, ...], where: str) -> "LoRAConfig":
        """See `Method.from_peft`."""
        for key, harmless in _PLAIN.items():
            if values.get(key) not in harmless:
                raise InputError(f"{where} has {key} = {values[key]!r}, which Puna's LoRA does not compute.")
        initial = values.get("init_lora_weights", True)
        if isinstance(initial, str) and initial.startswith(_CHANGE_THE_BASE):
            raise InputError(
                f"{where} has init_lora_weights = {initial!r}, which changes the model below the adapter, too, so that "
                "the adapter alone does not say what was trained. Convert it to a plain LoRA with PEFT "
                "(save_pretrained with path_initial_model_for_weight_conversion)."
            )
        rank, alpha = values.get("r"), values.get("lora_alpha")
        if not isinstance(rank, int) or not isinstance(alpha, int | float):
            raise InputError(f"{where}: r ({rank!r}) has to be a whole number and lora_alpha ({alpha!r}) a number.")
        return cls(
            rank=rank,
            alpha=alpha,
            dropout=values.get("lora_dropout") or 0.0,
            rank_stabilized=bool(values.get("use_rslora")),
            targets=targets,
        )


_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "layer_replication": (None,),
}
"""Settings of PEFT's that change what is computed -> the values that ask for nothing."""

_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class LoRALinear(AdaptedLinear):
    """A linear map with a low-rank update beside it.

    Attributes:
        lora_a: [R, K], in float32; random at first.
        lora_b: [N, R], in float32; zero at first, so that the update is.
    """

    FILE_NAMES: ClassVar[Mapping[str, str]] = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}

    def __init__(self, base: Base, config: LoRAConfig, generator: torch.Generator) -> None:
        super().__init__(base)
        self.scale, self.dropout = config.scale, config.dropout
        device = (base.weight if base.bias is None else base.bias).device
        # Kaiming's uniform with a = sqrt(5), as in the authors' code and PEFT.
        limit = 1 / math.sqrt(self.in_features)
        a_RK = torch.empty(config.rank, self.in_features).uniform_(-limit, limit, generator=generator)
        self.lora_a = nn.Parameter(a_RK.to(device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, config.rank, device=device))

    def adapted(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training)
        update = F.linear(F.linear(dropped, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))
        return self.base(x) + update * self.scale  # type: ignore[no-any-return]

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        weight_NK = self.base.weight
        return (weight_NK.float() + self.lora_b.float() @ self.lora_a.float() * self.scale).to(weight_NK.dtype)
