"""Several answers to each of many conversations, drawn by an engine; repeatable, whoever asks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from puna.batches.preferences import Messages
from puna.infer.engine import Engine
from puna.infer.sampling import SamplingParams
from puna.runtime.errors import InputError
from puna.runtime.progress import progress
from puna.runtime.seeds import derive_seed
from puna.tokenizer.chat import render_chat


@dataclass(frozen=True, slots=True)
class Drawn:
    """One answer."""

    text: str
    """The assistant's words, without space at the ends."""
    ids: tuple[int, ...]
    """Its tokens, the one that ended it included."""
    temperature: float
    """With which it was drawn."""
    finished: bool
    """It ended by itself, and not because there was no more room."""


def check_sampling(sampling: SamplingParams, temperature: str = "temperatures") -> None:
    """Refuse what `draw_answers` would replace, so that no setting is ignored.

    Args:
        temperature: the setting that says it instead.

    Raises:
        ValueError: names what to set.
    """
    if sampling.temperature != 1.0 or sampling.seed is not None:
        raise ValueError(f"Set {temperature} and seed instead of sampling.temperature and sampling.seed.")


def draw_answers(
    engine: Engine,
    prompts: Sequence[Messages],
    *,
    samples: int,
    temperatures: Sequence[float],
    sampling: SamplingParams,
    seed: int,
) -> list[list[Drawn]]:
    """Answer every prompt `samples` times at each temperature.

    What was computed for a prompt is shared by all its answers. The same seed gives the same answers, whatever else
    is drawn beside them.

    Args:
        prompts: conversations that end with something to answer.
        sampling: how answers go on and when they end; its temperature and seed are replaced.

    Returns:
        For each prompt its answers, first all of the first temperature.

    Raises:
        InputError: the model has no chat template, or a prompt does not fit into its context.
    """
    if engine.tokenizer.chat_template is None:
        raise InputError("The model has no chat template, so it cannot answer conversations; teach it: puna finetune.")
    requests, params = [], []
    for number, prompt in enumerate(prompts):
        ids = render_chat(engine.tokenizer, prompt, add_generation_prompt=True).ids
        for temperature in temperatures:
            for sample in range(samples):
                own_seed = derive_seed(seed, "answer", number, sample) % 2**63
                requests.append(ids)
                params.append(replace(sampling, temperature=temperature, seed=own_seed))
    with progress("Answering", total=len(requests)) as advance:
        completions = iter(engine.generate(requests, params, new_text=True, finished=advance))
    return [
        [
            Drawn(completion.text.strip(), completion.ids, temperature, completion.finish_reason == "stop")
            for temperature in temperatures
            for _ in range(samples)
            for completion in [next(completions)]
        ]
        for _ in prompts
    ]
