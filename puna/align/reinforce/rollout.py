"""Answers drawn by the model that is trained, from its weights in memory, and batches to learn from them.

Shapes: N answers, L tokens of the longest answer, B rows (always one), T tokens of all texts of a row side by side.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from puna.align.reinforce.rewards import Prompt
from puna.batches.packing import IGNORE, TokenBatch
from puna.batches.preferences import prompt_of
from puna.batches.tables import read_table
from puna.infer.engine import Engine
from puna.infer.sampling import SamplingParams
from puna.runtime.errors import InputError
from puna.runtime.seeds import derive_seed
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.chat import render_chat


@dataclass(frozen=True, slots=True)
class RolloutBatch(TokenBatch):
    """Texts side by side in one row, each a prompt with an answer without its last token, which nothing follows.

    Labels are the answers' tokens; the columns of floats are 0 where there is no label. Where a prompt is shared, all
    but its last token is a document of its own, which has a number above those of the answers, and each answer goes on
    from there with that last token (`puna.kernels.shared`).
    """

    groups_BT: Tensor
    """The number of each token's prompt in the row."""
    is_prompt_BT: Tensor
    """Whether a token belongs to a prompt that several answers go on from."""
    old_BT: Tensor
    """Log-probability of each label by the policy that drew it, as the engine computed it."""
    reference_BT: Tensor
    """The same by the reference."""
    advantages_BT: Tensor
    """How much better than expected the label was."""
    returns_BT: Tensor
    """What the critic should have expected before it."""
    values_BT: Tensor
    """What it did expect then."""
    weights_BT: Tensor
    """What the label's loss counts."""

    @property
    def num_answers(self) -> int:
        """Texts."""
        return int(self.documents_BT[~self.is_prompt_BT].max()) + 1


@dataclass(frozen=True, slots=True)
class Rollout:
    """Answers, all of a prompt side by side."""

    prompts: tuple[Prompt, ...]
    """What each is an answer to."""
    ids: tuple[tuple[int, ...], ...]
    """Tokens of each, the one that ended it included."""
    texts: tuple[str, ...]
    """What each says, without space at the ends."""
    finished: tuple[bool, ...]
    """Whether it ended by itself."""
    logprobs_NL: Tensor
    """Of its tokens, by the engine; 0 outside the mask. On the CPU, as the mask is."""
    mask_NL: Tensor
    """Where there is a token."""

    @property
    def num_answers(self) -> int:
        """N."""
        return len(self.ids)

    def batches(
        self,
        chosen: Sequence[int],
        rows: int,
        device: torch.device,
        columns: Mapping[str, Tensor] | None = None,
        *,
        share_prompts: bool = True,
    ) -> Iterator[RolloutBatch]:
        """Batches of some answers.

        Args:
            chosen: numbers of the answers.
            rows: answers in a batch.
            columns: for columns of the batch, by name without shape, values [N, L] on the CPU; zeros for others.
            share_prompts: let answers to the same prompt that stand side by side go on from one copy of it.
        """
        columns = {"old": self.logprobs_NL} | dict(columns or {})
        for start in range(0, len(chosen), rows):
            yield self._batch(list(chosen[start : start + rows]), columns, share_prompts).to(device)

    def _batch(self, chosen: list[int], columns: Mapping[str, Tensor], share_prompts: bool) -> RolloutBatch:
        row = _Row()
        documents = iter(range(len(chosen)))
        for group, (prompt, numbers) in enumerate(groupby(chosen, lambda number: self.prompts[number].ids)):
            answers = [self.ids[number] for number in numbers]
            shared = len(prompt) - 1 if share_prompts and len(answers) > 1 else 0
            if shared:
                row.add(prompt[:shared], [IGNORE] * shared, 0, len(chosen) + group, group, is_prompt=True)
            for answer in answers:
                labels = [*[IGNORE] * (len(prompt) - 1 - shared), *answer]
                row.add((*prompt[shared:], *answer[:-1]), labels, shared, next(documents), group, is_prompt=False)
        labels_1T = torch.tensor([row.labels])

        def column(name: str) -> Tensor:
            values_1T = torch.zeros(labels_1T.shape)
            if name in columns:
                values_1T[labels_1T != IGNORE] = columns[name][chosen][self.mask_NL[chosen]].float()
            return values_1T

        return RolloutBatch(
            torch.tensor([row.ids]),
            labels_1T,
            torch.tensor([row.positions]),
            torch.tensor([row.documents]),
            torch.tensor([row.groups]),
            torch.tensor([row.is_prompt]),
            *(column(name) for name in ("old", "reference", "advantages", "returns", "values", "weights")),
        )


