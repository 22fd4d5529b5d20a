"""The computing half of a step: from a plan in integers to logits.

Shapes: N tokens of a forward, side by side in one row; D model dimension, V vocabulary, R rows that are sampled.
"""

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import cast

import numpy as np
import torch
from torch import Tensor

from puna.infer.adapters import Adapters
from puna.infer.cache import KVPool, PagedAttend
from puna.infer.native import NativeForward
from puna.infer.request import Request, TokenLogprob
from puna.infer.scheduler import Plan
from puna.infer.sequence import Sequence
from puna.model.transformer import Linear, Transformer

_REPORTED_AT_ONCE = 64
"""Prompt tokens whose logits, over the whole vocabulary, are in memory at the same time."""


class ModelRunner:
    """Runs the model over a plan's tokens: pieces of prompts and decoding sequences in one forward.

    Args:
        chunk: compute in a way that makes a sequence's results independent of all others (batch-invariant). Each piece
            of a prompt is then a forward of its own, filled up to this many tokens, and the decoding sequences are
            another, filled up to `max_rows`: a matrix product of one shape treats all rows alike.
    """

    def __init__(
        self,
        model: Transformer,
        pool: KVPool,
        *,
        max_rows: int,
        max_context: int,
        chunk: int | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        self._model = model
        self._pool = pool
        self._adapters = adapters or Adapters(model)
        self._max_rows = max_rows
        self._chunk = chunk
        # The sequences' blocks, kept from step to step: only what is new is written.
        self._tables = np.zeros((max_rows, -(-max_context // pool.block_size) + 1), dtype=np.int64)
        self._rows: dict[Sequence, int] = {}
        self._native = NativeForward.of(model, pool, max_context)

    def run(self, plan: Plan) -> tuple[list[Request], Tensor]:
        """Compute what is planned.

        Log-probabilities of prompts go straight to the requests that asked for them.

        Returns:
            The requests of which all tokens are computed now, one for each token that it can be given (a request with
            a draft has several: one after each token of it, and one after the last), and the logits [R, V] for those.
        """
        planned = cast(dict[Request, int], plan)
        order = sorted(planned, key=lambda request: _order(request, planned[request]))
        if self._chunk is None:
            return self._forward(order, [planned[request] for request in order], fill=None)
        num_decoding = sum(planned[request] == 1 for request in order)
        groups = [order[:num_decoding]] if num_decoding else []
        groups += [[request] for request in order[num_decoding:]]
        sampled: list[Request] = []
        logits: list[Tensor] = []
        for group in groups:
            fill = self._max_rows if planned[group[0]] == 1 else self._chunk
            requests, logits_RV = self._forward(group, [planned[request] for request in group], fill=fill)
            sampled += requests
            logits.append(logits_RV)
        return sampled, torch.cat(logits)

    def _forward(
        self, requests: SequenceOf[Request], counts: SequenceOf[int], fill: int | None
    ) -> tuple[list[Request], Tensor]:
        """One forward over `counts` new tokens of each request, filled up to `fill` tokens."""
        ids: list[int] = []
        sampled: list[Request] = []
        picked: list[int] = []  # positions in the forward
        asking: list[tuple[Request, int, int]] = []
        for request, count in zip(requests, counts, strict=True):
            start = request.num_computed
            if count == 1 and start + 1 == request.length:
                sampled.append(request)
                picked.append(len(ids))
                ids.append(request.tokens[start])
                continue
            known = request.tokens[start : start + count]
            if request.params.prompt_logprobs is not None and start + 1 < request.num_prompt:
                asking.append((request, len(ids), count))
            ids += known
            ids += request.draft[: count - len(known)]
            if start + count >= request.length:
                num_logits = start + count - request.length + 1
                sampled += [request] * num_logits
                picked += range(len(ids) - num_logits, len(ids))
        num_padding = 0 if fill is None else fill - len(ids)
        ids += [0] * num_padding
        tables = self._tables[self._table_rows(requests)]
        starts = [request.num_computed for request in requests]
        alone = fill is not None
        decoding = max(counts) == 1

        def head(h_1ND: Tensor, output: Linear) -> Tensor:
            _report_prompts(asking, h_1ND[0], output)
            if alone and decoding:
                filled_NV: Tensor = output(h_1ND[0])
                return filled_NV[picked]
            logits_RV: Tensor = output(h_1ND[0] if len(picked) == len(ids) else h_1ND[0, picked])
            return logits_RV

        numbers = [request.adapter for request in requests]
        if self._native is not None and len(ids) <= self._native.most_tokens and not any(numbers):
            return sampled, head(self._native(ids, tables, starts, counts), self._model.output)
        attend = PagedAttend(self._pool, tables, starts, counts, num_padding=num_padding, alone=alone)
        ids_1N = torch.tensor([ids], device=self._pool.device)
        with self._adapters.selected(numbers, counts, num_padding=num_padding, alone=alone):
            logits_RV = self._model(ids_1N, attend.positions_1N, attend, head)
        return sampled, logits_RV

    def _table_rows(self, requests: Iterable[Request]) -> list[int]:
        """Rows of the requests in the table of blocks, brought up to date."""
        rows = []
        for request in requests:
            row = self._rows.get(request)
            if row is None:
                row = self._new_row(request)
            if request.stale_from < len(request.blocks):
                self._tables[row, request.stale_from : len(request.blocks)] = request.blocks[request.stale_from :]
                request.stale_from = len(request.blocks)
            rows.append(row)
        return rows

    def _new_row(self, request: Request) -> int:
        if len(self._rows) == self._max_rows:
            # Whoever owns no blocks does not run; it starts afresh if it comes back.
            self._rows = {other: row for other, row in self._rows.items() if other.blocks}
        taken = set(self._rows.values())
        row = next(row for row in range(self._max_rows) if row not in taken)
        self._rows[request] = row
        request.stale_from = 0
        return row


def _order(request: Request, count: int) -> tuple[int, int]:
    """Decoding sequences first, by length, then beginnings of prompts, then what goes on, equal counts together."""
    if count == 1:
        return 0, request.num_computed
    return (1, 0) if request.num_computed == 0 else (1 + count, request.num_computed)


def _report_prompts(asking: SequenceOf[tuple[Request, int, int]], h_ND: Tensor, output: Linear) -> None:
    """Add the log-probabilities of prompt tokens to the requests that ask for them.

    Args:
        asking: those, and the place and number of their tokens in the forward.
        h_ND: hidden states of the forward; each is for the token that follows.
    """
    rows: list[tuple[Request, int, int]] = []
    for request, first, count in asking:
        start = request.num_computed
        # Not the second token always: what is not asked for is left out, and some are known after a preemption.
        unknown = request.params.prompt_logprobs_from + len(request.prompt_logprobs)
        follow = range(max(unknown, start + 1), min(start + count + 1, request.num_prompt))
        rows += [(request, first + place - 1 - start, request.tokens[place]) for place in follow]
    for begin in range(0, len(rows), _REPORTED_AT_ONCE):
        slab = rows[begin : begin + _REPORTED_AT_ONCE]
        logits_NV: Tensor = output(h_ND[[row for _, row, _ in slab]])
        counts = [cast(int, request.params.prompt_logprobs) for request, _, _ in slab]
        reported = report(logits_NV, [token_id for _, _, token_id in slab], counts)
        for (request, _, _), entry in zip(slab, reported, strict=True):
            request.prompt_logprobs.append(entry)


def report(logits_NV: Tensor, ids: SequenceOf[int], num_likeliest: SequenceOf[int]) -> list[TokenLogprob]:
    """Each token's log-probability, and those of the likeliest tokens at its place."""
    logprobs_NV = logits_NV.float().log_softmax(dim=-1)
    chosen_N = logprobs_NV.gather(1, torch.tensor(ids, device=logits_NV.device)[:, None]).squeeze(1).tolist()
    most = min(max(num_likeliest), logprobs_NV.shape[1])
    likeliest = logprobs_NV.max(dim=-1, keepdim=True) if most == 1 else logprobs_NV.topk(most)  # max is faster
    best_N, ids_N = (part.tolist() for part in likeliest)
    return [
        TokenLogprob(token_id, logprob, tuple(zip(top_ids, top, strict=True))[:count])
        for token_id, logprob, top_ids, top, count in zip(ids, chosen_N, ids_N, best_N, num_likeliest, strict=True)
    ]


def report_next(logits_V: Tensor, ids: SequenceOf[int]) -> tuple[TokenLogprob, ...]:
    """The log-probability of each id at one place, with that of the likeliest token."""
    if not ids:
        return ()
    logprobs_V = logits_V.float().log_softmax(dim=-1)
    best, best_id = (part.item() for part in logprobs_V.max(dim=-1))
    likeliest = ((int(best_id), float(best)),)
    return tuple(
        TokenLogprob(token_id, logprob, likeliest)
        for token_id, logprob in zip(ids, logprobs_V[list(ids)].tolist(), strict=True)
    )
