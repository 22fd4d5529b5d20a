"""`puna reward`: a model that says how good an answer is, learnt from comparisons (Llama 2, arXiv:2307.09288, 3.2.2).

The head reads the last token of a prompt with its answer, as `LlamaForSequenceClassification` with one label does.

Shapes: B rows, T tokens, N answers, P pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from puna.align.learn import learn, open_both
from puna.align.preference import Judged, judge
from puna.align.rows import check_row_length, open_tokenizer
from puna.align.watch import HeldOutWatch
from puna.batches.packing import PADDING, TokenBatch
from puna.batches.preference_rows import PreferenceBatch
from puna.batches.preferences import STRENGTHS
from puna.config import to_plain
from puna.model.transformer import Transformer
from puna.parallel.mesh import joined_processes
from puna.peft.apply import merge, why_not_merged
from puna.peft.heads import HeadSpec, add_head, head_logits, save_head_adapter, save_head_model
from puna.peft.methods import AnyMethod
from puna.peft.tuning import adapt
from puna.runtime.errors import InputError
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say
from puna.train.config import TrainConfig
from puna.train.loss import Loss, LossSum
from puna.weights.load import load_model

HEAD = HeadSpec("ForSequenceClassification", "score", False, ("reward",), {"problem_type": "regression"})
"""One number for a text."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Teach a model to say how good an answer is, from comparisons of answers."""

    model: Path
    """Model directory to start from; one that has learnt to answer (`puna finetune`)."""
    output: Path
    """Gets model/ (which `transformers` loads as a sequence classifier with one label) or adapter/, report.txt,
    tokens/, checkpoints/, metrics.jsonl and tensorboard/."""
    preferences: Path
    """A file of preferences, or a folder of such files, as `puna align` reads them."""
    held_out_preferences: Path | None = None
    """Preferences to measure on."""
    margins: tuple[float, float, float, float] = (0.0, 1 / 3, 2 / 3, 1.0)
    """How much higher the better answer's reward should be, by the preference's strength: negligibly, slightly, plainly
    and significantly better (the paper's small margins, table 27). Preferences without a strength have the first."""
    center_weight: float = 0.0
    """Factor of the squared sum of a pair's rewards, which keeps rewards around zero (Eisenstein et al. 2023,
    arXiv:2312.09244, section 3.2: 0.01)."""
    chat_template: Literal["keep", "llama2", "llama3", "chatml"] = "keep"
    """The model's own chat template, or a built-in one whose special tokens its tokenizer has."""
    leave_out: bool = False
    """Leave out rows that cannot be used (broken, too long, without difference) and write them down, instead of
    refusing them."""
    peft: AnyMethod = None
    """Train by a method that leaves most parameters as they are; merged into model/ where that is possible."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in the finished model directory."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training run. A row holds all answers to its prompts, each with the prompt."""

    def __post_init__(self) -> None:
        if self.center_weight < 0:
            raise ValueError(f"center_weight is {self.center_weight}; it cannot be negative.")
        if list(self.margins) != sorted(self.margins) or self.margins[0] < 0:
            raise ValueError(f"margins are {self.margins}; they have to rise, from 0 at least.")


def main(config: RewardConfig) -> None:
    """Check the preferences, put the head on, train, and write the model directory."""
    with joined_processes(config.train.device):
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise InputError("A reward model is trained on one process; start the command without torchrun.")
        _train(config)


def _train(config: RewardConfig) -> None:
    train = config.train
    tokenizer = open_tokenizer(config.model, config.chat_template)
    model = load_model(config.model, dtype=torch.float32)
    check_row_length(train.row_length, model)
    rows, held_out = open_both(config, tokenizer, judged=False, formatting=True)
    training = adapt(model, config.peft, train.steps, train.seed)
    add_head(model, HEAD, train.seed)
    loss = reward_loss(config.margins, config.center_weight)
    watch = None if held_out is None else RewardWatch(held_out, train.validation_rows)
    paths = [config.model, config.preferences, config.held_out_preferences]
    inputs = {str(path): content_hash(path) for path in paths if path is not None}
    facts = learn(model, rows, loss, config, inputs, training, held_out, watch)
    manifest = Manifest("reward", to_plain(config), inputs, facts)
    if config.peft is not None and why_not_merged(model):
        written = config.output / "adapter"
        save_head_adapter(model, config.peft, HEAD, "causal", tokenizer, written, config.model, manifest)
    else:
        merge(model)
        written = config.output / "model"
        save_head_model(model, HEAD, "causal", tokenizer, written, getattr(torch, config.dtype), manifest)
    say(f"Wrote {written}")


