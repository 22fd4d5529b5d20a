"""The engine in five calls, for scripts and notebooks: `from puna import LLM`."""

import difflib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.infer.beam import BeamParams, beam_search
from puna.infer.engine import Engine
from puna.infer.hidden import hidden_states
from puna.infer.load import EngineConfig, load_engine
from puna.infer.request import Completion, Delta, TokenLogprob
from puna.infer.sampling import SamplingParams
from puna.runtime.errors import InputError
from puna.runtime.seeds import derive_seed
from puna.tokenizer.chat import render_chat

Prompt = str | Sequence[int]
"""A text, which gets a BOS in front where the vocabulary has one; or ids, which are taken as they are."""

Conversation = Sequence[Mapping[str, Any]]
"""Messages with `role` and `content`, the last of them usually a user's."""

Config = TypeVar("Config")


@dataclass(frozen=True, slots=True)
class Output:
    """What became of a prompt."""

    prompt_ids: tuple[int, ...]
    """The prompt as the model saw it."""
    completions: tuple[Completion, ...]
    """As many as were asked for."""

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self.completions[0].text


@dataclass(frozen=True, slots=True)
class Score:
    """How likely the model finds a text."""

    ids: tuple[int, ...]
    """The text's tokens, BOS included where there is one."""
    logprobs: tuple[TokenLogprob, ...]
    """Of each token but the first, given those before it."""

    @property
    def total(self) -> float:
        """The text's log-probability in nats: the sum over its tokens."""
        return sum(entry.logprob for entry in self.logprobs)


