"""How sure a model is of each token of a text: its log-probability, and what might have stood there instead."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from puna.finetune.explain.units import readable_units
from puna.infer.engine import Engine
from puna.infer.load import EngineConfig
from puna.infer.request import Completion, TokenLogprob
from puna.infer.sampling import SamplingParams
from puna.runtime.errors import InputError
from puna.tokenizer.base import Tokenizer
from puna.tokenizer.chat import render_chat

_LEAST_PROBABILITY = 1e-3
"""From here down, colours are at their strongest."""


@dataclass(frozen=True)
class GenerationSettings:
    """How a text is written that is then explained."""

    chat: bool = False
    """Texts are questions of a user, rendered by the model's chat template, instead of the beginnings of documents."""
    alternatives: int = 5
    """The likeliest tokens at each place that are shown."""
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0, max_tokens=64))
    """How the text goes on; with max_tokens = 0 it does not, and only what was given is measured. Probabilities are the
    model's own, before temperature and filters."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Where it computes."""

    def __post_init__(self) -> None:
        if self.alternatives < 1:
            raise ValueError(f"generation.alternatives is {self.alternatives}; it has to be at least 1.")
        if self.sampling.logprobs is not None or self.sampling.prompt_logprobs is not None:
            raise ValueError(
                "How many log-probabilities are shown is generation.alternatives; leave logprobs and prompt_logprobs "
                "of generation.sampling out."
            )


@dataclass(frozen=True, slots=True)
class Written:
    """One token."""

    text: str
    """As one reads it; the bytes of part of a character."""
    logprob: float
    """In nats."""
    alternatives: list[tuple[str, float]]
    """The likeliest tokens and their probabilities, the greatest first."""

    @property
    def probability(self) -> float:
        """Of the token after all before it."""
        return math.exp(self.logprob)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens that are shown as one because they share a character, or one token."""

    text: str
    tokens: list[Written]
    """Empty for the first token of a prompt, which follows nothing."""
    prompt: bool
    """Whether it was given, not written."""
    special: bool
    """Whether it is a special token."""

    @property
    def probability(self) -> float:
        """That of all its tokens together."""
        return math.prod(token.probability for token in self.tokens)

    @property
    def strength(self) -> float:
        """How surprising it was: 0 at probability 1, 1 from `_LEAST_PROBABILITY` down, by the logarithm."""
        if not self.tokens:
            return 0.0
        return min(1.0, math.log(max(self.probability, _LEAST_PROBABILITY)) / math.log(_LEAST_PROBABILITY))


@dataclass(frozen=True, slots=True)
class GenerationExplanation:
    """One text."""

    stretches: list[Stretch]
    finish_reason: str
    logprob: float
    """Mean over the tokens written (over the prompt's where none was), in nats."""
    num_tokens: int
    """How many those are."""

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability."""
        return math.exp(-self.logprob)


def explain_generation(
    engine: Engine, prompts: Sequence[str], settings: GenerationSettings
) -> list[GenerationExplanation]:
    """Continue prompts and tell how likely each of their tokens, and each written one, was.

    Raises:
        InputError: a prompt does not fit the model; or there is no chat template.
    """
    tokenizer = engine.tokenizer
    if settings.chat and tokenizer.chat_template is None:
        raise InputError("The model has no chat template; leave generation.chat out.")
    ids = [
        render_chat(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True).ids
        if settings.chat
        else engine.encode(prompt)
        for prompt in prompts
    ]
    count = min(settings.alternatives, tokenizer.vocab_size)
    params = replace(settings.sampling, logprobs=count, prompt_logprobs=count)
    completions = engine.generate(ids, params)
    for completion in completions:
        if completion.error:
            raise InputError(completion.error)
    return [
        _explanation(tokenizer, prompt_ids, completion) for prompt_ids, completion in zip(ids, completions, strict=True)
    ]


def _explanation(tokenizer: Tokenizer, prompt_ids: Sequence[int], completion: Completion) -> GenerationExplanation:
    known: list[TokenLogprob | None] = [None, *completion.prompt.logprobs, *completion.logprobs]
    measured = completion.logprobs or completion.prompt.logprobs
    # Prompt and answer one by one: a stretch belongs to one of them.
    parts = [(list(prompt_ids), known[: len(prompt_ids)], True), ([*completion.ids], known[len(prompt_ids) :], False)]
    stretches = [
        Stretch(unit.text, [_written(tokenizer, token) for token in tokens if token is not None], prompt, unit.special)
        for ids, logprobs, prompt in parts
        for unit in readable_units(tokenizer, ids, "pieces")
        for tokens in [logprobs[unit.start : unit.stop]]
    ]
    mean = sum(token.logprob for token in measured) / max(1, len(measured))
    return GenerationExplanation(stretches, completion.finish_reason, mean, len(measured))


def _written(tokenizer: Tokenizer, token: TokenLogprob) -> Written:
    alternatives = [(piece_text(tokenizer, token_id), math.exp(logprob)) for token_id, logprob in token.top]
    return Written(piece_text(tokenizer, token.id), token.logprob, alternatives)


def piece_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token by itself; bytes that are part of a character in hexadecimal, such as <E2 82>."""
    try:
        content = tokenizer.token_bytes(token_id)
    except InputError:
        return f"<{token_id}>"  # a row of the embedding that no token uses
    try:
        return content.decode()
    except UnicodeDecodeError:
        return f"<{content.hex(' ').upper()}>"
