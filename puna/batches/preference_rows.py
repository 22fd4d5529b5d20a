"""Preferences to token shards, and shards to rows: all answers to a prompt lie in one row, packed beside others.

Where rows share prompts, a prompt stands once, before its answers, each of which goes on from it: nothing is computed
twice but attention. `puna.kernels.shared` has the attention for such rows.

Shapes: B rows, T tokens.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
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

PROMPT = -2
"""In place of a rank: tokens of a prompt that its answers share."""

_GROUPS_FILE = "groups.npy"
_LEFT_OUT_FILE = "left_out.jsonl"
_NO_STRENGTH = -1


@dataclass(frozen=True, slots=True)
class PreferenceBatch(TokenBatch):
    """Each document is a prompt with one answer; the documents of a group are answers to the same prompt.

    Labels are the answer's tokens. Where prompts are shared, the start of a group's documents is one of its own, of the
    rank PROMPT, and the others go on from it.
    """

    groups_BT: Tensor
    """The number of each token's group in its row; PADDING where there is none."""
    ranks_BT: Tensor
    """The place of each token's answer in its group, 0 being the best; PROMPT where it belongs to all of them."""
    strengths_BT: Tensor
    """How much better the best answer is than the next, in [0, 1] from the least to the most of STRENGTHS; 0 where
    nobody said."""
    reference_BT: Tensor
    """Log-probability of each label by the reference model, float32; 0 where there is none."""

    def without_targets(self, rows_B: Tensor) -> "PreferenceBatch":
        """See `TokenBatch.without_targets`: what is counted are prompts, so there are none."""
        empty = {
            "documents_BT": self.documents_BT.masked_fill(rows_B[:, None], PADDING),
            "ranks_BT": self.ranks_BT.masked_fill(rows_B[:, None], 0),
        }
        return replace(TokenBatch.without_targets(self, rows_B), **empty)


