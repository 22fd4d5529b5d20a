"""What a model learns from raw text: the next token, hidden tokens, whether two stretches belong together, or several
of these in one run on a shared trunk.

Each row belongs to one objective. Rows of all objectives go through one forward pass together, whatever they are, so
that every rank of a distributed run makes the same calls.

Shapes: B rows, T tokens, D model dimension, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from puna.batches.mixture import MixedRows, Rotation
from puna.batches.packing import IGNORE, PADDING, PackedRows, TokenBatch
from puna.batches.shards import TokenShards
from puna.config import Kinds
from puna.kernels.attend import document_attend
from puna.model.attend import Attend, DocumentAttend
from puna.model.transformer import Linear, Transformer
from puna.pretrain.layer_skip import SkippingAttend, SkipPlan
from puna.pretrain.masking import Masker, Masking
from puna.pretrain.pairs import PairRows
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path
from puna.runtime.seeds import derive_seed
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.extend import extend_tokenizer
from puna.train.loss import Loss, LossSum, token_loss

PAIR_FILE = "pair_head.safetensors"
"""Beside a model's weights: the classifier of sentence pairs."""


@dataclass(frozen=True)
class CausalObjective:
    """Predict each token from those before it."""

    kind: Literal["causal"] = "causal"
    """The objective."""
    share: float = 1.0
    """Share of the rows; only the ratio to the other objectives' matters."""
    weight: float = 1.0
    """Factor of the loss of each prediction; all predictions of a step count alike otherwise."""

    def __post_init__(self) -> None:
        _check_balance(self.share, self.weight)


@dataclass(frozen=True)
class MaskedObjective:
    """Predict hidden tokens from those on both sides (BERT, arXiv:1810.04805)."""

    kind: Literal["masked"] = "masked"
    """The objective."""
    share: float = 1.0
    """Share of the rows; only the ratio to the other objectives' matters."""
    weight: float = 1.0
    """Factor of the loss of each prediction; all predictions of a step count alike otherwise."""
    masking: Masking = field(default_factory=Masking)
    """What is hidden."""

    def __post_init__(self) -> None:
        _check_balance(self.share, self.weight)


@dataclass(frozen=True)
class PairObjective:
    """Tell whether the second of two stretches of text belongs after the first, looking both ways."""

    kind: Literal["next_sentence", "sentence_order"] = "next_sentence"
    """`next_sentence`: the other choice is from another document (BERT, arXiv:1810.04805, section 3.1, task 2);
    `sentence_order`: the two are exchanged (ALBERT, arXiv:1909.11942, section 3.1), which is harder."""
    share: float = 1.0
    """Share of the rows; only the ratio to the other objectives' matters."""
    weight: float = 1.0
    """Factor of the loss of each pair. A row has one, but hundreds of tokens: beside hidden tokens in the same rows
    0.15 * row_length comes to BERT's sum of the two means."""
    masking: Masking | None = None
    """Hide tokens of the same rows too, as BERT does, and predict them, each with weight 1; not when absent."""

    def __post_init__(self) -> None:
        _check_balance(self.share, self.weight)


def _check_balance(share: float, weight: float) -> None:
    if share <= 0 or weight <= 0:
        raise ValueError(f"share ({share}) and weight ({weight}) of an objective have to be above 0.")


Objective = CausalObjective | MaskedObjective | PairObjective
AnyObjective = Annotated[
    Objective,
    Kinds(
        "objective",
        {
            "causal": f"{__name__}:CausalObjective",
            "masked": f"{__name__}:MaskedObjective",
            "next_sentence": f"{__name__}:PairObjective",
            "sentence_order": f"{__name__}:PairObjective",
        },
    ),
]


def masking_of(objective: Objective) -> Masking | None:
    """How an objective hides tokens, if it does."""
    return None if isinstance(objective, CausalObjective) else objective.masking


def predicts_pairs(objectives: Sequence[Objective]) -> bool:
    """Whether one of the objectives needs the classifier of pairs."""
    return any(isinstance(objective, PairObjective) for objective in objectives)


def with_mask_tokens(tokenizer: Tokenizer, objectives: Sequence[Objective]) -> Tokenizer:
    """The tokenizer with a mask token for each objective that hides tokens; itself, if it has them all."""
    masks = [masking.mask_token for objective in objectives if (masking := masking_of(objective)) is not None]
    missing = [name for name in dict.fromkeys(masks) if name not in tokenizer.special_tokens]
    return extend_tokenizer(tokenizer, special_tokens=missing) if missing else tokenizer


