"""Answers that go on from one copy of their prompt, and the bonus for entropy: beside what is computed without either.

Shapes: N answers, L tokens of the longest answer, V vocabulary.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.align.reinforce import entropy
from puna.align.reinforce.methods import GRPO, PPO, RLOO, Method
from puna.align.reinforce.policy import ReinforceLoss, add_critic, expected_values, policy_logprobs, shares_prompts
from puna.align.reinforce.rewards import Prompt
from puna.align.reinforce.rollout import Rollout
from puna.batches.packing import IGNORE
from puna.model.depths import Depths, gate_layers
from puna.model.transformer import Transformer
from puna.tokenizer.load import load_tokenizer
from puna.weights.load import load_model

CPU = torch.device("cpu")
METHODS: list[Method] = [GRPO(kl_weight=0.1), RLOO(), PPO(entropy_weight=0.1)]


@pytest.fixture(scope="module")
def model(base_model: Path) -> Transformer:
    """With a critic that expects something."""
    model = load_model(base_model, dtype=torch.float32)
    add_critic(model, None, base_model, load_tokenizer(base_model))
    torch.nn.init.normal_(model.get_parameter("critic.score.weight"), generator=torch.Generator().manual_seed(0))
    return model


def rollout_of(prompts: list[int], answers: list[int], seed: int) -> Rollout:
    """One answer for each length in `answers`, to the prompt of the length beside it; equal lengths, equal prompts."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(300, (length,), generator=generator).tolist())

    asked = {length: Prompt("", [], ids(length), {}) for length in sorted(set(prompts))}
    mask_NL = torch.arange(max(answers)) < torch.tensor(answers)[:, None]
    old_NL = (-5 + torch.randn(mask_NL.shape, generator=generator)) * mask_NL
    texts, finished = ("",) * len(answers), (True,) * len(answers)
    return Rollout(tuple(asked[n] for n in prompts), tuple(map(ids, answers)), texts, finished, old_NL, mask_NL)


def columns_of(rollout: Rollout, method: Method) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    names = ("reference", "advantages", "returns", "values")
    drawn = {name: torch.randn(rollout.mask_NL.shape, generator=generator) * rollout.mask_NL for name in names}
    return drawn | {"weights": method.token_weights(rollout.mask_NL, 8)}


def total_and_gradients(
    model: Transformer, method: Method, rollout: Rollout, *, share_prompts: bool
) -> tuple[Tensor, int, list[Tensor]]:
    model.zero_grad()
    every, columns = range(rollout.num_answers), columns_of(rollout, method)
    [batch] = rollout.batches(every, rollout.num_answers, CPU, columns, share_prompts=share_prompts)
    part = ReinforceLoss(method)(model, batch)
    part.total.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return part.total.detach(), part.count, [grad.clone() for grad in grads]


SIZES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=6)


@given(SIZES, st.sampled_from(METHODS), st.integers(0, 99))
@settings(max_examples=12)
def test_a_shared_prompt_changes_nothing(
    model: Transformer, sizes: list[tuple[int, int]], method: Method, seed: int
) -> None:
    prompts, answers = zip(*sizes, strict=True)
    rollout = rollout_of(list(prompts), list(answers), seed)
    total, count, gradients = total_and_gradients(model, method, rollout, share_prompts=True)
    expected, expected_count, expected_gradients = total_and_gradients(model, method, rollout, share_prompts=False)
    assert count == expected_count
    # float32, summed up in another order.
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    for mine, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def test_a_prompt_stands_once(model: Transformer) -> None:
    rollout = rollout_of([7, 7, 7, 3, 7], [2, 1, 4, 2, 3], 0)
    every, columns = range(5), {"advantages": torch.arange(20.0).view(5, 4) * torch.ones(5, 4)}
    [shared] = rollout.batches(every, 5, CPU, columns)
    [apart] = rollout.batches(every, 5, CPU, columns, share_prompts=False)
    assert shared.is_prompt_BT.sum() == 6  # the last token of a prompt is each answer's own
    assert not apart.is_prompt_BT.any()
    assert apart.ids_BT.numel() - shared.ids_BT.numel() == 2 * 6
    assert shared.num_answers == apart.num_answers == 5
    for name in ("labels_BT", "ids_BT", "positions_BT", "documents_BT", "advantages_BT"):
        ours, theirs = (getattr(batch, name)[batch.labels_BT != IGNORE].tolist() for batch in (shared, apart))
        assert ours == theirs, name
    together, alone = (policy_logprobs(model, rollout, rows, CPU) for rows in (5, 1))
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        expected_values(model, rollout, 5, CPU), expected_values(model, rollout, 1, CPU), rtol=0, atol=2e-5
    )


def test_gated_layers_read_texts_that_stand_alone(base_model: Path) -> None:
    model = load_model(base_model, dtype=torch.float32)
    assert shares_prompts(model)
    gate_layers(model, Depths((0,), 0.5), 0)
    assert not shares_prompts(model)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 99))
@settings(max_examples=20)
def test_entropies_in_slices(slice_numbers: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    h_ND, weight_VD = (torch.randn(size, 4, generator=generator, requires_grad=True) for size in (count, 5))
    labels_N = torch.randint(5, (count,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entropy, "_SLICE_NUMBERS", 5 * slice_numbers)
        found = entropy.linear_logprobs_and_entropies(h_ND, weight_VD, labels_N)
        gradients = torch.autograd.grad(found.sum(), (h_ND, weight_VD))
    expected = entropy.naive_linear_logprobs_and_entropies(h_ND, weight_VD, labels_N)
    torch.testing.assert_close(found, expected)
    for mine, other in zip(gradients, torch.autograd.grad(expected.sum(), (h_ND, weight_VD)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_the_bonus_is_the_mean_entropy(model: Transformer) -> None:
    """arXiv:1707.06347, equation 9, from the logits of each text alone."""
    rollout, method = rollout_of([5, 5, 3], [2, 4, 3], 2), PPO(entropy_weight=0.3)
    total, count, _ = total_and_gradients(model, method, rollout, share_prompts=True)
    without, _, _ = total_and_gradients(model, replace(method, entropy_weight=0.0), rollout, share_prompts=True)
    entropies = []
    for prompt, ids in zip(rollout.prompts, rollout.ids, strict=True):
        text = torch.tensor([[*prompt.ids, *ids[:-1]]])
        logits_1TV = model(text, torch.arange(text.shape[1])[None])
        logprobs_LV = F.log_softmax(logits_1TV[0, len(prompt.ids) - 1 :], -1)
        entropies += (-(logprobs_LV.exp() * logprobs_LV).sum(-1)).tolist()
    assert count == len(entropies) == 9
    assert (without - total).item() / count == pytest.approx(0.3 * sum(entropies) / count, rel=1e-4)
