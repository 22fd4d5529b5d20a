"""A language model as judge: asked through an engine of ours or an OpenAI-compatible server, and read with care.

Source: Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena" (arXiv:2306.05685), sections 3.1 and
3.4. A judge's verdict counts only where it has the form that was asked for; in comparisons, it is asked with both
orders, since judges favour a position.
"""

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from puna.evaluate.harness.cache import AnswerCache
from puna.infer.config import EngineConfig
from puna.infer.load import load_engine
from puna.infer.sampling import SamplingParams
from puna.runtime.errors import InputError
from puna.runtime.manifest import content_hash
from puna.runtime.progress import progress
from puna.runtime.seeds import derive_seed
from puna.tokenizer.chat import render_chat
from puna.weights.load import resolve

Messages = Sequence[dict[str, Any]]
Verdict = TypeVar("Verdict")

_ATTEMPTS = 3
_AT_ONCE = 4
"""Verdicts that are kept together, for each that is asked for at the same time."""
_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
_WINNER = re.compile(r"\[\[([ABC])\]\]")


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Who judges: a model directory, or a server."""

    model: Path | None = None
    """Model directory that judges; it needs a chat template."""
    url: str | None = None
    """In its place, an OpenAI-compatible server: what stands before /chat/completions, as in
    "http://localhost:8000/v1"."""
    name: str = "judge"
    """What the server calls its model."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the server's key; none is sent where it is not set."""
    max_tokens: int = 1024
    """Most tokens of a verdict, its explanation included."""
    timeout_seconds: float = 300.0
    """How long the server may take for a verdict."""
    parallel: int = 8
    """How many verdicts to ask the server for at the same time."""
    max_unreadable: float = 0.1
    """Largest share of verdicts that may lack the form asked for, after three attempts, before scores are refused."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """Where and how a model directory runs."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.url is None):
            raise ValueError("a judge is either a model directory (model) or a server (url): set one of them.")
        if self.max_tokens < 1 or self.parallel < 1 or self.timeout_seconds <= 0:
            raise ValueError("max_tokens and parallel have to be at least 1, and timeout_seconds above 0.")
        if not 0 <= self.max_unreadable < 1:
            raise ValueError(f"max_unreadable is {self.max_unreadable}; it has to be at least 0 and below 1.")


@dataclass(frozen=True)
class _Judge:
    """One who can be asked.

    Attributes:
        identity: what tells its answers from those of others.
        at_once: how many conversations it is asked about at the same time.
        ask: (conversations, temperature, seeds, called when one is done) -> its answer to each.
    """

    identity: str
    at_once: int
    ask: Callable[[Sequence[Messages], float, Sequence[int], Callable[[], object]], list[str]]


@dataclass(frozen=True, slots=True)
class Judgement(Generic[Verdict]):
    """What a judge says of one thing."""

    verdict: Verdict | None
    """None where no attempt could be read."""
    text: str
    """Its words, explanation included: those of the last attempt."""


def judge_all(
    config: JudgeConfig,
    conversations: Sequence[Messages],
    read: Callable[[str], Verdict | None],
    kept: Path | None = None,
) -> list[Judgement[Verdict]]:
    """The judge's verdict on each conversation.

    What cannot be read is asked for again, twice, and then drawn at temperature 0.7, as the likeliest answer stays the
    same.

    Args:
        read: the verdict in the judge's words, or None where it is not there.
        kept: file where its answers are kept (`AnswerCache`): what the same judge was asked once is not asked again,
            and what was interrupted goes on.

    Raises:
        InputError: the judge cannot be asked, or more than `max_unreadable` of its verdicts cannot be read.
    """
    judge = _open_server(config) if config.url is not None else _open_model(config)
    cache = AnswerCache(kept or Path(":memory:"), judge.identity)
    found: dict[int, Judgement[Verdict]] = {}
    left = list(range(len(conversations)))
    try:
        for attempt in range(_ATTEMPTS):
            if left:
                texts = _ask(judge, cache, [conversations[place] for place in left], config.max_tokens, attempt)
                found |= {place: Judgement(read(text), text) for place, text in zip(left, texts, strict=True)}
                left = [place for place in left if found[place].verdict is None]
    finally:
        cache.close()
    if len(left) > config.max_unreadable * len(conversations):
        raise InputError(
            f"{len(left)} of {len(conversations)} verdicts of the judge {config.model or config.url} cannot be read, "
            f"more than the share of {config.max_unreadable:g} that max_unreadable allows, so there is no score. One "
            f"of them ends: {found[left[0]].text[-200:]!r}. Take a judge that follows the form it is asked for."
        )
    return [found[place] for place in range(len(conversations))]