class LLM:
    """A model that is ready to use.

    Args:
        model: a model directory, or anything else that `puna generate` takes for one.
        config: how the engine computes; single settings may be given by name.
        settings: see `EngineConfig`.

    Raises:
        InputError: the model cannot be loaded, or a setting does not exist or is impossible.

    Example:
        llm = LLM("runs/quickstart/assistant/model", max_rows=16)
        print(llm.chat([{"role": "user", "content": "What does os.path.isdir do?"}]).text)
        for output in llm.generate(["Once upon a time", "import os"], temperature=0.8, n=2):
            print([completion.text for completion in output.completions])
    """

    def __init__(self, model: str | Path, config: EngineConfig | None = None, **settings: Any) -> None:
        self.engine: Engine = load_engine(Path(model), _changed(config or EngineConfig(), settings))

    @overload
    def generate(
        self, prompts: str, params: SamplingParams | None = ..., *, n: int = ..., **changes: Any
    ) -> Output: ...

    @overload
    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = ..., *, n: int = ..., **changes: Any
    ) -> list[Output]: ...

    def generate(
        self, prompts: str | Sequence[Prompt], params: SamplingParams | None = None, *, n: int = 1, **changes: Any
    ) -> Output | list[Output]:
        """Go on from a prompt, or from several at once.

        Args:
            prompts: one text, or a list of texts and of lists of ids.
            params: how the texts go on and when they end.
            n: completions for each prompt; with a seed, each has a random stream of its own.
            changes: single parameters by name, such as temperature = 0; see `SamplingParams`.

        Raises:
            InputError: a parameter does not exist or is impossible, or a prompt does not fit (the message says which).
        """
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        outputs = self._complete([self._ids(prompt) for prompt in several], params, n, changes, new_text=False)
        return outputs[0] if isinstance(prompts, str) else outputs

    @overload
    def chat(self, messages: Conversation, params: SamplingParams | None = ..., **options: Any) -> Output: ...

    @overload
    def chat(
        self, messages: Sequence[Conversation], params: SamplingParams | None = ..., **options: Any
    ) -> list[Output]: ...

    def chat(
        self, messages: Conversation | Sequence[Conversation], params: SamplingParams | None = None, **options: Any
    ) -> Output | list[Output]:
        """Answer a conversation, or several at once.

        Args:
            messages: one list of messages, or a list of such lists.
            params: how the answers go on and when they end.
            options: `n` and single parameters by name, as for `generate`.

        Raises:
            InputError: as for `generate`; or the model has no chat template, or a conversation does not suit it.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Conversation], [messages] if single else messages)
        prompts = [self._rendered(conversation) for conversation in conversations]
        outputs = self._complete(prompts, params, options.pop("n", 1), options, new_text=True)
        return outputs[0] if single else outputs

    def stream(
        self, prompt: Prompt | Conversation, params: SamplingParams | None = None, **changes: Any
    ) -> Generator[Delta, None, None]:
        """Go on from a prompt, or answer a conversation, piece by piece. Closing the generator gives it up.

        Raises:
            InputError: see `generate` and `chat`; at once, not when the first piece is asked for.
        """
        talks = not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)
        ids = self._rendered(cast(Conversation, prompt)) if talks else self._ids(cast(Prompt, prompt))
        return self.engine.stream(ids, _changed(params or SamplingParams(), changes), new_text=talks)

    def beam_search(
        self, prompts: Sequence[Prompt], params: BeamParams | None = None, *, n: int = 1, **changes: Any
    ) -> list[Output]:
        """The likeliest texts that go on from each prompt, as far as a search with a few beams finds them.

        Args:
            params: how many beams, how long, and what texts are compared by.
            n: how many of the texts found to return for each prompt, best first; at most `num_beams`.
            changes: single parameters by name, such as num_beams = 8; see `BeamParams`.

        Raises:
            InputError: a parameter does not exist or is impossible, or a prompt does not fit (the message says which).
        """
        chosen = _changed(params or BeamParams(), changes)
        if not 1 <= n <= chosen.num_beams:
            raise InputError(f"n is {n}; it has to be at least 1, and at most num_beams, which is {chosen.num_beams}.")
        several = [self._ids(prompt) for prompt in prompts]
        found = beam_search(self.engine, several, chosen)
        return [Output(tuple(ids), tuple(texts[:n])) for ids, texts in zip(several, found, strict=True)]

    @overload
    def score(self, texts: str, *, top: int = ...) -> Score: ...  # type: ignore[overload-overlap]

    @overload
    def score(self, texts: Sequence[Prompt], *, top: int = ...) -> list[Score]: ...

    def score(self, texts: str | Sequence[Prompt], *, top: int = 0) -> Score | list[Score]:
        """The log-probability of each token of a text, or of several texts.

        Args:
            top: report this many of the likeliest tokens at each place, too.

        Raises:
            InputError: a text does not fit into the context (the message says which).
        """
        several = [self._ids(text) for text in ([texts] if isinstance(texts, str) else texts)]
        params = SamplingParams(max_tokens=0, prompt_logprobs=top)
        completions = self.engine.generate(several, params)
        scores = [Score(tuple(ids), done.prompt.logprobs) for ids, done in zip(several, completions, strict=True)]
        return scores[0] if isinstance(texts, str) else scores

    def embed(
        self,
        texts: Sequence[Prompt],
        *,
        pooling: Literal["mean", "last"] = "mean",
        layer: int | None = None,
        normalize: bool = True,
    ) -> Tensor:
        """A vector for each text, [N, D] in float32 on the CPU, from its tokens' hidden states.

        Args:
            pooling: the mean over a text's tokens, or the state of its last one.
            layer: whose states; absent is what the output projection reads. See `hidden_states`.
            normalize: scale each vector to length 1.

        Raises:
            InputError: a text is empty, or longer than the context; or there is no such pooling or layer.
        """
        if pooling not in ("mean", "last"):
            raise InputError(f'pooling is {pooling!r}; it has to be "mean" or "last".')
        number = self.engine.model.config.num_layers if layer is None else layer
        states = self._hidden(texts, [number])
        vectors = [h_1TD[0].mean(0) if pooling == "mean" else h_1TD[0, -1] for h_1TD in states]
        stacked_ND = torch.stack(vectors) if vectors else torch.empty(0, self.engine.model.config.dim)
        return F.normalize(stacked_ND, dim=-1) if normalize else stacked_ND

    def hidden_states(self, texts: Sequence[Prompt], *, layers: Sequence[int] | None = None) -> list[Tensor]:
        """The hidden states of each text's tokens, [layers, tokens, D] in float32 on the CPU.

        Args:
            layers: which; all where absent. 0 is what the embedding gives, i the output of the i-th layer, except that
                the last is taken after the model's last norm, as the output projection reads it (and `transformers`
                reports it).

        Raises:
            InputError: a text is empty, or longer than the context; or there is no such layer.
        """
        every = range(self.engine.model.config.num_layers + 1)
        return list(self._hidden(texts, every if layers is None else layers))

    def _hidden(self, texts: Sequence[Prompt], layers: Sequence[int]) -> Iterator[Tensor]:
        """States on the CPU, computed for as many texts at once as the context holds."""
        num_layers = self.engine.model.config.num_layers
        for number in layers:
            if not 0 <= number <= num_layers:
                raise InputError(f"There is no layer {number}: 0 is the embedding, and {num_layers} the last layer.")
        several = [self._ids(text) for text in texts]
        for ids in several:
            self.engine.check(ids, SamplingParams(max_tokens=0))
        groups: list[list[list[int]]] = []
        for ids in several:
            if groups and sum(map(len, groups[-1])) + len(ids) <= self.engine.max_context:
                groups[-1].append(ids)
            else:
                groups.append([ids])
        for group in groups:
            for h_LTD in hidden_states(self.engine.model, group, layers):
                yield h_LTD.cpu()

    def _complete(
        self,
        prompts: list[list[int]],
        params: SamplingParams | None,
        n: int,
        changes: Mapping[str, Any],
        *,
        new_text: bool,
    ) -> list[Output]:
        if n < 1:
            raise InputError(f"n is {n}; it has to be at least 1.")
        base = _changed(params or SamplingParams(), changes)
        choices = [
            base if choice == 0 or base.seed is None else replace(base, seed=derive_seed(base.seed, choice))
            for choice in range(n)
        ]
        completions = self.engine.generate(
            [ids for ids in prompts for _ in choices], choices * len(prompts), new_text=new_text
        )
        return [Output(tuple(ids), tuple(completions[i * n : (i + 1) * n])) for i, ids in enumerate(prompts)]

    def _ids(self, prompt: Prompt) -> list[int]:
        return self.engine.encode(prompt) if isinstance(prompt, str) else list(prompt)

    def _rendered(self, conversation: Conversation) -> list[int]:
        return render_chat(self.engine.tokenizer, conversation, add_generation_prompt=True).ids


def _changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy of a dataclass with some fields changed; a name that it has not is an error, with the nearest."""
    names = [field.name for field in fields(config)]  # type: ignore[arg-type]
    for name in changes:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise InputError(f"There is no setting {name}.{hint} There are: {', '.join(names)}.")
    return replace(config, **changes)  # type: ignore[type-var]
