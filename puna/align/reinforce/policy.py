"""The models of a run as one: the policy, its critic, its reference; and the loss.

The critic is a submodule of the policy, so that one optimiser step, one clipping and one checkpoint are of both.

Shapes: N answers, L tokens of the longest answer, B rows (always one), T tokens side by side.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from puna.align.preference import token_logprobs
from puna.align.reinforce.entropy import linear_logprobs_and_entropies
from puna.align.reinforce.losses import divergence, is_clipped, policy_loss, value_loss
from puna.align.reinforce.methods import GRPO, PPO, Method
from puna.align.reinforce.rollout import Rollout, RolloutBatch
from puna.align.scoring import open_reward_model
from puna.batches.packing import IGNORE, TokenBatch
from puna.kernels.attend import document_attend
from puna.kernels.shared import SharedPromptAttend
from puna.model.attend import Attend
from puna.model.depths import GatedLayer
from puna.model.transformer import Linear, Transformer
from puna.parallel.mesh import Mesh
from puna.peft.apply import adapted_maps, disabled
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer
from puna.train.loss import LossSum
from puna.weights.load import load_model

CRITIC = "critic"
"""Name of the critic in the policy."""
_HEAD = "score"


def add_critic(model: Transformer, begin: Path | None, own: Path, tokenizer: Tokenizer) -> None:
    """Give the policy a critic.

    Args:
        begin: the reward model that it begins as; None begins as the model in `own` with a head of zeros.
        own: the policy's directory.
        tokenizer: the policy's.

    Raises:
        InputError: `begin` is no reward model, or reads other tokens.
    """
    if begin is None:
        critic = load_model(own, dtype=torch.float32)
        head = Linear(critic.config.dim, 1, bias=False)
        nn.init.zeros_(head.weight)
        critic.add_module(_HEAD, head)
        if not critic.config.tie_embeddings:
            critic.output.requires_grad_(False)
    else:
        opened = open_reward_model(begin)
        if opened.tokenizer.hash != tokenizer.hash:
            raise InputError(
                f"The critic cannot begin as {begin}, whose tokenizer is another than that of {own}; leave critic out, "
                "or take a reward model that was made from the same family."
            )
        critic = opened.model
    model.add_module(CRITIC, critic)


def shares_prompts(model: Transformer) -> bool:
    """Whether answers may go on from one copy of a prompt: gated layers need texts that stand alone."""
    return not any(isinstance(module, GatedLayer) for module in model.modules())


def _attend(batch: RolloutBatch) -> Attend:
    """What a token sees: its text."""
    if batch.is_prompt_BT.any():
        return SharedPromptAttend(batch.documents_BT, batch.groups_BT, batch.is_prompt_BT)
    return document_attend(batch.documents_BT)


def label_logprobs(model: Transformer, batch: RolloutBatch) -> Tensor:
    """Log-probability of each label, float32 [labels]."""
    return token_logprobs(model, batch, _attend(batch))[batch.labels_BT != IGNORE]


def label_logprobs_and_entropies(model: Transformer, batch: RolloutBatch) -> Tensor:
    """The same, and the entropy of what could have stood there, float32 [2, labels]."""
    target_BT = batch.labels_BT != IGNORE

    def head(h_BTD: Tensor, output: Linear) -> Tensor:
        return linear_logprobs_and_entropies(h_BTD[target_BT], output.weight, batch.labels_BT[target_BT])

    both: Tensor = model(batch.ids_BT, batch.positions_BT, _attend(batch), head)
    return both


def label_values(model: Transformer, batch: RolloutBatch) -> Tensor:
    """What the critic expects before each label, float32 [labels]."""
    critic = model.get_submodule(CRITIC)
    assert isinstance(critic, Transformer)
    critic.compute_dtype = model.compute_dtype
    head = critic.get_submodule(_HEAD)
    values_BT1: Tensor = critic(batch.ids_BT, batch.positions_BT, _attend(batch), lambda h_BTD, _: head(h_BTD))
    return values_BT1[:, :, 0].float()[batch.labels_BT != IGNORE]


def open_reference(model: Transformer, own: Path, other: Path | None) -> Transformer | None:
    """What the policy should stay near: None where that is the policy without its adapters, else a model of its own.

    Args:
        own: the policy's directory.
        other: the directory of another model, if it is not to be that.
    """
    adapters = {id(parameter) for part in adapted_maps(model).values() for parameter in part.own_parameters().values()}
    trained = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith(f"{CRITIC}.")]
    if other is None and all(id(parameter) in adapters for parameter in trained):
        return None
    return load_model(other or own, dtype=torch.float32).requires_grad_(False)


def reference_logprobs(
    model: Transformer, reference: Transformer | None, rollout: Rollout, rows: int, device: torch.device
) -> Tensor:
    """The reference's log-probabilities of the answers' tokens, [N, L] on the CPU.

    Args:
        reference: see `open_reference`.
        rows: answers in a forward.
    """
    if reference is not None:
        return policy_logprobs(reference, rollout, rows, device)
    with disabled(model):
        return policy_logprobs(model, rollout, rows, device)


def policy_logprobs(model: Transformer, rollout: Rollout, rows: int, device: torch.device) -> Tensor:
    """The same by a model as it is."""
    return _of_tokens(label_logprobs, model, rollout, rows, device)


def expected_values(model: Transformer, rollout: Rollout, rows: int, device: torch.device) -> Tensor:
    """What the critic expects before the answers' tokens, [N, L] on the CPU."""
    return _of_tokens(label_values, model, rollout, rows, device)