@dataclass(frozen=True, slots=True)
class ObjectiveBatch(TokenBatch):
    """Rows of several objectives."""

    pair_labels_B: Tensor
    """Class of the row's pair, or IGNORE, int64."""
    objectives_B: Tensor
    """Number of the row's objective, int64."""
    rows_B: Tensor
    """Number of the row, counted from the beginning of training, int64."""

    @property
    def num_targets(self) -> int:
        """How many predictions carry a loss."""
        return int((self.labels_BT != IGNORE).sum() + (self.pair_labels_B != IGNORE).sum())


class ObjectiveRows:
    """Endless rows of several objectives, in fixed proportions; row *i* is a pure function of (rows, seed, *i*).

    Args:
        rows: the text. Row *i* is made of its row *i*, or, for pairs, of documents of the same source.
        objectives: what to make of it.
        tokenizer: with every mask token (`with_mask_tokens`).
        row_length: tokens in a row.
        seed: of what is hidden and paired.
    """

    def __init__(
        self,
        rows: PackedRows | MixedRows,
        objectives: Sequence[Objective],
        tokenizer: Tokenizer,
        row_length: int,
        seed: int,
    ) -> None:
        self.rows, self.objectives, self.seed = rows, tuple(objectives), seed
        self._order = Rotation([objective.share for objective in objectives])
        ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), list(tokenizer.special_ids))
        self._maskers = [
            None if (m := masking_of(o)) is None else Masker(m, tokenizer.special_tokens[m.mask_token], ordinary)
            for o in objectives
        ]
        self._pairs = [
            PairRows(self._shards_of, tokenizer, row_length, seed, o.kind) if isinstance(o, PairObjective) else None
            for o in objectives
        ]

    @property
    def rows_per_epoch(self) -> int:
        """Rows in one pass over the documents, where they are of one source."""
        assert isinstance(self.rows, PackedRows), "a mixture has no common epoch"
        return self.rows.rows_per_epoch

    def batch(self, rows: Sequence[int]) -> ObjectiveBatch:
        """Rows by number, counted from 0."""
        parts = [self._row(row) for row in rows]
        names = ("ids_BT", "labels_BT", "positions_BT", "documents_BT")
        columns = {name: torch.cat([getattr(part, name) for part, _, _ in parts]) for name in names}
        return ObjectiveBatch(
            **columns,
            pair_labels_B=torch.tensor([label for _, label, _ in parts]),
            objectives_B=torch.tensor([number for _, _, number in parts]),
            rows_B=torch.tensor(list(rows)),
        )

    def origins(self, row: int) -> list[tuple[TokenShards, int]]:
        """The documents that a row holds tokens of, with the shards that they are in."""
        pairs = self._pairs[self._order.at(row)]
        return self.rows.origins(row) if pairs is None else pairs.origins(row)

    def _row(self, row: int) -> tuple[TokenBatch, int, int]:
        """One row as a batch, the class of its pair, and the number of its objective."""
        number = self._order.at(row)
        pairs, masker = self._pairs[number], self._maskers[number]
        pair_label = IGNORE
        if pairs is None:
            batch = self.rows.batch([row])
        else:
            ids, positions, documents, pair_label = pairs.row(row)
            columns = (ids, np.full_like(ids, IGNORE), positions, documents)
            batch = TokenBatch(*(torch.from_numpy(column)[None] for column in columns))
        if masker is not None:
            generator = np.random.default_rng(derive_seed(self.seed, "masking", row))
            real_T = (batch.documents_BT[0] != PADDING).numpy()
            hidden, labels = masker.hide(batch.ids_BT[0].numpy(), real_T, generator)
            batch = replace(batch, ids_BT=torch.from_numpy(hidden)[None], labels_BT=torch.from_numpy(labels)[None])
        return batch, pair_label, number

    def _shards_of(self, row: int) -> TokenShards:
        if isinstance(self.rows, PackedRows):
            return self.rows.shards
        ingredient, _ = self.rows.locate(row)
        return self.rows.ingredients[ingredient].rows.shards