def rewards(model: Transformer, batch: PreferenceBatch) -> Tensor:
    """The reward of each answer, [N], in the order of `judge`."""
    rewards_BT = head_logits(model, batch, HEAD.module, "causal")[:, :, 0]
    return rewards_BT[_is_last_BT(batch)]


def _is_last_BT(batch: PreferenceBatch) -> Tensor:
    """Whether a token is the last of its answer."""
    following_BT = F.pad(batch.documents_BT[:, 1:], (0, 1), value=PADDING)
    return (batch.documents_BT != PADDING) & (batch.documents_BT != following_BT)


def reward_loss(margins: Sequence[float], center_weight: float = 0.0) -> Loss:
    """-log sigmoid(better - worse - margin) (Llama 2, equation 2), each prompt counting once.

    Args:
        margins: see `RewardConfig.margins`.
        center_weight: see `RewardConfig.center_weight`.
    """

    def loss(model: Transformer, batch: TokenBatch) -> LossSum:
        assert isinstance(batch, PreferenceBatch)
        rewards_N, judged = rewards(model, batch), _compared(batch)
        better_P, worse_P, weights_P = judged.pairs()
        levels_P = _levels(batch)[better_P]
        asked_P = torch.tensor(margins, device=rewards_N.device)[levels_P]
        each_P = -F.logsigmoid(rewards_N[better_P] - rewards_N[worse_P] - asked_P)
        if center_weight:
            each_P = each_P + center_weight * (rewards_N[better_P] + rewards_N[worse_P]).square()
        return LossSum((each_P * weights_P).sum(), judged.num_groups)

    return loss


def _compared(batch: PreferenceBatch) -> Judged:
    """How the answers of a batch compare; their lengths are in tokens."""
    return judge(batch, torch.zeros_like(batch.reference_BT))


def _levels(batch: PreferenceBatch) -> Tensor:
    """The strength of each answer's preference, as an index into STRENGTHS, [N]."""
    return (batch.strengths_BT[_is_last_BT(batch)] * (len(STRENGTHS) - 1)).round().long()


class RewardWatch(HeldOutWatch):
    """How often a reward model agrees with people, and whether it likes long answers."""

    def _measure(self, model: Transformer) -> tuple[dict[str, float], list[str]]:
        margins, levels, longer, all_rewards, lengths = [], [], [], [], []
        for batch in self._batches(model):
            rewards_N, judged = rewards(model, batch), _compared(batch)
            better_P, worse_P, _ = judged.pairs()
            margins.append(rewards_N[better_P] - rewards_N[worse_P])
            levels.append(_levels(batch)[better_P])
            lengths_N = judged.answers.lengths_N
            longer.append((lengths_N[better_P] - lengths_N[worse_P]).sign())
            all_rewards.append(rewards_N)
            lengths.append(lengths_N)
        margin_P, level_P, longer_P = torch.cat(margins), torch.cat(levels), torch.cat(longer)
        right_P = (margin_P > 0).float()
        rewards_and_lengths = torch.stack((torch.cat(all_rewards), torch.cat(lengths)))
        values = {
            "accuracy": right_P.mean(),
            "margin": margin_P.mean(),
            "reward_deviation": rewards_and_lengths[0].std(),
            "length_correlation": rewards_and_lengths.corrcoef()[0, 1].nan_to_num(),
            "calibration_error": calibration_error(margin_P.sigmoid()),
        }
        groups = [("accuracy, better answer longer", longer_P > 0), ("accuracy, better answer shorter", longer_P < 0)]
        if level_P.any():  # somebody said how much better
            groups += [(f"accuracy, {name}", level_P == level) for level, name in enumerate(STRENGTHS)]
        lines = [f"{name:36} {right_P[of].mean():.4f} of {int(of.sum()):,}" for name, of in groups if of.any()]
        return {name: float(value) for name, value in values.items()}, lines


def calibration_error(probability_P: Tensor, bins: int = 10) -> Tensor:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3): how far the probability of the
    likelier order is from the share in which it is right."""
    confidence_P = torch.maximum(probability_P, 1 - probability_P)
    right_P = (probability_P > 0.5).float()
    bin_P = ((confidence_P - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, device=probability_P.device).index_add(0, bin_P, right_P - confidence_P)
    return gaps.abs().sum() / len(probability_P)
