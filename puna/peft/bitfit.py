"""Biases alone (BitFit, Ben Zaken et al. 2021, arXiv:2106.10199).

Llama's maps have none to train, so each target gets one; that of a Qwen map is trained as a change beside it.

Shapes: N outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from puna.model.config import LlamaConfig
from puna.peft.method import AdaptedLinear, Base, MapMethod, MergeableLinear


@dataclass(frozen=True)
class BitFitConfig(MapMethod):
    """BitFit: a trained bias for each output of linear maps, and nothing else.

    Merging needs a model that has room for them: on exactly the queries, keys and values of all layers, as Qwen2 has.
    """

    PEFT_TYPE: ClassVar[str] = "BITFIT"

    kind: Literal["bitfit"] = "bitfit"
    """The method."""
    targets: tuple[str, ...] = ("layers.*.attention.query", "layers.*.attention.key", "layers.*.attention.value")
    """Linear maps that get a bias, by name with wildcards; "layers.*" is more and cannot be merged."""
    whole: tuple[str, ...] = ()
    """Parameters of the model to train beside them, by name with wildcards: "output", "*norm"."""

    @classmethod
    def linear(cls, values: Mapping[str, Any]) -> type[AdaptedLinear]:
        """See `MapMethod.linear`."""
        return BiasLinear

    def wrap(self, name: str, base: Base, generator: torch.Generator) -> "BiasLinear":
        """See `MapMethod.wrap`."""
        return BiasLinear(base)

    def shapes(self, name: str, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """See `MapMethod.shapes`."""
        return {"shift": (out_features,)}

    def to_peft(self, config: LlamaConfig, maps: Sequence[str]) -> dict[str, Any]:
        """See `Method.to_peft`."""
        return {}

    @classmethod
    def from_peft(
        cls, values: Mapping[str, Any], maps: tuple[str, ...], whole: tuple[str, ...], where: str
    ) -> "BitFitConfig":
        """See `Method.from_peft`."""
        return cls(targets=maps, whole=whole)


class BiasLinear(MergeableLinear):
    """A linear map and a trained shift of its outputs.

    Attributes:
        shift: [N], in float32; zero at first.
    """

    FILE_NAMES: ClassVar[Mapping[str, str]] = {"shift": "bias_shift"}

    shift: Tensor

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self.set_own(shift=torch.zeros(self.out_features))

    def adapted(self, x: Tensor) -> Tensor:
        return self.base(x) + self.shift.to(x.dtype)  # type: ignore[no-any-return]

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        return self.base.weight.detach()

    @torch.no_grad()
    def merged_bias(self) -> Tensor:
        base = self.base.bias
        return self.shift.to(self.base.weight.dtype) if base is None else (base + self.shift).to(base.dtype)
