"""Masked language modelling: which tokens are hidden, and behind what.

Shapes: T tokens of a row.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from puna.batches.packing import IGNORE


@dataclass(frozen=True)
class Masking:
    """How tokens are chosen and hidden (Devlin et al. 2019, arXiv:1810.04805, section 3.1, task 1)."""

    rate: float = 0.15
    """Share of a row's tokens to predict. Special tokens and padding are never among them."""
    mask_share: float = 0.8
    """Of those, the share that the mask token stands for."""
    random_share: float = 0.1
    """The share that another token, drawn at random, stands for. The rest stays as it is: 0.8 and 0.1 are BERT's, 1 and
    0 plain masking."""
    mask_token: str = "<|mask|>"
    """Special token that hides. One that the tokenizer lacks is added to it; naming a reserved one, such as
    <|reserved_special_token_0|>, keeps the tokenizer as it is."""

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate is {self.rate}; it has to be above 0 and at most 1.")
        if min(self.mask_share, self.random_share) < 0 or self.mask_share + self.random_share > 1:
            raise ValueError(
                f"mask_share ({self.mask_share}) and random_share ({self.random_share}) have to be at least 0, and 1 "
                "at most together."
            )


@dataclass(frozen=True)
class Masker:
    """Hides tokens of a row."""

    masking: Masking
    """How."""
    mask_id: int
    """Id of the mask token."""
    ordinary_ids: NDArray[np.int64]
    """Ids of everything but special tokens, to draw from and to hide."""

    def hide(
        self, ids_T: NDArray[np.int64], real_T: NDArray[np.bool_], generator: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(input, labels): the row with tokens hidden, and the hidden tokens at their places, IGNORE elsewhere.

        The number of hidden tokens is `rate` of the ordinary ones, rounded, and at least one. `real_T` is false for
        padding.
        """
        candidates = np.flatnonzero(np.isin(ids_T, self.ordinary_ids, kind="table") & real_T)
        hidden_T, labels_T = ids_T.copy(), np.full_like(ids_T, IGNORE)
        if not len(candidates):
            return hidden_T, labels_T
        count = max(1, round(self.masking.rate * len(candidates)))
        chosen = generator.choice(candidates, count, replace=False)
        labels_T[chosen] = ids_T[chosen]
        fate = generator.random(count)
        others = generator.choice(self.ordinary_ids, count)
        masked = fate < self.masking.mask_share
        replaced = ~masked & (fate < self.masking.mask_share + self.masking.random_share)
        hidden_T[chosen[masked]] = self.mask_id
        hidden_T[chosen[replaced]] = others[replaced]
        return hidden_T, labels_T
