"""Puna as a model of lm-eval, so that its whole catalogue of tasks can be asked of a Puna engine:

    python -m puna.evaluate.harness.lm_eval_model run --model puna --model_args pretrained=DIR --tasks arc_easy,piqa

is `lm-eval run ...` with one more model. lm-eval 0.4.13 looks for models of other packages nowhere (it has no entry
points, and --include_path is for tasks), so somebody has to import this module before its command line runs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import lm_eval.models  # type: ignore[import-untyped]  # noqa: F401  (its own models come first, or they never come)
from lm_eval.api.model import LM  # type: ignore[import-untyped]
from lm_eval.api.registry import register_model  # type: ignore[import-untyped]

from puna.config import parse_config
from puna.evaluate.harness.ask import Asker
from puna.evaluate.harness.cache import AnswerCache
from puna.evaluate.harness.engine import EvaluationEngineConfig
from puna.evaluate.tasks.request import Continuation, Generated, Generation, Likelihood, Prompt, Request, Text
from puna.infer.load import load_engine
from puna.runtime.errors import InputError
from puna.tokenizer.chat import render_chat

Kind = TypeVar("Kind", Likelihood, Generated)

_MOST_TOKENS = 256
"""Of an answer, where a task does not say; lm-eval's own."""


@register_model("puna")
class PunaLM(LM):  # type: ignore[misc]
    """A model directory run by Puna's engine.

    Args:
        pretrained: the directory, or a name on the hub.
        device: cpu; all else is the GPU where there is one, as lm-eval says "cuda:0" where the user says nothing.
        settings: of the engine (`puna config evaluate`, table engine), such as max_context=2048 or dtype=bfloat16.
            lm-eval's batch_size and max_batch_size are left out: the engine fills its batches itself.

    Raises:
        InputError: the model cannot be read, or there is no such setting.
    """

    def __init__(self, pretrained: str, device: str | None = None, **settings: Any) -> None:
        super().__init__()
        left_out = ("batch_size", "max_batch_size")
        given = {key: value for key, value in settings.items() if key not in left_out and value is not None}
        given["device"] = "cpu" if device == "cpu" else "auto"
        engine = load_engine(Path(pretrained), parse_config(EvaluationEngineConfig, given, "--model_args"))
        self._name = pretrained
        self._engine = engine
        # In memory, as lm-eval has a cache of its own: --use_cache.
        self._asker = Asker(engine, AnswerCache(Path(":memory:"), pretrained), read_special=True)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is greedy."""
        asked = [Continuation(*request.args) for request in requests]
        return [(answer.log_likelihood, answer.greedy) for answer in self._ask(asked, Likelihood)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-likelihood of each text."""
        return [
            answer.log_likelihood for answer in self._ask([Text(*request.args) for request in requests], Likelihood)
        ]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The model's answers.

        Raises:
            InputError: a task wants to draw answers by rules that there are none of here.
        """
        asked = [_generation(*request.args, seed=seed) for seed, request in enumerate(requests)]
        return [answer.text for answer in self._ask(asked, Generated)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model reads, without its BOS, which is added again."""
        tokenizer = self._engine.tokenizer
        text = render_chat(tokenizer, chat_history, add_generation_prompt=add_generation_prompt).text
        return text.removeprefix(tokenizer.special_names().get("bos_token", ""))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's own; it has one at most."""
        if isinstance(chat_template, str):
            raise InputError(f"This model has no chat template called {chat_template!r}, only its own. Leave it out.")
        return (self._engine.tokenizer.chat_template or "") if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval knows its cached prompts by."""
        return self._name.replace("/", "__")

    def _ask(self, requests: Sequence[Request], kind: type[Kind]) -> list[Kind]:
        answers = self._asker.ask(requests, "Asking for lm-eval")
        return [answer for answer in answers if isinstance(answer, kind)]


def _generation(prompt: Prompt, settings: dict[str, Any], *, seed: int) -> Generation:
    """A request in lm-eval's terms."""
    known = dict(settings)
    until = known.pop("until", ())
    draws = known.pop("do_sample", False)
    temperature = float(known.pop("temperature", 1.0 if draws else 0.0))
    max_tokens = int(known.pop("max_gen_toks", known.pop("max_new_tokens", known.pop("max_tokens", _MOST_TOKENS))))
    top_p = float(known.pop("top_p", 1.0))
    if known:
        raise InputError(f"Puna does not read {', '.join(map(repr, known))} of a task's generation_kwargs.")
    return Generation(
        prompt,
        max_tokens=max_tokens,
        until=(until,) if isinstance(until, str) else tuple(until or ()),
        temperature=temperature if draws else 0.0,
        top_p=top_p,
        seed=seed,
    )


def main() -> None:
    """lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import-untyped]

    cli_evaluate()


if __name__ == "__main__":
    main()
