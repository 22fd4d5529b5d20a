"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), with the scalings that Llama models use.

Shapes: B batch, T tokens, H heads, K head dimension, P rotated pairs (K / 2).
"""

import math

import torch
from torch import Tensor

from puna.model.config import LlamaConfig, RopeScaling

Rotation = tuple[Tensor, Tensor]
"""cos_BTP and sin_BTP of every position, in the activations' dtype."""


def frequencies(config: LlamaConfig, device: torch.device | str | None = None) -> Tensor:
    """Radians per token of each rotated pair, shape [P], float32."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).float() / config.head_dim
    inverse = 1.0 / (config.rope_theta**exponent)
    return inverse if config.rope_scaling is None else _scaled(inverse, config.rope_scaling)


def _scaled(inverse: Tensor, scaling: RopeScaling) -> Tensor:
    if scaling.kind == "linear":
        return inverse / scaling.factor
    # llama3: `keep` is 1 for fast frequencies, 0 for slow ones, and rises linearly with the number of turns that a
    # frequency makes within the original context.
    turns = scaling.original_context_length * inverse / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return (1 - keep) * inverse / scaling.factor + keep * inverse


def rotation(positions_BT: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Rotation:
    """cos and sin of every position, computed in float32 whatever `dtype` the activations have."""
    angles_BTP = positions_BT[..., None].float() * frequencies
    return angles_BTP.cos().to(dtype), angles_BTP.sin().to(dtype)


def rotate(x_BTHK: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair of `x_BTHK` by its position's angle.

    Pairs are (i, i + K/2), the layout of Hugging Face checkpoints. Meta's interleaved layout is permuted on reading
    (`puna.weights.meta`).
    """
    cos_BT1P, sin_BT1P = (part.unsqueeze(2) for part in rotation)
    first, second = x_BTHK.chunk(2, dim=-1)
    return torch.cat((first * cos_BT1P - second * sin_BT1P, second * cos_BT1P + first * sin_BT1P), dim=-1)