def objective_loss(objectives: Sequence[Objective], skip: SkipPlan | None = None, z_loss: float = 0.0) -> Loss:
    """The loss of batches of `ObjectiveRows`: the sum over predictions, each times its objective's `weight`.

    Hidden tokens are predicted by the model's own output projection from the state at their place; pairs by the
    classifier that `add_pair_head` adds, from the state at BOS.

    Args:
        skip: while the model trains, leave layers out and predict from early ones too; `layer_skip.install` the hooks.
        z_loss: of token predictions, see `puna.train.loss.token_loss`.
    """

    def loss(model: Transformer, batch: TokenBatch) -> LossSum:
        assert isinstance(batch, ObjectiveBatch)
        attend = objective_attend(objectives, batch)
        weights, skipping = {}, None
        if skip is not None and model.training:
            rows = batch.rows_B.tolist()
            weights = skip.exit_weights(rows[0] // skip.batch_rows)
            kept_LB = torch.from_numpy(skip.kept(rows)).to(batch.ids_BT.device)
            attend = skipping = SkippingAttend(attend, kept_LB, frozenset(weights))

        def head(h_BTD: Tensor, output: Linear) -> Tensor:
            pair_head = getattr(model, "pair_head", None)
            if skipping is None:
                return weighted_loss(objectives, batch, h_BTD, output, pair_head, z_loss)
            total = h_BTD.new_zeros((), dtype=torch.float32)
            for layer, weight in weights.items():
                state_BTD = model.norm(skipping.states[layer])
                total = total + weight * weighted_loss(objectives, batch, state_BTD, output, pair_head, z_loss)
            return total

        return LossSum(model(batch.ids_BT, batch.positions_BT, attend, head), batch.num_targets)

    return loss


def objective_attend(objectives: Sequence[Objective], batch: ObjectiveBatch) -> Attend:
    """Attention within documents: backwards for rows of causal objectives, both ways for the others."""
    causal = [isinstance(objective, CausalObjective) for objective in objectives]
    if all(causal):
        return document_attend(batch.documents_BT)
    if not any(causal):
        return DocumentAttend(batch.documents_BT, causal=False)
    causal_B = torch.tensor(causal, device=batch.objectives_B.device)[batch.objectives_B]
    return DocumentAttend(batch.documents_BT, causal=causal_B)


def weighted_loss(
    objectives: Sequence[Objective],
    batch: ObjectiveBatch,
    h_BTD: Tensor,
    output: Linear,
    pair_head: nn.Module | None,
    z_loss: float = 0.0,
) -> Tensor:
    """Sum over a batch's predictions from its last hidden states, each times its objective's `weight`."""
    total = h_BTD.new_zeros((), dtype=torch.float32)
    for number, objective in enumerate(objectives):
        mine_B = batch.objectives_B == number
        if not isinstance(objective, PairObjective) or objective.masking is not None:
            labels_BT = batch.labels_BT.where(mine_B[:, None], IGNORE)
            tokens = token_loss(h_BTD, output, labels_BT, z_loss=z_loss)
            total = total + (1.0 if isinstance(objective, PairObjective) else objective.weight) * tokens
        if isinstance(objective, PairObjective):
            assert pair_head is not None
            logits_B2 = pair_head(h_BTD[:, 0]).float()
            labels_B = batch.pair_labels_B.where(mine_B, IGNORE)
            pairs = F.cross_entropy(logits_B2, labels_B, ignore_index=IGNORE, reduction="sum")
            total = total + objective.weight * pairs
    return total


def add_pair_head(model: Transformer, seed: int, directory: Path | None = None) -> None:
    """Give `model` the classifier of pairs, `pair_head`: that of the model directory, where it has one, or a new one.

    Like the output projection, it starts with a standard deviation of 1 / sqrt(D).
    """
    dim = model.config.dim
    head = Linear(dim, 2, bias=False)
    generator = torch.Generator().manual_seed(derive_seed(seed, "pair head"))
    nn.init.trunc_normal_(head.weight, std=dim**-0.5, a=-3 * dim**-0.5, b=3 * dim**-0.5, generator=generator)
    if directory is not None and (directory / PAIR_FILE).exists():
        stored = load_file(directory / PAIR_FILE)
        if stored.keys() != {"weight"} or stored["weight"].shape != head.weight.shape:
            raise InputError(f"{directory / PAIR_FILE} is not a classifier of pairs for this model; delete it.")
        head.load_state_dict(stored)
    model.add_module("pair_head", head)


def take_pair_head(model: Transformer) -> Callable[[Path], None]:
    """Take the classifier off again, so that the trunk can be saved; returns what writes it into a model directory."""
    head = model.get_submodule("pair_head")
    del model.pair_head

    def write(directory: Path) -> None:
        with atomic_path(directory / PAIR_FILE) as path:
            save_file({"weight": head.get_parameter("weight").detach().to("cpu").contiguous()}, path)

    return write
