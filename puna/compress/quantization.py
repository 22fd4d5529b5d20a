"""What to quantise and how, and how a model directory says so.

The form on the disk is that of the `compressed-tensors` library, which transformers and vLLM read:
`quantization_config` in config.json, and beside each other in the safetensors the integers and their scales.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from puna.runtime.errors import InputError

QUANT_METHOD = "compressed-tensors"

GROUP_SIZES = {"int4": (32, 64, 128), "int8": (32,)}
_DEFAULT_GROUP_SIZE = 64


@dataclass(frozen=True)
class Quantization:
    """How weights are stored as integers, and what they are multiplied with."""

    kind: Literal["int8", "int4"] = "int8"
    """int8: one scale for each output channel, or for each group of 32 inputs. int4: one scale for each group."""
    group_size: int | None = None
    """Inputs of a channel that share a scale. With int4: 32, 64 or 128; absent is 64. With int8: 32; absent is all of
    them. Smaller is more exact and larger."""
    symmetric: bool = True
    """With int4: whether integers stand for scale * q; otherwise for scale * (q - zero point), which fits groups better
    that lie to one side of zero."""
    activations: Literal["float", "int8"] = "float"
    """int8 rounds each token's activations to integers too, so that the product is one of integers: several times
    faster on a CPU, a little less exact."""
    keep: tuple[str, ...] = ("output",)
    """Modules that stay as they are, by name with wildcards: "output" is the projection to the vocabulary, "layers.0.*"
    all of the first layer. The embedding, the norms and the biases always stay."""

    def __post_init__(self) -> None:
        sizes = GROUP_SIZES[self.kind]
        if self.group_size is not None and self.group_size not in sizes:
            allowed = " or ".join(map(str, sizes))
            raise ValueError(f"group_size is {self.group_size}; with {self.kind} it has to be {allowed}, or absent.")
        if self.kind == "int8" and not self.symmetric:
            raise ValueError("symmetric = false is for int4; int8 loses nothing by being symmetric.")

    @property
    def inputs_per_scale(self) -> int | None:
        """Inputs that share a scale; None for all of a channel's."""
        return self.group_size or (_DEFAULT_GROUP_SIZE if self.kind == "int4" else None)

    def to_config(self, kept: tuple[str, ...]) -> dict[str, Any]:
        """The `quantization_config` of a config.json.

        Args:
            kept: names in the file of the linear maps that stayed as they were.
        """
        weights: dict[str, Any] = {
            "num_bits": 4 if self.kind == "int4" else 8,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.inputs_per_scale is None else "group",
            "group_size": self.inputs_per_scale,
            "dynamic": False,
        }
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": _PER_TOKEN if self.activations == "int8" else None,
            "output_activations": None,
            "format": _format(self.kind),
        }
        return {
            "quant_method": QUANT_METHOD,
            "format": _format(self.kind),
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(kept),
        }

    @classmethod
    def from_config(cls, values: Mapping[str, Any], where: str) -> "Quantization":
        """The inverse of `to_config`, `keep` apart, which the tensors in the file say.

        Raises:
            InputError: it asks for what Puna does not compute.
        """

        def refuse(what: str) -> InputError:
            return InputError(
                f"{where}: its quantization_config has {what}, which Puna does not read. It reads compressed-tensors "
                "with integers of 4 bits in groups of 32, 64 or 128 (pack-quantized), or of 8 bits by channel or in "
                "groups of 32 (int-quantized)."
            )

        groups = values.get("config_groups")
        if values.get("quant_method") != QUANT_METHOD or not isinstance(groups, dict) or len(groups) != 1:
            raise refuse(f"quant_method {values.get('quant_method')!r} or several groups")
        (group,) = groups.values()
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or weights.get("type") != "int" or weights.get("actorder"):
            raise refuse("weights that are not plain integers")
        bits, strategy = weights.get("num_bits"), weights.get("strategy")
        kind = _KINDS.get(f"{bits} by {strategy}")
        if kind is None or values.get("kv_cache_scheme") or group.get("output_activations"):
            raise refuse(f"num_bits {bits!r} with strategy {strategy!r}, or more than weights and inputs")
        if values.get("format") != _format(kind):
            raise refuse(f"format {values.get('format')!r} for {kind}")
        inputs = group.get("input_activations")
        if inputs is not None and (not isinstance(inputs, dict) or _PER_TOKEN.items() - inputs.items()):
            raise refuse("activations other than of 8 bits, token by token")
        try:
            return cls(
                kind=kind,
                group_size=weights.get("group_size") if strategy == "group" else None,
                symmetric=bool(weights.get("symmetric", True)),
                activations="float" if inputs is None else "int8",
            )
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error


_KINDS: dict[str, Literal["int8", "int4"]] = {"8 by channel": "int8", "8 by group": "int8", "4 by group": "int4"}

_PER_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def _format(kind: Literal["int8", "int4"]) -> str:
    return "pack-quantized" if kind == "int4" else "int-quantized"
