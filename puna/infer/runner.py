"""The computing half of a step: from a plan in integers to logits.

Shapes: N tokens of a forward, side by side in one row; W of them that somebody asks about; D model dimension, V
vocabulary, R rows that are sampled.
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
from puna.model.rope import frequencies, rotation
from puna.model.transformer import Layer, Linear, Transformer

_LOGITS_AT_ONCE = 2**22
"""Of prompts: as many of their tokens' logits, over the whole vocabulary, are in memory at the same time."""

_Asked = tuple[Request, int, int]
"""Whose prompt token a log-probability is asked of, the place in the forward that it follows, and the token."""


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
        asked: list[_Asked] = []
        for request, count in zip(requests, counts, strict=True):
            start = request.num_computed
            if count == 1 and start + 1 == request.length:
                sampled.append(request)
                picked.append(len(ids))
                ids.append(request.tokens[start])
                continue
            known = request.tokens[start : start + count]
            if request.params.prompt_logprobs is not None and start + 1 < request.num_prompt:
                asked += _asked(request, len(ids), count)
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

        numbers = [request.adapter for request in requests]
        wanted = sorted({*picked, *(place for _, place, _ in asked)})
        native = None if any(numbers) else self._native
        if native is not None and len(ids) > native.most_tokens:
            native = None
        # Updates by adapters are for every token; and where results shall not depend on what else runs, nor may shapes.
        narrow = native is None and not alone and not any(numbers) and len(wanted) < len(ids) and _is_plain(self._model)
        if narrow:
            rows = {place: row for row, place in enumerate(wanted)}
            picked = [rows[place] for place in picked]
            asked = [(request, rows[place], token_id) for request, place, token_id in asked]

        def head(h_1WD: Tensor, output: Linear) -> Tensor:
            _report_prompts(asked, h_1WD[0], output, self._model.config.vocab_size)
            if alone and decoding:
                filled_NV: Tensor = output(h_1WD[0])
                return filled_NV[picked]
            logits_RV: Tensor = output(h_1WD[0] if len(picked) == h_1WD.shape[1] else h_1WD[0, picked])
            return logits_RV

        if native is not None:
            return sampled, head(native(ids, tables, starts, counts), self._model.output)
        # Updates by adapters are for every token, in order.
        attend = PagedAttend(
            self._pool, tables, starts, counts, num_padding=num_padding, alone=alone, keeps_shape=any(numbers)
        )
        ids_1N = torch.tensor([ids], device=self._pool.device)
        if narrow:
            return sampled, head(hidden_states(self._model, ids_1N, attend, wanted), self._model.output)
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


def hidden_states(model: Transformer, ids_1N: Tensor, attend: PagedAttend, wanted: SequenceOf[int]) -> Tensor:
    """Normalised hidden states h_1WD of some tokens of a forward; `Transformer.forward` is the twin that has them all.

    Of the last layer, the other tokens are computed as far as keys and values only: nobody reads more of them.
    """
    x_1ND = model.embedding(ids_1N)
    if model.compute_dtype is not None:
        x_1ND = x_1ND.to(model.compute_dtype)
    turn = rotation(attend.positions_1N, frequencies(model.config, ids_1N.device), x_1ND.dtype)
    *before, last = model.layers
    for layer in before:
        x_1ND = layer(x_1ND, turn, attend)
    rows_W = torch.tensor(wanted, dtype=torch.int64, device=ids_1N.device)

    def narrowed(layer: int, q_1NHK: Tensor, k_1NGK: Tensor, v_1NGK: Tensor) -> Tensor:
        return attend(layer, q_1NHK, k_1NGK, v_1NGK)[:, rows_W]

    assert isinstance(last, Layer)
    x_1WD = x_1ND[:, rows_W] + last.attention(last.attention_norm(x_1ND), turn, narrowed)
    x_1WD = x_1WD + last.feed_forward(last.feed_forward_norm(x_1WD))
    h_1WD: Tensor = model.norm(x_1WD)
    return h_1WD


def _is_plain(model: Transformer) -> bool:
    """Whether `hidden_states` may take the model apart: nothing looks on, and the last layer is an ordinary one."""
    last = model.layers[-1]
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in (model, last))
    return type(model) is Transformer and type(last) is Layer and not hooked


def _asked(request: Request, first: int, count: int) -> list[_Asked]:
    """The log-probabilities that a request asks of `count` prompt tokens, the first of which has the place `first`."""
    start = request.num_computed
    # Not the second token always: what is not asked for is left out, and some are known after a preemption.
    unknown = request.params.prompt_logprobs_from + len(request.prompt_logprobs)
    follow = range(max(unknown, start + 1), min(start + count + 1, request.num_prompt))
    return [(request, first + place - 1 - start, request.tokens[place]) for place in follow]


def _report_prompts(asked: SequenceOf[_Asked], h_WD: Tensor, output: Linear, vocab_size: int) -> None:
    """Add the log-probabilities of prompt tokens to the requests that ask for them.

    Args:
        asked: those; places are rows of `h_WD`.
        h_WD: hidden states; each is for the token that follows.
    """
    size = max(_LOGITS_AT_ONCE // vocab_size, 1)
    for begin in range(0, len(asked), size):
        slab = asked[begin : begin + size]
        logits_WV: Tensor = output(h_WD[[row for _, row, _ in slab]])
        counts = [cast(int, request.params.prompt_logprobs) for request, _, _ in slab]
        reported = report(logits_WV, [token_id for _, _, token_id in slab], counts)
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


def report_next(logits_RV: Tensor, ids: SequenceOf[SequenceOf[int]]) -> list[tuple[TokenLogprob, ...]]:
    """The log-probabilities of some ids at each place, with that of the likeliest token there."""
    logprobs_RV = logits_RV.float().log_softmax(dim=-1)
    rows = [row for row, own in enumerate(ids) for _ in own]
    logprobs = iter(logprobs_RV[rows, [token_id for own in ids for token_id in own]].tolist())
    best_R, ids_R = (part.tolist() for part in logprobs_RV.max(dim=-1))
    return [
        tuple(TokenLogprob(token_id, next(logprobs), ((top_id, top),)) for token_id in own)
        for own, top_id, top in zip(ids, ids_R, best_R, strict=True)
    ]
