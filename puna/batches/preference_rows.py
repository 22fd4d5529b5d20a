"""Preferences to token shards, and shards to rows: all answers to a prompt lie in one row, packed beside others.

Shapes: B rows, T tokens.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from puna.batches.packing import PADDING, Piece, TokenBatch, best_fit, fill_row
from puna.batches.preferences import STRENGTHS, Preference
from puna.batches.shards import ShardWriter, TokenShards
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, write_jsonl
from puna.runtime.manifest import Manifest
from puna.runtime.progress import progress, say
from puna.runtime.seeds import derive_seed
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.chat import render_chat

_GROUPS_FILE = "groups.npy"
_LEFT_OUT_FILE = "left_out.jsonl"
_NO_STRENGTH = -1


@dataclass(frozen=True, slots=True)
class PreferenceBatch(TokenBatch):
    """Each document is a prompt with one answer; the documents of a group are answers to the same prompt.

    Labels are the answer's tokens.
    """

    groups_BT: Tensor
    """The number of each token's group in its row; PADDING where there is none."""
    ranks_BT: Tensor
    """The place of each token's answer in its group, 0 being the best."""
    strengths_BT: Tensor
    """How much better the best answer is than the next, in [0, 1] from the least to the most of STRENGTHS; 0 where
    nobody said."""
    reference_BT: Tensor
    """Log-probability of each label by the reference model, float32; 0 where there is none."""


def write_preference_shards(
    preferences: Iterable[Preference | InputError],
    tokenizer: Tokenizer,
    destination: Path,
    row_length: int,
    *,
    judged: bool,
    formatting: bool,
    leave_out: bool,
) -> None:
    """Render, check and store preferences, one document for each answer.

    Args:
        row_length: tokens that all answers to one prompt may have together, each with the prompt.
        judged: whether answers are judged one by one, or compared.
        formatting: whether special tokens of an answer, such as its end, are labels too.
        leave_out: rows that cannot be used are left out, counted by reason and written down, instead of refused.

    Raises:
        InputError: a row cannot be used; or none can. Names line and reason.
    """
    refused: list[InputError] = []
    count = 0
    groups: list[tuple[int, ...]] = []
    with atomic_path(destination) as folder, progress("Rendering preferences", total=None) as advance:
        folder.mkdir()
        with ShardWriter(folder, tokenizer.vocab_size) as writer:
            for count, preference in enumerate(preferences, start=1):
                try:
                    documents = _documents(preference, tokenizer, row_length, judged=judged, formatting=formatting)
                except InputError as error:
                    if not leave_out:
                        raise InputError(
                            f"{error} Set leave_out=true to train without such rows; they are counted and written down."
                        ) from error
                    refused.append(error)
                    advance()
                    continue
                assert isinstance(preference, Preference)
                strength = _NO_STRENGTH if preference.strength is None else preference.strength
                for (ids, mask), rank in zip(documents, preference.ranks, strict=True):
                    writer.add(ids, str(count), 0, mask)
                    groups.append((count, rank, strength))
                advance()
        if not groups:
            first = f"; the first: {refused[0]}" if refused else ""
            raise InputError(f"There is no preference to learn from in {count:,} rows{first}")
        np.save(folder / _GROUPS_FILE, np.array(groups, dtype=np.int64))
        write_jsonl(folder / _LEFT_OUT_FILE, ({"reason": str(error)} for error in refused))
        results = writer.results(tokenizer.hash) | {"num_left_out": len(refused)}
        Manifest("align", {}, {}, results).write(folder)
    if refused:
        reasons = Counter(str(error).partition(": ")[2] or str(error) for error in refused)
        shown = "; ".join(f"{number:,} because {reason}" for reason, number in reasons.most_common(5))
        say(f"Left out {len(refused):,} of {count:,} rows ({shown}); see {destination / _LEFT_OUT_FILE}.")


def _documents(
    preference: Preference | InputError, tokenizer: Tokenizer, row_length: int, *, judged: bool, formatting: bool
) -> list[tuple[list[int], list[int]]]:
    """Ids and loss mask of each answer behind its prompt.

    Raises:
        InputError: the row cannot be used.
    """
    if isinstance(preference, InputError):
        raise preference
    if preference.is_judged != judged:
        found, wanted = ("one judged answer", "several in order") if preference.is_judged else ("several", "one judged")
        raise InputError(f"{preference.where}: it has {found}, but the method needs {wanted}.")
    documents = []
    try:
        for answer in preference.answers:
            rendered = render_chat(tokenizer, [*preference.prompt, *answer])
            mask = _answer_only(rendered.mask, sum(message["role"] == "assistant" for message in preference.prompt))
            if not formatting:
                mask = [int(own and n not in tokenizer.special_ids) for own, n in zip(mask, rendered.ids, strict=True)]
            documents.append((rendered.ids, mask))
    except InputError as error:
        raise InputError(f"{preference.where}: {error}") from error
    if not all(any(mask) for _, mask in documents):
        raise InputError(f"{preference.where}: an answer has no token that could be learnt from.")
    if (total := sum(len(ids) for ids, _ in documents)) > row_length:
        raise InputError(
            f"{preference.where}: its answers have {total:,} tokens together, more than a row ({row_length:,})."
        )
    return documents


