"""A classifier between clients and the model: prompts are judged before anything is computed, answers before they
leave.

What is refused has the shape of OpenAI's protocol: `finish_reason` "content_filter", and in chats `refusal` in place of
`content`.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from puna.infer.request import Delta, PromptReport
from puna.peft.text_classifier import TextClassifier
from puna.runtime.devices import DeviceName, open_device
from puna.serve.worker import EngineFailed, Run

logger = logging.getLogger(__name__)

Side = Literal["prompts", "answers"]


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """A classifier that judges what clients send and what they get."""

    model: Path
    """Directory of a classifier of texts: model/ or adapter/ of `puna finetune` with the task classification."""
    unsafe: tuple[str, ...] = ("unsafe",)
    """Its classes that are refused."""
    threshold: float = 0.5
    """The probability of such a class from which on a text is refused."""
    prompts: bool = True
    """Judge every message of a conversation, and every prompt to complete, each by itself."""
    answers: bool = True
    """Judge answers. No text leaves before it has been judged, so there are no log-probabilities then: they would show
    tokens that have not been."""
    window: int = 200
    """Characters of an answer that are judged, and leave, at a time. Small windows make streams smooth, and cost more
    judgements."""
    context: int = 800
    """Characters before a window that are judged along with it."""
    refusal: str = "I can't help with that."
    """What clients get to read instead."""
    device: DeviceName = "auto"
    """Where the classifier computes; "auto" takes a GPU where there is one."""
    num_threads: int = 0
    """CPU threads of the classifier; 0 takes every core, as the model does that it takes turns with."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; it has to be above 0 and at most 1.")
        if not (self.prompts or self.answers) or not self.unsafe:
            raise ValueError("A guard has to judge prompts or answers, and needs classes that are unsafe.")
        if self.window < 1 or self.context < 0 or self.num_threads < 0:
            raise ValueError("window has to be at least 1; context and num_threads cannot be negative.")


@dataclass(slots=True)
class Count:
    """What a guard has done on one side."""

    judged: int = 0
    """Texts: prompts and messages, or windows of answers."""
    refused: int = 0
    """Of them."""
    seconds: float = 0.0
    """From asking to the verdict, waiting for others' turn included; of all together."""
    most_seconds: float = 0.0
    """The longest of them, of texts that were asked about together."""


class Guard:
    """Judges texts, in a thread of its own, one request after the other.

    Args:
        config: what is refused.

    Raises:
        InputError: the classifier cannot be read, or has no such class.
    """

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._classifier = TextClassifier(config.model, open_device(config.device, config.num_threads))
        self._columns = self._classifier.columns(config.unsafe)
        self._thread = ThreadPoolExecutor(1, "puna-guard")
        self.counts: dict[Side, Count] = {"prompts": Count(), "answers": Count()}

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def is_unsafe(self, texts: Sequence[str]) -> list[bool]:
        """The verdict on each text; nothing but space is safe."""
        told = [text for text in texts if text.strip()]
        if not told:
            return [False] * len(texts)
        highest = self._classifier.probabilities(told)[:, self._columns].amax(-1)
        verdicts = iter((highest >= self.config.threshold).tolist())
        return [bool(text.strip()) and next(verdicts) for text in texts]

    async def allows(self, side: Side, texts: Sequence[str]) -> bool:
        """Whether all of some texts are safe; counted.

        Raises:
            EngineFailed: there was no verdict, so the texts must not go on.
        """
        started = time.perf_counter()
        try:
            verdicts = await asyncio.get_running_loop().run_in_executor(self._thread, self.is_unsafe, texts)
        except Exception as error:
            logger.exception("The guard failed; what it was asked about goes no further.")
            raise EngineFailed(f"The guard failed: {error}") from error
        seconds = time.perf_counter() - started
        count = self.counts[side]
        count.judged += len(texts)
        count.refused += sum(verdicts)
        count.seconds += seconds
        count.most_seconds = max(count.most_seconds, seconds)
        return not any(verdicts)

    def report(self) -> dict[str, Any]:
        """The counts, for people and programs that watch over the server."""
        return {side: asdict(count) for side, count in self.counts.items()}


class Answers(Protocol):
    """The answers to one request, on their way."""

    def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """See `Run.deltas`."""
        ...

    def close(self) -> None:
        """See `Run.close`."""
        ...


class Refused:
    """`Answers` to a request that is not let through: nothing is computed."""

    def __init__(self, num_jobs: int, refusal: str) -> None:
        self._num_jobs, self._refusal = num_jobs, refusal

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """A refusal for each."""
        for number in range(self._num_jobs):
            yield number, Delta(self._refusal, (), (), "content_filter")

    def close(self) -> None:
        """Nothing runs."""


@dataclass(slots=True)
class Held:
    """An answer that leaves window by window, each after it has been judged."""

    window: int
    context: int
    _text: str = ""
    _left: int = 0
    _ids: list[int] = field(default_factory=list)
    _last: Delta | None = None
    _prompt: PromptReport | None = None

    def add(self, delta: Delta) -> None:
        """Take in what is new."""
        self._text += delta.text
        self._ids += delta.ids
        self._prompt = self._prompt or delta.prompt
        if delta.finish_reason is not None:
            self._last = delta

    def due(self) -> str | None:
        """What has to be judged next: the next window with its context, or None where more text has to come first.

        It follows from the whole answer alone, not from how it came.
        """
        end = self._end()
        return None if end is None else self._text[max(0, self._left - self.context) : end]

    def release(self) -> Delta:
        """The window that `due` gave, to be called when it has been found safe; with the tokens that have come."""
        end = self._end()
        assert end is not None
        text, self._left = self._text[self._left : end], end
        ended = self._last is not None and end == len(self._text)
        return self._delta(text, self._last if ended else None)

    def refuse(self, refusal: str) -> Delta:
        """The end of an answer of which no more may leave."""
        return self._delta(refusal, Delta("", (), (), "content_filter"))

    def _end(self) -> int | None:
        """Where the next window ends; one without text brings the answer's end."""
        if len(self._text) - self._left > self.window:
            return self._left + self.window
        return None if self._last is None else len(self._text)

    def _delta(self, text: str, last: Delta | None) -> Delta:
        ids, prompt = tuple(self._ids), self._prompt
        self._ids, self._prompt = [], None
        return Delta(text, ids, (), None if last is None else last.finish_reason, prompt)


class GuardedRun:
    """`Answers` of a run that leave when they have been judged."""

    def __init__(self, run: Run, guard: Guard, num_jobs: int) -> None:
        self._run, self._guard = run, guard
        self._held = [Held(guard.config.window, guard.config.context) for _ in range(num_jobs)]

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """See `Run.deltas`; an answer that is found unsafe ends with a refusal, and is computed no further."""
        async for number, delta in self._run.deltas():
            held = self._held[number]
            held.add(delta)
            while (text := held.due()) is not None:
                if not await self._guard.allows("answers", [text]):
                    self._run.drop(number)
                    yield number, held.refuse(self._guard.config.refusal)
                    break
                released = held.release()
                yield number, released
                if released.finish_reason is not None:
                    break

    def close(self) -> None:
        """See `Run.close`."""
        self._run.close()
