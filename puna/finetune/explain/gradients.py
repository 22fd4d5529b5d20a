"""Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365): what each token adds to an answer.

Shapes: N points on the path, T tokens, D model dimension, C outputs of the head, K explained outputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from puna.batches.packing import IGNORE
from puna.finetune.tasks.task import Example, collate
from puna.model.transformer import Transformer
from puna.peft.heads import Attention, HeadSpec, head_logits
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer

Function = Callable[[Tensor], Tensor]
"""Embeddings [N, T, D] to outputs [N, K], every text for itself."""

Baseline = Literal["padding", "bos", "zero"]

_FIRST_PARTS = 4
_POINTS_A_PART = 8
FEWEST_POINTS = _FIRST_PARTS * _POINTS_A_PART
"""That are computed in any case."""

_ROWS_AT_ONCE = 16
_ROUNDING = 1e-5
"""Relative, of outputs computed in float32 through some dozens of layers."""


@dataclass(frozen=True, slots=True)
class Attributions:
    """Contributions of tokens to K outputs, and how far they are from being complete."""

    values_KT: Tensor
    """What each token adds to each output, float64, in the output's unit."""
    outputs_K: Tensor
    """The outputs for the text."""
    baseline_outputs_K: Tensor
    """The outputs for the baseline."""
    gaps_K: Tensor
    """How far contributions may be from adding up to the difference of the two: the sum of how far they are on each
    part of the way. Completeness (proposition 1 of the paper) says 0 for the exact integral."""
    bounds_K: Tensor
    """How far they may be."""
    num_points: int
    """Gradients computed on the way."""

    @property
    def complete_K(self) -> Tensor:
        """Which outputs' contributions are within their bound."""
        return self.gaps_K <= self.bounds_K


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A part of the way from the baseline, at 0, to the text, at 1."""

    low: float
    high: float
    values_KT: Tensor
    gaps_K: Tensor


def integrated_gradients(
    function: Function, x_TD: Tensor, baseline_TD: Tensor, *, tolerance: float = 0.01, max_points: int = 2048
) -> Attributions:
    """Integrate gradients along the straight line from a baseline to a text's embeddings (equation 1).

    Equation 3 of the paper is a sum over equal steps. A trained head changes its mind within a short stretch of the
    way, for which that takes very many; so the way is cut into parts, each integrated by Gauss-Legendre quadrature, and
    those are halved whose contributions do not add up to the difference of the outputs at their two ends.

    Args:
        function: what is explained.
        x_TD: the text; `baseline_TD` what stands for its absence.
        tolerance: contributions may miss the difference of the outputs by this share of the sum of their absolute
            values.
        max_points: give up halving there; `Attributions.complete_K` tells.
    """
    way = _Way(function, x_TD, baseline_TD)
    parts = way.parts([(number / _FIRST_PARTS, (number + 1) / _FIRST_PARTS) for number in range(_FIRST_PARTS)])
    num_points = len(parts) * _POINTS_A_PART
    baseline_outputs_K, outputs_K = way.outputs[0.0], way.outputs[1.0]
    rounding_K = _ROUNDING * torch.maximum(outputs_K.abs(), baseline_outputs_K.abs())
    while True:
        values_KT = torch.stack([part.values_KT for part in parts]).sum(0)
        gaps_K = torch.stack([part.gaps_K for part in parts]).sum(0)
        bounds_K = tolerance * values_KT.abs().sum(1) + rounding_K
        # Where none is above its share, the sum is within the bound.
        poor = [part for part in parts if bool((part.gaps_K > bounds_K / len(parts)).any())]
        if not bool((gaps_K > bounds_K).any()) or num_points + 2 * len(poor) * _POINTS_A_PART > max_points:
            return Attributions(values_KT, outputs_K, baseline_outputs_K, gaps_K, bounds_K, num_points)
        halves = []
        for part in poor:
            middle = (part.low + part.high) / 2
            halves += [(part.low, middle), (middle, part.high)]
        num_points += len(halves) * _POINTS_A_PART
        parts = [part for part in parts if part not in poor] + way.parts(halves)


class _Way:
    """The straight line from a baseline to a text, and the outputs at the ends of its parts."""

    def __init__(self, function: Function, x_TD: Tensor, baseline_TD: Tensor) -> None:
        self.function, self.baseline_TD, self.difference_TD = function, baseline_TD, x_TD - baseline_TD
        nodes, weights = np.polynomial.legendre.leggauss(_POINTS_A_PART)
        # From [-1, 1], for which they are tabulated, to [0, 1].
        self.nodes, self.weights = (nodes + 1) / 2, torch.tensor(weights / 2, device=x_TD.device)
        self.outputs: dict[float, Tensor] = {}

    def parts(self, ends: Sequence[tuple[float, float]]) -> list[_Part]:
        """Integrate each part by itself."""
        new = sorted({end for both in ends for end in both} - self.outputs.keys())
        with torch.no_grad():
            for start in range(0, len(new), _ROWS_AT_ONCE):
                chosen = new[start : start + _ROWS_AT_ONCE]
                outputs_NK = self.function(self._points(chosen)).double().cpu()
                self.outputs.update(zip(chosen, outputs_NK, strict=True))
        return [self._part(low, high) for low, high in ends]

    def _part(self, low: float, high: float) -> _Part:
        path_NTD = self._points(low + (high - low) * self.nodes).requires_grad_()
        with torch.enable_grad():
            outputs_NK = self.function(path_NTD)
            gradients = [
                torch.autograd.grad(column_N.sum(), path_NTD, retain_graph=True)[0] for column_N in outputs_NK.unbind(1)
            ]
        means = [torch.einsum("ntd,n->td", gradient.double(), self.weights) for gradient in gradients]
        step_TD = (high - low) * self.difference_TD.double()
        values_KT = (torch.stack(means) * step_TD).sum(-1).cpu()
        return _Part(low, high, values_KT, (values_KT.sum(1) - (self.outputs[high] - self.outputs[low])).abs())

    def _points(self, alphas: Any) -> Tensor:
        """Embeddings at shares of the way, [N, T, D]."""
        alphas_N = torch.as_tensor(alphas, dtype=self.difference_TD.dtype, device=self.difference_TD.device)
        return self.baseline_TD + alphas_N[:, None, None] * self.difference_TD


@dataclass(frozen=True, slots=True)
class Target:
    """One output of a head, at one token."""

    position: int
    """The token."""
    label: int
    """The output's number."""


