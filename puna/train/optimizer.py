"""The optimisers, what each updates, and what it decays."""

import importlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from puna.model.transformer import Transformer
from puna.peft.method import AdaptedLinear
from puna.runtime.errors import InputError
from puna.train.config import OptimizerConfig


def build_optimizers(
    model: Transformer, config: OptimizerConfig, rates: Mapping[str, float] | None = None
) -> list[Optimizer]:
    """The optimisers of all parameters that are trained; each is in exactly one.

    Decay is for the weights of linear layers and for the matrices of adapters. Norms and biases have no scale to
    shrink, and a row of the embedding that no token of a batch touches should not shrink either. A weight that is tied
    to the embedding counts as a linear layer's.

    Args:
        rates: name of a parameter -> factor of its learning rate, where it is not 1; becomes its group's `rate`.
    """
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            linear |= {id(parameter) for parameter in module.own_parameters().values() if parameter.ndim > 1}
    hidden = {id(module.weight) for module in model.layers.modules() if isinstance(module, nn.Linear)}
    alike: dict[tuple[bool, bool, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_muon = config.kind == "muon" and id(parameter) in hidden
            alike[by_muon, id(parameter) in linear, (rates or {}).get(name, 1.0)].append(parameter)
    groups: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for (by_muon, decays, rate), parameters in sorted(alike.items(), key=lambda item: item[0], reverse=True):
        groups[by_muon].append(
            {
                "params": parameters,
                "lr": config.learning_rate * rate,
                "weight_decay": config.weight_decay if decays else 0.0,
                "rate": rate,
            }
        )
    optimizers: list[Optimizer] = []
    if groups[True]:
        optimizers.append(Muon(groups[True], momentum=0.95, adjust_lr_fn="match_rms_adamw"))
    if groups[False]:
        optimizers.append(_adamw(groups[False], config))
    return optimizers


def _adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
    options: dict[str, Any] = {"betas": (config.beta1, config.beta2), "eps": config.epsilon}
    if config.state_precision == "int8":
        try:
            torchao = importlib.import_module("torchao.optim")
        except ImportError as error:
            raise InputError(
                "train.optimizer.state_precision is 'int8', which needs torchao: pip install torchao."
            ) from error
        return torchao.AdamW8bit(groups, **options)  # type: ignore[no-any-return]
    return (AdamW if config.state_precision == "fp32" else HalfStateAdamW)(groups, fused=True, **options)


class HalfStateAdamW(AdamW):
    """AdamW that keeps its two running means in bfloat16 and computes with them in float32, a parameter at a time."""

    def __init__(self, params: ParamsT, **options: Any) -> None:
        super().__init__(params, **options)
        # Loading casts a state to its parameter's dtype.
        self.register_load_state_dict_post_hook(_halve)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                means = [state[name].float() for name in ("exp_avg", "exp_avg_sq")]
                beta1, beta2 = group["betas"]
                adamw(
                    [parameter],
                    [parameter.grad],
                    [means[0]],
                    [means[1]],
                    [],
                    [state["step"]],
                    fused=True,
                    grad_scale=getattr(self, "grad_scale", None),
                    found_inf=getattr(self, "found_inf", None),
                    amsgrad=False,
                    beta1=beta1,
                    beta2=beta2,
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
                for name, mean in zip(("exp_avg", "exp_avg_sq"), means, strict=True):
                    state[name].copy_(mean)


def _halve(optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].to(torch.bfloat16)
