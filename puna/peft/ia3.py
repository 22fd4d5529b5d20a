"""Trained factors of activations ((IA)^3, Liu et al. 2022, arXiv:2205.05638, section 3.3).

Keys and values are scaled where they leave their maps, the feed-forward layer's activations where they enter the last.

Shapes: N outputs, K inputs.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from puna.model.config import LlamaConfig
from puna.peft.method import AdaptedLinear, Base, MapMethod, MergeableLinear, hf_name
from puna.runtime.errors import InputError


@dataclass(frozen=True)
class IA3Config(MapMethod):
    """(IA)^3: a trained factor for each key, value and feed-forward activation; very few parameters."""

    PEFT_TYPE: ClassVar[str] = "IA3"

    kind: Literal["ia3"] = "ia3"
    """The method."""
    targets: tuple[str, ...] = ("layers.*.attention.key", "layers.*.attention.value", "layers.*.feed_forward.down")
    """Linear maps to scale, by name with wildcards."""
    scale_inputs: tuple[str, ...] = ("layers.*.feed_forward.down",)
    """Those of them whose inputs are scaled, not their outputs."""
    whole: tuple[str, ...] = ()
    """Parameters of the model to train beside them, by name with wildcards: "output", "*norm"."""

    def scales_inputs(self, name: str) -> bool:
        """Whether the inputs of the map `name` are scaled."""
        return any(fnmatchcase(name, pattern) for pattern in self.scale_inputs)

    @classmethod
    def linear(cls, values: Mapping[str, Any]) -> type[AdaptedLinear]:
        """See `MapMethod.linear`."""
        return IA3Linear

    def wrap(self, name: str, base: Base, generator: torch.Generator) -> "IA3Linear":
        """See `MapMethod.wrap`."""
        return IA3Linear(base, scale_inputs=self.scales_inputs(name))

    def shapes(self, name: str, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """See `MapMethod.shapes`."""
        return {"factors": (1, in_features) if self.scales_inputs(name) else (out_features, 1)}

    def to_peft(self, config: LlamaConfig, maps: Sequence[str]) -> dict[str, Any]:
        """See `Method.to_peft`."""
        return {
            # In full, for PEFT wants the names of the one list in the other.
            "target_modules": [hf_name(name) for name in maps],
            "feedforward_modules": [hf_name(name) for name in maps if self.scales_inputs(name)],
            "fan_in_fan_out": False,
            "init_ia3_weights": True,
        }

    @classmethod
    def from_peft(
        cls, values: Mapping[str, Any], maps: tuple[str, ...], whole: tuple[str, ...], where: str
    ) -> "IA3Config":
        """See `Method.from_peft`."""
        forward = values.get("feedforward_modules") or []
        if values.get("fan_in_fan_out"):
            raise InputError(f"{where} has fan_in_fan_out, which is for models that Puna has not.")
        if not isinstance(forward, str | list):
            raise InputError(f"{where} has feedforward_modules = {forward!r}; it has to be a list of names.")

        def fits(name: str) -> bool:
            key = hf_name(name)
            return bool(re.fullmatch(forward, key)) if isinstance(forward, str) else key.endswith(tuple(forward))

        return cls(targets=maps, scale_inputs=tuple(name for name in maps if fits(name)), whole=whole)


class IA3Linear(MergeableLinear):
    """A linear map with a factor for each input or each output.

    Attributes:
        factors: [1, K] or [N, 1], in float32; one at first.
    """

    FILE_NAMES: ClassVar[Mapping[str, str]] = {"factors": "ia3_l"}

    factors: Tensor

    def __init__(self, base: Base, *, scale_inputs: bool) -> None:
        super().__init__(base)
        self.scale_inputs = scale_inputs
        self.set_own(factors=torch.ones((1, self.in_features) if scale_inputs else (self.out_features, 1)))

    def adapted(self, x: Tensor) -> Tensor:
        factors = self.factors.flatten().to(x.dtype)
        y: Tensor = self.base(x * factors) if self.scale_inputs else self.base(x) * factors
        return y

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        return (self.base.weight.float() * self.factors).to(self.base.weight.dtype)

    @torch.no_grad()
    def merged_bias(self) -> Tensor | None:
        bias = self.base.bias
        return bias if bias is None or self.scale_inputs else (bias * self.factors.flatten()).to(bias.dtype)
