"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), with the scalings that Llama models use.

Shapes: B batch, T tokens, H heads, K head dimension.
"""

import math

import torch
from torch import Tensor

from puna.model.config import LlamaConfig, RopeScaling

Rotation = tuple[Tensor, Tensor]
"""cos_BTK and sin_BTK of every position, in the activations' dtype."""


def frequencies(config: LlamaConfig, device: torch.device | str | None = None) -> Tensor:
    """Radians per token of each rotated pair, shape [K / 2], float32."""
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
    """cos and sin of every position, computed in float32 whatever `dtype` the activations have.

    The K dimension holds each frequency twice, [f0 .. fn, f0 .. fn]: pairs are (i, i + K/2), the layout of
    Hugging Face checkpoints. Meta's interleaved layout is permuted on reading (`puna.weights.meta`).
    """
    angles = positions_BT[..., None].float() * frequencies
    angles_BTK = torch.cat((angles, angles), dim=-1)
    return angles_BTK.cos().to(dtype), angles_BTK.sin().to(dtype)


def rotate(x_BTHK: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair of `x_BTHK` by its position's angle."""
    cos_BT1K, sin_BT1K = (part.unsqueeze(2) for part in rotation)
    first, second = x_BTHK.chunk(2, dim=-1)
    return x_BTHK * cos_BT1K + torch.cat((-second, first), dim=-1) * sin_BT1K
