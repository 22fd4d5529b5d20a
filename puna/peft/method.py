"""What every adapter method has in common: a configuration that wraps linear maps, and the wrapped map.

A method is one file: a frozen dataclass that meets `Method`, and its `AdaptedLinear`. `puna.peft.files.METHODS` names
it. Everything else (attaching by name, files, merging) is written once, for all.

Shapes: N outputs, K inputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from puna.compress.linear import QuantizedLinear
from puna.model.transformer import Linear

Base = Linear | QuantizedLinear
"""What can be adapted."""


class AdaptedLinear(nn.Module, ABC):
    """Takes the place of a linear map, which it holds as `base` and leaves as it is.

    Attributes:
        FILE_NAMES: each parameter of its own -> what PEFT calls it in a file, after the map's name.
        merged: the base holds the adapted weight at the moment, so that it alone is the answer.
    """

    FILE_NAMES: ClassVar[Mapping[str, str]]
    in_features: int
    out_features: int

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.merged = False

    @abstractmethod
    def adapted(self, x: Tensor) -> Tensor:
        """What the map and its adapter make of `x`."""

    @abstractmethod
    def merged_weight(self) -> Tensor:
        """The weight [N, K], in the base's dtype, of the one linear map that does the same; the bias stays."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.merged else self.adapted(x)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters, by their names here."""
        return {name: self.get_parameter(name) for name in self.FILE_NAMES}


class Method(Protocol):
    """A frozen dataclass that says how to adapt.

    Attributes:
        PEFT_TYPE: `peft_type` of its adapter_config.json.
        targets: the linear maps to adapt, by name with wildcards.
    """

    PEFT_TYPE: ClassVar[str]

    @property
    def targets(self) -> tuple[str, ...]: ...

    def wrap(self, base: Base, generator: torch.Generator) -> AdaptedLinear:
        """A map that computes what `base` does until it is trained."""
        ...

    def shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the adapter's parameters around a map of this size, by their names."""
        ...

    def to_peft(self) -> dict[str, Any]:
        """The settings of an adapter_config.json that are the method's own."""
        ...

    @classmethod
    def from_peft(cls, values: Mapping[str, Any], targets: tuple[str, ...], where: str) -> Self:
        """The inverse of `to_peft`.

        Raises:
            InputError: it asks for what Puna does not compute.
        """
        ...
