"""LayerSkip (Elhoushi et al. 2024, arXiv:2404.16710): train so that early layers can predict too.

Two parts, both only while training: layers are left out at random, later ones more often (section 4.1.1), and the
model's own norm and output projection predict from the states after earlier layers as well (section 4.1.2). The model
stays what it was in shape and in its files; it can then draft for itself (`engine.speculation.kind = "layers"`).

The paper leaves a layer out by computing fewer rows; here every row is computed and the result dropped, so that all
ranks of a distributed run make the same calls. It saves no training time.

Shapes: B rows, T tokens, D model dimension, L layers.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from puna.model.attend import Attend
from puna.model.transformer import Transformer
from puna.runtime.seeds import derive_seed


@dataclass(frozen=True)
class LayerSkip:
    """Layer dropout and early-exit loss. The defaults are the paper's for going on from Llama 2 7B."""

    dropout: float = 0.1
    """Probability, for each row, that the last layer is left out; at the first it is 0, and rises exponentially."""
    growing_dropout: bool = False
    """Let the dropout rise exponentially over training, from nothing; for training from random weights."""
    exit_scale: float = 0.2
    """Weight of early exits: the one after layer l (0, 1, ...) counts exit_scale * (0 + 1 + ... + l); 0 means none."""
    exit_every: int = 8
    """Predict after every so many layers, and in the next step after those that come next, in turn; 1 after all. The
    last layer always predicts."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"layer_skip.dropout is {self.dropout}; it has to be at least 0 and less than 1.")
        if self.exit_scale < 0 or self.exit_every < 1:
            raise ValueError("layer_skip.exit_scale has to be at least 0, and exit_every at least 1.")


@dataclass(frozen=True)
class SkipPlan:
    """What is left out, and what predicts, in every row of a training."""

    config: LayerSkip
    """The settings."""
    num_layers: int
    """Of the model."""
    steps: int
    """Of the training."""
    batch_rows: int
    """Rows of a step."""
    seed: int
    """Of what is left out."""

    def dropout(self, layer: int, step: int) -> float:
        """Probability that a layer is left out (D(l) times S(t), section 4.1.1)."""
        depth = 2 ** (layer / max(1, self.num_layers - 1)) - 1
        progress = 2 ** (step / max(1, self.steps - 1)) - 1 if self.config.growing_dropout else 1.0
        return self.config.dropout * depth * progress

    def kept(self, rows: list[int]) -> NDArray[np.bool_]:
        """Whether each layer computes for each row, shape [L, B]: a pure function of (seed, row)."""
        chances = np.stack(
            [
                np.random.default_rng(derive_seed(self.seed, "layer dropout", row)).random(self.num_layers)
                for row in rows
            ]
        )
        limits = [[self.dropout(layer, row // self.batch_rows) for layer in range(self.num_layers)] for row in rows]
        return (chances >= np.array(limits)).T

    def exit_weights(self, step: int) -> dict[int, float]:
        """Layer -> weight of the prediction after it, adding up to 1 (e(l), section 4.1.2, rotating curriculum)."""
        scale, last = self.config.exit_scale, self.num_layers - 1
        weights = {layer: scale * math.comb(layer + 1, 2) for layer in range(last) if self._exits(layer, step)}
        weights = {layer: weight for layer, weight in weights.items() if weight > 0}
        weights[last] = last + scale * math.comb(last, 2)
        total = sum(weights.values())
        return {layer: weight / total for layer, weight in weights.items()} if total else {last: 1.0}

    def _exits(self, layer: int, step: int) -> bool:
        return (layer - step) % self.config.exit_every == 0


@dataclass(frozen=True)
class SkippingAttend:
    """An attention context that also tells the hooks of `install` what to leave out and what to remember."""

    attend: Attend
    """The attention."""
    kept_LB: Tensor
    """Whether each layer computes for each row, bool."""
    exits: frozenset[int]
    """Layers whose states are remembered."""
    states: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> x_BTD after it."""

    def __call__(self, layer: int, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        return self.attend(layer, q_BTHK, k_BTGK, v_BTGK)


def install(model: Transformer) -> None:
    """Make the layers of `model` heed a `SkippingAttend`; with any other attention context nothing changes."""
    for number, layer in enumerate(model.layers):
        layer.register_forward_hook(_Hook(number))


@dataclass(frozen=True)
class _Hook:
    layer: int

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, object, object], x_BTD: Tensor) -> Tensor:
        before_BTD, _, attend = inputs
        if not isinstance(attend, SkippingAttend):
            return x_BTD
        x_BTD = torch.where(attend.kept_LB[self.layer][:, None, None], x_BTD, before_BTD)
        if self.layer in attend.exits:
            attend.states[self.layer] = x_BTD
        return x_BTD
