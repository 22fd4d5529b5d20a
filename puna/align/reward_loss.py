"""The head of a reward model, and its loss (Llama 2, arXiv:2307.09288, section 3.2.2).

The head reads the last token of a prompt with its answer, as `LlamaForSequenceClassification` with one label does.

Shapes: B rows, T tokens, D model dimension, N answers, P pairs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.align.preference import Judged, attend_of, is_answer, judge
from puna.batches.packing import PADDING, TokenBatch
from puna.batches.preference_rows import PreferenceBatch
from puna.batches.preferences import STRENGTHS
from puna.model.transformer import Transformer
from puna.peft.heads import HeadSpec
from puna.train.loss import Loss, LossSum

HEAD = HeadSpec("ForSequenceClassification", "score", False, ("reward",), {"problem_type": "regression"})
"""One number for a text."""


def rewards(model: Transformer, batch: PreferenceBatch) -> Tensor:
    """The reward of each answer, [N], in the order of `judge`."""
    head = model.get_submodule(HEAD.module)
    rewards_BT1: Tensor = model(batch.ids_BT, batch.positions_BT, attend_of(batch), lambda h_BTD, _: head(h_BTD))
    return rewards_BT1[:, :, 0].float()[_is_last_BT(batch)]


def _is_last_BT(batch: PreferenceBatch) -> Tensor:
    """Whether a token is the last of its answer."""
    following_BT = F.pad(batch.documents_BT[:, 1:], (0, 1), value=PADDING)
    return is_answer(batch) & (batch.documents_BT != following_BT)


def reward_loss(margins: Sequence[float], center_weight: float = 0.0) -> Loss:
    """-log sigmoid(better - worse - margin) (Llama 2, equation 2), each prompt counting once.

    Args:
        margins: see `RewardConfig.margins`.
        center_weight: see `RewardConfig.center_weight`.
    """

    def loss(model: Transformer, batch: TokenBatch) -> LossSum:
        assert isinstance(batch, PreferenceBatch)
        rewards_N, judged = rewards(model, batch), compared(batch)
        better_P, worse_P, weights_P = judged.pairs()
        levels_P = levels(batch)[better_P]
        asked_P = torch.tensor(margins, device=rewards_N.device)[levels_P]
        each_P = -F.logsigmoid(rewards_N[better_P] - rewards_N[worse_P] - asked_P)
        if center_weight:
            each_P = each_P + center_weight * (rewards_N[better_P] + rewards_N[worse_P]).square()
        return LossSum((each_P * weights_P).sum(), judged.num_groups)

    return loss


def compared(batch: PreferenceBatch) -> Judged:
    """How the answers of a batch compare; their lengths are in tokens."""
    return judge(batch, torch.zeros_like(batch.reference_BT))


def levels(batch: PreferenceBatch) -> Tensor:
    """The strength of each answer's preference, as an index into STRENGTHS, [N]."""
    return (batch.strengths_BT[_is_last_BT(batch)] * (len(STRENGTHS) - 1)).round().long()
