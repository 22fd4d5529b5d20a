"""The engine: sequences share forwards, joining and leaving the batch between steps.

Shapes: B rows, T tokens, D model dimension, V vocabulary, N rows that asked for log-probabilities.
"""

from collections import deque
from collections.abc import Callable, Generator
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from puna.infer.cache import CachedAttend, KVCache
from puna.infer.sampling import Sampler, SamplingParams
from puna.infer.sequence import Completion, Delta, Sequence, TokenLogprob, open_decoder
from puna.model.transformer import Linear, Transformer
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer

DEFAULT_MAX_CONTEXT = 4096


class Engine:
    """Generates for up to `max_rows` sequences at once; further ones wait for a free row, first come, first served.

    One thread at a time may use an engine; `encode`, `check` and `stop_ids`, which only read, are free for all.

    Args:
        model: loaded, on the device where it shall compute, in the dtype in which it shall.
        tokenizer: the model's own.
        max_rows: how many sequences run at once. Each row takes `max_context` slots of the cache from the start.
        max_context: longest prompt and answer together, in tokens. Where absent the model's own context, but no
            more than `DEFAULT_MAX_CONTEXT`, as few who load a model meant for 131,072 tokens have the memory for it.

    Raises:
        InputError: the model and the tokenizer or the context do not fit together, or the memory is too small.

    Example:
        engine = Engine(load_model(path), load_tokenizer(path))
        [completion] = engine.generate([engine.encode("Once upon a time")], SamplingParams(temperature=0))
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, *, max_rows: int = 8, max_context: int | None = None
    ) -> None:
        config = model.config
        if max_context is None:
            max_context = min(config.context_length, DEFAULT_MAX_CONTEXT)
        if max_rows < 1:
            raise InputError(f"max_rows is {max_rows}; the engine needs at least 1.")
        if not 2 <= max_context <= config.context_length:
            raise InputError(
                f"max_context is {max_context}, but it has to be at least 2 and at most the {config.context_length} "
                "tokens that the model is meant for."
            )
        if tokenizer.vocab_size > config.vocab_size:
            raise InputError(
                f"The tokenizer has {tokenizer.vocab_size} ids and the model only {config.vocab_size}: they do not "
                "belong together. Use the tokenizer that the model was trained with."
            )
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        self.max_context = max_context
        self.model = model
        self._device = model.embedding.weight.device
        dtype = model.compute_dtype or model.embedding.weight.dtype
        self._cache = KVCache(config, rows=max_rows, slots=max_context, device=self._device, dtype=dtype)
        self._waiting: deque[Sequence] = deque()
        self._active: list[Sequence] = []  # the i-th owns row i of the cache
        self._sampler: Sampler | None = None  # of exactly the active sequences
        # Rows of a padded embedding, and holes in the vocabulary, stand for no text and are never chosen.
        absent = [i for i in range(config.vocab_size) if not _is_token(tokenizer, i)]
        self._absent_ids = torch.tensor(absent, device=self._device) if absent else None

    def encode(self, text: str) -> list[int]:
        """Prompt ids of a document's beginning: BOS, where the vocabulary has one, and the text."""
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        return bos + self.tokenizer.encode(text)

    def stop_ids(self, params: SamplingParams) -> frozenset[int]:
        """The ids that end a text."""
        own = frozenset(params.stop_ids)
        return own if params.ignore_eos else own | self.tokenizer.stop_ids

    def check(self, prompt_ids: SequenceOf[int]) -> None:
        """See whether a prompt can be submitted.

        Raises:
            InputError: it is empty, holds an id that is no token, or leaves no room for an answer.
        """
        if not prompt_ids:
            raise InputError("The prompt is empty; the model needs at least one token to go on from.")
        if len(prompt_ids) >= self.max_context:
            raise InputError(
                f"The prompt has {len(prompt_ids)} tokens, but the context holds {self.max_context}, the answer "
                "included. Shorten the prompt, or open the engine with a longer context."
            )
        if wrong := [i for i in prompt_ids if not _is_token(self.tokenizer, i)]:
            raise InputError(
                f"{wrong[0]} is not a token of this model, whose ids end at {self.tokenizer.vocab_size - 1}."
            )

    def submit(self, prompt_ids: SequenceOf[int], params: SamplingParams, *, new_text: bool = False) -> Sequence:
        """Queue a prompt; `step` does the rest.

        Args:
            new_text: the answer is a text of its own (a chat's turn), not the prompt's continuation.

        Raises:
            InputError: see `check`.
        """
        self.check(prompt_ids)
        room = self.max_context - len(prompt_ids)
        sequence = Sequence(
            tuple(prompt_ids),
            params,
            max_tokens=room if params.max_tokens is None else min(room, params.max_tokens),
            stop_ids=self.stop_ids(params),
            decoder=open_decoder(self.tokenizer, prompt_ids, new_text=new_text),
        )
        self._waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Give a sequence up and free its row; does nothing to a finished one."""
        if sequence.finish_reason is not None:
            return
        sequence.finish("cancelled")
        if sequence in self._active:
            self._release(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self._active and not self._waiting

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Admit what fits, then advance every running sequence by one token.

        Returns the sequences with new text or an end, for `Sequence.take`.
        """
        stepped = []
        while self._waiting and len(self._active) < self.max_rows:
            stepped += self._prefill()
        if self._active:
            stepped += self._decode()
        return [sequence for sequence in dict.fromkeys(stepped) if sequence.has_news]

    def generate(
        self,
        prompts: SequenceOf[SequenceOf[int]],
        params: SamplingParams | SequenceOf[SamplingParams],
        *,
        finished: Callable[[], object] = lambda: None,
    ) -> list[Completion]:
        """Complete every prompt, in the order given.

        Args:
            prompts: ids of each, BOS included where the model wants one (`encode`).
            params: for all, or one for each.
            finished: called once for each prompt that is done, for showing progress.

        Raises:
            InputError: a prompt cannot be submitted (the message says which); nothing was generated then.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        sequences = []
        try:
            for i, (prompt_ids, own) in enumerate(zip(prompts, each, strict=True)):
                try:
                    sequences.append(self.submit(prompt_ids, own))
                except InputError as error:
                    raise InputError(f"Prompt {i + 1} of {len(prompts)}: {error}") from error
            pending = set(sequences)
            while pending:
                for sequence in self.step():
                    if sequence.finish_reason is not None and sequence in pending:
                        pending.remove(sequence)
                        finished()
        finally:
            for sequence in sequences:
                self.cancel(sequence)
        return [sequence.completion() for sequence in sequences]

    def stream(
        self, prompt_ids: SequenceOf[int], params: SamplingParams, *, new_text: bool = False
    ) -> Generator[Delta, None, None]:
        """Complete one prompt piece by piece, beginning when the first is asked for. Closing gives it up.

        Raises:
            InputError: see `check`.
        """
        self.check(prompt_ids)
        return self._follow(prompt_ids, params, new_text)

    def _follow(
        self, prompt_ids: SequenceOf[int], params: SamplingParams, new_text: bool
    ) -> Generator[Delta, None, None]:
        sequence = self.submit(prompt_ids, params, new_text=new_text)
        try:
            while sequence.finish_reason is None:
                self.step()
                if sequence.has_news:
                    yield sequence.take()
        finally:
            self.cancel(sequence)

    def _prefill(self) -> list[Sequence]:
        """Admit the longest run of waiting sequences whose padding does not outweigh their prompts."""
        free = self.max_rows - len(self._active)
        admitted: list[Sequence] = []
        longest = total = 0
        while self._waiting and len(admitted) < free:
            length = len(self._waiting[0].prompt_ids)
            longest, total = max(longest, length), total + length
            if longest * (len(admitted) + 1) > 2 * total:
                break
            admitted.append(self._waiting.popleft())
        rows = [list(s.prompt_ids) for s in admitted]
        longest = max(map(len, rows))
        last_B = torch.tensor([len(row) - 1 for row in rows], device=self._device)
        ids_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self._device)
        attend = CachedAttend(self._cache, len(self._active), [0] * len(rows), longest)

        def last_logits(h_BTD: Tensor, output: Linear) -> Tensor:
            picked_BV: Tensor = output(h_BTD[torch.arange(len(rows), device=self._device), last_B])
            return picked_BV

        logits_BV = self.model(ids_BT, attend.positions_BT, attend, last_logits)
        self._active += admitted
        self._sampler = None
        self._append(admitted, Sampler([s.params for s in admitted], self._device), logits_BV)
        return admitted

    def _decode(self) -> list[Sequence]:
        running = list(self._active)
        ids_BT = torch.tensor([[s.ids[-1]] for s in running], device=self._device)
        attend = CachedAttend(self._cache, 0, [s.length - 1 for s in running], 1)
        logits_BV = self.model(ids_BT, attend.positions_BT, attend)[:, 0]
        if self._sampler is None:
            self._sampler = Sampler([s.params for s in running], self._device)
        self._append(running, self._sampler, logits_BV)
        return running

    def _append(self, sequences: list[Sequence], sampler: Sampler, logits_BV: Tensor) -> None:
        """Choose each sequence's next token, and let those go that it finishes."""
        allowed_BV = logits_BV
        if self._absent_ids is not None:
            allowed_BV = logits_BV.index_fill(1, self._absent_ids, -torch.inf)
        chosen_B = sampler(allowed_BV, [s.draw() for s in sequences])
        logprobs = _logprobs(sequences, logits_BV, chosen_B)
        for i, (sequence, token_id) in enumerate(zip(sequences, chosen_B.tolist(), strict=True)):
            sequence.append(token_id, logprobs.get(i))
            if sequence.finish_reason is not None:
                self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Free the row of `sequence`; the last row's owner moves there, so that active rows stay side by side."""
        row = self._active.index(sequence)
        last = self._active.pop()
        if last is not sequence:
            self._cache.move(len(self._active), row, last.length)
            self._active[row] = last
        self._sampler = None


def _logprobs(sequences: list[Sequence], logits_BV: Tensor, chosen_B: Tensor) -> dict[int, TokenLogprob]:
    """Row -> what its parameters ask to report."""
    asking = [i for i, s in enumerate(sequences) if s.params.logprobs is not None]
    if not asking:
        return {}
    logprobs_NV = logits_BV[asking].float().log_softmax(dim=-1)
    chosen_N = logprobs_NV.gather(1, chosen_B[asking, None]).squeeze(1).tolist()
    most = max(sequences[i].params.logprobs or 0 for i in asking)
    best_N, ids_N = (part.tolist() for part in logprobs_NV.topk(min(most, logprobs_NV.shape[1])))
    reports = {}
    for n, i in enumerate(asking):
        top = tuple(zip(ids_N[n], best_N[n], strict=True))[: sequences[i].params.logprobs]
        reports[i] = TokenLogprob(int(chosen_B[i]), chosen_N[n], top)
    return reports


def _is_token(tokenizer: Tokenizer, token_id: int) -> bool:
    try:
        tokenizer.token_bytes(token_id)
    except InputError:
        return False
    return True
