"""Small networks after sublayers (Houlsby et al. 2019, arXiv:1902.00751, section 2.1; Pfeiffer et al. 2020,
arXiv:2005.00247, section 3.2).

Shapes: D model dimension, R bottleneck.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.model.config import LlamaConfig
from puna.peft.method import AdaptedLinear, Base, MapMethod
from puna.runtime.errors import InputError


@dataclass(frozen=True)
class BottleneckConfig(MapMethod):
    """Bottleneck adapters: a two-layer network around which a sublayer's result passes, before it is added back.

    They are not linear, so that they cannot be merged.
    """

    PEFT_TYPE: ClassVar[str] = "BOTTLENECK"

    kind: Literal["bottleneck"] = "bottleneck"
    """The method."""
    size: int = 64
    """Width of the network's middle."""
    places: Literal["houlsby", "pfeiffer"] = "houlsby"
    """houlsby: after attention and after the feed-forward sublayer; pfeiffer: after the latter only."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """Between its two layers."""
    whole: tuple[str, ...] = ()
    """Parameters of the model to train beside it, by name with wildcards; Houlsby trains the norms, "*norm", too."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"size is {self.size}; it has to be at least 1.")

    @property
    def targets(self) -> tuple[str, ...]:  # type: ignore[override]
        """The last maps of the sublayers."""
        after_attention = ("layers.*.attention.output",) if self.places == "houlsby" else ()
        return (*after_attention, "layers.*.feed_forward.down")

    @classmethod
    def linear(cls, values: Mapping[str, Any]) -> type[AdaptedLinear]:
        """See `MapMethod.linear`."""
        return BottleneckLinear

    def wrap(self, name: str, base: Base, generator: torch.Generator) -> "BottleneckLinear":
        """See `MapMethod.wrap`."""
        return BottleneckLinear(base, self.size, self.activation, generator)

    def shapes(self, name: str, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """See `MapMethod.shapes`."""
        return {
            "down": (self.size, out_features),
            "down_bias": (self.size,),
            "up": (out_features, self.size),
            "up_bias": (out_features,),
        }

    def to_peft(self, config: LlamaConfig, maps: Sequence[str]) -> dict[str, Any]:
        """See `Method.to_peft`."""
        return {"size": self.size, "places": self.places, "activation": self.activation}

    @classmethod
    def from_peft(
        cls, values: Mapping[str, Any], maps: tuple[str, ...], whole: tuple[str, ...], where: str
    ) -> "BottleneckConfig":
        """See `Method.from_peft`."""
        size, places, activation = (values.get(key) for key in ("size", "places", "activation"))
        if not isinstance(size, int) or places not in ("houlsby", "pfeiffer") or activation not in _ACTIVATIONS:
            raise InputError(f"{where} has size {size!r}, places {places!r} and activation {activation!r}.")
        return cls(size=size, places=places, activation=activation, whole=whole)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class BottleneckLinear(AdaptedLinear):
    """A sublayer's last linear map, and y + up(activation(down(y))) of its result y.

    Attributes:
        down: [R, D], in float32; random at first.
        down_bias: [R].
        up: [D, R]; zero at first, so that y passes unchanged.
        up_bias: [D].
    """

    FILE_NAMES: ClassVar[Mapping[str, str]] = {
        "down": "adapter_down.weight",
        "down_bias": "adapter_down.bias",
        "up": "adapter_up.weight",
        "up_bias": "adapter_up.bias",
    }

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor

    def __init__(self, base: Base, size: int, activation: str, generator: torch.Generator) -> None:
        super().__init__(base)
        self.activation = _ACTIVATIONS[activation]
        dim = self.out_features
        self.set_own(
            down=torch.empty(size, dim).normal_(std=0.01, generator=generator),  # section 3.1's spread
            down_bias=torch.zeros(size),
            up=torch.zeros(dim, size),
            up_bias=torch.zeros(dim),
        )

    def adapted(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        own = {name: parameter.to(y.dtype) for name, parameter in self.own_parameters().items()}
        return y + F.linear(self.activation(F.linear(y, own["down"], own["down_bias"])), own["up"], own["up_bias"])
