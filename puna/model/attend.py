"""Who may look at whom: the attention contexts that training and scoring use.

An `Attend` is what `Attention` calls between projecting and mixing heads. Here are those without a cache;
`puna.infer` has the one that holds keys and values of earlier steps.

Shapes: B batch, T tokens, S keys, H query heads, G key/value heads, K head dimension; in the regrouped form, N
documents of at most L tokens each.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, which loads the compiler only when called


class Attend(Protocol):
    """Scaled dot-product attention in some context."""

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        """Return o_BTHK. `layer` counts from 0; keys and queries are rotated already."""
        ...


def scaled_dot_product(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, *, mask_BTS: Tensor | None = None, causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v with grouped heads; `mask_BTS` is true where a query may look."""
    grouped = q_BTHK.shape[2] != k_BSGK.shape[2]
    o_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGK.transpose(1, 2),
        attn_mask=None if mask_BTS is None else mask_BTS.unsqueeze(1),
        is_causal=causal,
        enable_gqa=grouped,
    )
    return o_BHTK.transpose(1, 2)


def causal(layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Every token sees itself and what came before it in its row."""
    return scaled_dot_product(q_BTHK, k_BTGK, v_BTGK, causal=True)


def bidirectional(layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Every token sees its whole row."""
    return scaled_dot_product(q_BTHK, k_BTGK, v_BTGK)


class DocumentAttend:
    """Attention that stays inside documents packed side by side in a row.

    Also the context for padded batches: give padding a document number of its own.

    A mask over whole rows is always right. On a CPU, where rows hold several documents, causal attention is computed
    document by document instead, which leaves out what the mask would throw away.

    Args:
        documents_BT: the document that each token belongs to; equal numbers mean the same document, and a
            document's tokens stand together.
        causal: whether a token sees only what came before it; a tensor says it for each row, shape [B], bool.
    """

    def __init__(self, documents_BT: Tensor, *, causal: bool | Tensor = True) -> None:
        self.documents_BT, self.causal = documents_BT, causal
        self._regrouping = None
        if causal is True and documents_BT.device.type == "cpu":
            regrouping = _Regrouping.of(documents_BT)
            if regrouping.cost < documents_BT.numel() * documents_BT.shape[1]:
                self._regrouping = regrouping
        if self._regrouping is None:
            self._mask_BTS = documents_BT[:, :, None] == documents_BT[:, None, :]
            if isinstance(causal, Tensor):
                self._mask_BTS = self._mask_BTS.tril() | (self._mask_BTS & ~causal[:, None, None])
            elif causal:
                self._mask_BTS = self._mask_BTS.tril()

    # Shapes of the regrouped form change with every batch, for each of which a compiler would compile anew.
    @_disable_dynamo
    def __call__(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        if self._regrouping is None:
            return scaled_dot_product(q_BTHK, k_BTGK, v_BTGK, mask_BTS=self._mask_BTS)
        return self._regrouping.attend(q_BTHK, k_BTGK, v_BTGK)


@dataclass(frozen=True)
class _Regrouping:
    """Documents taken out of their rows and put side by side with others of about their length.

    Short ends are filled up with copies of a document's last token. As keys they come after every real query, so the
    causal mask hides them; as queries their results are dropped, and so their gradients are zero.
    """

    source: Tensor
    """Where in the flattened batch each token of the regrouped batch comes from."""
    filler: Tensor
    """True for copies that fill up."""
    home: Tensor
    """Where in the regrouped batch each token of the flattened batch is."""
    shapes: list[tuple[int, int]]
    """(N, L) of each group."""

    @property
    def cost(self) -> int:
        """Query-key pairs computed."""
        return sum(count * length**2 for count, length in self.shapes)

    @classmethod
    def of(cls, documents_BT: Tensor) -> "_Regrouping":
        new_document = torch.ones_like(documents_BT, dtype=torch.bool)
        new_document[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
        starts = new_document.flatten().nonzero().squeeze(1)
        lengths = torch.diff(starts, append=starts.new_tensor([documents_BT.numel()]))
        # Lengths within a factor of two share a group: few groups, little filling.
        kinds = lengths.log2().floor()
        sources, fillers, shapes = [], [], []
        for kind in torch.unique(kinds):
            members = kinds == kind
            steps = torch.arange(int(lengths[members].max()))
            last = lengths[members, None] - 1
            sources.append((starts[members, None] + steps.minimum(last)).flatten())
            fillers.append((steps > last).flatten())
            shapes.append((int(members.sum()), len(steps)))
        source, filler = torch.cat(sources), torch.cat(fillers)
        home = torch.empty(documents_BT.numel(), dtype=torch.int64)
        home[source[~filler]] = (~filler).nonzero().squeeze(1)
        return cls(source, filler, home, shapes)

    def attend(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        sizes = [count * length for count, length in self.shapes]
        q, k, v = (
            torch.split(_Regroup.apply(x.flatten(0, 1), self), sizes)  # type: ignore[no-untyped-call]
            for x in (q_BTHK, k_BTGK, v_BTGK)
        )
        parts = [
            scaled_dot_product(*(x[n].view(*shape, *x[n].shape[1:]) for x in (q, k, v)), causal=True).flatten(0, 1)
            for n, shape in enumerate(self.shapes)
        ]
        flat: Tensor = _Ungroup.apply(torch.cat(parts), self)  # type: ignore[no-untyped-call]
        return flat.view_as(q_BTHK)


class _Regroup(torch.autograd.Function):
    """Flattened batch to regrouped batch. Backward reads each token's gradient from its one real place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, regrouping: _Regrouping) -> Tensor:
        ctx.regrouping = regrouping
        return x.index_select(0, regrouping.source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.regrouping.home), None


class _Ungroup(torch.autograd.Function):
    """Regrouped batch to flattened batch. Backward gives fillers a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, regrouping: _Regrouping) -> Tensor:
        ctx.regrouping = regrouping
        return x.index_select(0, regrouping.home)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        filler = ctx.regrouping.filler[:, None, None]
        return grads[0].index_select(0, ctx.regrouping.source).masked_fill_(filler, 0), None
