"""The settings of `puna reinforce`."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from puna.align.reinforce.methods import GRPO, METHODS, PPO, Method
from puna.align.reinforce.rewards import AnyReward
from puna.config import Kinds
from puna.infer.sampling import SamplingParams
from puna.parallel.config import ParallelConfig
from puna.peft.methods import AnyMethod
from puna.train.config import FaultConfig, TrainConfig

_WITHOUT_MEANING = ("z_loss", "compile", "log_every")
"""Settings of training that would change nothing here."""


@dataclass(frozen=True)
class AlarmConfig:
    """When to stop because it is going wrong; the model as it was before that is kept."""

    patience: int = 5
    """Rollouts in a row that have to look wrong."""
    most_divergence: float = 1.0
    """From the reference, in nats for each token."""
    least_entropy: float = 0.005
    """Of the next token, in nats; wrong where the reward has been higher before."""
    most_growth: float = 3.0
    """Length of answers as a multiple of that at first; wrong where most answers do not end either."""
    least_explained_variance: float = 0.0
    """Of the critic, once it has seen 20 rollouts."""

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience is {self.patience}; it has to be at least 1.")


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig:
    """Teach a model by rewards for answers that it draws itself (PPO, GRPO, RLOO)."""

    model: Path
    """Model directory to start from; one that has learnt to answer (`puna finetune`)."""
    output: Path
    """Gets model/ (the finished model directory) or adapter/, dashboard.html, answers.jsonl (the last answers drawn,
    with their rewards), checkpoints/, metrics.jsonl and tensorboard/."""
    prompts: Path
    """A file of prompts, or a folder of such files: a column "prompt", or conversations and preferences, of which the
    last answers are left out; and the columns that the rewards ask for, such as "answer"."""
    held_out_prompts: Path | None = None
    """Prompts to measure the reward of the likeliest answers on."""
    held_out_preferences: Path | None = None
    """Preferences by which the rewards are checked before anything is learnt: they have to agree with people more often
    than by chance."""
    method: Annotated[Method, Kinds("method", METHODS)] = field(default_factory=GRPO)
    """How the model learns from rewards."""
    rewards: tuple[AnyReward, ...]
    """What answers are worth: the sum of these, each by its weight."""
    unfinished_reward: float | None = None
    """Reward of an answer that does not end within sampling.max_tokens, whatever else it deserves (the "EOS trick");
    absent, it is judged like any other."""
    judge: Path | None = None
    """Directory of another reward model, which only looks at the answers to held_out_prompts: that it likes them less
    while the reward rises means that the reward is being exploited."""
    prompts_per_rollout: int = 16
    """Prompts that are answered between two times of learning."""
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=256))
    """How answers end. They are drawn from the model as it is: temperature 1, nothing filtered out or penalised."""
    rows_at_once: int = 64
    """Answers drawn at once; more take more memory for their cache."""
    reference: Path | None = None
    """Model directory that the model should stay near; `model` itself when absent."""
    chat_template: Literal["keep", "llama2", "llama3", "chatml"] = "keep"
    """The model's own chat template, or a built-in one whose special tokens its tokenizer has."""
    peft: AnyMethod = None
    """Train by a method that leaves most parameters as they are, such as `{ kind = "lora", rank = 16 }`; gives
    adapter/, and needs no second model for the reference."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights in the finished model directory."""
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    """When to stop because it is going wrong."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training run. A row is an answer with its prompt, and row_length the most tokens that it may have; steps are
    optimiser steps, of which a rollout gives epochs * prompts_per_rollout * samples / batch_rows; validation_rows are
    held-out prompts."""

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError('rewards is empty; add one, such as [[rewards]] with kind = "number".')
        for name in ("prompts_per_rollout", "rows_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be at least 1.")
        own = self.sampling
        if own != SamplingParams(
            max_tokens=own.max_tokens, stop=own.stop, stop_ids=own.stop_ids, ignore_eos=own.ignore_eos
        ):
            raise ValueError(
                "sampling may set max_tokens, stop, stop_ids and ignore_eos only: answers that are not drawn from the "
                "model as it is would teach it about another."
            )
        if not own.max_tokens or own.max_tokens >= self.train.row_length:
            raise ValueError(
                f"sampling.max_tokens is {own.max_tokens}; it has to be at least 1 and leave room for a prompt within "
                f"train.row_length ({self.train.row_length})."
            )
        self._check_train()
        if self.judge is not None and self.held_out_prompts is None:
            raise ValueError("judge looks at the answers to held_out_prompts; set these too.")

    def _check_train(self) -> None:
        train, usual = self.train, TrainConfig()
        for name in _WITHOUT_MEANING:
            if getattr(train, name) != getattr(usual, name):
                raise ValueError(f"train.{name} has no meaning here; leave it out.")
        if train.parallel != ParallelConfig(data=train.parallel.data, shard=train.parallel.shard):
            raise ValueError("Of train.parallel, only data and shard have a meaning here.")
        if isinstance(self.method, PPO) and train.parallel.shard > 1:
            raise ValueError(
                "With ppo, processes cannot share the parameters, which the critic is beside; set train.parallel.shard "
                "to 1, so that each has a copy (train.parallel.data)."
            )
        spikes = {name: getattr(train.faults, name) for name in ("spike_deviations", "spike_settle_steps")}
        if train.faults != replace(FaultConfig(), **spikes):
            raise ValueError("Of train.faults, only spike_deviations and spike_settle_steps have a meaning here.")
        answers = self.prompts_per_rollout * self.method.samples
        if answers % train.batch_rows:
            raise ValueError(
                f"A rollout has {answers} answers ({self.prompts_per_rollout} prompts, {self.method.samples} each); "
                f"that has to be a multiple of train.batch_rows ({train.batch_rows})."
            )
        if train.steps % self.steps_per_rollout:
            raise ValueError(
                f"train.steps is {train.steps}; it has to be a multiple of the {self.steps_per_rollout} steps that "
                "each rollout gives."
            )

    @property
    def steps_per_rollout(self) -> int:
        """Optimiser steps between two rollouts."""
        return self.method.epochs * self.prompts_per_rollout * self.method.samples // self.train.batch_rows

    @property
    def needs_reference(self) -> bool:
        """Whether the divergence from the reference counts."""
        return self.method.kl_weight > 0