def write_preference_shards(
    preferences: Iterable[Preference | InputError],
    tokenizer: Tokenizer,
    destination: Path,
    row_length: int,
    *,
    judged: bool,
    formatting: bool,
    leave_out: bool,
    share_prompts: bool = False,
) -> None:
    """Render, check and store preferences, one document for each answer.

    Args:
        row_length: tokens that all answers to one prompt may have together, each with the prompt.
        share_prompts: whether rows will share prompts; the prompt is then counted once.
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
                    if isinstance(preference, InputError):
                        raise preference
                    documents = _documents(preference, tokenizer, judged=judged, formatting=formatting)
                    shared = _num_shared(documents) if share_prompts else 0
                    _check_length(documents, shared, row_length, preference.where)
                except InputError as error:
                    if not leave_out:
                        raise InputError(
                            f"{error} Set leave_out=true to train without such rows; they are counted and written down."
                        ) from error
                    refused.append(error)
                    advance()
                    continue
                strength = _NO_STRENGTH if preference.strength is None else preference.strength
                for (ids, mask), rank in zip(documents, preference.ranks, strict=True):
                    writer.add(ids, str(count), 0, mask)
                    groups.append((count, rank, strength, shared))
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
    preference: Preference, tokenizer: Tokenizer, *, judged: bool, formatting: bool
) -> list[tuple[list[int], list[int]]]:
    """Ids and loss mask of each answer behind its prompt.

    Raises:
        InputError: the row cannot be used.
    """
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
    return documents


def _num_shared(documents: Sequence[tuple[list[int], list[int]]]) -> int:
    """Tokens at the start of all documents that can stand once: they are the same, and what follows them is too, for a
    token is asked for the next one only where it has just one."""
    shared = 0
    for tokens in zip(*(zip(ids, mask, strict=True) for ids, mask in documents), strict=False):
        if any(mask or id_ != tokens[0][0] for id_, mask in tokens):
            break
        shared += 1
    return max(shared - 1, 0)


def _check_length(documents: Sequence[tuple[list[int], list[int]]], shared: int, row_length: int, where: str) -> None:
    total = sum(len(ids) for ids, _ in documents) - shared * (len(documents) - 1)
    if total > row_length:
        raise InputError(f"{where}: its answers have {total:,} tokens together, more than a row ({row_length:,}).")


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
        share_prompts: let a prompt stand once for all of its answers; as the shards were written.
    """

    reference: NDArray[np.float32] | None = None
    """Log-probability of every token's label by the reference model, document after document."""

    def __init__(
        self, shards: TokenShards, row_length: int, seed: int, pad_id: int, *, share_prompts: bool = False
    ) -> None:
        self.shards, self.row_length, self.seed, self.pad_id = shards, row_length, seed, pad_id
        facts = np.load(shards.directory / _GROUPS_FILE)
        starts = np.flatnonzero(np.diff(facts[:, 0], prepend=-1))
        self._groups = [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(facts)], strict=True)]
        self._ranks, self._strengths = facts[:, 1], np.maximum(facts[:, 2], 0) / (len(STRENGTHS) - 1)
        self._shared = facts[:, 3] if share_prompts else np.zeros(len(facts), dtype=np.int64)
        self._offsets = np.concatenate(([0], np.cumsum(shards.lengths())))
        own = shards.lengths() - self._shared
        lengths = np.add.reduceat(own, starts) + self._shared[starts]
        longest_first = np.argsort(-lengths, kind="stable")
        # Packed once, so that every epoch has the same number of rows; their order is the epoch's own.
        packed = best_fit(lengths[longest_first].tolist(), row_length)
        self._rows = [[int(longest_first[item]) for item in row] for row in packed]
        self._order = lru_cache(maxsize=2)(self._make_order)
        self.num_groups, self.rows_per_epoch = len(self._groups), len(self._rows)

    def batch(self, rows: Sequence[int]) -> PreferenceBatch:
        """Rows by number, counted from 0 over all epochs."""
        filled = [self._fill(self._pieces(row)) for row in rows]
        return PreferenceBatch(*(torch.from_numpy(np.stack(column)) for column in zip(*filled, strict=True)))

    def origins(self, row: int) -> list[tuple[TokenShards, int]]:
        """See `PackedRows.origins`."""
        return [
            (self.shards, document) for document in dict.fromkeys(piece.document for piece, _, _ in self._pieces(row))
        ]

    def in_order(self) -> Iterator[tuple[PreferenceBatch, NDArray[np.int64]]]:
        """Every row of an epoch as a batch, and the place of each of its tokens among all tokens of the shards; padding
        is left out."""
        for row in range(self.rows_per_epoch):
            pieces = [piece for piece, _, _ in self._pieces(row)]
            spans = [self._offsets[piece.document] + np.arange(piece.start, piece.stop) for piece in pieces]
            yield self.batch([row]), np.concatenate(spans)

    def _pieces(self, row: int) -> list[tuple[Piece, int, int]]:
        """What a row is made of: tokens of a document, the number of its group there, and its rank."""
        epoch, within = divmod(row, self.rows_per_epoch)
        pieces = []
        for number, group in enumerate(self._rows[self._order(epoch)[within]]):
            shared = int(self._shared[self._groups[group][0]])
            if shared:
                pieces.append((Piece(self._groups[group][0], 0, shared), number, PROMPT))
            for document in self._groups[group]:
                length = int(self._offsets[document + 1] - self._offsets[document])
                pieces.append((Piece(document, shared, length), number, int(self._ranks[document])))
        return pieces

    def _make_order(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng(derive_seed(self.seed, "preferences", epoch)).permutation(self.rows_per_epoch)

    def _fill(self, pieces: Sequence[tuple[Piece, int, int]]) -> tuple[NDArray[np.generic], ...]:
        """The columns of a row."""
        plain = [piece for piece, _, _ in pieces]
        ids, labels, positions, documents = fill_row(self.shards, plain, self.row_length, self.pad_id)
        groups = np.full(self.row_length, PADDING, dtype=np.int64)
        ranks = np.zeros(self.row_length, dtype=np.int64)
        strengths = np.zeros(self.row_length, dtype=np.float32)
        reference = np.zeros(self.row_length, dtype=np.float32)
        at = 0
        for piece, group, rank in pieces:
            span = slice(at, at + piece.stop - piece.start)
            positions[span] += piece.start
            groups[span], ranks[span], strengths[span] = group, rank, self._strengths[piece.document]
            if self.reference is not None:
                first = self._offsets[piece.document]
                reference[span] = self.reference[first + piece.start : first + piece.stop]
            at = span.stop
        return ids, labels, positions, documents, groups, ranks, strengths, reference
