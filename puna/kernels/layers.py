"""The parts of a layer between its products, natively, in training on a CPU: norms, rotation and the gated unit.

Torch takes some forty passes over memory a layer for them, forward and back, where eight do. `torch.compile` fuses most
of them too, but needs minutes to begin.

Shapes: N tokens, T tokens of B rows, H heads, K head dimension, P rotated pairs, D model dimension, F feed-forward
dimension.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from puna.kernels.loader import address, level, loaded_library, native_library
from puna.model.rope import Rotation
from puna.model.transformer import Attention, FeedForward, RMSNorm, are_plain

_PARTS = 32
"""Parts of the rows whose gradients of a norm's weight are added up apart: enough for the cores of one machine."""


def use_native_layers(model: nn.Module) -> None:
    """Let `model` compute these parts natively while it is trained in float32, where there is a native library.

    The classes of its modules change in place, their parameters and names do not. Each falls back on the class that
    it extends, which is its readable twin, where the kernels do not apply: other dtypes, no gradient, and, for the
    gated unit, weights that are adapted, sharded or hooked.
    """
    if native_library() is None:
        return
    native = {RMSNorm: NativeRMSNorm, FeedForward: NativeFeedForward, Attention: NativeAttention}
    for module in model.modules():
        if type(module) in native:
            module.__class__ = native[type(module)]


class NativeRMSNorm(RMSNorm):
    """`RMSNorm` in one pass forward and one back."""

    def forward(self, x: Tensor) -> Tensor:
        if not _applies(x, self.weight):
            return super().forward(x)
        return _Norm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call, no-any-return]


class NativeFeedForward(FeedForward):
    """`FeedForward` whose gate and up are one product that nobody cuts apart or puts together again."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        maps = (self.gate, self.up, self.down)
        if not are_plain(*maps) or not _applies(x_BTD, *(part.weight for part in maps)):
            return super().forward(x_BTD)
        y_ND: Tensor = _GatedUnit.apply(x_BTD.flatten(0, -2), *(part.weight for part in maps))  # type: ignore[no-untyped-call]
        return y_ND.view_as(x_BTD)


class NativeAttention(Attention):
    """`Attention` that turns queries and keys in one pass."""

    def rotate(self, x_BTHK: Tensor, rotation: Rotation) -> Tensor:
        if not _applies(x_BTHK, *rotation):
            return super().rotate(x_BTHK, rotation)
        return _Rotation.apply(x_BTHK, *rotation)  # type: ignore[no-untyped-call, no-any-return]


def _applies(*tensors: Tensor) -> bool:
    """Whether gradients are wanted, and all are whole float32 tensors of a CPU: no DTensor, for one."""
    return torch.is_grad_enabled() and all(
        type(x) in (Tensor, nn.Parameter) and x.dtype is torch.float32 and x.device.type == "cpu" for x in tensors
    )


def _call(name: str, *arguments: Tensor | int | float) -> None:
    """Call a kernel: tensors by their first element, integers as long."""
    given = [
        address(each)
        if isinstance(each, Tensor)
        else ctypes.c_long(each)
        if isinstance(each, int)
        else ctypes.c_float(each)
        for each in arguments
    ]
    getattr(loaded_library(), name)(ctypes.c_int(level()), *given)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1])
        _call("puna_norm_forward", x, weight_D, inverse.numel(), x.shape[-1], eps, y, inverse)
        ctx.save_for_backward(x, weight_D, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, inverse = ctx.saved_tensors
        x_grad, parts = torch.empty_like(x), x.new_empty(_PARTS, x.shape[-1])
        sizes = (inverse.numel(), x.shape[-1], _PARTS)
        _call("puna_norm_backward", x, weight_D, inverse, y_grad.contiguous(), *sizes, x_grad, parts)
        return x_grad, parts.sum(0), None


class _GatedUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
        joint_NE = x_ND @ torch.cat([gate_FD, up_FD]).T
        h_NF = x_ND.new_empty(len(x_ND), len(gate_FD))
        _call("puna_swiglu_forward", joint_NE, *h_NF.shape, h_NF)
        ctx.save_for_backward(x_ND, gate_FD, up_FD, down_DF, joint_NE, h_NF)
        return h_NF @ down_DF.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, gate_FD, up_FD, down_DF, joint_NE, h_NF = ctx.saved_tensors
        wants_x, wants_gate, wants_up, wants_down = ctx.needs_input_grad
        h_grad_NF, joint_grad_NE = y_grad_ND @ down_DF, torch.empty_like(joint_NE)
        _call("puna_swiglu_backward", joint_NE, h_grad_NF, *h_NF.shape, joint_grad_NE)
        joint_grad_ED = joint_grad_NE.T @ x_ND if wants_gate or wants_up else None
        gate_grad_FD, up_grad_FD = (None, None) if joint_grad_ED is None else joint_grad_ED.chunk(2)
        return (
            joint_grad_NE @ torch.cat([gate_FD, up_FD]) if wants_x else None,
            gate_grad_FD if wants_gate else None,
            up_grad_FD if wants_up else None,
            y_grad_ND.T @ h_NF if wants_down else None,
        )


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cos_BTP: Tensor, sin_BTP: Tensor) -> Tensor:
        turns = [part.expand(*x_BTHK.shape[:2], -1).contiguous() for part in (cos_BTP, sin_BTP)]
        ctx.save_for_backward(*turns)
        return _turned(x_BTHK, *turns, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_grad_BTHK: Tensor) -> tuple[Tensor | None, ...]:
        return _turned(y_grad_BTHK, *ctx.saved_tensors, back=True), None, None


def _turned(x_BTHK: Tensor, cos_BTP: Tensor, sin_BTP: Tensor, *, back: bool) -> Tensor:
    num_rows, num_tokens, num_heads, size = x_BTHK.shape
    token_row = x_BTHK.stride(1)
    if x_BTHK.stride() != (num_tokens * token_row, token_row, size, 1):
        x_BTHK, token_row = x_BTHK.contiguous(), num_heads * size
    y_BTHK = x_BTHK.new_empty(x_BTHK.shape)
    sizes = (num_rows * num_tokens, num_heads, size)
    _call("puna_rotate", x_BTHK, token_row, cos_BTP, sin_BTP, *sizes, int(back), y_BTHK)
    return y_BTHK
