"""The engine: requests share forwards and cache, joining and leaving the batch between steps.

Shapes: R rows that are sampled, V vocabulary.
"""

from collections.abc import Callable, Generator, Hashable
from collections.abc import Sequence as SequenceOf
from typing import cast

import torch
from torch import Tensor

from puna.infer.blocks import BlockManager
from puna.infer.cache import KVPool
from puna.infer.config import EngineConfig
from puna.infer.request import Completion, Delta, Request, TokenLogprob, open_decoder
from puna.infer.runner import ModelRunner, report
from puna.infer.sampling import Penalties, Sampler, SamplingParams
from puna.infer.scheduler import Scheduler
from puna.model.transformer import Transformer
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer

DEFAULT_MAX_CONTEXT = 4096

_INVARIANT_CHUNK_BLOCKS = 4
"""Blocks in a piece of a prompt in batch-invariant mode."""


class Engine:
    """Generates for up to `max_rows` sequences at once; further ones wait for their turn.

    One thread at a time may use an engine; `encode`, `check` and `stop_ids`, which only read, are free for all.

    Args:
        model: loaded, on the device where it shall compute, in the dtype in which it shall.
        tokenizer: the model's own.
        config: how much at once. Where and in what precision it computes is the model's affair here (`load_engine`).

    Raises:
        InputError: the model and the tokenizer or the context do not fit together, or the memory is too small.

    Example:
        engine = Engine(load_model(path), load_tokenizer(path), EngineConfig(max_rows=4))
        [completion] = engine.generate([engine.encode("Once upon a time")], SamplingParams(temperature=0))
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, config: EngineConfig | None = None) -> None:
        limits = config or EngineConfig()
        shape = model.config
        max_context = limits.max_context
        if max_context is None:
            max_context = min(shape.context_length, DEFAULT_MAX_CONTEXT)
        if not 2 <= max_context <= shape.context_length:
            raise InputError(
                f"max_context is {max_context}, but it has to be at least 2 and at most the {shape.context_length} "
                "tokens that the model is meant for."
            )
        if tokenizer.vocab_size > shape.vocab_size:
            raise InputError(
                f"The tokenizer has {tokenizer.vocab_size} ids and the model only {shape.vocab_size}: they do not "
                "belong together. Use the tokenizer that the model was trained with."
            )
        cache_tokens = limits.max_rows * max_context if limits.cache_tokens is None else limits.cache_tokens
        if cache_tokens < max_context:
            raise InputError(
                f"cache_tokens is {cache_tokens}, but one text alone may take {max_context} (max_context). Raise the "
                "one, or lower the other."
            )
        self.tokenizer = tokenizer
        self.model = model
        self.max_rows = limits.max_rows
        self.max_context = max_context
        self._device = model.embedding.weight.device
        dtype = model.compute_dtype or model.embedding.weight.dtype
        size = limits.block_size
        # A text's last block may be partly empty.
        num_blocks = -(-cache_tokens // size) + (limits.max_rows if limits.cache_tokens is None else 1)
        chunk = _INVARIANT_CHUNK_BLOCKS * size if limits.batch_invariant else None
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
        pool = KVPool(shape, num_blocks=num_blocks, block_size=size, device=self._device, dtype=dtype)
        self._runner = ModelRunner(model, pool, max_rows=limits.max_rows, max_context=max_context, chunk=chunk)
        self._weight_version = 0
        self._penalties: dict[Request, Penalties] = {}
        self._sampled: list[Request] = []
        self._sampler = Sampler([], self._device)  # for exactly those
        # Rows of a padded embedding, and holes in the vocabulary, stand for no text and are never chosen.
        absent = [i for i in range(shape.vocab_size) if not _is_token(tokenizer, i)]
        self._absent_ids = torch.tensor(absent, device=self._device) if absent else None

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
            InputError: they put a bias on an id that is no token.
        """
        self._check_ids([token_id for token_id, _ in params.logit_bias])

    def _check_ids(self, ids: SequenceOf[int]) -> None:
        if wrong := [i for i in ids if not _is_token(self.tokenizer, i)]:
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
        request = Request(
            tokens=list(prompt_ids),
            num_prompt=len(prompt_ids),
            max_tokens=room if params.max_tokens is None else min(room, params.max_tokens),
            priority=priority,
            namespace=self._namespace,
            reads_cache=params.prompt_logprobs is None,
            params=params,
            stop_ids=self.stop_ids(params),
            decoder=open_decoder(self.tokenizer, prompt_ids, new_text=new_text),
        )
        if params.adjusts:
            self._penalties[request] = Penalties(
                params, prompt_ids, [], vocab_size=self.model.config.vocab_size, device=self._device
            )
        self.scheduler.add(request)
        return request

    def cancel(self, request: Request) -> None:
        """Give a request up and free what it holds; does nothing to a finished one."""
        if request.finish_reason is None:
            request.finish("cancelled")
            self._release(request)

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return self.scheduler.idle

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Admit what fits, then advance what runs, decoding sequences by a token.

        Returns the requests with new text or an end, for `Request.take`.
        """
        plan = self.scheduler.plan()
        if not plan:
            return []
        sampled, logits_RV = self._runner.run(plan)
        for sequence, num_tokens in plan.items():
            self.scheduler.advance(sequence, num_tokens)
        read = [request for request in sampled if request.max_tokens == 0]
        for request in read:
            request.finish("length")
            self._release(request)
        if read:
            kept = [i for i, request in enumerate(sampled) if request.max_tokens]
            sampled, logits_RV = [sampled[i] for i in kept], logits_RV[kept]
        if sampled:
            self._append(sampled, logits_RV)
        return [request for request in (*read, *sampled) if request.has_news]

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
            InputError: a prompt cannot be submitted (the message says which); nothing was generated then.
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
        return [request.completion() for request in requests]

    def stream(
        self, prompt_ids: SequenceOf[int], params: SamplingParams, *, new_text: bool = False
    ) -> Generator[Delta, None, None]:
        """Complete one prompt piece by piece, beginning when the first is asked for. Closing gives it up.

        Raises:
            InputError: see `check`.
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
                if request.has_news:
                    yield request.take()
        finally:
            self.cancel(request)

    @property
    def _namespace(self) -> Hashable:
        return (self._weight_version,)

    def _append(self, sampled: list[Request], logits_RV: Tensor) -> None:
        """Choose each request's next token, and let those go that it finishes."""
        if sampled != self._sampled:
            self._sampled, self._sampler = sampled, Sampler([r.params for r in sampled], self._device)
        allowed_RV = self._allowed(sampled, logits_RV)
        chosen = self._sampler(allowed_RV, [request.draw() for request in sampled]).tolist()
        logprobs = _logprobs(sampled, logits_RV, chosen)
        for i, (request, token_id) in enumerate(zip(sampled, chosen, strict=True)):
            if request in self._penalties:
                self._penalties[request].note(token_id)
            request.append(token_id, logprobs.get(i))
            if request.finish_reason is not None:
                self._release(request)

    def _allowed(self, sampled: list[Request], logits_RV: Tensor) -> Tensor:
        """The logits after biases and penalties, minus infinity where a token is out of the question."""
        allowed_RV = logits_RV
        if self._absent_ids is not None:
            allowed_RV = allowed_RV.index_fill(1, self._absent_ids, -torch.inf)
        adjusting = [i for i, request in enumerate(sampled) if request in self._penalties] if self._penalties else []
        if adjusting:
            allowed_RV = allowed_RV.float() if allowed_RV is not logits_RV else logits_RV.float().clone()
            for i in adjusting:
                allowed_RV[i] = self._penalties[sampled[i]].adjusted(allowed_RV[i])
        return allowed_RV

    def _release(self, request: Request) -> None:
        self.scheduler.remove(request)
        self._penalties.pop(request, None)


def _logprobs(sampled: list[Request], logits_RV: Tensor, chosen: list[int]) -> dict[int, TokenLogprob]:
    """Row -> what its parameters ask to report."""
    asking = [i for i, request in enumerate(sampled) if request.params.logprobs is not None]
    if not asking:
        return {}
    counts = [cast(int, sampled[i].params.logprobs) for i in asking]
    rows = logits_RV if len(asking) == len(sampled) else logits_RV[asking]
    return dict(zip(asking, report(rows, [chosen[i] for i in asking], counts), strict=True))


def _is_token(tokenizer: Tokenizer, token_id: int) -> bool:
    try:
        tokenizer.token_bytes(token_id)
    except InputError:
        return False
    return True
