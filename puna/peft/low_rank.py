"""A linear map with a low-rank update beside it: W x + s B A x (Hu et al. 2021, arXiv:2106.09685, section 4.1).

Shapes: N outputs, K inputs, R rank.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.peft.method import Base, MergeableLinear


class LoRALinear(MergeableLinear):
    """A linear map with a low-rank update beside it.

    Args:
        scale: what the update is multiplied by.
        dropout: share of the update's inputs that is dropped in training.

    Attributes:
        lora_a: [R, K], in float32; random at first.
        lora_b: [N, R], in float32; zero at first, so that the update is.
    """

    FILE_NAMES: ClassVar[Mapping[str, str]] = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}

    lora_a: Tensor
    lora_b: Tensor

    def __init__(self, base: Base, rank: int, scale: float, dropout: float, generator: torch.Generator) -> None:
        super().__init__(base)
        self.scale, self.dropout = scale, dropout
        # Kaiming's uniform with a = sqrt(5), as in the authors' code and PEFT.
        limit = 1 / math.sqrt(self.in_features)
        a_RK = torch.empty(rank, self.in_features).uniform_(-limit, limit, generator=generator)
        self.set_own(lora_a=a_RK, lora_b=torch.zeros(self.out_features, rank))

    def update(self, x: Tensor) -> Tensor:
        """s B A x."""
        return F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype)) * self.scale

    def adapted(self, x: Tensor) -> Tensor:
        return self.base(x) + self.update(F.dropout(x, self.dropout, self.training))  # type: ignore[no-any-return]

    def updated_weight(self) -> Tensor:
        """W + s B A, in float32."""
        return self.base.weight.float() + self.lora_b.float() @ self.lora_a.float() * self.scale

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        return self.updated_weight().to(self.base.weight.dtype)