def head_outputs(logits: Tensor, spec: HeadSpec) -> Tensor:
    """What is explained, from logits [..., C]: probabilities, as in section 2 of the paper; a number as it is."""
    match spec.config.get("problem_type"):
        case "regression":
            return logits
        case "multi_label_classification":
            return logits.sigmoid()
        case _:
            return logits.softmax(-1)


def head_function(
    model: Transformer, ids: Sequence[int], spec: HeadSpec, attention: Attention, targets: Sequence[Target]
) -> Function:
    """A text's head as a function of its embeddings; `targets` are the columns of what it returns."""
    positions = [target.position for target in targets]
    labels = [target.label for target in targets]

    def function(x_NTD: Tensor) -> Tensor:
        batch = collate([Example(list(ids), [IGNORE] * len(ids))] * len(x_NTD), pad_id=0).to(x_NTD.device)

        def replace(module: Any, inputs: Any, output: Tensor) -> Tensor:
            # Virtual tokens, where a method trained some, stand before the text.
            return torch.cat((output[:, : -len(ids)], x_NTD), dim=1)

        hook = model.embedding.register_forward_hook(replace)
        try:
            logits_NTC = head_logits(model, batch, spec.module, attention)
        finally:
            hook.remove()
        return head_outputs(logits_NTC[:, positions], spec)[:, range(len(targets)), labels]

    return function


def baseline_embeddings(model: Transformer, ids: Sequence[int], tokenizer: Tokenizer, baseline: Baseline) -> Tensor:
    """What stands for a text's absence, shape [T, D].

    Special tokens stay where they are, so that only words are explained. An embedding of zeros suits a model that
    normalises its input badly: RMSNorm makes the same of all points of the way but those right beside the baseline, and
    everything is decided there.

    Raises:
        InputError: the tokenizer has no BOS token to take.
    """
    embedding = model.embedding.weight.detach()
    x_TD = embedding[list(ids)].clone()
    token = tokenizer.bos_id if baseline == "bos" else tokenizer.pad_id
    if token is None:
        raise InputError("This tokenizer has no BOS token; choose another baseline: --set head.baseline=padding.")
    words = [at for at, token_id in enumerate(ids) if token_id not in tokenizer.special_ids]
    x_TD[words] = torch.zeros_like(embedding[0]) if baseline == "zero" else embedding[token]
    return x_TD