def read_rating(text: str) -> float | None:
    """The last [[rating]] from 1 to 10; None where there is none.

    >>> read_rating("Good, but dull. Rating: [[6]]")
    6.0
    """
    found = _RATING.findall(text)
    return float(found[-1]) if found and 1 <= float(found[-1]) <= 10 else None


def read_winner(text: str) -> Literal["A", "B", "C"] | None:
    """The last of [[A]], [[B]] and [[C]], which is a tie; None where there is none."""
    found = _WINNER.findall(text)
    return found[-1] if found else None


def win_of_first(
    ours_first: Literal["A", "B", "C"] | None, theirs_first: Literal["A", "B", "C"] | None
) -> float | None:
    """1 where ours wins in both orders, 0 where theirs does, else a tie, 0.5; None where a verdict is missing.

    Args:
        ours_first: verdict where our answer was shown as A.
        theirs_first: verdict where theirs was.
    """
    if ours_first is None or theirs_first is None:
        return None
    return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((ours_first, theirs_first), 0.5)


def _ask(
    judge: _Judge, cache: AnswerCache, conversations: Sequence[Messages], max_tokens: int, attempt: int
) -> list[str]:
    """Its answers, as many of them from the cache as are known. One that is drawn depends on what is asked alone."""
    temperature = 0.7 if attempt else 0.0
    keys = [cache.key("verdict", list(messages), max_tokens, temperature, attempt) for messages in conversations]
    known = cache.get(keys)
    asked = {key: messages for key, messages in zip(keys, conversations, strict=True) if key not in known}
    left = list(asked)
    with progress("Judging", total=len(left)) as advance:
        for start in range(0, len(left), judge.at_once):
            slab = left[start : start + judge.at_once]
            seeds = [derive_seed("judge", attempt, key.hex()) for key in slab]
            texts = judge.ask([asked[key] for key in slab], temperature, seeds, advance)
            answers = dict(zip(slab, texts, strict=True))
            cache.put(answers)
            known |= answers
    return [known[key] for key in keys]


def _open_model(config: JudgeConfig) -> _Judge:
    assert config.model is not None
    engine = load_engine(config.model, config.engine)
    device = engine.pool.keys[0].device.type
    identity = " ".join([content_hash(resolve(config.model)), device, config.engine.dtype, config.engine.cache_dtype])

    def ask(
        conversations: Sequence[Messages], temperature: float, seeds: Sequence[int], finished: Callable[[], object]
    ) -> list[str]:
        prompts = [render_chat(engine.tokenizer, list(own), add_generation_prompt=True).ids for own in conversations]
        params = [SamplingParams(max_tokens=config.max_tokens, temperature=temperature, seed=seed) for seed in seeds]
        engine.forget_prefixes()
        return [found.text for found in engine.generate(prompts, params, new_text=True, finished=finished)]

    return _Judge(identity, _AT_ONCE * engine.max_rows, ask)


def _open_server(config: JudgeConfig) -> _Judge:
    def ask(
        conversations: Sequence[Messages], temperature: float, seeds: Sequence[int], finished: Callable[[], object]
    ) -> list[str]:
        with ThreadPoolExecutor(config.parallel) as pool:
            found = []
            for text in pool.map(partial(_post, config, temperature), seeds, conversations):
                found.append(text)
                finished()
            return found

    return _Judge(f"{config.url} {config.name}", _AT_ONCE * config.parallel, ask)


def _post(config: JudgeConfig, temperature: float, seed: int, messages: Messages) -> str:
    address = f"{config.url}/chat/completions"
    body = {"model": config.name, "messages": list(messages), "max_tokens": config.max_tokens}
    body |= {"temperature": temperature, "seed": seed}
    key = os.environ.get(config.key_variable)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=config.timeout_seconds) as response:
            return str(json.load(response)["choices"][0]["message"]["content"])
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(500).decode(errors="replace")
        raise InputError(f"The judge at {address} answers {error.code} {error.reason}: {said}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"The judge at {address} cannot be asked: {error}.") from error
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"The judge at {address} answers with something that is no chat completion.") from error
