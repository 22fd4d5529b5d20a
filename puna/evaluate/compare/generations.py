"""What the models say to the same prompts, side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

from puna.evaluate.compare.candidates import Candidate
from puna.evaluate.compare.section import not_measured
from puna.infer.config import EngineConfig
from puna.infer.load import load_engine
from puna.infer.sampling import SamplingParams
from puna.runtime.progress import progress
from puna.tokenizer.chat import render_chat


@dataclass(frozen=True, slots=True)
class Generations:
    """One prompt and every model's answer."""

    prompt: str
    answers: dict[str, str]
    """Model's name -> answer, or why there is none."""


def generate_all(
    candidates: Sequence[Candidate], prompts: Sequence[str], chat: bool, max_tokens: int, engine_config: EngineConfig
) -> list[Generations]:
    """Greedy answers; each model is loaded once, one at a time.

    Args:
        candidates: the models.
        prompts: texts.
        chat: ask through the chat template, rather than let the model go on.
        max_tokens: of an answer.
        engine_config: where and how.
    """
    answers: dict[str, list[str]] = {}
    params = SamplingParams(max_tokens=max_tokens, temperature=0)
    with progress("Generating", total=len(candidates) if prompts else 0) as advance:
        for candidate in candidates if prompts else ():
            answers[candidate.name] = [not_measured("no weights")] * len(prompts)
            if candidate.directory is not None:
                engine = load_engine(candidate.directory, engine_config)
                if chat and engine.tokenizer.chat_template is None:
                    answers[candidate.name] = [not_measured("no chat template")] * len(prompts)
                elif chat:
                    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
                    ids = [render_chat(engine.tokenizer, turn, add_generation_prompt=True).ids for turn in turns]
                    answers[candidate.name] = [done.text for done in engine.generate(ids, params, new_text=True)]
                else:
                    ids = [engine.encode(prompt) for prompt in prompts]
                    answers[candidate.name] = [done.text for done in engine.generate(ids, params)]
            advance()
    return [
        Generations(prompt, {name: texts[i] for name, texts in answers.items()}) for i, prompt in enumerate(prompts)
    ]