def _answer_only(mask: Sequence[int], earlier: int) -> list[int]:
    """The mask without its first `earlier` runs, which are earlier turns of the assistant."""
    own, runs, before = [], 0, 0
    for value in mask:
        runs += value > before
        before = value
        own.append(int(value and runs > earlier))
    return own


class PreferenceRows:
    """Endless rows of `row_length` tokens, each group whole in one of them; row *i* follows from the seed.

    Args:
        shards: what `write_preference_shards` wrote.
        row_length: tokens in a row.
        seed: of the order.
        pad_id: fills the ends of rows.
        reference: log-probability of every token's label by the reference model, document after document.
    """

    def __init__(
        self,
        shards: TokenShards,
        row_length: int,
        seed: int,
        pad_id: int,
        reference: NDArray[np.float32] | None = None,
    ) -> None:
        self.shards, self.row_length, self.seed, self.pad_id, self.reference = (
            shards,
            row_length,
            seed,
            pad_id,
            reference,
        )
        facts = np.load(shards.directory / _GROUPS_FILE)
        starts = np.flatnonzero(np.diff(facts[:, 0], prepend=-1))
        self._groups = [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(facts)], strict=True)]
        self._ranks, self._strengths = facts[:, 1], np.maximum(facts[:, 2], 0) / (len(STRENGTHS) - 1)
        self._offsets = np.concatenate(([0], np.cumsum(shards.lengths())))
        lengths = np.add.reduceat(shards.lengths(), starts)
        longest_first = np.argsort(-lengths, kind="stable")
        # Packed once, so that every epoch has the same number of rows; their order is the epoch's own.
        packed = best_fit(lengths[longest_first].tolist(), row_length)
        self._rows = [[int(longest_first[item]) for item in row] for row in packed]
        self._order = lru_cache(maxsize=2)(self._make_order)
        self.num_groups, self.rows_per_epoch = len(self._groups), len(self._rows)

    def batch(self, rows: Sequence[int]) -> PreferenceBatch:
        """Rows by number, counted from 0 over all epochs."""
        filled = [self._fill(self._documents(row)) for row in rows]
        return PreferenceBatch(*(torch.from_numpy(np.stack(column)) for column in zip(*filled, strict=True)))

    def origins(self, row: int) -> list[tuple[TokenShards, int]]:
        """See `PackedRows.origins`."""
        return [(self.shards, document) for document, _ in self._documents(row)]

    def in_order(self) -> Iterator[tuple[PreferenceBatch, list[int]]]:
        """Every row of an epoch as a batch, and its documents from left to right."""
        for row in range(self.rows_per_epoch):
            yield self.batch([row]), [document for document, _ in self._documents(row)]

    def _documents(self, row: int) -> list[tuple[int, int]]:
        """Each document of a row, and the number of its group there."""
        epoch, within = divmod(row, self.rows_per_epoch)
        groups = self._rows[self._order(epoch)[within]]
        return [(document, number) for number, group in enumerate(groups) for document in self._groups[group]]

    def _make_order(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng(derive_seed(self.seed, "preferences", epoch)).permutation(self.rows_per_epoch)

    def _fill(self, documents: Sequence[tuple[int, int]]) -> tuple[NDArray[np.generic], ...]:
        """The columns of a row."""
        lengths = [int(self._offsets[document + 1] - self._offsets[document]) for document, _ in documents]
        pieces = [Piece(document, 0, length) for (document, _), length in zip(documents, lengths, strict=True)]
        groups = np.full(self.row_length, PADDING, dtype=np.int64)
        ranks = np.zeros(self.row_length, dtype=np.int64)
        strengths = np.zeros(self.row_length, dtype=np.float32)
        reference = np.zeros(self.row_length, dtype=np.float32)
        at = 0
        for (document, group), length in zip(documents, lengths, strict=True):
            span = slice(at, at + length)
            groups[span], ranks[span], strengths[span] = group, self._ranks[document], self._strengths[document]
            if self.reference is not None:
                reference[span] = self.reference[self._offsets[document] : self._offsets[document + 1]]
            at += length
        return *fill_row(self.shards, pieces, self.row_length, self.pad_id), groups, ranks, strengths, reference
