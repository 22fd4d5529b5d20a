"""Cross-entropy of a linear projection without ever holding all logits.

A vocabulary of 128,256 and 8,192 tokens make 4 GiB of float32 logits, which the plain loss writes and reads several
times. Here they exist for one slice of tokens at a time, and each slice's gradients are taken at once, so that nothing
is computed twice (as in Liger Kernel, arXiv:2410.10989).

Shapes: N tokens, D model dimension, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from puna.kernels.cross_entropy import cross_entropy_and_error

_SLICE_BYTES = 128 * 2**20
"""Of float32 logits. Smaller slices multiply more slowly: 32 MiB by a tenth, at 32,000 tokens of vocabulary."""


def naive_linear_cross_entropy(
    h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, ignore: int, z_loss: float = 0.0
) -> Tensor:
    """The readable twin of `linear_cross_entropy`."""
    return cross_entropy(F.linear(h_ND, weight_VD.to(h_ND.dtype)), labels_N, ignore, z_loss)


def cross_entropy(logits_NV: Tensor, labels_N: Tensor, ignore: int, z_loss: float = 0.0) -> Tensor:
    """The same from logits; they may be a DTensor that is split by vocabulary, within torch's `loss_parallel`."""
    logits_NV = logits_NV.float()
    total = F.cross_entropy(logits_NV, labels_N, ignore_index=ignore, reduction="sum")
    if isinstance(total, DTensor):
        # A copy, because FSDP2 warns of views.
        total = total.to_local().clone()
    if z_loss:
        log_sum_N = logits_NV.logsumexp(-1)
        if isinstance(log_sum_N, DTensor):
            log_sum_N = log_sum_N.full_tensor()
        total = total + z_loss * log_sum_N[labels_N != ignore].square().sum()
    return total


def linear_cross_entropy(h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, ignore: int, z_loss: float = 0.0) -> Tensor:
    """Sum of -log softmax(h W^T)[label] over tokens whose label is not `ignore`, in float32.

    The products run in the dtype of `h_ND`; the softmax in float32.

    Args:
        z_loss: factor of the square of each token's log sum of exponentials, which is added (PaLM, arXiv:2204.02311,
            section 5).
    """
    total: Tensor = _LinearCrossEntropy.apply(h_ND, weight_VD, labels_N, ignore, z_loss, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, ignore: int, z_loss: float, needs_grad: bool
    ) -> Tensor:
        targets = (labels_N != ignore).nonzero().squeeze(1)
        weight = weight_VD.to(h_ND.dtype)
        wants_h, wants_weight = (needs_grad and wanted for wanted in ctx.needs_input_grad[:2])
        grad_h_ND = torch.zeros_like(h_ND) if wants_h else None
        grad_weight_VD = torch.zeros_like(weight_VD) if wants_weight else None
        total = torch.zeros((), dtype=torch.float32, device=h_ND.device)
        rows = _slice_rows(weight)
        # One buffer, reused in place by every slice: fresh memory costs more than the arithmetic on it.
        product = h_ND.new_empty(min(rows, len(targets)), weight.shape[0])
        for chosen in torch.split(targets, rows):
            h, labels = h_ND[chosen], labels_N[chosen]
            logits = torch.mm(h, weight.T, out=product[: len(chosen)]).float()
            log_sum = logits.logsumexp(-1) if z_loss else None
            part, error = cross_entropy_and_error(logits, labels)
            total += part
            if log_sum is not None:
                total += z_loss * log_sum.square().sum()
                # The gradient of the square is 2 log_sum softmax; error is softmax - onehot.
                factor = (2 * z_loss * log_sum)[:, None]
                error.mul_(1 + factor).scatter_add_(1, labels[:, None], factor)
            error = error.to(h.dtype)
            if grad_h_ND is not None:
                grad_h_ND[chosen] = error @ weight
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, error.T, h)
        ctx.save_for_backward(grad_h_ND, grad_weight_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_h_ND, grad_weight_VD = ctx.saved_tensors
        (grad,) = grads
        if grad.device.type == "cpu" and grad == 1:  # as in training; asking a GPU would make it wait
            return grad_h_ND, grad_weight_VD, None, None, None, None
        return (
            None if grad_h_ND is None else (grad_h_ND * grad).to(grad_h_ND.dtype),
            None if grad_weight_VD is None else grad_weight_VD * grad,
            None,
            None,
            None,
            None,
        )


def linear_logprobs(h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, ignore: int) -> Tensor:
    """log softmax(h W^T)[label] of each token, float32 [N]; 0 where the label is `ignore`.

    For losses that weigh tokens by what the whole text turns out to be: a slice's logits are computed again in the
    backward pass, when the weights are known. Dtypes as in `linear_cross_entropy`.
    """
    logprobs_N: Tensor = _LinearLogprobs.apply(h_ND, weight_VD, labels_N, ignore)  # type: ignore[no-untyped-call]
    return logprobs_N


def naive_linear_logprobs(h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, ignore: int) -> Tensor:
    """The readable twin of `linear_logprobs`."""
    logprobs_NV = F.linear(h_ND, weight_VD.to(h_ND.dtype)).float().log_softmax(-1)
    chosen_N = logprobs_NV.gather(1, labels_N.clamp(min=0)[:, None]).squeeze(1)
    return chosen_N.masked_fill(labels_N == ignore, 0.0)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, ignore: int) -> Tensor:
        targets = (labels_N != ignore).nonzero().squeeze(1)
        weight = weight_VD.to(h_ND.dtype)
        logprobs_N = torch.zeros(len(h_ND), dtype=torch.float32, device=h_ND.device)
        log_sum_N = torch.zeros_like(logprobs_N)
        for chosen in torch.split(targets, _slice_rows(weight)):
            logits = (h_ND[chosen] @ weight.T).float()
            log_sum_N[chosen] = logits.logsumexp(-1)
            logprobs_N[chosen] = logits.gather(1, labels_N[chosen, None]).squeeze(1) - log_sum_N[chosen]
        ctx.save_for_backward(h_ND, weight_VD, labels_N, targets, log_sum_N)
        return logprobs_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h_ND, weight_VD, labels_N, targets, log_sum_N = ctx.saved_tensors
        (grad_N,) = grads
        weight = weight_VD.to(h_ND.dtype)
        wants_h, wants_weight = ctx.needs_input_grad[:2]
        grad_h_ND = torch.zeros_like(h_ND) if wants_h else None
        grad_weight_VD = torch.zeros_like(weight_VD) if wants_weight else None
        for chosen in torch.split(targets, _slice_rows(weight)):
            h, grad = h_ND[chosen], grad_N[chosen, None]
            # The gradient is onehot(label) - softmax(logits), times what comes from above.
            error = ((h @ weight.T).float() - log_sum_N[chosen, None]).exp_().mul_(-grad)
            error = error.scatter_add_(1, labels_N[chosen, None], grad).to(h.dtype)
            if grad_h_ND is not None:
                grad_h_ND[chosen] = error @ weight
            if grad_weight_VD is not None:
                _add_product(grad_weight_VD, error.T, h)
        return grad_h_ND, grad_weight_VD, None, None


def _slice_rows(weight_VD: Tensor) -> int:
    """Tokens whose float32 logits make a slice."""
    return max(1, _SLICE_BYTES // (4 * len(weight_VD)))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in one go where the dtypes are the same."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
