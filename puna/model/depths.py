"""Mixture-of-Depths (Raposo et al. 2024, arXiv:2404.02258): layers that most tokens pass by.

A router gives every token a weight. In training the `capacity` share of a row's tokens with the largest weights go
through the layer, its change multiplied by the weight; the others keep their state (equation 1). Which tokens are
among the largest depends on later ones, so a small predictor learns to guess it from the token's state alone (section
3.5), and decides in evaluation and generation; what it learns does not flow back into the model. A cache holds keys and
values of those tokens alone that went through.

Layers become gated from outside, by `gate_layers`; their weights keep their names and places.

Shapes: B rows, T tokens, C chosen tokens (filled up to the longest row), D model dimension, P rotated pairs.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, which loads the compiler only when called

from puna.model.attend import Attend, DocumentAttend, causal
from puna.model.rope import Rotation
from puna.model.transformer import Layer, Linear, Transformer

_PREDICTOR_DIM = 128

_FILLER = -2
"""Document number of places that fill up a row of chosen tokens."""


@dataclass(frozen=True)
class Depths:
    """Which layers are gated, and how many tokens go through them."""

    layers: tuple[int, ...]
    """Numbers of the gated layers, from 0."""
    capacity: float
    """Share of a row's tokens that go through one, in training; above 0 and at most 1."""


@runtime_checkable
class Narrowable(Protocol):
    """An `Attend` that knows more than the tokens of a forward, as one with a cache, and so narrows itself.

    Attributes:
        keeps_shape: whether a layer has to compute every token, and throw away what did not pass, so that the shapes
            of its products, and with them the rounding, do not depend on who passes.
    """

    keeps_shape: bool

    def narrow(self, chosen_BC: Tensor, real_BC: Tensor) -> Attend:
        """The same context among the chosen tokens, of which only the real ones count; see `attend_to_chosen`."""
        ...


class GatedLayer(Layer):
    """A layer with a router and a predictor around it.

    Both look at the normalised state, because the scale of the state itself grows with depth; the paper routes by the
    state.

    Args:
        layer: its parts become this one's.
        capacity: share of a row's tokens that go through in training.

    Attributes:
        passed_share: share of the tokens that went through in the last forward pass of evaluation.
    """

    def __init__(self, layer: Layer, capacity: float) -> None:
        nn.Module.__init__(self)
        for name, part in layer.named_children():
            self.add_module(name, part)
        self.capacity, self.passed_share = capacity, math.nan
        dim = len(layer.attention_norm.weight)
        with layer.attention_norm.weight.device:
            self.router = Linear(dim, 1, bias=False)
            self.predictor = nn.Sequential(
                Linear(dim, min(dim, _PREDICTOR_DIM), bias=False),
                nn.SiLU(),
                Linear(min(dim, _PREDICTOR_DIM), 1, bias=False),
            )

    def forward(self, x_BTD: Tensor, rotation: Rotation, attend: Attend) -> Tensor:
        n_BTD = self.attention_norm(x_BTD)
        weights_BT = self.router(n_BTD).squeeze(-1)
        guesses_BT = self.predictor(n_BTD.detach()).squeeze(-1).float()
        if self.training:
            count = math.ceil(self.capacity * x_BTD.shape[1])
            chosen_BC = weights_BT.topk(count, dim=1).indices.sort(dim=1).values
            real_BC = torch.ones_like(chosen_BC, dtype=torch.bool)
            largest_BT = torch.zeros_like(guesses_BT).scatter(1, chosen_BC, 1.0)
            prediction_loss = F.binary_cross_entropy_with_logits(guesses_BT, largest_BT, reduction="sum")
            x_BTD = _AddLoss.apply(x_BTD, prediction_loss)  # type: ignore[no-untyped-call]
        else:
            every = isinstance(attend, Narrowable) and attend.keeps_shape
            chosen_BC, real_BC = _every_place(guesses_BT > 0) if every else _places(guesses_BT > 0)
            self.passed_share = real_BC.sum().item() / guesses_BT.numel()
        if not chosen_BC.shape[1]:
            return x_BTD
        place_BC1 = chosen_BC.unsqueeze(-1)
        x_BCD = x_BTD.take_along_dim(place_BC1, 1)
        cos_BCP, sin_BCP = (part_BTP.take_along_dim(place_BC1, 1) for part_BTP in rotation)
        narrowed = attend_to_chosen(attend, chosen_BC, real_BC)
        change_BCD = super().forward(x_BCD, (cos_BCP, sin_BCP), narrowed) - x_BCD
        gates_BC = weights_BT.take_along_dim(chosen_BC, 1).where(real_BC, 0)
        return x_BTD.scatter_add(1, place_BC1.expand_as(change_BCD), gates_BC.unsqueeze(-1) * change_BCD)


