"""Frozen weights in four bits, for adapters to be trained around (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

NormalFloat (section 3 and appendix E): the sixteen levels are quantiles of a normal distribution, scaled for each block
of weights by its largest magnitude. Double quantisation (section 3): these scales are stored in eight bits themselves.

Shapes: N outputs, K inputs, W weights (N K), S blocks of weights, C chunks of scales.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.model.transformer import Linear, Transformer
from puna.runtime.errors import InputError

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""What the sixteen codes stand for (appendix E)."""

_CHUNK = 256
"""Scales that share a scale of their own (section 3, double quantisation)."""


@dataclass(frozen=True)
class NF4Config:
    """A base in four bits below the adapters: about an eighth of float32's memory, a little less exact."""

    block_size: int = 64
    """Weights that share a scale."""
    keep: tuple[str, ...] = ("output",)
    """Linear maps that stay as they are, by name with wildcards."""

    def __post_init__(self) -> None:
        if self.block_size < 2 or self.block_size % 2:
            raise InputError(f"block_size is {self.block_size}; it has to be an even number of weights.")


class NF4Linear(nn.Module):
    """Takes the place of a `Linear` whose weight is not trained.

    Attributes:
        codes: uint8 [W / 2], two codes each, the first in the high bits.
        scale_codes: int8 [S], the blocks' scales less their mean, in parts of their chunk's scale.
        chunk_scales: float32 [C].
        scale_mean: float32 [].
    """

    codes: Tensor
    scale_codes: Tensor
    chunk_scales: Tensor
    scale_mean: Tensor
    levels: Tensor

    @torch.no_grad()
    def __init__(self, linear: nn.Linear, block_size: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.block_size, self.dtype = block_size, linear.weight.dtype
        levels = torch.tensor(LEVELS, device=linear.weight.device)
        blocks = linear.weight.detach().float().flatten().view(-1, block_size)
        scales = blocks.abs().amax(1)
        mean = scales.mean()
        spread = F.pad(scales - mean, (0, -len(scales) % _CHUNK)).view(-1, _CHUNK)
        chunk_scales = spread.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        scale_codes = (spread / chunk_scales[:, None]).round().flatten()[: len(scales)].to(torch.int8)
        # Halfway points between levels: the nearest level is the number of them below the weight.
        shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        codes = torch.bucketize(shares.flatten(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
        self.register_buffer("codes", codes[::2] << 4 | codes[1::2])
        self.register_buffer("scale_codes", scale_codes)
        self.register_buffer("chunk_scales", chunk_scales)
        self.register_buffer("scale_mean", mean)
        self.register_buffer("levels", levels, persistent=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The weights as floats in the dtype of the model, [N, K], made anew at every access."""
        return self.dequantize(self.dtype)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights as floats, [N, K]."""
        chunks = self.chunk_scales.repeat_interleave(_CHUNK)[: len(self.scale_codes)]
        scales = self.scale_codes * chunks + self.scale_mean
        codes = torch.stack((self.codes >> 4, self.codes & 15), dim=1).flatten()
        weights = self.levels[codes.int()].view(-1, self.block_size) * scales[:, None]
        return weights.view(self.out_features, self.in_features).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = cast(Tensor, _Multiply.apply(x, self))  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, block_size={self.block_size}"


class _Multiply(torch.autograd.Function):
    """x W^T. Backward makes the floats of W again, rather than keeping them for as long as all activations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: NF4Linear) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.linear.dequantize(grads[0].dtype), None


def quantize_nf4(model: Transformer, config: NF4Config) -> list[str]:
    """Put linear maps into four bits, in place and before adapters are attached; returns their names.

    Raises:
        InputError: the weights of a map are not a whole number of blocks, or no map is left to quantise.
    """
    names = [name for name, part in model.named_modules() if isinstance(part, Linear)]
    chosen = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in config.keep)]
    linears = {name: cast(Linear, model.get_submodule(name)) for name in chosen}
    if not linears:
        raise InputError("There is nothing to quantise: keep fits every linear map, or all are quantised already.")
    if odd := [name for name, linear in linears.items() if linear.weight.numel() % config.block_size]:
        raise InputError(
            f"{odd[0]} has {linears[odd[0]].weight.numel():,} weights, not a whole number of blocks of "
            f"{config.block_size}. Choose another block_size, or keep it."
        )
    if model.config.tie_embeddings and "output" in linears:
        raise InputError("The projection to the vocabulary shares its weight with the embedding; keep 'output'.")
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, NF4Linear(linear, config.block_size))
    return chosen
