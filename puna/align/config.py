"""The settings of `puna align`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from puna.align.learn import PreferenceSource, check_sources
from puna.align.losses import DPO, LOSSES, PairLoss, PreferenceLoss
from puna.config import Kinds
from puna.peft.methods import AnyMethod
from puna.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """Teach a model what people prefer, from comparisons or judgements of answers."""

    model: Path
    """Model directory to start from; one that has learnt to answer (`puna finetune`)."""
    output: Path
    """Gets model/ (the finished model directory) or adapter/, report.txt, tokens/, checkpoints/, metrics.jsonl and
    tensorboard/."""
    preferences: Path | None = None
    """A file of preferences, or a folder of such files: pairs, rankings, edited answers, transcripts as in HH-RLHF, or
    for `kto` single answers with a label."""
    mixture: tuple[PreferenceSource, ...] = ()
    """Several sources in proportions of your choice, such as helpfulness and safety, in place of `preferences`."""
    held_out_preferences: Path | None = None
    """Preferences to measure loss, accuracy and margin on."""
    loss: Annotated[PreferenceLoss, Kinds("loss", LOSSES)] = field(default_factory=DPO)
    """What is minimised."""
    nll_weight: float = 0.0
    """Factor of the best answer's negative log-likelihood per token, added to losses of pairs; Llama 3 took 0.2
    (arXiv:2407.21783, section 4.1.4)."""
    formatting: bool = False
    """Whether special tokens of answers, such as their end, count in the loss. They stand in better and worse answers
    alike, and training on both at once can make a model ramble or stop short (same section)."""
    reference: Path | None = None
    """Model directory that the model should stay near; `model` itself when absent."""
    chat_template: Literal["keep", "llama2", "llama3", "chatml"] = "keep"
    """The model's own chat template, or a built-in one whose special tokens its tokenizer has."""
    leave_out: bool = False
    """Leave out rows that cannot be used (broken, too long, without difference) and write them down, instead of
    refusing them."""
    peft: AnyMethod = None
    """Train by a method that leaves most parameters as they are, such as `{ kind = "lora", rank = 16 }`; gives
    adapter/."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in the finished model directory."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training run. A row holds all answers to its prompts, each with the prompt."""

    def __post_init__(self) -> None:
        check_sources(self)
        if self.nll_weight < 0:
            raise ValueError(f"nll_weight is {self.nll_weight}; it cannot be negative.")
        if self.nll_weight and not isinstance(self.loss, PairLoss):
            raise ValueError(f"nll_weight is for losses of pairs, and {self.loss.kind} has none.")
        if self.reference is not None and not self.loss.needs_reference:
            raise ValueError(f"{self.loss.kind} has no reference model; leave reference out.")
