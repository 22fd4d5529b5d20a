"""Reinforcement on several processes: each draws and judges answers to its share of a rollout's prompts, with a whole
copy of the weights, and is told of what the others drew. From there on all have the same rollout, so that advantages,
order of learning, curves and alarms are those of one process, and each takes its rows of every step.

What is trained may be sharded; what draws, and the reference, is whole on every process.

Shapes: N answers, L tokens of the longest answer.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from puna.align.reinforce.config import ReinforceConfig
from puna.align.reinforce.rewards import Prompt
from puna.align.reinforce.rollout import Rollout
from puna.model.transformer import Transformer
from puna.parallel.mesh import Mesh
from puna.runtime.errors import InputError
from puna.train.ranks import gather

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Drawn:
    """Answers, and what rewards and models say of them, on the CPU."""

    rollout: Rollout
    rewards: list[float]
    """Of each answer."""
    parts: dict[str, float]
    """The mean of each kind of reward."""
    reference_NL: Tensor
    """Log-probability of each token by the reference, as `puna.align.reinforce.methods.Scored` has it."""
    values_NL: Tensor
    """What the critic expected before each token, likewise."""


def check_processes(config: ReinforceConfig, processes: int) -> None:
    """Refuse what works on one process only.

    Raises:
        InputError: there are several, and the settings have something that does not.
    """
    if processes > 1 and config.peft is not None:
        raise InputError(
            "On several processes, reinforcement trains all parameters: leave out peft, or start the command without "
            "torchrun."
        )
    if config.prompts_per_rollout % processes:
        raise InputError(
            f"prompts_per_rollout is {config.prompts_per_rollout}, which {processes} processes cannot take equal parts "
            "of. Change it, or start another number with torchrun --nproc-per-node."
        )


def whole_copy(model: Transformer, mesh: Mesh, device: torch.device) -> Transformer:
    """The model by which this process draws: `model` itself where there is one process."""
    return model if mesh.num_processes == 1 else deepcopy(model).to(device).requires_grad_(False).eval()


def bring_up_to_date(policy: Transformer, model: Transformer) -> None:
    """Give a `whole_copy` the weights of the model that is trained; every process has to call."""
    if policy is not model:
        policy.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))


def of_all(value: Value) -> list[Value]:
    """The value of every process, in their order; every process has to call."""
    return gather(value, dist.group.WORLD if dist.is_initialized() else None)


def own_prompts(prompts: Sequence[Prompt], mesh: Mesh) -> tuple[Sequence[Prompt], int]:
    """This process's share of the prompts, and the number of its first."""
    share = len(prompts) // mesh.num_processes
    first = share * mesh.rank("rows")
    return prompts[first : first + share], first


def together(own: Drawn) -> Drawn:
    """What all processes drew, in the order of the prompts."""
    shares = of_all(own)
    if len(shares) == 1:
        return own
    rollouts = [share.rollout for share in shares]
    rollout = Rollout(
        tuple(prompt for each in rollouts for prompt in each.prompts),
        tuple(ids for each in rollouts for ids in each.ids),
        tuple(text for each in rollouts for text in each.texts),
        tuple(finished for each in rollouts for finished in each.finished),
        _below_each_other([each.logprobs_NL for each in rollouts]),
        _below_each_other([each.mask_NL for each in rollouts]),
    )
    return Drawn(
        rollout,
        [reward for share in shares for reward in share.rewards],
        {name: sum(share.parts[name] for share in shares) / len(shares) for name in own.parts},
        _below_each_other([share.reference_NL for share in shares]),
        _below_each_other([share.values_NL for share in shares]),
    )


def _below_each_other(tables: Sequence[Tensor]) -> Tensor:
    """One table of several, as wide as the widest."""
    width = max(table.shape[1] for table in tables)
    return torch.cat([F.pad(table, (0, width - table.shape[1])) for table in tables])
