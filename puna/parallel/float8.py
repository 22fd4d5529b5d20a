"""The layers' products in float8, by torchao."""

import importlib

import torch

from puna.model.transformer import Transformer
from puna.runtime.errors import InputError


def use_float8(model: Transformer, device: torch.device, *, emulate: bool = False) -> None:
    """Replace the linear maps of the layers by those that multiply in float8, with the same parameters.

    Args:
        emulate: round as float8 does, but multiply in the activations' dtype, which any device can.

    Raises:
        InputError: the device has no float8 products, or torchao is not installed.
    """
    if not emulate and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise InputError(
            "train.precision is 'fp8', but this device does not multiply in float8: it takes an NVIDIA GPU from Ada or "
            "Hopper (H100) on. Set it to 'bf16'."
        )
    try:
        torchao = importlib.import_module("torchao.float8")
    except ImportError as error:
        raise InputError("train.precision is 'fp8', which needs torchao: pip install torchao.") from error
    # Products of dims that 16 does not divide have no float8 kernel.
    torchao.convert_to_float8_training(
        model.layers,
        config=torchao.Float8LinearConfig(emulate=emulate),
        module_filter_fn=lambda part, name: not (part.in_features % 16 or part.out_features % 16),
    )
