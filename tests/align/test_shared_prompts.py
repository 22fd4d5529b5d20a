"""Rows in which a prompt stands once: the same losses, gradients, rewards and reference as rows that repeat it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from puna.align.config import AlignConfig
from puna.align.learn import open_data
from puna.align.losses import DPO, KTO, PreferenceLoss
from puna.align.main import reference_logprobs
from puna.align.preference import preference_loss
from puna.align.reward_loss import HEAD, reward_loss
from puna.batches.preference_rows import PROMPT, PreferenceRows, write_preference_shards
from puna.batches.preferences import Preference, with_mismatched
from puna.batches.shards import TokenShards
from puna.config import load_config
from puna.model.transformer import Transformer
from puna.peft.heads import add_head
from puna.runtime.errors import InputError
from puna.runtime.files import write_jsonl
from puna.tokenizer.load import load_tokenizer
from puna.train.loss import Loss
from puna.weights.load import load_model

WORDS = st.lists(st.sampled_from(["the", "llama", "walks", "to a", "good", "bad", "city"]), min_size=1, max_size=6)
ANSWERS = st.lists(WORDS.map(" ".join), min_size=2, max_size=3, unique=True)
PROMPTS = st.lists(st.tuples(WORDS.map(" ".join), ANSWERS), min_size=1, max_size=4)


def preferences(asked: list[tuple[str, list[str]]], *, judged: bool) -> list[Preference]:
    if judged:
        asked = [(prompt, answers[:1]) for prompt, answers in asked]
    return [
        Preference(
            f"line {n}",
            [{"role": "user", "content": prompt}],
            tuple([{"role": "assistant", "content": answer}] for answer in answers),
            (n % 2,) if judged else tuple(range(len(answers))),
            n % 4,
        )
        for n, (prompt, answers) in enumerate(asked)
    ]


def both(base_model: Path, folder: Path, asked: list[tuple[str, list[str]]], *, judged: bool) -> list[PreferenceRows]:
    """Rows that repeat prompts, and rows that share them."""
    tokenizer = load_tokenizer(base_model)
    found = []
    for share in (False, True):
        where, source = folder / str(share), preferences(asked, judged=judged)
        write_preference_shards(
            with_mismatched(source) if judged else source,
            tokenizer, where, 256, judged=judged, formatting=True, leave_out=False, share_prompts=share,
        )  # fmt: skip
        shards = TokenShards(where, tokenizer.hash)
        found.append(PreferenceRows(shards, 256, 0, tokenizer.pad_id, share_prompts=share))
    return found


def total_and_gradients(model: Transformer, loss: Loss, rows: PreferenceRows) -> tuple[Tensor, int, list[Tensor]]:
    model.zero_grad()
    part = loss(model, rows.batch(range(rows.rows_per_epoch)))
    part.total.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return part.total.detach(), part.count, [grad.clone() for grad in grads]


@pytest.fixture(scope="module")
def model(base_model: Path) -> Transformer:
    model = load_model(base_model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    add_head(model, HEAD, 0)
    return model.requires_grad_()


@given(PROMPTS, st.sampled_from([DPO(beta=0.5), KTO(beta=0.5), None]))
@settings(max_examples=20)
def test_nothing_changes(
    base_model: Path,
    model: Transformer,
    tmp_path_factory: pytest.TempPathFactory,
    asked: list[tuple[str, list[str]]],
    kind: PreferenceLoss | None,
) -> None:
    """With None, the loss of a reward model. KTO's divergence is one of the whole batch, which is the same."""
    loss = reward_loss((0.0, 0.3, 0.6, 1.0), 0.1) if kind is None else preference_loss(kind)
    judged = isinstance(kind, KTO)
    repeated, shared = both(base_model, tmp_path_factory.mktemp("shards"), asked, judged=judged)
    reference = load_model(base_model, dtype=torch.float32)
    for rows in (repeated, shared):
        rows.reference = reference_logprobs(reference, rows)
    assert repeated.reference is not None
    assert shared.reference is not None
    np.testing.assert_allclose(shared.reference, repeated.reference, rtol=1e-4, atol=1e-5)
    total, count, gradients = total_and_gradients(model, loss, shared)
    expected, expected_count, expected_gradients = total_and_gradients(model, loss, repeated)
    # float32, summed up in another order; gradients are sums of many such terms.
    assert count == expected_count
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    for mine, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def test_a_prompt_stands_once_up_to_where_answers_differ(base_model: Path, tmp_path: Path) -> None:
    """The token that answers begin after is each one's own, for it is asked for different tokens."""
    repeated, shared = both(
        base_model, tmp_path, [("Who walks to Peru?", ["the llama", "the city", "hay"])], judged=False
    )
    [batch], [full] = [shared.batch([0])], [repeated.batch([0])]
    is_prompt = batch.ranks_BT == PROMPT
    length = int(is_prompt.sum())
    documents = [shared.shards.ids(document).tolist() for document in range(3)]
    assert documents[0][:length] == documents[1][:length] == documents[2][:length]
    masks = [np.array(shared.shards.mask(document)) for document in range(3)]
    assert all(not mask[: length + 1].any() and mask[length + 1] for mask in masks)
    assert (batch.documents_BT >= 0).sum() == (full.documents_BT >= 0).sum() - 2 * length
    for n in range(3):
        own = batch.documents_BT == n + 1
        assert batch.ids_BT[own].tolist() == documents[n][length:]
        assert batch.positions_BT[own].tolist() == list(range(length, len(documents[n])))
    assert [document for _, document in shared.origins(0)] == [0, 1, 2]


def test_a_row_holds_what_it_could_not_with_the_prompt_twice(base_model: Path, tmp_path: Path) -> None:
    asked = [("the llama walks " * 9, ["hay", "a city"])]
    with pytest.raises(InputError, match="more than a row"):
        write(base_model, tmp_path / "repeated", asked, share_prompts=False)
    write(base_model, tmp_path / "shared", asked, share_prompts=True)


def write(base_model: Path, folder: Path, asked: list[tuple[str, list[str]]], *, share_prompts: bool) -> None:
    options = {"judged": False, "formatting": True, "leave_out": False, "share_prompts": share_prompts}
    write_preference_shards(preferences(asked, judged=False), load_tokenizer(base_model), folder, 128, **options)


@pytest.mark.parametrize(("method", "shares"), [("", True), ('peft={kind="prefix",num_virtual_tokens=2}', False)])
def test_prompts_are_shared_wherever_attention_allows_it(
    base_model: Path, tmp_path: Path, method: str, shares: bool
) -> None:
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Who walks?", "chosen": "a llama", "rejected": "a city"}] * 3)
    given = [f"model={base_model}", f"output={tmp_path / 'out'}", f"preferences={tmp_path / 'p.jsonl'}"]
    config = load_config(AlignConfig, None, [*given, "train.row_length=128", *([method] if method else [])])
    opened = open_data(config, load_model(base_model), load_tokenizer(base_model), judged=False, formatting=False)
    batch = opened.rows.batch([0])
    assert bool((batch.ranks_BT == PROMPT).any()) == shares  # type: ignore[attr-defined]
