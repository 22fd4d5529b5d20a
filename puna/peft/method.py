"""What every method has in common, and what those have in common that wrap linear maps.

A method is one file: a frozen dataclass derived from `Method`, which `puna.peft.methods.METHODS` names. Most are
`MapMethod`s, with an `AdaptedLinear` of their own. Everything else (attaching by name, files, merging) is written once,
for all.

Shapes: N outputs, K inputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from puna.compress.linear import QuantizedLinear
from puna.model.config import LlamaConfig
from puna.model.transformer import Linear, Transformer
from puna.peft.nf4 import NF4Linear
from puna.weights.names import to_hf

QUANTIZED = (QuantizedLinear, NF4Linear)
"""Maps whose weight is not a parameter, and cannot hold what is merged into it."""

Base = Linear | QuantizedLinear | NF4Linear
"""What can be adapted."""

Value = TypeVar("Value")


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

    def merged_bias(self) -> Tensor | None:
        """The bias [N] of the one linear map that does the same, if there is one."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.merged else self.adapted(x)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters, by their names here."""
        return {name: self.get_parameter(name) for name in self.FILE_NAMES}

    def set_own(self, **values: Tensor) -> None:
        """Make these, in float32 on the base's device, the adapter's parameters."""
        device = device_of(self.base)
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.to(device)))


class MergeableLinear(AdaptedLinear):
    """One whose place a linear map can take that does the same."""

    @abstractmethod
    def merged_weight(self) -> Tensor:
        """The weight [N, K] of that map, in the base's dtype."""


def device_of(base: Base) -> torch.device:
    """Where a map's numbers are."""
    return next(iter(base.state_dict().values())).device  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Training:
    """What a method asks of the training, as `puna.train.loop.fit` takes it."""

    rates: Mapping[str, float] = field(default_factory=dict)
    """Name of a parameter -> factor of its learning rate, where it is not 1."""
    penalty: Callable[[Transformer], Tensor] | None = None
    """A scalar that is added to the mean loss."""
    after_update: Callable[[int], None] | None = None
    """To be called with the step after each update, while the gradients are still there."""


class Method(ABC):
    """A frozen dataclass that says what is trained.

    Attributes:
        PEFT_TYPE: `peft_type` of its adapter_config.json; one that PEFT has not where it has no such method.
        PREFIX: of names in PEFT's files.
        kind: its name in a recipe.
        whole: parameters of the model itself that are trained, by name with wildcards.
    """

    PEFT_TYPE: ClassVar[str]
    PREFIX: ClassVar[str] = "base_model.model."

    kind: str

    whole: tuple[str, ...]

    def whole_in(self, config: LlamaConfig) -> tuple[str, ...]:
        """`whole` for a model of this size."""
        return self.whole

    def prepare(self, model: Transformer) -> None:  # noqa: B027 (most have nothing to do)
        """Change the model below, in place, before anything is put on it."""

    def training(self, model: Transformer, steps: int) -> Training:
        """What it asks of a training of so many steps, once it is attached.

        Raises:
            InputError: it has no use for so few steps.
        """
        return Training()

    @abstractmethod
    def to_peft(self, config: LlamaConfig, maps: Sequence[str]) -> dict[str, Any]:
        """The settings of an adapter_config.json that are the method's own.

        Args:
            config: of the model below.
            maps: names of the linear maps that are adapted.
        """

    @classmethod
    @abstractmethod
    def from_peft(cls, values: Mapping[str, Any], maps: tuple[str, ...], whole: tuple[str, ...], where: str) -> Self:
        """The inverse of `to_peft`.

        Args:
            values: the settings.
            maps: the linear maps that the file has tensors for, by name.
            whole: the model's own parameters that the file has.
            where: the file, for errors.

        Raises:
            InputError: it asks for what Puna does not compute.
        """


class MapMethod(Method):
    """A method that wraps linear maps.

    Attributes:
        targets: the linear maps to adapt, by name with wildcards.
    """

    targets: tuple[str, ...]

    @classmethod
    @abstractmethod
    def linear(cls, values: Mapping[str, Any]) -> type[AdaptedLinear]:
        """The class that it puts around them, going by the settings in an adapter_config.json."""

    @abstractmethod
    def wrap(self, name: str, base: Base, generator: torch.Generator) -> AdaptedLinear:
        """What takes the place of the map `name`."""

    @abstractmethod
    def shapes(self, name: str, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the adapter's parameters around a map of this name and size, by their names."""


class VirtualTokens(nn.Module, ABC):
    """Trained vectors that stand before every document; put into a model by a `VirtualMethod`.

    Attributes:
        vectors: [number of virtual tokens, ...], in float32.
    """

    vectors: nn.Parameter

    @abstractmethod
    def take_off(self, model: Transformer) -> None:
        """Leave the model as it was."""


class VirtualMethod(Method):
    """A method that puts virtual tokens before every document.

    Attributes:
        num_virtual_tokens: how many.
    """

    PREFIX = "base_model."

    num_virtual_tokens: int

    @abstractmethod
    def width(self, config: LlamaConfig) -> int:
        """Numbers for each virtual token."""

    @abstractmethod
    def put_on(self, model: Transformer, generator: torch.Generator) -> None:
        """Put the virtual tokens into a model, in place."""


def hf_name(name: str) -> str:
    """Hugging Face's name of a linear map."""
    return to_hf(f"{name}.weight").removesuffix(".weight")


def lookup(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """The value of the first pattern that fits a name, or else the default."""
    return next((value for pattern, value in patterns.items() if fnmatchcase(name, pattern)), default)