def gate_layers(model: Transformer, depths: Depths, seed: int | None = None) -> None:
    """Put gated layers in the place of plain ones, with the same weights.

    Args:
        model: changed in place.
        depths: which layers.
        seed: of the routers and predictors; None leaves them to be loaded.

    Raises:
        ValueError: there is no such layer, or it is gated already.
    """
    for number in depths.layers:
        layer = model.layers[number] if 0 <= number < len(model.layers) else None
        if type(layer) is not Layer:
            raise ValueError(
                f"Layer {number} cannot be gated: the model has {len(model.layers)} layers, counted from 0."
            )
        gated = GatedLayer(layer, depths.capacity)
        model.layers[number] = gated
        if seed is not None:
            generator = torch.Generator(gated.router.weight.device).manual_seed(seed + number)
            for weight in (gated.router.weight, *gated.predictor.parameters()):
                std = 1 / math.sqrt(weight.shape[1])
                nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)


def depths_of(model: Transformer) -> Depths | None:
    """What `gate_layers` made of a model; None for a plain one."""
    gated = {number: layer.capacity for number, layer in enumerate(model.layers) if isinstance(layer, GatedLayer)}
    return Depths(tuple(gated), next(iter(gated.values()))) if gated else None


# Shapes change with every batch in evaluation.
@_disable_dynamo
def attend_to_chosen(attend: Attend, chosen_BC: Tensor, real_BC: Tensor) -> Attend:
    """The same context as `attend`, among the chosen tokens only.

    Args:
        chosen_BC: their places in each row, in order.
        real_BC: false for places that only fill up a row; nobody sees them, and their results mean nothing.

    Raises:
        ValueError: it is one that cannot be narrowed.
    """
    if isinstance(attend, Narrowable):
        return attend.narrow(chosen_BC, real_BC)
    documents_BT = getattr(attend, "documents_BT", None)
    if attend is causal:
        return causal if real_BC.all() else DocumentAttend(torch.where(real_BC, 0, _FILLER))
    if documents_BT is None:
        raise ValueError(
            f"A mixture of depths needs causal or document-masked attention, and cannot narrow {type(attend).__name__}."
        )
    documents_BC = documents_BT.take_along_dim(chosen_BC, 1).where(real_BC, _FILLER)
    return DocumentAttend(documents_BC, causal=getattr(attend, "causal", True))


def _places(wanted_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the true entries of each row in order, filled up to the longest row, and which of them are real."""
    counts_B = wanted_BT.sum(1)
    order_BT = wanted_BT.int().argsort(dim=1, descending=True, stable=True)
    chosen_BC = order_BT[:, : int(counts_B.max())]
    real_BC = torch.arange(chosen_BC.shape[1], device=wanted_BT.device) < counts_B[:, None]
    return chosen_BC, real_BC


def _every_place(wanted_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The same with all places; those that are not wanted are no real ones."""
    return torch.arange(wanted_BT.shape[1], device=wanted_BT.device).expand_as(wanted_BT), wanted_BT


class _AddLoss(torch.autograd.Function):
    """Passes x on; in the backward pass `loss`, a sum over tokens, is part of what is minimised, with weight 1.

    So a layer's own loss needs no way through the model's result (as in Megatron-LM's MoEAuxLossAutoScaler).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0].new_ones((), dtype=torch.float32)
