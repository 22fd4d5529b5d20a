"""A low-rank update of the direction of each output's weights, and their length beside it (DoRA).

m (W + s B A) / |W + s B A|, with the norm of each output's row (Liu et al. 2024, arXiv:2402.09353, equation 5).

Shapes: N outputs, K inputs.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.peft.low_rank import LoRALinear
from puna.peft.method import Base


class DoRALinear(LoRALinear):
    """A linear map with a low-rank update, whose rows have a trained length.

    Attributes:
        magnitude: [N], in float32; the lengths of the base's rows at first.
    """

    FILE_NAMES: ClassVar[Mapping[str, str]] = {**LoRALinear.FILE_NAMES, "magnitude": "lora_magnitude_vector"}

    magnitude: Tensor

    def __init__(self, base: Base, rank: int, scale: float, dropout: float, generator: torch.Generator) -> None:
        super().__init__(base, rank, scale, dropout, generator)
        # Of the base alone: the update is zero at first.
        self.set_own(magnitude=torch.linalg.norm(base.weight.detach().float(), dim=1))

    def stretch(self) -> Tensor:
        """Factor of each output, [N]. The length of the sum counts as a constant (section 4.3)."""
        length_N: Tensor = torch.linalg.norm(self.updated_weight().detach(), dim=1)
        return self.magnitude / length_N

    def adapted(self, x: Tensor) -> Tensor:
        stretch_N = self.stretch().to(x.dtype)
        if not self.training or not self.dropout:
            return self._add_bias((self._straight(x) + self.update(x)) * stretch_N)
        # Dropout is of the inputs to what differs from the base, as in PEFT.
        dropped = F.dropout(x, self.dropout)
        change = self._straight(dropped) * (stretch_N - 1) + self.update(dropped) * stretch_N
        return self._add_bias(self._straight(x) + change)

    def _straight(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y if self.base.bias is None else y - self.base.bias.to(x.dtype)

    def _add_bias(self, y: Tensor) -> Tensor:
        return y if self.base.bias is None else y + self.base.bias.to(y.dtype)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        return (self.updated_weight() * self.stretch()[:, None]).to(self.base.weight.dtype)
