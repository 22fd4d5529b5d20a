"""Some of the model's own parameters, and nothing new: top layers, norms, the projection to the vocabulary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from puna.model.config import LlamaConfig
from puna.peft.method import Method
from puna.runtime.errors import InputError


@dataclass(frozen=True)
class PartialConfig(Method):
    """Partial tuning: a list of the model's own parameters is trained, all others are frozen."""

    PEFT_TYPE: ClassVar[str] = "PARTIAL"

    kind: Literal["partial"] = "partial"
    """The method."""
    whole: tuple[str, ...] = ()
    """What is trained, by name with wildcards: "*norm" all norms, "output" the projection to the vocabulary,
    "layers.3.*" a layer."""
    top_layers: int = 0
    """So many of the last layers besides."""

    def __post_init__(self) -> None:
        if self.top_layers < 0:
            raise InputError(f"top_layers is {self.top_layers}; it has to be at least 0.")
        if not self.whole and not self.top_layers:
            raise InputError('Partial tuning needs whole, such as ["*norm", "output"], or top_layers.')

    def whole_in(self, config: LlamaConfig) -> tuple[str, ...]:
        """See `Method.whole_in`.

        Raises:
            InputError: the model has not so many layers.
        """
        if self.top_layers > config.num_layers:
            raise InputError(f"top_layers is {self.top_layers}, but the model has {config.num_layers} layers.")
        first = config.num_layers - self.top_layers
        return (*self.whole, *(f"layers.{layer}.*" for layer in range(first, config.num_layers)))

    def to_peft(self, config: LlamaConfig, maps: Sequence[str]) -> dict[str, Any]:
        """See `Method.to_peft`."""
        return {}

    @classmethod
    def from_peft(
        cls, values: Mapping[str, Any], maps: tuple[str, ...], whole: tuple[str, ...], where: str
    ) -> "PartialConfig":
        """See `Method.from_peft`."""
        return cls(whole=whole)
