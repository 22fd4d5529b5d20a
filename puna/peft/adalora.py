"""Low-rank updates that give up ranks where they matter least (AdaLoRA, Zhang et al. 2023, arXiv:2303.10512).

Each update is P diag(e) Q (equation 3); a triplet of a column of P, a number of e and a row of Q is given up by setting
the number to zero.

Shapes: N outputs, K inputs, R rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.model.config import LlamaConfig
from puna.model.transformer import Transformer
from puna.peft.lora import refuse_dropout
from puna.peft.method import AdaptedLinear, Base, MapMethod, MergeableLinear, Training, hf_name, lookup
from puna.runtime.errors import InputError

_RANK_EPSILON = 1e-5
"""PEFT adds it to the rank that it divides by."""


@dataclass(frozen=True)
class AdaLoRAConfig(MapMethod):
    """AdaLoRA: low-rank updates that share a falling budget of ranks by how much each rank matters."""

    PEFT_TYPE: ClassVar[str] = "ADALORA"

    kind: Literal["adalora"] = "adalora"
    """The method."""
    initial_rank: int = 12
    """Rank of the update of each weight at first."""
    target_rank: int = 8
    """Mean rank in the end."""
    alpha: float = 32.0
    """The update is multiplied by alpha / initial_rank."""
    dropout: float = 0.0
    """Share of the inputs to each update that is dropped in training."""
    full_steps: int = 0
    """First steps, with the whole budget."""
    final_steps: int = 0
    """Last steps, in which the ranks stay as they are; between, the budget falls by a cubic curve (equation 12)."""
    allocation_interval: int = 1
    """Steps between two allocations of the budget."""
    sensitivity_decay: float = 0.85
    """Share of the old in the running mean of each weight's importance (equation 9)."""
    uncertainty_decay: float = 0.85
    """Share of the old in the running mean of its variation (equation 10)."""
    orthogonality: float = 0.5
    """Weight in the loss of the mean distance of P^T P and Q Q^T from the identity (equation 4)."""
    targets: tuple[str, ...] = ("layers.*",)
    """Linear maps to adapt, by name with wildcards."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Ranks of some of them, by name with wildcards, in place of `initial_rank`; what a file has after an allocation.
    The updates' factors stay those of `initial_rank`."""
    whole: tuple[str, ...] = ()
    """Parameters of the model to train beside the adapters, by name with wildcards: "output", "*norm"."""

    def __post_init__(self) -> None:
        if not 1 <= self.target_rank <= self.initial_rank:
            raise InputError(
                f"target_rank is {self.target_rank}; it has to be from 1 to initial_rank, which is {self.initial_rank}."
            )
        for name in ("sensitivity_decay", "uncertainty_decay"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it has to be above 0 and below 1.")
        if min(self.full_steps, self.final_steps) < 0 or self.allocation_interval < 1 or self.orthogonality < 0:
            raise InputError(
                "full_steps, final_steps and orthogonality have to be at least 0, and allocation_interval at least 1."
            )
        refuse_dropout(self.dropout)

    def training(self, model: Transformer, steps: int) -> Training:
        """See `Method.training`."""

        def penalty(model: Transformer) -> Tensor:
            return self.orthogonality * orthogonality(model)

        return Training(penalty=penalty, after_update=RankAllocator(model, self, steps).update)

    @classmethod
    def linear(cls, values: Mapping[str, Any]) -> type[AdaptedLinear]:
        """See `MapMethod.linear`."""
        return AdaLoRALinear

    def wrap(self, name: str, base: Base, generator: torch.Generator) -> "AdaLoRALinear":
        """See `MapMethod.wrap`."""
        scale = self.alpha / (self.initial_rank + _RANK_EPSILON)
        return AdaLoRALinear(base, lookup(self.ranks, name, self.initial_rank), scale, self.dropout, generator)

    def shapes(self, name: str, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """See `MapMethod.shapes`."""
        rank = lookup(self.ranks, name, self.initial_rank)
        return {"lora_a": (rank, in_features), "lora_b": (out_features, rank), "lora_e": (rank, 1)}

    def to_peft(self, config: LlamaConfig, maps: Sequence[str]) -> dict[str, Any]:
        """See `Method.to_peft`."""
        ranks = {hf_name(name): lookup(self.ranks, name, self.initial_rank) for name in maps}
        return {
            "init_r": self.initial_rank,
            "target_r": self.target_rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "tinit": self.full_steps,
            "tfinal": self.final_steps,
            "deltaT": self.allocation_interval,
            "beta1": self.sensitivity_decay,
            "beta2": self.uncertainty_decay,
            "orth_reg_weight": self.orthogonality,
            # PEFT insists on one, for training; it is not of the adapter.
            "total_step": self.full_steps + self.final_steps + 1,
            "rank_pattern": {
                f"{name}.lora_E": [True] * rank for name, rank in ranks.items() if rank != self.initial_rank
            }
            or None,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        }

    @classmethod
    def from_peft(
        cls, values: Mapping[str, Any], maps: tuple[str, ...], whole: tuple[str, ...], where: str
    ) -> "AdaLoRAConfig":
        """See `Method.from_peft`."""
        if values.get("bias") not in (None, "none") or values.get("fan_in_fan_out"):
            raise InputError(f"{where} has bias or fan_in_fan_out, which Puna's AdaLoRA does not compute.")
        pattern = values.get("rank_pattern") or {}
        if not isinstance(pattern, dict) or not all(isinstance(kept, list) for kept in pattern.values()):
            raise InputError(f"{where} has rank_pattern = {pattern!r}; it has to be a table of lists by name.")
        left = {key.partition(".lora_E")[0]: sum(map(bool, kept)) for key, kept in pattern.items()}
        settings = {name: values[key] for key, name in _PEFT_NAMES.items() if values.get(key) is not None}
        if wrong := [key for key in _PEFT_NAMES if not isinstance(values.get(key) or 0, int | float)]:
            raise InputError(f"{where} has {wrong[0]} = {values[wrong[0]]!r}; it has to be a number.")
        return cls(
            **settings,
            targets=maps,
            ranks={name: left[hf_name(name)] for name in maps if hf_name(name) in left},
            whole=whole,
        )


_PEFT_NAMES = {
    "init_r": "initial_rank",
    "target_r": "target_rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "tinit": "full_steps",
    "tfinal": "final_steps",
    "deltaT": "allocation_interval",
    "beta1": "sensitivity_decay",
    "beta2": "uncertainty_decay",
    "orth_reg_weight": "orthogonality",
}
"""Settings of PEFT's -> ours."""


class AdaLoRALinear(MergeableLinear):
    """A linear map with an update P diag(e) Q beside it.

    Attributes:
        lora_a: Q, [R, K], in float32; random at first.
        lora_b: P, [N, R], in float32; random at first.
        lora_e: e, [R, 1], in float32; zero at first.
    """

    FILE_NAMES: ClassVar[Mapping[str, str]] = {"lora_a": "lora_A", "lora_b": "lora_B", "lora_e": "lora_E"}

    lora_a: Tensor
    lora_b: Tensor
    lora_e: Tensor

    def __init__(self, base: Base, rank: int, scale: float, dropout: float, generator: torch.Generator) -> None:
        super().__init__(base)
        self.scale, self.dropout = scale, dropout
        self.set_own(
            lora_a=torch.empty(rank, self.in_features).normal_(std=0.02, generator=generator),
            lora_b=torch.empty(self.out_features, rank).normal_(std=0.02, generator=generator),
            lora_e=torch.zeros(rank, 1),
        )

    def adapted(self, x: Tensor) -> Tensor:
        h = F.linear(F.dropout(x, self.dropout, self.training), (self.lora_a * self.lora_e).to(x.dtype))
        return self.base(x) + F.linear(h, self.lora_b.to(x.dtype)) * self.scale  # type: ignore[no-any-return]

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        weight_NK = self.base.weight
        return (weight_NK.float() + self.lora_b @ (self.lora_a * self.lora_e) * self.scale).to(weight_NK.dtype)


def orthogonality(model: Transformer) -> Tensor:
    """Mean over all P and Q of |P^T P - I| and |Q Q^T - I| (equation 4; the norm is not squared, as in PEFT).

    Its product with `AdaLoRAConfig.orthogonality` belongs to the mean loss.
    """
    parts = [part for part in model.modules() if isinstance(part, AdaLoRALinear)]
    grams = [gram for part in parts for gram in (part.lora_a @ part.lora_a.T, part.lora_b.T @ part.lora_b)]
    distances = [torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)) for gram in grams]
    return torch.stack(distances).mean()