@torch.no_grad()
def _of_tokens(
    compute: Callable[[Transformer, RolloutBatch], Tensor],
    model: Transformer,
    rollout: Rollout,
    rows: int,
    device: torch.device,
) -> Tensor:
    """Values of labels, put where the answers' tokens are, [N, L]."""
    found_NL = torch.zeros(rollout.mask_NL.shape)
    every = range(rollout.num_answers)
    batches = rollout.batches(every, rows, device, share_prompts=shares_prompts(model))
    found_NL[rollout.mask_NL] = torch.cat([compute(model, batch).float().cpu() for batch in batches])
    return found_NL


class ReinforceLoss:
    """The loss of a micro-batch, and sums of what is worth watching about it.

    Its units are tokens or answers, see `Method.units_are_tokens`.

    Args:
        mesh: the processes that compute it.
    """

    def __init__(self, method: Method, mesh: Mesh | None = None) -> None:
        self.method = method
        self._mesh = mesh or Mesh()
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))

    def __call__(self, model: Transformer, batch: TokenBatch) -> LossSum:
        assert isinstance(batch, RolloutBatch)
        method = self.method
        target_BT = batch.labels_BT != IGNORE
        old, advantages, weights = (
            column[target_BT] for column in (batch.old_BT, batch.advantages_BT, batch.weights_BT)
        )
        if method.entropy_weight:
            logprobs, entropies = label_logprobs_and_entropies(model, batch)
        else:
            logprobs, entropies = label_logprobs(model, batch), None
        tokens = {"policy_divergence": divergence(old, logprobs.detach(), "k3")}
        limits = (method.clip_low, method.clip_high)
        if method.by_answer:
            owners = batch.documents_BT[target_BT]
            logprobs_N, old_N, each_N = (
                values.new_zeros(batch.num_answers).index_add(0, owners, values)
                for values in (logprobs, old, advantages * weights)
            )
            total = policy_loss(logprobs_N, old_N, each_N, *limits).sum()
            self._note("clip_fraction", is_clipped(logprobs_N, old_N, each_N, *limits))
        else:
            each = policy_loss(logprobs, old, advantages, *limits)
            if isinstance(method, GRPO) and method.kl_weight:
                gap = divergence(logprobs, batch.reference_BT[target_BT], method.kl_estimator)
                if method.kl_correction:
                    gap = gap * (logprobs - old).exp()
                each = each + method.kl_weight * gap
            total = (each * weights).sum()
            tokens["clip_fraction"] = is_clipped(logprobs, old, advantages, *limits)
        if isinstance(method, PPO):
            before, returns = batch.values_BT[target_BT], batch.returns_BT[target_BT]
            errors = value_loss(label_values(model, batch), before, returns, method.value_clip)
            total = total + method.value_weight * (errors * weights).sum()
            tokens["value_loss"] = errors
        if entropies is not None:
            total = total - method.entropy_weight * (entropies * weights).sum()
            tokens["entropy"] = entropies
        for name, values in tokens.items():
            self._note(name, values)
        return LossSum(total, len(logprobs) if method.units_are_tokens else batch.num_answers)

    def _note(self, name: str, values: Tensor) -> None:
        self._sums[name] = self._sums[name] + values.detach().double().sum().cpu()
        self._sums[f"{name} count"] = self._sums[f"{name} count"] + values.numel()

    def measured(self) -> dict[str, float]:
        """Means since the last call, over all processes, each of which has to call."""
        totals = self._mesh.sum(torch.stack(list(self._sums.values())))
        sums = dict(zip(self._sums, totals.tolist(), strict=True))
        self._sums.clear()
        return {name: value / sums[f"{name} count"] for name, value in sums.items() if f"{name} count" in sums}


def learning_rates(model: Transformer, method: Method, rates: Mapping[str, float]) -> dict[str, float]:
    """Factors of learning rates by parameter: what a method of `peft` asks for, and the critic's."""
    if not isinstance(method, PPO):
        return dict(rates)
    names = [name for name, _ in model.named_parameters() if name.startswith(f"{CRITIC}.")]
    return dict(rates) | dict.fromkeys(names, method.value_rate)
