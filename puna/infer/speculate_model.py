"""Guesses by a model: a small one of its own, or the first layers of the model itself.

Shapes: R rows, W vocabulary of the guessing model, cut to that of the model that it guesses for.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from puna.infer.adapters import Adapters
from puna.infer.blocks import BlockManager
from puna.infer.cache import KVPool
from puna.infer.request import Request
from puna.infer.runner import ModelRunner
from puna.infer.sampling import Sampler, SamplingParams, draw
from puna.infer.sequence import Sequence
from puna.infer.speculate_draft import Draft
from puna.model.transformer import Transformer


class Books(Protocol):
    """Where the guessing model's keys and values are."""

    def open(self, request: Request, count: int) -> Request | None:
        """The guessing model's view of a request: its tokens, with what is known of them in the cache, and blocks for
        `count` more tokens; None where there is no room for guessing."""
        ...

    def forget(self, request: Request) -> None:
        """Let go what a request holds."""
        ...


class ModelProposer:
    """Guesses token by token with a model that is cheaper than the one that it guesses for.

    A request that samples gets guesses drawn from the guessing model's distribution under the request's own
    temperature and filters (without penalties). One that is greedy gets the likeliest tokens, and so does one with a
    seed: then its answer depends on the seed alone, not on how many guesses there was room for.

    Args:
        runner: runs the guessing model over the cache that `books` are kept on.
        step_tokens: most tokens of a prompt that are read at once.
        vocab_size: ids of the model that is guessed for.
    """

    def __init__(self, runner: ModelRunner, books: Books, *, step_tokens: int, vocab_size: int) -> None:
        self._runner = runner
        self._books = books
        self._step_tokens = step_tokens
        self._vocab_size = vocab_size

    def forget(self, request: Request) -> None:
        """See `Proposer`."""
        self._books.forget(request)

    def propose(self, requests: SequenceOf[Request], counts: SequenceOf[int]) -> list[Draft]:
        """See `Proposer`."""
        originals: dict[Request, Request] = {}
        ends: dict[Request, int] = {}
        for request, count in zip(requests, counts, strict=True):
            view = self._books.open(request, count)
            if view is not None:
                originals[view], ends[view] = request, request.length + count
        distributions: dict[Request, list[Tensor]] = {view: [] for view in originals}
        self._read(list(originals))
        while active := [view for view in originals if view.length < ends[view]]:
            sampled, logits_RV = self._runner.run({view: view.num_pending for view in active})
            likeliest, drawn = self._choose([originals[view] for view in sampled], logits_RV[:, : self._vocab_size])
            for row, view in enumerate(sampled):
                view.num_computed = view.length
                view.tokens.append(likeliest[row])
                if row in drawn:
                    view.tokens[-1], distribution_W = drawn[row]
                    distributions[view].append(distribution_W)
        drafts = {
            request: Draft(
                view.tokens[request.length :], torch.stack(found) if (found := distributions[view]) else None
            )
            for view, request in originals.items()
        }
        return [drafts.get(request, Draft()) for request in requests]

    def _read(self, views: list[Request]) -> None:
        """Compute all but the last token of texts that are new to the guessing model."""
        while unread := [view for view in views if view.num_pending > 2]:
            plan: dict[Sequence, int] = {}
            budget = self._step_tokens
            for view in unread:
                if budget > 0:
                    plan[view] = min(view.num_pending - 1, budget)
                    budget -= plan[view]
            self._runner.run(plan)
            for planned, num_tokens in plan.items():
                planned.num_computed += num_tokens

    def _choose(self, requests: list[Request], logits_RW: Tensor) -> tuple[list[int], dict[int, tuple[int, Tensor]]]:
        """Each row's likeliest token; and of the rows that sample, a drawn token with its distribution."""
        drawing = [row for row, request in enumerate(requests) if draws(request.params)]
        if not drawing:
            return logits_RW.argmax(dim=-1).tolist(), {}
        sampler = Sampler([requests[row].params for row in drawing], logits_RW.device)
        probabilities_RW = sampler.filter(logits_RW[drawing]).softmax(dim=-1)
        tokens = draw(probabilities_RW, [requests[row].chance() for row in drawing]).tolist()
        drawn = zip(tokens, probabilities_RW, strict=True)
        return logits_RW.argmax(dim=-1).tolist(), dict(zip(drawing, drawn, strict=True))


def draws(params: SamplingParams) -> bool:
    """Whether guesses for a request are drawn, not the likeliest."""
    return params.temperature > 0 and params.seed is None