class RankAllocator:
    """Shares out the budget of ranks in the course of training (section 3.2, algorithm 1).

    Call `update` after each step's update of the parameters and before their gradients are dropped. What it has to
    remember are buffers of the adapted maps, so that a training's checkpoints hold it: `kept`, the running mean of each
    weight's importance (`lora_e_sensitivity` for E) and that of its variation (`lora_e_uncertainty`).

    Args:
        model: with the adapters of `config` attached.
        total_steps: of the run.

    Raises:
        InputError: no step is left between the first and the last.
    """

    def __init__(self, model: Transformer, config: AdaLoRAConfig, total_steps: int) -> None:
        if config.full_steps >= total_steps - config.final_steps:
            raise InputError(
                f"full_steps ({config.full_steps}) and final_steps ({config.final_steps}) leave none of the "
                f"{total_steps} steps to give up ranks in."
            )
        self.config, self.total_steps = config, total_steps
        self.maps = [part for part in model.modules() if isinstance(part, AdaLoRALinear)]
        self.full_budget = sum(len(part.lora_e) for part in self.maps)
        self.target_budget = config.target_rank * len(self.maps)
        for part in self.maps:
            part.register_buffer("kept", torch.ones_like(part.lora_e, dtype=torch.bool))
            for name, parameter in part.own_parameters().items():
                for mean in ("sensitivity", "uncertainty"):
                    part.register_buffer(f"{name}_{mean}", torch.zeros_like(parameter))

    def budget(self, step: int) -> int:
        """Ranks in all after step `step` (equation 12)."""
        last = self.total_steps - self.config.final_steps
        if step <= self.config.full_steps:
            return self.full_budget
        left = max(0.0, 1 - (step - self.config.full_steps) / (last - self.config.full_steps))
        return int((self.full_budget - self.target_budget) * left**3 + self.target_budget)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the gradients of step `step` (0, 1, ...) and give up ranks where the budget has fallen."""
        last = self.total_steps - self.config.final_steps
        if step < last:
            self._measure()
        due = step > self.config.full_steps and step % self.config.allocation_interval == 0
        if step == last or (step < last and due):
            self._choose(self.budget(step))
        if step > last:
            # The optimiser has moved those that were given up.
            self._give_up()

    def _measure(self) -> None:
        """Running means of each weight's importance and of its variation (equations 8 to 10)."""
        beta1, beta2 = self.config.sensitivity_decay, self.config.uncertainty_decay
        for part in self.maps:
            for name, parameter in part.own_parameters().items():
                assert parameter.grad is not None
                importance = (parameter * parameter.grad).abs()
                sensitivity = part.get_buffer(f"{name}_sensitivity")
                sensitivity.mul_(beta1).add_(importance, alpha=1 - beta1)
                variation = (importance - sensitivity).abs()
                part.get_buffer(f"{name}_uncertainty").mul_(beta2).add_(variation, alpha=1 - beta2)

    def _choose(self, budget: int) -> None:
        """Keep the triplets that matter most (equations 7 and 11)."""
        num_given_up = self.full_budget - budget
        if not num_given_up:
            return
        scores = []
        for part in self.maps:
            score = {
                name: part.get_buffer(f"{name}_sensitivity") * part.get_buffer(f"{name}_uncertainty")
                for name in part.FILE_NAMES
            }
            scores.append(score["lora_e"][:, 0] + score["lora_a"].mean(1) + score["lora_b"].mean(0))
        threshold = torch.cat(scores).kthvalue(num_given_up)[0]
        for part, score_R in zip(self.maps, scores, strict=True):
            part.get_buffer("kept").copy_((score_R > threshold)[:, None])
        self._give_up()

    def _give_up(self) -> None:
        for part in self.maps:
            part.lora_e.masked_fill_(~part.get_buffer("kept"), 0)
