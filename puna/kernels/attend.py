"""Document-masked causal attention by the native kernels, with its gradient.

Shapes: B batch, T tokens, N = B * T, H query heads, G key/value heads, K head dimension.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, which loads the compiler only when called

from puna.kernels.loader import address, level, loaded_library, native_library
from puna.model.attend import Attend, DocumentAttend


def document_attend(documents_BT: Tensor) -> Attend:
    """Causal attention inside documents: native where that applies, `DocumentAttend` elsewhere.

    Args:
        documents_BT: the document that each token belongs to, as for `DocumentAttend`.
    """
    if documents_BT.device.type == "cpu" and native_library() is not None:
        return NativeDocumentAttend(documents_BT)
    return DocumentAttend(documents_BT)


class NativeDocumentAttend:
    """`DocumentAttend` without copies of documents, without a mask, and without work on what a token may not see.

    The twin that says what is right is `DocumentAttend`; it also takes over where the kernels do not apply: other types
    than float32, and head dimensions that are no multiple of 16.
    """

    def __init__(self, documents_BT: Tensor) -> None:
        self.documents_BT, self.causal = documents_BT, True
        self._other: DocumentAttend | None = None
        first = torch.ones_like(documents_BT, dtype=torch.bool)
        first[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
        self.starts = torch.cat([first.flatten().nonzero().squeeze(1), torch.tensor([documents_BT.numel()])])
        self.longest = int(self.starts.diff().max())

    # The kernels are opaque to a compiler.
    @_disable_dynamo
    def __call__(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        if q_BTHK.dtype is not torch.float32 or q_BTHK.shape[-1] % 16:
            self._other = self._other or DocumentAttend(self.documents_BT)
            other: Tensor = self._other(layer, q_BTHK, k_BTGK, v_BTGK)
            return other
        o_NHK: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
            q_BTHK.flatten(0, 1), k_BTGK.flatten(0, 1), v_BTGK.flatten(0, 1), self.starts, self.longest
        )
        return o_NHK.view_as(q_BTHK)


def _rows(x_NHK: Tensor) -> Tensor:
    """`x_NHK` with its two inner axes dense, as the kernels want it; the outer stride is free."""
    size = x_NHK.shape[2]
    return x_NHK if x_NHK.stride(2) == 1 and x_NHK.stride(1) == size else x_NHK.contiguous()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, starts: Tensor, longest: int) -> Tensor:
        q_NHK, k_NGK, v_NGK = _rows(q_NHK), _rows(k_NGK), _rows(v_NGK)
        o_NHK = torch.empty(q_NHK.shape)
        log_sum_NH = torch.empty(q_NHK.shape[:2])
        arguments = _arguments(q_NHK, k_NGK, v_NGK, starts, longest, o_NHK, log_sum_NH)
        loaded_library().puna_attention_forward(*arguments)
        ctx.save_for_backward(q_NHK, k_NGK, v_NGK, starts, o_NHK, log_sum_NH)
        ctx.longest = longest
        return o_NHK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_NHK, k_NGK, v_NGK, starts, o_NHK, log_sum_NH = ctx.saved_tensors
        o_grad_NHK = _rows(grads[0])
        gradients = tuple(torch.empty(x.shape) for x in (q_NHK, k_NGK, v_NGK))
        loaded_library().puna_attention_backward(
            *_arguments(q_NHK, k_NGK, v_NGK, starts, ctx.longest, o_NHK, log_sum_NH),
            address(o_grad_NHK),
            ctypes.c_long(o_grad_NHK.stride(0)),
            *(address(gradient) for gradient in gradients),
        )
        return *gradients, None, None


def _arguments(
    q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, starts: Tensor, longest: int, o_NHK: Tensor, log_sum_NH: Tensor
) -> list[Any]:
    rows = [part for x in (q_NHK, k_NGK, v_NGK) for part in (address(x), ctypes.c_long(x.stride(0)))]
    sizes = (len(starts) - 1, longest, q_NHK.shape[1], k_NGK.shape[1], q_NHK.shape[2])
    scale = ctypes.c_float(q_NHK.shape[2] ** -0.5)
    return [
        ctypes.c_int(level()),
        *rows,
        address(starts),
        *map(ctypes.c_long, sizes),
        scale,
        address(o_NHK),
        address(log_sum_NH),
    ]