class OwnBooks:
    """The books on a small model's own cache, which has room for every request at its longest."""

    def __init__(self, blocks: BlockManager, *, max_rows: int, max_context: int) -> None:
        self._blocks = blocks
        self._max_rows = max_rows
        self._max_context = max_context
        self._views: dict[Request, Request] = {}
        self._agreed: dict[Request, int] = {}  # tokens of a view that are no guesses

    def open(self, request: Request, count: int) -> Request | None:
        """See `Books`."""
        if request.length + count > self._max_context:
            return None
        view = self._views.get(request)
        if view is None:
            view = self._views[request] = self._new(request)
        else:
            # Guesses that were refused go; the text goes on with what was chosen in their place.
            agreed, known = self._agreed[request], min(view.num_computed, request.length - 1)
            while agreed < known and view.tokens[agreed] == request.tokens[agreed]:
                agreed += 1
            view.num_computed = min(agreed, known)
            view.tokens[agreed:] = request.tokens[agreed:]
        self._agreed[request] = request.length
        self._blocks.register(view)
        room = self._blocks.grow(view, request.length + count)
        assert room, "every request fits at its longest"
        return view

    def _new(self, request: Request) -> Request:
        if len(self._views) == self._max_rows:
            for other in [other for other in self._views if not other.blocks]:  # they wait
                self.forget(other)
        view = mirror(request)
        self._blocks.take_prefix(view, self._blocks.find_prefix(view))
        return view

    def forget(self, request: Request) -> None:
        """See `Books`."""
        view = self._views.pop(request, None)
        if view is not None:
            del self._agreed[request]
            self._blocks.release(view)


class SharedBooks:
    """The books of a model whose own first layers guess.

    Keys and values of a layer follow from the layers below it alone, so those that the model has written are what its
    first layers need, and nothing is computed or stored twice. The guesses' own are written where the model will write
    the same again when it checks them.
    """

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._views: dict[Request, Request] = {}

    def open(self, request: Request, count: int) -> Request | None:
        """See `Books`."""
        if not self._blocks.grow(request, request.length + count):
            return None
        for other, view in self._views.items():
            view.blocks = other.blocks
        if request not in self._views:
            self._views[request] = mirror(request, request.adapter)
        view = self._views[request]
        view.tokens = list(request.tokens)
        view.num_computed = request.num_computed
        view.blocks, view.stale_from = request.blocks, 0
        return view

    def forget(self, request: Request) -> None:
        """See `Books`."""
        view = self._views.pop(request, None)
        if view is not None:
            view.blocks = []  # the row in the runner's table becomes free


def mirror(request: Request, adapter: int = 0) -> Request:
    """A request for the same text, of which nothing is computed."""
    return Request(
        tokens=list(request.tokens),
        num_prompt=request.num_prompt,
        max_tokens=request.max_tokens,
        adapter=adapter,
        params=SamplingParams(),
        stop_ids=frozenset(),
        decoder=request.decoder,
    )


def small_model_proposer(
    draft: Transformer, *, max_rows: int, max_context: int, block_size: int, step_tokens: int, vocab_size: int
) -> ModelProposer:
    """Guesses by a model of its own, whose cache holds `max_rows` texts of `max_context` tokens, or of its own context
    where that is shorter."""
    context = min(max_context, draft.config.context_length)
    num_blocks = max_rows * -(-context // block_size)
    device, dtype = draft.embedding.weight.device, draft.compute_dtype or draft.embedding.weight.dtype
    pool = KVPool(draft.config, num_blocks=num_blocks, block_size=block_size, device=device, dtype=dtype)
    runner = ModelRunner(draft, pool, max_rows=max_rows, max_context=context)
    books = OwnBooks(BlockManager(num_blocks, block_size), max_rows=max_rows, max_context=context)
    return ModelProposer(runner, books, step_tokens=step_tokens, vocab_size=vocab_size)


def first_layers_proposer(
    model: Transformer,
    num_layers: int,
    pool: KVPool,
    blocks: BlockManager,
    adapters: Adapters,
    *,
    max_rows: int,
    max_context: int,
    step_tokens: int,
) -> ModelProposer:
    """Guesses by a model's first layers and its output projection, on the model's own cache (self-speculation of
    LayerSkip, Elhoushi et al. 2024, arXiv:2404.16710, section 3.3). Worth while for models that were trained for it."""
    part = first_layers(model, num_layers)
    runner = ModelRunner(part, pool, max_rows=max_rows, max_context=max_context, adapters=adapters)
    return ModelProposer(runner, SharedBooks(blocks), step_tokens=step_tokens, vocab_size=model.config.vocab_size)


def first_layers(model: Transformer, num_layers: int) -> Transformer:
    """A model of another's first layers, embedding, last norm and output projection; the weights are the same ones."""
    with torch.device("meta"):
        part = Transformer(replace(model.config, num_layers=num_layers))
    part.compute_dtype = model.compute_dtype
    part.embedding, part.norm, part.output = model.embedding, model.norm, model.output
    part.layers = model.layers[:num_layers]
    return part.train(model.training)
