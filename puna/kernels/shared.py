"""Attention for rows in which a prompt stands once and several answers go on from it.

Only attention sees a prompt again for each answer: queries, keys and values are laid out as if each answer stood behind
a prompt of its own, and what attention gives is brought back. Everything else of a layer, which is nearly all of its
work, is done for a prompt once.

Shapes: B rows, T tokens, U tokens of the rows laid out, N = B * T, M = B * U, H query heads, G key/value heads, K head
dimension.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, which loads the compiler only when called

from puna.kernels.attend import document_attend
from puna.model.attend import scaled_dot_product


class SharedPromptAttend:
    """Causal attention of a document to itself and to the prompt that it goes on from.

    Args:
        documents_BT: the document of each token, as for `DocumentAttend`; below 0 is padding, whose result has no use.
        groups_BT: the number of each token's prompt in its row.
        is_prompt_BT: whether a token belongs to a prompt that the other documents of its group go on from.
    """

    def __init__(self, documents_BT: Tensor, groups_BT: Tensor, is_prompt_BT: Tensor) -> None:
        num_rows, length = documents_BT.shape
        new_BT = torch.ones_like(is_prompt_BT)
        new_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
        starts = new_BT.flatten().nonzero().squeeze(1).tolist()
        stops = [*starts[1:], documents_BT.numel()]
        of_first = [column.flatten()[starts].tolist() for column in (documents_BT, groups_BT, is_prompt_BT)]
        rows: list[list[Tensor]] = [[] for _ in range(num_rows)]
        numbers: list[list[Tensor]] = [[] for _ in range(num_rows)]
        prompts: dict[tuple[int, int], Tensor] = {}
        for start, stop, document, group, is_prompt in zip(starts, stops, *of_first, strict=True):
            row, own = start // length, torch.arange(start, stop)
            if is_prompt:
                prompts[row, group] = own
            elif document >= 0:
                laid_out = torch.cat([prompts.get((row, group), own[:0]), own])
                rows[row].append(laid_out)
                numbers[row].append(torch.full_like(laid_out, document))
        longest = max(sum(map(len, parts)) for parts in rows)
        source_BU = torch.zeros(num_rows, longest, dtype=torch.int64)
        documents_BU = torch.full_like(source_BU, -1)
        for row, (parts, own_numbers) in enumerate(zip(rows, numbers, strict=True)):
            if parts:
                laid_out = torch.cat(parts)
                source_BU[row, : len(laid_out)], documents_BU[row, : len(laid_out)] = laid_out, torch.cat(own_numbers)
        device = documents_BT.device
        self._layout = _Layout.of(source_BU.flatten(), documents_BU.flatten() >= 0, documents_BT.numel(), device)
        self._shape = (num_rows, longest)
        self._attend = document_attend(documents_BU.to(device))

    # Shapes change with every batch, for each of which a compiler would compile anew.
    @_disable_dynamo
    def __call__(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        """See `puna.model.attend.Attend`."""
        q, k, v = (
            _LayOut.apply(x.flatten(0, 1), self._layout).unflatten(0, self._shape)  # type: ignore[no-untyped-call]
            for x in (q_BTHK, k_BTGK, v_BTGK)
        )
        o_BUHK = self._attend(layer, q, k, v)
        o_NHK: Tensor = _BringBack.apply(o_BUHK.flatten(0, 1), self._layout)  # type: ignore[no-untyped-call]
        return o_NHK.view_as(q_BTHK)


class NaiveSharedPromptAttend:
    """The readable twin of `SharedPromptAttend`: one mask."""

    def __init__(self, documents_BT: Tensor, groups_BT: Tensor, is_prompt_BT: Tensor) -> None:
        same_BTS = documents_BT[:, :, None] == documents_BT[:, None, :]
        prompt_BTS = (groups_BT[:, :, None] == groups_BT[:, None, :]) & is_prompt_BT[:, None, :]
        self._mask_BTS = (same_BTS | prompt_BTS).tril()

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        """See `puna.model.attend.Attend`."""
        return scaled_dot_product(q_BTHK, k_BTGK, v_BTGK, mask_BTS=self._mask_BTS)


@dataclass(frozen=True)
class _Layout:
    """Where tokens are."""

    source_M: Tensor
    """Where each token laid out comes from."""
    is_first_M: Tensor
    """Whether it is the first copy of its token, and not another, or there only to fill a row up."""
    home_N: Tensor
    """Where the first copy of each token is; 0 for padding, which has none."""
    is_padding_N: Tensor
    """Which tokens are padding."""
    copies: list[tuple[Tensor, Tensor]]
    """For second copies, third ones and so on: their tokens, and where they are."""

    @classmethod
    def of(cls, source_M: Tensor, is_real_M: Tensor, num_tokens: int, device: torch.device) -> "_Layout":
        places = is_real_M.nonzero().squeeze(1)
        places = places[source_M[places].argsort(stable=True)]  # a token's copies stand side by side, in order
        tokens = source_M[places]
        is_new = torch.ones_like(tokens, dtype=torch.bool)
        is_new[1:] = tokens[1:] != tokens[:-1]
        nth = torch.arange(len(tokens)) - is_new.nonzero().squeeze(1)[is_new.cumsum(0) - 1]
        home_N = torch.zeros(num_tokens, dtype=torch.int64)
        home_N[tokens[is_new]] = places[is_new]
        is_padding_N = torch.ones(num_tokens, dtype=torch.bool)
        is_padding_N[tokens] = False
        is_first_M = torch.zeros_like(is_real_M)
        is_first_M[places[is_new]] = True
        copies = [(tokens[nth == n].to(device), places[nth == n].to(device)) for n in range(1, int(nth.max()) + 1)]
        return cls(source_M.to(device), is_first_M.to(device), home_N.to(device), is_padding_N.to(device), copies)


class _LayOut(torch.autograd.Function):
    """Rows to rows laid out. Backward adds up the gradients of a token's copies, in order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: _Layout) -> Tensor:
        ctx.layout = layout
        return x.index_select(0, layout.source_M)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        layout, grad = ctx.layout, grads[0]
        found = grad.index_select(0, layout.home_N).masked_fill_(layout.is_padding_N[:, None, None], 0)
        for tokens, places in layout.copies:
            found[tokens] += grad[places]
        return found, None


class _BringBack(torch.autograd.Function):
    """Rows laid out to rows, each token from its first copy. Backward gives the others a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: _Layout) -> Tensor:
        ctx.layout = layout
        return x.index_select(0, layout.home_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        layout = ctx.layout
        return grads[0].index_select(0, layout.source_M).masked_fill_(~layout.is_first_M[:, None, None], 0), None
