"""The loss of a batch of preferences, and what is measured beside it.

Shapes: B rows, T tokens, D model dimension, N answers, P pairs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from puna.align.losses import KTO, Answers, PairLoss, PreferenceLoss
from puna.align.watch import HeldOutWatch
from puna.batches.packing import IGNORE, PADDING, TokenBatch
from puna.batches.preference_rows import PROMPT, PreferenceBatch, PreferenceRows
from puna.batches.preferences import BAD, GOOD, MISMATCHED
from puna.kernels.attend import document_attend
from puna.kernels.shared import SharedPromptAttend
from puna.model.attend import Attend
from puna.model.transformer import Linear, Transformer
from puna.train.cross_entropy import linear_logprobs
from puna.train.loss import Loss, LossSum


def is_answer(batch: PreferenceBatch) -> Tensor:
    """Whether a token belongs to one answer, and not to several or to none, bool [B, T]."""
    return (batch.documents_BT != PADDING) & (batch.ranks_BT != PROMPT)


def attend_of(batch: TokenBatch) -> Attend:
    """What a token sees: its document, and the prompt that this goes on from."""
    if isinstance(batch, PreferenceBatch) and (batch.ranks_BT == PROMPT).any():
        return SharedPromptAttend(batch.documents_BT, batch.groups_BT, batch.ranks_BT == PROMPT)
    return document_attend(batch.documents_BT)


def token_logprobs(model: Transformer, batch: TokenBatch, attend: Attend | None = None) -> Tensor:
    """Log-probability of each label, float32 [B, T]; 0 where there is none.

    Args:
        attend: what a token sees; absent, see `attend_of`.
    """

    def head(h_BTD: Tensor, output: Linear) -> Tensor:
        logprobs = linear_logprobs(h_BTD.flatten(0, 1), output.weight, batch.labels_BT.flatten(), IGNORE)
        return logprobs.view_as(batch.labels_BT)

    logprobs_BT: Tensor = model(batch.ids_BT, batch.positions_BT, attend or attend_of(batch), head)
    return logprobs_BT


@dataclass(frozen=True, slots=True)
class Judged:
    """The answers of a batch, and how they compare."""

    answers: Answers
    """What the model makes of them."""
    groups_N: Tensor
    """The prompt that each is an answer to, as a number of the batch's."""
    ranks_N: Tensor
    """Its place among them."""

    @property
    def num_groups(self) -> int:
        """Prompts."""
        return int(self.groups_N.max()) + 1 if len(self.groups_N) else 0

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The better and the worse answer of every pair, and the pair's weight [P]: each prompt has 1 in all
        (InstructGPT, arXiv:2203.02155, equation 1)."""
        same_NN = self.groups_N[:, None] == self.groups_N
        better_P, worse_P = (same_NN & (self.ranks_N[:, None] < self.ranks_N)).nonzero(as_tuple=True)
        groups_P = self.groups_N[better_P]
        return better_P, worse_P, 1 / groups_P.bincount()[groups_P]


def judge(batch: PreferenceBatch, logprobs_BT: Tensor) -> Judged:
    """The answers of a batch from the log-probabilities of its labels."""
    real_BT = is_answer(batch)
    rows_BT = torch.arange(len(real_BT), device=real_BT.device)[:, None] * real_BT.shape[1]
    documents, inverse = (batch.documents_BT + rows_BT)[real_BT].unique(return_inverse=True)  # type: ignore[no-untyped-call]

    def summed(values_BT: Tensor) -> Tensor:
        zeros = torch.zeros(len(documents), device=real_BT.device)
        return zeros.index_add(0, inverse, values_BT[real_BT].float())

    def of_each(values_BT: Tensor) -> Tensor:
        found = torch.empty(len(documents), dtype=values_BT.dtype, device=real_BT.device)
        return found.index_put((inverse,), values_BT[real_BT])

    answers = Answers(summed(logprobs_BT), summed(batch.reference_BT), summed(batch.labels_BT != IGNORE))
    _, groups_N = of_each(batch.groups_BT + rows_BT).unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return Judged(answers, groups_N, of_each(batch.ranks_BT))


def preference_loss(settings: PreferenceLoss, nll_weight: float = 0.0) -> Loss:
    """The loss as `puna.train.step` takes it; its units are prompts.

    Args:
        nll_weight: see `AlignConfig.nll_weight`.
    """

    def loss(model: Transformer, batch: TokenBatch) -> LossSum:
        assert isinstance(batch, PreferenceBatch)
        judged = judge(batch, token_logprobs(model, batch))
        if isinstance(settings, KTO):
            total = _kto(settings, judged)
        else:
            assert isinstance(settings, PairLoss)
            better_P, worse_P, weights_P = judged.pairs()
            total = (settings(judged.answers.at(better_P), judged.answers.at(worse_P)) * weights_P).sum()
            if nll_weight:
                total = total - nll_weight * judged.answers.mean_N[judged.ranks_N == 0].sum()
        return LossSum(total, judged.num_groups)

    return loss


def _kto(settings: KTO, judged: Judged) -> Tensor:
    mismatched_N = judged.ranks_N == MISMATCHED
    # Of the micro-batch; it scales the loss, and is not driven down (equation 8).
    divergence = judged.answers.log_ratio_N[mismatched_N].mean().clamp(min=0).detach()
    own_N = (~mismatched_N).nonzero().squeeze(1)
    return settings(judged.answers.at(own_N), judged.ranks_N[own_N] == GOOD, divergence).sum()


class PreferenceWatch(HeldOutWatch):
    """How often, and by how much, the model prefers what people prefer.

    Args:
        settings: the loss, whose rewards are compared.
        held_out, num_rows: see `HeldOutWatch`.
    """

    def __init__(self, settings: PreferenceLoss, held_out: PreferenceRows, num_rows: int) -> None:
        super().__init__(held_out, num_rows)
        self.settings = settings

    def _measure(self, model: Transformer) -> tuple[dict[str, float], list[str]]:
        parts = [self._of_batch(judge(batch, token_logprobs(model, batch))) for batch in self._batches(model)]
        return {name: float(torch.cat([part[name] for part in parts]).mean()) for name in parts[0]}, []

    def _of_batch(self, judged: Judged) -> dict[str, Tensor]:
        """Values to take the mean of."""
        answers = judged.answers
        if isinstance(self.settings, KTO):
            rewards_N = self.settings.beta * answers.log_ratio_N
            return {
                "reward_of_good": rewards_N[judged.ranks_N == GOOD],
                "reward_of_bad": rewards_N[judged.ranks_N == BAD],
            }
        assert isinstance(self.settings, PairLoss)
        better_P, worse_P, _ = judged.pairs()
        rewards_N = self.settings.rewards(answers)
        margin_P = rewards_N[better_P] - rewards_N[worse_P]
        return {
            "accuracy": (margin_P > 0).float(),
            "margin": margin_P,
            "chosen_logprob": answers.mean_N[judged.ranks_N == 0],
            "rejected_logprob": answers.mean_N[worse_P],
        }
