"""Requests to answers through the engine: beginnings in common are computed once, known answers not at all.

Requests are sorted, so that those that begin alike stand together, and go to the engine in slabs. What is computed in a
slab depends on nothing else, and its answers are kept together: a run that was killed goes on with the slab in which it
died, and ends with the same bits.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.evaluate.harness.cache import AnswerCache
from puna.evaluate.harness.encode import Encoder, Window
from puna.evaluate.tasks.request import Answer, Continuation, Generated, Generation, Likelihood, Request, Text
from puna.infer.engine import Engine
from puna.infer.request import Completion
from puna.infer.sampling import SamplingParams
from puna.runtime.errors import InputError
from puna.runtime.progress import progress

_SLAB_WINDOWS = 512
_SLAB_ROWS = 2
"""Generated answers in a slab, for each row of the engine."""


@dataclass(frozen=True, slots=True)
class _Job:
    """What one sequence of the engine finds out: several answers, where several tokens may follow one text."""

    ids: tuple[int, ...]
    params: SamplingParams
    new_text: bool
    keys: tuple[bytes, ...]


class Asker:
    """Asks one model.

    Args:
        engine: the model's.
        cache: answers known, and where new ones are kept.
        read_special: see `Encoder`.
    """

    def __init__(self, engine: Engine, cache: AnswerCache, *, read_special: bool = False) -> None:
        self.engine = engine
        self._cache = cache
        self._encoder = Encoder(engine.tokenizer, engine.max_context, read_special=read_special)

    @property
    def kept(self) -> Path:
        """Where answers are kept."""
        return self._cache.path

    def ask(self, requests: Sequence[Request], title: str = "Asking") -> list[Answer]:
        """The answer to each request, in the order given.

        Args:
            title: of the progress bar.

        Raises:
            InputError: see `Encoder`.
        """
        scored = [request for request in requests if not isinstance(request, Generation)]
        generated = [request for request in requests if isinstance(request, Generation)]
        likelihoods = iter(self._likelihoods(scored, title) if scored else [])
        texts = iter(self._generate(generated, title) if generated else [])
        return [next(texts) if isinstance(request, Generation) else next(likelihoods) for request in requests]

    def _likelihoods(self, requests: Sequence[Continuation | Text], title: str) -> list[Likelihood]:
        encoded = self._encoder.encode(requests)
        nexts: dict[tuple[tuple[int, ...], int], dict[int, bytes]] = defaultdict(dict)
        keys: dict[Window, bytes] = {}
        for request in encoded:
            for window in request.windows:
                if window not in keys:
                    keys[window] = self._cache.key("likelihood", window.ids, window.first, window.next)
                    nexts[window.ids, window.first][window.next] = keys[window]
        jobs = [
            _Job(
                ids,
                SamplingParams(
                    max_tokens=0, prompt_logprobs=1, prompt_logprobs_from=first, next_logprobs=tuple(following)
                ),
                False,
                tuple(following.values()),
            )
            for (ids, first), following in sorted(nexts.items(), key=lambda item: item[0])
        ]
        known = self._run(jobs, _SLAB_WINDOWS, title, _read_likelihoods)
        found = []
        for request in encoded:
            parts = [known[keys[window]] for window in request.windows]
            found.append(
                Likelihood(
                    log_likelihood=sum(part[0] for part in parts),
                    greedy=all(part[1] for part in parts),
                    num_tokens=sum(window.num_scored for window in request.windows),
                    num_truncated=request.num_truncated,
                )
            )
        return found

    def _generate(self, requests: Sequence[Generation], title: str) -> list[Generated]:
        prompts = [self._encoder.prompt(request) for request in requests]
        jobs: dict[bytes, _Job] = {}
        keys = []
        for request, (ids, _) in zip(requests, prompts, strict=True):
            chat = not isinstance(request.prompt, str)
            drawn = [request.temperature, request.top_p, request.seed] if request.temperature else []
            key = self._cache.key("generation", ids, chat, request.max_tokens, request.until, *drawn)
            keys.append(key)
            params = SamplingParams(
                max_tokens=request.max_tokens,
                temperature=request.temperature,
                top_p=request.top_p,
                seed=request.seed,
                stop=request.until,
            )
            jobs[key] = _Job(tuple(ids), params, chat, (key,))
        ordered = sorted(jobs.values(), key=lambda job: (job.new_text, job.ids, job.keys))
        known = self._run(ordered, _SLAB_ROWS * self.engine.max_rows, title, _read_generated)
        answers = [known[key] for key in keys]
        return [
            Generated(text, finished, num_tokens, cut)
            for (text, finished, num_tokens), (_, cut) in zip(answers, prompts, strict=True)
        ]

    def _run(
        self,
        jobs: Sequence[_Job],
        slab_size: int,
        title: str,
        read: Callable[[Completion], list[list[Any]]],
    ) -> dict[bytes, list[Any]]:
        """Key -> answer, of all jobs."""
        known = self._cache.get(key for job in jobs for key in job.keys)
        with progress(title, total=len(jobs)) as advance:
            for start in range(0, len(jobs), slab_size):
                slab = jobs[start : start + slab_size]
                left = [job for job in slab if any(key not in known for key in job.keys)]
                advance(len(slab) - len(left))
                answers: dict[bytes, list[Any]] = {}
                self.engine.forget_prefixes()
                for new_text in (False, True):
                    group = [job for job in left if job.new_text == new_text]
                    completions = self.engine.generate(
                        [job.ids for job in group], [job.params for job in group], new_text=new_text, finished=advance
                    )
                    for job, completion in zip(group, completions, strict=True):
                        if completion.finish_reason == "failed":
                            raise InputError(completion.error)
                        answers |= zip(job.keys, read(completion), strict=True)
                self._cache.put(answers)
                known |= answers
        return known


def _read_likelihoods(completion: Completion) -> list[list[Any]]:
    """Log-likelihood and whether it is greedy, for each token that may follow."""
    before = completion.prompt.logprobs
    total = sum(entry.logprob for entry in before)
    greedy = all(entry.id == entry.top[0][0] for entry in before)
    return [
        [total + entry.logprob, greedy and entry.id == entry.top[0][0]] for entry in completion.prompt.next_logprobs
    ]


def _read_generated(completion: Completion) -> list[list[Any]]:
    return [[completion.text, completion.finish_reason == "stop", len(completion.ids)]]
