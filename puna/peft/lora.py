"""Low-rank adaptation and its variants: LoRA (Hu et al. 2021, arXiv:2106.09685), rsLoRA, DoRA, LoRA+ and, over a
base in four bits, QLoRA."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch

from puna.model.config import LlamaConfig
from puna.model.transformer import Transformer
from puna.peft.apply import adapted_maps
from puna.peft.dora import DoRALinear
from puna.peft.low_rank import LoRALinear
from puna.peft.method import AdaptedLinear, Base, MapMethod, Training, hf_name, lookup
from puna.peft.nf4 import NF4Config, quantize_nf4
from puna.runtime.errors import InputError


@dataclass(frozen=True)
class LoRAConfig(MapMethod):
    """Low-rank updates beside linear maps: how large, and which maps get one."""

    PEFT_TYPE: ClassVar[str] = "LORA"

    kind: Literal["lora"] = "lora"
    """The method."""
    rank: int = 16
    """Rank of the update of each weight."""
    alpha: float = 32.0
    """The update is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of the inputs to each update that is dropped in training."""
    rank_stabilized: bool = False
    """Multiply by alpha / sqrt(rank) instead, so that high ranks learn as fast as low ones (rsLoRA, Kalajdzievski 2023,
    arXiv:2312.03732)."""
    weight_decomposed: bool = False
    """Train the length of each output's weights beside the update of their direction (DoRA, Liu et al. 2024,
    arXiv:2402.09353)."""
    four_bits: NF4Config | None = None
    """Keep the model below in four bits while the adapters are trained (QLoRA, Dettmers et al. 2023,
    arXiv:2305.14314)."""
    b_rate: float = 1.0
    """Learning rate of B, and of DoRA's lengths, as a multiple of A's (LoRA+, Hayou et al. 2024, arXiv:2402.12354,
    whose section 5 recommends 16)."""
    targets: tuple[str, ...] = ("layers.*",)
    """Linear maps to adapt, by name with wildcards: "layers.*" is all but the projection to the vocabulary,
    "layers.*.attention.query" the queries' of every layer."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Ranks of some of them, by name with wildcards, in place of `rank`."""
    alphas: Mapping[str, float] = field(default_factory=dict)
    """Likewise in place of `alpha`."""
    whole: tuple[str, ...] = ()
    """Parameters of the model to train beside the adapters, by name with wildcards: "output", "*norm"."""

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.ranks.values()):
            if rank < 1:
                raise InputError(f"rank is {rank}; it has to be at least 1.")
        refuse_dropout(self.dropout)
        if self.b_rate < 1:
            raise InputError(f"b_rate is {self.b_rate}; it has to be at least 1.")

    def rank_of(self, name: str) -> int:
        """Rank of the update of the map `name`."""
        return lookup(self.ranks, name, self.rank)

    def scale_of(self, name: str) -> float:
        """What that update is multiplied by."""
        rank = self.rank_of(name)
        return lookup(self.alphas, name, self.alpha) / (math.sqrt(rank) if self.rank_stabilized else rank)

    def prepare(self, model: Transformer) -> None:
        """See `Method.prepare`."""
        if self.four_bits is not None:
            quantize_nf4(model, self.four_bits)

    def training(self, model: Transformer, steps: int) -> Training:
        """See `Method.training`."""
        names = [f"{name}.{own}" for name, adapted in adapted_maps(model).items() for own in adapted.FILE_NAMES]
        return Training(rates={name: self.b_rate for name in names if not name.endswith(".lora_a")})

    @classmethod
    def linear(cls, values: Mapping[str, Any]) -> type[AdaptedLinear]:
        """See `MapMethod.linear`."""
        return DoRALinear if values.get("use_dora") else LoRALinear

    def wrap(self, name: str, base: Base, generator: torch.Generator) -> LoRALinear:
        """See `MapMethod.wrap`."""
        linear = DoRALinear if self.weight_decomposed else LoRALinear
        return linear(base, self.rank_of(name), self.scale_of(name), self.dropout, generator)

    def shapes(self, name: str, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """See `MapMethod.shapes`."""
        rank = self.rank_of(name)
        shapes: dict[str, tuple[int, ...]] = {"lora_a": (rank, in_features), "lora_b": (out_features, rank)}
        return shapes | ({"magnitude": (out_features,)} if self.weight_decomposed else {})

    def to_peft(self, config: LlamaConfig, maps: Sequence[str]) -> dict[str, Any]:
        """See `Method.to_peft`."""
        ranks = {hf_name(name): self.rank_of(name) for name in maps}
        alphas = {hf_name(name): lookup(self.alphas, name, self.alpha) for name in maps}
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rank_stabilized,
            "use_dora": self.weight_decomposed,
            "rank_pattern": {name: rank for name, rank in ranks.items() if rank != self.rank},
            "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != self.alpha},
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        }

    @classmethod
    def from_peft(
        cls, values: Mapping[str, Any], maps: tuple[str, ...], whole: tuple[str, ...], where: str
    ) -> "LoRAConfig":
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
            weight_decomposed=bool(values.get("use_dora")),
            targets=maps,
            ranks=_pattern(values, "rank_pattern", int, maps, where),
            alphas=_pattern(values, "alpha_pattern", (int, float), maps, where),
            whole=whole,
        )


Number = TypeVar("Number")


def _pattern(
    values: Mapping[str, Any], key: str, kind: type[Number] | tuple[type[Number], ...], maps: Sequence[str], where: str
) -> dict[str, Number]:
    """A pattern of PEFT's, whose keys are regular expressions for the ends of names, as values of the maps by name."""
    pattern = values.get(key) or {}
    if not isinstance(pattern, dict) or not all(isinstance(value, kind) for value in pattern.values()):
        raise InputError(f"{where} has {key} = {pattern!r}; it has to be a table of numbers by name.")
    try:
        return {
            name: value
            for name in maps
            for value in [next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", hf_name(name))), None)]
            if value is not None
        }
    except re.error as error:
        raise InputError(f"{where} has {key} = {pattern!r}, with a broken regular expression: {error}.") from error


def refuse_dropout(dropout: float) -> None:
    """A dropout is a share.

    Raises:
        InputError: it is none below 1.
    """
    if not 0 <= dropout < 1:
        raise InputError(f"dropout is {dropout}; it has to be at least 0 and below 1.")


_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "use_qalora": (None, False),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "layer_replication": (None,),
}
"""Settings of PEFT's that change what is computed -> the values that ask for nothing."""

_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
