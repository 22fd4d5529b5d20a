"""The engine: requests share forwards and cache, joining and leaving the batch between steps.

Shapes: R rows that are sampled, V vocabulary.
"""

from collections.abc import Callable, Generator, Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from puna.infer.adapters import Adapters
from puna.infer.blocks import BlockManager
from puna.infer.cache import KVPool
from puna.infer.choose import Chooser, is_token
from puna.infer.config import EngineConfig
from puna.infer.constrain import Constraints, Matcher, check_support
from puna.infer.reload import replace_weights
from puna.infer.request import Completion, Delta, Request, open_decoder
from puna.infer.runner import ModelRunner, report_next
from puna.infer.sampling import SamplingParams
from puna.infer.scheduler import Scheduler
from puna.infer.speculate import open_speculator
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer

_CACHE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "float8": torch.float8_e4m3fn,
}

_COMPILING_SECONDS = 0.05
"""How long a step waits for a constraint where there is nothing else to do."""


class Engine:
    """Generates for up to `max_rows` sequences at once; further ones wait for their turn.

    One thread at a time may use an engine; `encode`, `check` and `stop_ids`, which only read, are free for all.

    Args:
        model: loaded, on the device where it shall compute, in the dtype in which it shall.
        tokenizer: the model's own.
        config: how much at once. Where and in what precision it computes is the model's affair here (`load_engine`).
        guesser: the smaller model, where `config.speculation` asks for one.

    Raises:
        InputError: the model and the tokenizer or the context do not fit together, or the memory is too small.

    Example:
        engine = Engine(load_model(path), load_tokenizer(path), EngineConfig(max_rows=4))
        [completion] = engine.generate([engine.encode("Once upon a time")], SamplingParams(temperature=0))
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        *,
        guesser: Transformer | None = None,
    ) -> None:
        limits = config or EngineConfig()
        shape = model.config
        max_context = limits.context_of(shape)
        num_blocks = limits.num_blocks(max_context)
        if tokenizer.vocab_size > shape.vocab_size:
            raise InputError(
                f"The tokenizer has {tokenizer.vocab_size} ids and the model only {shape.vocab_size}: they do not "
                "belong together. Use the tokenizer that the model was trained with."
            )
        self.tokenizer = tokenizer
        self.model = model
        self.max_rows = limits.max_rows
        self.max_context = max_context
        device = model.norm.weight.device
        dtype = model.compute_dtype or model.norm.weight.dtype
        size, chunk = limits.block_size, limits.chunk
        blocks = BlockManager(
            num_blocks, size, share=limits.prefix_cache, share_step=chunk or 1, share_answers=chunk is None
        )
        self.scheduler = Scheduler(
            blocks,
            max_rows=limits.max_rows,
            step_tokens=limits.step_tokens,
            chunk=chunk,
            overcommit=limits.overcommit,
        )
        self.pool = KVPool(
            shape,
            num_blocks=num_blocks,
            block_size=size,
            device=device,
            dtype=_CACHE_DTYPES.get(limits.cache_dtype, dtype),
            activations=dtype,
        )
        self.adapters = Adapters(model)
        for name, directory in limits.adapters.items():
            self.adapters.load(name, directory)
        self._limits = limits
        self._guesser = guesser
        self._open_runner()
        self.weight_version = 0
        self.chooser = Chooser(tokenizer, shape.vocab_size, device)
        self._constraints: Constraints | None = None  # made for the first request that needs it
        self._compiling: dict[Request, Future[Matcher]] = {}

    def encode(self, text: str) -> list[int]:
        """Prompt ids of a document's beginning: BOS, where the vocabulary has one, and the text."""
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return bos + self.tokenizer.encode(text)

    def stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """The ids that end a text."""
        own = frozenset(params.stop_ids)
        return own if params.ignore_eos else own | self.tokenizer.stop_ids

    def check(self, prompt_ids: SequenceOf[int], params: SamplingParams | None = None) -> None:
        """See whether a prompt can be submitted.

        Raises:
            InputError: it is empty, holds an id that is no token, or leaves no room for an answer; or see
                `check_params`.
        """
        if params is not None:
            self.check_params(params)
        if not prompt_ids:
            raise InputError("The prompt is empty; the model needs at least one token to go on from.")
        room = self.max_context - len(prompt_ids)
        if room < 0 or (room == 0 and not (params is not None and params.max_tokens == 0)):
            raise InputError(
                f"The prompt has {len(prompt_ids)} tokens, but the context holds {self.max_context}, the answer "
                "included. Shorten the prompt, or open the engine with a longer context."
            )
        self._check_ids(prompt_ids)

    def check_params(self, params: SamplingParams) -> None:
        """See whether parameters suit this model.

        Raises:
            InputError: they put a bias on an id that is no token, or stop at one, name an adapter that is not loaded,
                or constrain what cannot be (`check_support`). What a constraint says is looked at later: the request
                then fails.
        """
        if params.constraint is not None:
            check_support(self.tokenizer)
        if params.adapter is not None:
            self.adapters.check(params.adapter)
        self._check_ids([*(token_id for token_id, _ in params.logit_bias), *params.stop_ids, *params.next_logprobs])

    def _check_ids(self, ids: SequenceOf[int]) -> None:
        if wrong := [i for i in ids if not is_token(self.tokenizer, i)]:
            raise InputError(
                f"{wrong[0]} is not a token of this model, whose ids end at {self.tokenizer.vocab_size - 1}."
            )

    def submit(
        self,
        prompt_ids: SequenceOf[int],
        params: SamplingParams,
        *,
        new_text: bool = False,
        priority: int = 0,
    ) -> Request:
        """Queue a prompt; `step` does the rest.

        Args:
            new_text: the answer is a text of its own (a chat's turn), not the prompt's continuation.
            priority: who goes first when not all can; greater is sooner.

        Raises:
            InputError: see `check`.
        """
        self.check(prompt_ids, params)
        room = self.max_context - len(prompt_ids)
        adapter = self.adapters.acquire(params.adapter)
        request = Request(
            tokens=list(prompt_ids),
            num_prompt=len(prompt_ids),
            max_tokens=room if params.max_tokens is None else min(room, params.max_tokens),
            priority=priority,
            namespace=(self.weight_version, adapter),
            adapter=adapter,
            most_cached=None if params.prompt_logprobs is None else params.prompt_logprobs_from - 1,
            params=params,
            stop_ids=self.stop_ids(params),
            decoder=open_decoder(self.tokenizer, prompt_ids, new_text=new_text),
        )
        self.chooser.add(request)
        if params.constraint is None:
            self.scheduler.add(request)
        else:
            self._constraints = self._constraints or Constraints(self.tokenizer, self.model.config.vocab_size)
            self._compiling[request] = self._constraints.compile(params.constraint)
        return request

    def cancel(self, request: Request) -> None:
        """Give a request up and free what it holds; does nothing to a finished one."""
        if request.finish_reason is None:
            request.finish("cancelled")
            self._release(request)

    def load_weights(self, source: Mapping[str, Tensor] | Path) -> None:
        """Put other weights into the model, in place, between two steps.

        What runs or waits goes on with them: texts keep the tokens that they have, whose keys and values are computed
        anew. Nothing that was computed with earlier weights is taken from the cache afterwards. Log-probabilities of a
        prompt are all from the same weights: the new ones, unless its answer has begun.

        Args:
            source: tensors by the model's own names (`Transformer.state_dict`), or a model directory.

        Raises:
            InputError: they do not fit the model (`replace_weights`). Nothing has changed then.
        """
        replace_weights(self.model, source)
        self.weights_changed()

    def weights_changed(self) -> None:
        """Note that the model's weights have been changed in place, by a training for instance, between two steps.

        For what runs or waits see `load_weights`.
        """
        self._open_runner()
        self.weight_version += 1
        unfinished = cast(list[Request], self.scheduler.preempt_all())
        for request in (*unfinished, *self._compiling):
            request.namespace = (self.weight_version, request.adapter)
            if not request.num_generated:
                request.prompt_logprobs.clear()

    def forget_prefixes(self) -> None:
        """Take nothing over from earlier texts: what is computed next depends, to the last bit, on what is asked next.

        Only for an idle engine.
        """
        assert self.idle
        self.scheduler.blocks.forget()

    def _open_runner(self) -> None:
        """What computes; it may keep copies of weights, in an order of its own."""
        limits, blocks = self._limits, self.scheduler.blocks
        self._runner = ModelRunner(
            self.model,
            self.pool,
            max_rows=self.max_rows,
            max_context=self.max_context,
            chunk=limits.chunk,
            adapters=self.adapters,
        )
        self.speculator = open_speculator(
            limits,
            self.model,
            self.pool,
            blocks,
            self.adapters,
            max_context=self.max_context,
            guesser=self._guesser,
        )

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return self.scheduler.idle and not self._compiling

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Admit what fits, then advance what runs, decoding sequences by a token.

        Returns the requests with new text or an end, for `Request.take`.
        """
        failed = self._take_compiled() if self._compiling else []
        if self.speculator is not None:
            self.speculator.propose(cast(list[Request], self.scheduler.running))
        plan = self.scheduler.plan()
        if not plan:
            return failed
        sampled, logits_RV = self._runner.run(plan)
        for sequence, num_tokens in plan.items():
            self.scheduler.advance(sequence, min(num_tokens, sequence.num_pending))
        rows = [row for row, request in enumerate(sampled) if request.max_tokens == 0]
        read = [sampled[row] for row in rows]
        if read:
            reports = report_next(logits_RV[rows], [request.params.next_logprobs for request in read])
            for request, report in zip(read, reports, strict=True):
                request.next_logprobs = report
                request.finish("length")
                self._release(request)
            kept = [i for i, request in enumerate(sampled) if request.max_tokens]
            sampled, logits_RV = [sampled[i] for i in kept], logits_RV[kept]
        if sampled:
            self._append(sampled, logits_RV)
        # With a draft a request has several rows.
        return [request for request in dict.fromkeys((*failed, *read, *sampled)) if request.has_news]

    def generate(
        self,
        prompts: SequenceOf[SequenceOf[int]],
        params: SamplingParams | SequenceOf[SamplingParams],
        *,
        new_text: bool = False,
        finished: Callable[[], object] = lambda: None,
    ) -> list[Completion]:
        """Complete every prompt, in the order given.

        Args:
            prompts: ids of each, BOS included where the model wants one (`encode`).
            params: for all, or one for each.
            new_text: the answers are texts of their own (a chat's turns), not the prompts' continuations.
            finished: called once for each prompt that is done, for showing progress.

        Raises:
            InputError: a prompt cannot be submitted (the message says which); nothing was generated then. Or every
                request has failed, as with a constraint that is refused. Where only some fail, see `Completion.error`.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        requests = []
        try:
            for i, (prompt_ids, own) in enumerate(zip(prompts, each, strict=True)):
                try:
                    requests.append(self.submit(prompt_ids, own, new_text=new_text))
                except InputError as error:
                    raise InputError(f"Prompt {i + 1} of {len(prompts)}: {error}") from error
            pending = set(requests)
            while pending:
                for request in self.step():
                    if request.finish_reason is not None and request in pending:
                        pending.remove(request)
                        finished()
        finally:
            for request in requests:
                self.cancel(request)
        if requests and all(request.finish_reason == "failed" for request in requests):
            raise InputError(requests[0].error)
        return [request.completion() for request in requests]

    def stream(
        self, prompt_ids: SequenceOf[int], params: SamplingParams, *, new_text: bool = False
    ) -> Generator[Delta, None, None]:
        """Complete one prompt piece by piece, beginning when the first is asked for. Closing gives it up.

        Raises:
            InputError: see `check`; and, when a piece is asked for, that the request has failed.
        """
        self.check(prompt_ids, params)
        return self._follow(prompt_ids, params, new_text)

    def _follow(
        self, prompt_ids: SequenceOf[int], params: SamplingParams, new_text: bool
    ) -> Generator[Delta, None, None]:
        request = self.submit(prompt_ids, params, new_text=new_text)
        try:
            while request.finish_reason is None:
                self.step()
                if request.finish_reason == "failed":
                    raise InputError(request.error)
                if request.has_news:
                    yield request.take()
        finally:
            self.cancel(request)

    def _take_compiled(self) -> list[Request]:
        """Queue the requests whose constraints are ready; returns those whose constraints are refused."""
        if self.scheduler.idle:
            wait(self._compiling.values(), _COMPILING_SECONDS, FIRST_COMPLETED)
        failed = []
        for request in [request for request, future in self._compiling.items() if future.done()]:
            compiled = self._compiling.pop(request)
            if (error := compiled.exception()) is not None:
                request.fail(str(error))
                self._release(request)
                failed.append(request)
            else:
                self.chooser.matchers[request] = compiled.result().copy()
                self.scheduler.add(request)
        return failed

    def _append(self, sampled: list[Request], logits_RV: Tensor) -> None:
        """Choose each request's next token, and let those go that it finishes."""
        revise = None if self.speculator is None else partial(self.speculator.revise, sampled)
        chosen, logprobs = self.chooser.choose(sampled, logits_RV, revise)
        first = 0
        while first < len(sampled):
            request, num_accepted = sampled[first], 0
            end = first + len(request.draft) + 1
            for i, guess in enumerate([*request.draft, None], start=first):
                if request.finish_reason is not None:
                    break
                self.chooser.take(request, chosen[i], logprobs.get(i))
                if chosen[i] != guess:
                    break
                num_accepted += 1
            if self.speculator is not None and request.draft:
                self.scheduler.advance(request, num_accepted)
                self.speculator.settle(request, num_accepted)
            if request.finish_reason is not None:
                self._release(request)
            first = end

    def _release(self, request: Request) -> None:
        self.scheduler.remove(request)
        self.adapters.release(request.adapter)
        self._compiling.pop(request, None)
        self.chooser.forget(request)
        if self.speculator is not None:
            self.speculator.forget(request)
