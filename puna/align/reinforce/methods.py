"""The methods, with their settings: what they make of rewards, and what their loss is.

Shapes: N answers (P prompts with S answers each, side by side), L tokens of the longest answer.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from puna.align.reinforce.advantages import (
    generalized_advantages,
    group_relative,
    leave_one_out,
    shaped_rewards,
    whiten,
)
from puna.align.reinforce.losses import Estimator, divergence


@dataclass(frozen=True, slots=True)
class Scored:
    """A rollout in numbers, without gradient."""

    rewards_N: Tensor
    """Of each answer."""
    logprobs_NL: Tensor
    """Of its tokens, by the policy that drew them."""
    reference_NL: Tensor
    """The same by the reference; equal to `logprobs_NL` where nobody asked it."""
    values_NL: Tensor
    """What the critic expected before each token; zeros without one."""
    mask_NL: Tensor
    """Where there is a token."""
    samples: int
    """Answers to each prompt."""


class Method(ABC):
    """The settings of a method; each is a frozen dataclass with a `kind`.

    Attributes:
        in_loss: the divergence from the reference is part of the loss, and not of the reward.
        by_answer: the ratio of policies is that of whole answers, and not of tokens.
        samples: answers to each prompt.
        epochs: how often each rollout is gone through.
        kl_weight: of the divergence from the reference, for each nat.
        entropy_weight: of the entropy of the next token, which is taken off the loss.
        clip_low, clip_high: see `puna.align.reinforce.losses.policy_loss`.
    """

    in_loss: ClassVar[bool]
    by_answer: ClassVar[bool] = False

    kind: str
    samples: int
    epochs: int
    kl_weight: float
    entropy_weight: float
    clip_low: float
    clip_high: float

    def check(self) -> None:
        """Refuse settings that make no sense.

        Raises:
            ValueError: says which.
        """
        for name in ("samples", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be at least 1.")
        for name in ("kl_weight", "entropy_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative.")
        if not 0 < self.clip_low < 1 or self.clip_high <= 0:
            raise ValueError(
                f"clip_low is {self.clip_low} and clip_high {self.clip_high}; the one has to be between 0 and 1, the "
                "other above 0."
            )

    @abstractmethod
    def advantages(self, scored: Scored, kl_weight: float) -> tuple[Tensor, Tensor]:
        """Advantages of tokens and returns for the critic, both [N, L].

        Args:
            kl_weight: at this time; see `PPO.kl_target`.
        """

    @abstractmethod
    def token_weights(self, mask_NL: Tensor, max_tokens: int) -> Tensor:
        """What each token's loss counts, [N, L].

        Args:
            max_tokens: most tokens that an answer may have.
        """

    @property
    def units_are_tokens(self) -> bool:
        """Whether the loss is divided by the number of tokens, and not of answers."""
        return False


@dataclass(frozen=True)
class PPO(Method):
    """Proximal policy optimisation, with a critic and the divergence in every token's reward.

    Schulman et al. 2017 (arXiv:1707.06347), as for InstructGPT (arXiv:2203.02155) and Llama 2 (arXiv:2307.09288,
    section 3.2.3).
    """

    in_loss: ClassVar[bool] = False

    kind: Literal["ppo"] = "ppo"
    """The method."""
    samples: int = 1
    """Answers to each prompt in a rollout."""
    epochs: int = 4
    """How often each rollout is gone through; InstructGPT took 1, most others 4."""
    kl_weight: float = 0.05
    """Taken off the reward for each nat that the model is away from the reference; at first, where kl_target is set."""
    kl_target: float = 0.0
    """Divergence of an answer, in nats, to which kl_weight is adapted after each rollout (Ziegler et al. 2019,
    arXiv:1909.08593, section 2.2); 0 leaves kl_weight as it is."""
    kl_horizon: int = 10000
    """Answers in which kl_weight is adapted."""
    entropy_weight: float = 0.0
    """Of a bonus for being unsure of the next token, for each nat of its entropy, which keeps the model trying
    (arXiv:1707.06347, equation 9); 0 saves its computation."""
    clip_low: float = 0.2
    """How far the ratio of policies may fall below 1."""
    clip_high: float = 0.2
    """How far it may rise above 1."""
    value_clip: float = 0.2
    """How far values may move in the epochs of one rollout."""
    value_weight: float = 0.5
    """Of the critic's loss beside the policy's."""
    value_rate: float = 1.0
    """Factor of the critic's learning rate."""
    discount: float = 1.0
    """Of rewards that come a token later."""
    trace: float = 0.95
    """Lambda of generalised advantage estimation: 1 trusts rewards alone, 0 the critic alone."""
    whiten_rewards: bool = False
    """Divide the rewards of answers by their standard deviation in each rollout, after taking off their mean (Llama 2);
    the divergence is taken off afterwards, where trl's setting of this name divides both together."""
    critic: Path | None = None
    """Directory of the reward model that the critic begins as; absent, it begins as the model itself with a head of
    zeros."""

    def __post_init__(self) -> None:
        self.check()
        for name in ("kl_target", "value_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it cannot be negative.")
        for name in ("value_clip", "value_rate", "kl_horizon"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be above 0.")
        for name in ("discount", "trace"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be between 0 and 1.")
        if self.kl_target and not self.kl_weight:
            raise ValueError("kl_weight is 0, from where it cannot be adapted to kl_target; give it a value.")

    def advantages(self, scored: Scored, kl_weight: float) -> tuple[Tensor, Tensor]:
        mask_NL = scored.mask_NL
        rewards_N = scored.rewards_N
        if self.whiten_rewards:
            rewards_N = whiten(rewards_N[:, None], mask_NL[:, :1])[:, 0]
        gap_NL = divergence(scored.logprobs_NL, scored.reference_NL, "k1")
        shaped_NL = shaped_rewards(rewards_N, gap_NL, mask_NL, kl_weight)
        advantages_NL, returns_NL = generalized_advantages(
            shaped_NL, scored.values_NL, mask_NL, self.discount, self.trace
        )
        return whiten(advantages_NL, mask_NL), returns_NL

    def token_weights(self, mask_NL: Tensor, max_tokens: int) -> Tensor:
        return mask_NL.float()

    @property
    def units_are_tokens(self) -> bool:
        return True


@dataclass(frozen=True)
class GRPO(Method):
    """Group-relative policy optimisation: no critic, an answer is measured by the others to its prompt.

    DeepSeekMath (arXiv:2402.03300, equation 3).
    """

    in_loss: ClassVar[bool] = True

    kind: Literal["grpo"] = "grpo"
    """The method."""
    samples: int = 8
    """Answers to each prompt."""
    epochs: int = 1
    """How often each rollout is gone through."""
    kl_weight: float = 0.04
    """Of the divergence from the reference in the loss; 0 does without a reference."""
    kl_estimator: Estimator = "k3"
    """How that is estimated from the tokens that were drawn."""
    kl_correction: bool = True
    """Multiply the estimate by the ratio of policies, so that its gradient is that of the divergence (DeepSeek-V3.2,
    arXiv:2512.02556); false as in DeepSeekMath."""
    entropy_weight: float = 0.0
    """Of a bonus for being unsure of the next token, for each nat of its entropy, which keeps the model trying
    (arXiv:1707.06347, equation 9); 0 saves its computation."""
    clip_low: float = 0.2
    """How far the ratio of policies may fall below 1."""
    clip_high: float = 0.2
    """How far it may rise above 1; more than clip_low keeps rare tokens alive (DAPO, arXiv:2503.14476, section 3.1)."""
    scale_rewards: bool = True
    """Divide by the standard deviation of a prompt's rewards; false as in Dr. GRPO (arXiv:2503.20783)."""
    token_share: Literal["answer", "equal"] = "answer"
    """`answer`: each answer counts the same, its tokens share it. `equal`: each token counts the same, so that long
    wrong answers are not forgiven; the sum is divided by sampling.max_tokens (Dr. GRPO)."""

    def __post_init__(self) -> None:
        self.check()
        if self.samples < 2:
            raise ValueError("samples is 1, but grpo measures an answer by the others to its prompt; take 2 or more.")

    def advantages(self, scored: Scored, kl_weight: float) -> tuple[Tensor, Tensor]:
        of_groups = group_relative(scored.rewards_N.view(-1, scored.samples), scale=self.scale_rewards)
        advantages_NL = of_groups.view(-1, 1) * scored.mask_NL
        return advantages_NL, advantages_NL * 0

    def token_weights(self, mask_NL: Tensor, max_tokens: int) -> Tensor:
        if self.token_share == "equal":
            return mask_NL / max_tokens
        return mask_NL / mask_NL.sum(1, keepdim=True)


@dataclass(frozen=True)
class RLOO(Method):
    """REINFORCE leave-one-out: no critic, an answer is one action, measured by the mean of the others.

    Ahmadian et al. 2024 (arXiv:2402.14740).
    """

    in_loss: ClassVar[bool] = False
    by_answer: ClassVar[bool] = True

    kind: Literal["rloo"] = "rloo"
    """The method."""
    samples: int = 4
    """Answers to each prompt."""
    epochs: int = 1
    """How often each rollout is gone through."""
    kl_weight: float = 0.05
    """Taken off an answer's reward for each nat that the model is away from the reference; 0 does without a
    reference."""
    entropy_weight: float = 0.0
    """Of a bonus for being unsure of the next token, for each nat of its entropy, which keeps the model trying
    (arXiv:1707.06347, equation 9); 0 saves its computation."""
    clip_low: float = 0.2
    """How far the ratio of policies, of whole answers, may fall below 1."""
    clip_high: float = 0.2
    """How far it may rise above 1."""
    whiten_advantages: bool = False
    """Give the advantages of a rollout mean 0 and variance 1."""

    def __post_init__(self) -> None:
        self.check()
        if self.samples < 2:
            raise ValueError("samples is 1, but rloo measures an answer by the others to its prompt; take 2 or more.")

    def advantages(self, scored: Scored, kl_weight: float) -> tuple[Tensor, Tensor]:
        gap_NL = divergence(scored.logprobs_NL, scored.reference_NL, "k1") * scored.mask_NL
        rewards_N = scored.rewards_N - kl_weight * gap_NL.sum(1)
        of_groups = leave_one_out(rewards_N.view(-1, scored.samples)).view(-1, 1)
        if self.whiten_advantages:
            of_groups = whiten(of_groups, scored.mask_NL[:, :1])
        advantages_NL = of_groups * scored.mask_NL
        return advantages_NL, advantages_NL * 0

    def token_weights(self, mask_NL: Tensor, max_tokens: int) -> Tensor:
        return mask_NL / mask_NL.sum(1, keepdim=True)


METHODS = {
    "ppo": "puna.align.reinforce.methods:PPO",
    "grpo": "puna.align.reinforce.methods:GRPO",
    "rloo": "puna.align.reinforce.methods:RLOO",
}
"""Kind of a method -> its class."""
