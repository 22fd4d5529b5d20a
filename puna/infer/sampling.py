"""From logits to the next token, each row of a batch by its own rules.

Shapes: B rows, V vocabulary; a 1 in place of a letter broadcasts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from puna.infer.constrain import Constraint
from puna.runtime.errors import InputError

Revise = Callable[[Tensor], None]
"""Changes the rows' probabilities, in place, before anything is drawn."""

_USUAL_CANDIDATES = 256


@dataclass(frozen=True)
class SamplingParams:
    """How a text goes on, and when it ends.

    First come the logit bias and the penalties, then the filters in this order, the order and definitions of
    `transformers`: temperature, top-k, top-p, min-p.
    """

    max_tokens: int | None = 512
    """Most tokens to generate; where absent, the context's end is the limit. 0 only reads the prompt, for the
    log-probabilities of its tokens."""
    temperature: float = 1.0
    """Logits are divided by it; 0 always takes the likeliest token (the lowest id of several)."""
    top_k: int = 0
    """Keep the k likeliest tokens, and any tied with the last of them; 0 keeps all."""
    top_p: float = 1.0
    """Of those, keep the fewest, likeliest first, whose probabilities sum to at least this, and any tied with the
    last of them; 1 keeps all."""
    min_p: float = 0.0
    """Of those, keep tokens at least this fraction as likely as the likeliest; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Logits of tokens that occur in the prompt or the answer are divided by it where positive, multiplied where
    negative (Keskar et al. 2019, arXiv:1909.05858, section 4.1); 1 leaves them alone."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that occur in the answer."""
    frequency_penalty: float = 0.0
    """Taken off the logits of tokens once for each time that they occur in the answer."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token id and what is added to its logit; -100 as good as forbids a token."""
    constraint: Constraint | None = None
    """What the text has to look like: a JSON schema, a regular expression, a choice, a grammar."""
    adapter: str | None = None
    """LoRA adapter that the text is generated with, by its name in the engine; absent is the bare model."""
    seed: int | None = None
    """Makes the choice repeatable: equal prompt, parameters and seed give equal tokens. Fresh where absent."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these strings."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end the text, besides those that the tokenizer names."""
    ignore_eos: bool = False
    """Go on after the tokenizer's end-of-text and end-of-turn tokens."""
    logprobs: int | None = None
    """Report each token's log-probability under the model, before temperature and filters, and those of this many
    likeliest tokens; nothing where absent."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, from `prompt_logprobs_from` on; they are then computed even if they are in the
    cache."""
    prompt_logprobs_from: int = 1
    """The first of the prompt's tokens, counted from 0, whose log-probability is reported. What stands before it may
    come from the cache. The very first token has none."""
    next_logprobs: tuple[int, ...] = ()
    """Report the log-probability of each of these ids as the token right after the prompt, where max_tokens is 0."""

    def __post_init__(self) -> None:
        def check(name: str, fine: bool, rule: str) -> None:
            if not fine:
                raise InputError(f"{name} is {getattr(self, name)!r}; it has to be {rule}.")

        check("max_tokens", self.max_tokens is None or self.max_tokens >= 0, "at least 0, or absent")
        check("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or a positive number")
        check("top_k", self.top_k >= 0, "at least 1, or 0 to keep all")
        check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        check("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        check("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "a positive number")
        check("presence_penalty", math.isfinite(self.presence_penalty), "a number")
        check("frequency_penalty", math.isfinite(self.frequency_penalty), "a number")
        finite = all(math.isfinite(bias) for _, bias in self.logit_bias)
        check("logit_bias", finite, "pairs of a token id and a finite number")
        check("stop", all(self.stop) and not isinstance(self.stop, str), "a tuple of strings, none of them empty")
        check("prompt_logprobs_from", self.prompt_logprobs_from >= 1, "at least 1, as the first token has none")
        check("next_logprobs", not self.next_logprobs or self.max_tokens == 0, "empty unless max_tokens is 0")
        for name in ("logprobs", "prompt_logprobs"):
            check(name, getattr(self, name) is None or getattr(self, name) >= 0, "at least 0, or absent")

    @property
    def adjusts(self) -> bool:
        """Whether there is a bias or a penalty."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(penalties or self.logit_bias)


class Penalties:
    """Logit bias and penalties of one answer, and the occurrences that they depend on.

    Args:
        params: says how much.
        prompt_ids: the prompt, and `ids` what of the answer there is already.
        vocab_size: logits in a row.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        ids: Sequence[int],
        *,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        def tensor(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self._params = params
        self._counts_V = tensor(ids, torch.int64).bincount(minlength=vocab_size).float()
        self._seen_V = self._counts_V > 0
        self._seen_V[tensor(prompt_ids, torch.int64)] = True
        self._biased_ids = tensor([token_id for token_id, _ in params.logit_bias], torch.int64)
        self._biases = tensor([bias for _, bias in params.logit_bias], torch.float32)

    def note(self, token_id: int) -> None:
        """Count one more token of the answer."""
        self._counts_V[token_id] += 1
        self._seen_V[token_id] = True

    def adjusted(self, logits_V: Tensor, guesses: Sequence[int] = ()) -> Tensor:
        """The logits after bias and penalties, as they are when `guesses` are part of the answer."""
        params, counts_V, seen_V = self._params, self._counts_V, self._seen_V
        if guesses:
            guessed = torch.tensor(guesses, device=counts_V.device)
            counts_V = counts_V.index_add(0, guessed, torch.ones_like(guessed, dtype=counts_V.dtype))
            seen_V = seen_V.index_fill(0, guessed, True)
        adjusted_V = logits_V.float().index_add(0, self._biased_ids, self._biases)
        if params.repetition_penalty != 1:
            factor_V = torch.where(adjusted_V > 0, 1 / params.repetition_penalty, params.repetition_penalty)
            adjusted_V = torch.where(seen_V, adjusted_V * factor_V, adjusted_V)
        if params.frequency_penalty:
            adjusted_V = adjusted_V - params.frequency_penalty * counts_V
        if params.presence_penalty:
            adjusted_V = adjusted_V - params.presence_penalty * (counts_V > 0)
        return adjusted_V


def draw(probabilities_BV: Tensor, uniforms: Sequence[float]) -> Tensor:
    """A token of each row, shape [B].

    Args:
        probabilities_BV: up to a factor.
        uniforms: for each row a number in [0, 1). The row's token is where it falls when the tokens' probabilities are
            laid end to end in the order of ids.
    """
    edges_BV = probabilities_BV.cumsum(dim=-1, dtype=torch.float64)
    total_B1 = edges_BV[:, -1:]
    point_B1 = torch.tensor(uniforms, dtype=torch.float64, device=edges_BV.device)[:, None] * total_B1
    # Rounding may lift the product to the total, which is behind the last token.
    point_B1 = point_B1.minimum(total_B1.nextafter(torch.zeros_like(total_B1)))
    return torch.searchsorted(edges_BV, point_B1, right=True).squeeze(1)


class Sampler:
    """Chooses the next token of each row of a batch; what it needs from the parameters is laid out once.

    A row's token depends on its own logits, parameters and uniform number only, whoever its neighbours are.
    """

    def __init__(self, params: Sequence[SamplingParams], device: torch.device) -> None:
        def column(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, device=device)[:, None]

        self._greedy = [p.temperature == 0 for p in params]
        self._greedy_B = torch.tensor(self._greedy, device=device)
        self._temperature_B1 = column([max(p.temperature, 1e-30) for p in params])
        self._ranked = [i for i, p in enumerate(params) if p.temperature and (p.top_k or p.top_p < 1)]
        self._top_k_R1 = column([params[i].top_k for i in self._ranked]).long()
        self._top_p_R1 = column([params[i].top_p for i in self._ranked])
        self._num_candidates = max([_USUAL_CANDIDATES, *(params[i].top_k for i in self._ranked)])
        self._min_p_B1 = column([p.min_p for p in params])
        self._any_min_p = any(p.min_p for p in params)

    def __call__(self, logits_BV: Tensor, uniforms: Sequence[float], revise: Revise | None = None) -> Tensor:
        """The chosen ids, shape [B].

        Args:
            uniforms: for each row the number that draws from its filtered probabilities (`draw`).
            revise: called where not all rows are greedy.

        Raises:
            FloatingPointError: a row holds NaN or infinity, so the weights or the computation are broken.
        """
        best_B1, choice_B1 = logits_BV.max(dim=-1, keepdim=True)
        if not best_B1.isfinite().all():
            raise FloatingPointError("The model's logits are not finite: its weights are damaged, or overflowed.")
        if all(self._greedy):
            return choice_B1.squeeze(1)
        probabilities_BV = self.filter(logits_BV).softmax(dim=-1)
        if revise is not None:
            revise(probabilities_BV)
        return torch.where(self._greedy_B, choice_B1.squeeze(1), draw(probabilities_BV, uniforms))

    def filter(self, logits_BV: Tensor) -> Tensor:
        """Logits over temperature, less their maximum, in float32; minus infinity where a token is ruled out."""
        wide_BV = logits_BV.float()
        # The maximum goes first: a temperature near 0 then leads to 0 and minus infinity, not to NaN.
        scaled_BV = (wide_BV - wide_BV.amax(dim=-1, keepdim=True)) / self._temperature_B1
        if self._ranked:
            scaled_RV = scaled_BV[self._ranked]
            scaled_BV[self._ranked] = scaled_RV.masked_fill(scaled_RV < self._least_kept(scaled_RV), -torch.inf)
        if self._any_min_p:
            scaled_BV.masked_fill_(scaled_BV < self._min_p_B1.log(), -torch.inf)
        return scaled_BV

    def _least_kept(self, scaled_RV: Tensor) -> Tensor:
        """The smallest logit that top-k and top-p keep, shape [R, 1], in the rows R that ask for either.

        A few candidates C nearly always hold all that is kept; only when they do not is the whole row sorted.
        """
        size = scaled_RV.shape[1]
        for num_candidates in (min(self._num_candidates, size), size):
            best_RC = scaled_RV.topk(num_candidates).values
            kth_R1 = best_RC.gather(1, self._top_k_R1.clamp(1, num_candidates) - 1)
            kth_R1.masked_fill_(self._top_k_R1 == 0, -torch.inf)
            total_R1 = scaled_RV.masked_fill(scaled_RV < kth_R1, -torch.inf).logsumexp(dim=-1, keepdim=True)
            short_RC = (best_RC - total_R1).exp().cumsum(dim=-1) < self._top_p_R1
            if not (short_RC[:, -1:] & (self._top_p_R1 < 1)).any():
                break
        last_R1 = short_RC.sum(dim=-1, keepdim=True).clamp(max=num_candidates - 1)
        nucleus_R1 = best_RC.gather(1, last_R1).masked_fill(self._top_p_R1 == 1, -torch.inf)
        return kth_R1.maximum(nucleus_R1)