@dataclass(slots=True)
class _Row:
    """A row that grows, document by document."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    is_prompt: list[bool] = field(default_factory=list)

    def add(
        self, ids: Sequence[int], labels: Sequence[int], first: int, document: int, group: int, *, is_prompt: bool
    ) -> None:
        """A document whose first token has the position `first`."""
        self.ids += ids
        self.labels += labels
        self.positions += range(first, first + len(ids))
        self.documents += [document] * len(ids)
        self.groups += [group] * len(ids)
        self.is_prompt += [is_prompt] * len(ids)


def read_prompts(path: Path, tokenizer: Tokenizer, longest: int, columns: Sequence[str]) -> list[Prompt]:
    """The prompts of a file or folder, as `puna.batches.preferences.read_prompts` knows them.

    Args:
        longest: tokens that a prompt may have.
        columns: what each row has to have.

    Raises:
        InputError: a row has no prompt, lacks a column, or is too long; names its line. Or there is no row.
    """
    prompts = []
    for row in read_table(path):
        messages = prompt_of(row)
        if missing := [name for name in columns if name not in row.values]:
            raise InputError(
                f"{row.where}: there is no column {missing[0]!r}, by which the reward tells right from wrong."
            )
        ids = tuple(render_chat(tokenizer, messages, add_generation_prompt=True).ids)
        if len(ids) > longest:
            raise InputError(
                f"{row.where}: the prompt has {len(ids):,} tokens, and only {longest:,} leave room for an answer of "
                "sampling.max_tokens within train.row_length."
            )
        prompts.append(Prompt(row.where, messages, ids, row.values))
    if not prompts:
        raise InputError(f"There is no prompt in {path}.")
    return prompts


def prompts_of_rollout(prompts: Sequence[Prompt], rollout: int, count: int, seed: int) -> list[Prompt]:
    """The prompts of a rollout by its number: `count` of them, in another order in every pass over all."""
    found = []
    for number in range(rollout * count, (rollout + 1) * count):
        epoch, within = divmod(number, len(prompts))
        order = np.random.default_rng(derive_seed(seed, "prompts", epoch)).permutation(len(prompts))
        found.append(prompts[order[within]])
    return found


def roll_out(
    engine: Engine,
    prompts: Sequence[Prompt],
    samples: int,
    sampling: SamplingParams,
    seed: tuple[int | str, ...],
    first: int = 0,
) -> Rollout:
    """Draw `samples` answers to each prompt; what is computed for a prompt is shared by them.

    Args:
        engine: over the model that is trained, which knows of the last update (`Engine.weights_changed`).
        sampling: how answers go on and when they end.
        seed: what the drawing follows from, besides weights and prompts.
        first: number of the first prompt, where these are some of more; the drawing follows from that too.
    """
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    params = [
        replace(sampling, logprobs=0, seed=derive_seed(*seed, first * samples + number) % 2**63)
        for number in range(len(repeated))
    ]
    completions = engine.generate([prompt.ids for prompt in repeated], params, new_text=True)
    lengths_N = torch.tensor([len(completion.ids) for completion in completions])
    mask_NL = torch.arange(int(lengths_N.max())) < lengths_N[:, None]
    logprobs_NL = torch.zeros(mask_NL.shape)
    logprobs_NL[mask_NL] = torch.tensor([token.logprob for each in completions for token in each.logprobs])
    return Rollout(
        tuple(repeated),
        tuple(completion.ids for completion in completions),
        tuple(completion.text.strip() for completion in completions),
        tuple(completion.finish_reason == "stop" for completion in completions),
        logprobs_NL,
        mask_NL,
    )
