"""Cross-entropy of a linear projection without ever holding all logits.

A vocabulary of 128,256 and 8,192 tokens make 4 GiB of float32 logits, which the plain loss writes and reads several
times. Here they exist for one slice of tokens at a time, small enough to stay in the processor's cache, and each
slice's gradients are taken at once, so that nothing is computed twice (as in Liger Kernel, arXiv:2410.10989).

Shapes: N tokens, D model dimension, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.kernels.cross_entropy import cross_entropy_and_error

_SLICE_BYTES = 32 * 2**20


def naive_linear_cross_entropy(h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, ignore: int) -> Tensor:
    """The readable twin of `linear_cross_entropy`."""
    logits_NV = F.linear(h_ND, weight_VD.to(h_ND.dtype)).float()
    return F.cross_entropy(logits_NV, labels_N, ignore_index=ignore, reduction="sum")


def linear_cross_entropy(h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, ignore: int) -> Tensor:
    """Sum of -log softmax(h W^T)[label] over tokens whose label is not `ignore`, in float32.

    The products run in the dtype of `h_ND`; the softmax in float32.
    """
    total: Tensor = _LinearCrossEntropy.apply(h_ND, weight_VD, labels_N, ignore, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, ignore: int, needs_grad: bool) -> Tensor:
        targets = (labels_N != ignore).nonzero().squeeze(1)
        weight = weight_VD.to(h_ND.dtype)
        grad_h_ND = torch.zeros_like(h_ND) if needs_grad else None
        grad_weight_VD = torch.zeros_like(weight_VD) if needs_grad else None
        total = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        rows = max(1, _SLICE_BYTES // (4 * weight.shape[0]))
        # One buffer, reused in place by every slice: fresh memory costs more than the arithmetic on it.
        product = h_ND.new_empty(min(rows, len(targets)), weight.shape[0])
        for chosen in torch.split(targets, rows):
            h, labels = h_ND[chosen], labels_N[chosen]
            logits = torch.mm(h, weight.T, out=product[: len(chosen)]).float()
            part, error = cross_entropy_and_error(logits, labels)
            total += part
            if grad_h_ND is not None and grad_weight_VD is not None:
                error = error.to(h.dtype)
                grad_h_ND[chosen] = error @ weight
                if error.dtype == grad_weight_VD.dtype:
                    grad_weight_VD.addmm_(error.T, h)
                else:
                    grad_weight_VD += error.T @ h
        if needs_grad:
            ctx.save_for_backward(grad_h_ND, grad_weight_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_h_ND, grad_weight_VD = ctx.saved_tensors
        (grad,) = grads
        return (grad_h_ND * grad).to(grad_h_ND.dtype), grad_weight_VD * grad, None, None, None
