"""`puna simulate`: answers compared by a program in place of people, with a person's inconstancy.

A rater's scores are made uncertain by Gumbel noise. Of two answers it then prefers one with the probability
sigmoid(difference / noise), which is the Bradley-Terry model; more answers come in an order of the Plackett-Luce model
(Luce 1959; Yellott 1977 for the noise).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from puna.align.raters import RATERS, Rater
from puna.batches.preferences import STRENGTHS, Messages, read_prompts
from puna.config import Kinds, to_plain
from puna.infer.config import EngineConfig
from puna.infer.draw import check_sampling, draw_answers
from puna.infer.load import load_engine
from puna.infer.sampling import SamplingParams
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, write_jsonl
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say
from puna.runtime.seeds import derive_seed

FILE_NAME = "preferences.jsonl"


@dataclass(frozen=True, kw_only=True)
class SimulateConfig:
    """Draw answers and let a program compare them: preferences without people."""

    models: tuple[Path, ...]
    """Model directories that answer. Several kinds of answers teach more than one (Llama 2, section 3.2.1)."""
    prompts: Path
    """A file of prompts, or a folder of such files: a column "prompt", or conversations and preferences, of which the
    last answers are left out."""
    rater: Annotated[Rater, Kinds("rater", RATERS)]
    """Who compares, such as { kind = "reward", path = "runs/reward/model" }."""
    output: Path
    """Gets preferences.jsonl, which `puna reward` and `puna align` learn from."""
    samples: int = 2
    """Answers of each model to each prompt, at each temperature. Two give a pair, more a ranking."""
    temperatures: tuple[float, ...] = (1.0,)
    """How freely they are drawn."""
    noise: float = 1.0
    """How inconstant the rater is. With 1, an answer that is better by d is preferred with the probability sigmoid(d);
    with 0, always."""
    levels: tuple[float, float, float, float] = (0.1, 0.5, 1.0, 2.0)
    """How far the best two answers have to be apart, noise included, to be called negligibly, slightly, plainly and
    significantly better. What is nearer than the first is a tie, and left out."""
    max_prompts: int = 0
    """Take at most so many prompts, from the first on; 0 takes all."""
    seed: int = 0
    """Of the drawing and of the rater."""
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=256))
    """How answers go on, and when they end; `temperature` and `seed` are those above."""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(max_rows=16))
    """Where the answering models compute."""

    def __post_init__(self) -> None:
        if not self.models or not self.temperatures or self.samples < 1 or self.max_prompts < 0:
            raise ValueError("models and temperatures cannot be empty, samples has to be at least 1, max_prompts 0.")
        if len(self.models) * len(self.temperatures) * self.samples < 2:
            raise ValueError("There is one answer to each prompt, and nothing to compare it with; raise samples.")
        if min(self.temperatures) < 0 or self.noise < 0:
            raise ValueError("temperatures and noise cannot be negative.")
        if list(self.levels) != sorted(self.levels) or self.levels[0] < 0:
            raise ValueError(f"levels are {self.levels}; they have to rise, from 0 at least.")
        check_sampling(self.sampling)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One answer."""

    text: str
    """The assistant's words."""
    model: str
    """Directory of the model that gave it."""
    temperature: float
    """With which it was drawn."""


def main(config: SimulateConfig) -> None:
    """Draw, compare, and write; whole or not at all.

    Raises:
        InputError: a model, the prompts or the rater is wrong; or there is no prompt with two answers that differ.
    """
    prompts = list(read_prompts(config.prompts, config.max_prompts))
    candidates = _draw(config, [prompt for _, prompt in prompts])
    texts = [[each.text for each in own] for own in candidates]
    scores = config.rater.scores([prompt for _, prompt in prompts], texts, config.engine.device)
    rows: list[dict[str, Any]] = []
    counts = Counter(num_prompts=len(prompts))
    generator = np.random.default_rng(derive_seed(config.seed, "rater"))
    for (where, prompt), own, values in zip(prompts, candidates, scores, strict=True):
        order, strength = compared(values, config.noise, config.levels, generator)
        if len(own) < 2:
            counts["num_without_two_answers"] += 1
        elif strength is None:
            counts["num_ties"] += 1
        else:
            counts[f"num_{STRENGTHS[strength].replace(' ', '_')}"] += 1
            counts["num_against_scores"] += values[order[0]] < values[order[1]]
            rows.append(_row(where, prompt, [own[n] for n in order], [values[n] for n in order], strength))
    if not rows:
        raise InputError(
            f"None of the {len(prompts):,} prompts has a comparison: {counts['num_ties']:,} are ties, and to the rest "
            f"there are no two different answers that ended by themselves within {config.sampling.max_tokens} tokens."
        )
    with atomic_path(config.output) as folder:
        folder.mkdir()
        write_jsonl(folder / FILE_NAME, rows)
        paths = (*config.models, config.prompts, *config.rater.inputs)
        inputs = {str(path): content_hash(path) for path in paths}
        results = {"num_preferences": len(rows), **counts}
        Manifest("simulate", to_plain(config), inputs, results).write(folder)
    say(
        f"{len(rows):,} preferences from {len(prompts):,} prompts, of which the rater's scores say the opposite for "
        f"{counts['num_against_scores']:,}; left out {counts['num_ties']:,} ties, and "
        f"{counts['num_without_two_answers']:,} without two different whole answers."
    )
    say(f"Wrote {config.output / FILE_NAME}")


def _draw(config: SimulateConfig, prompts: Sequence[Messages]) -> list[list[Candidate]]:
    """The different whole answers to each prompt."""
    found: list[dict[str, Candidate]] = [{} for _ in prompts]
    for number, model in enumerate(config.models):
        drawn = draw_answers(
            load_engine(model, config.engine),
            prompts,
            samples=config.samples,
            temperatures=config.temperatures,
            sampling=config.sampling,
            seed=derive_seed(config.seed, "model", number),
        )
        for own, answers in zip(found, drawn, strict=True):
            for answer in answers:
                if answer.finished and answer.text:
                    own.setdefault(answer.text, Candidate(answer.text, str(model), answer.temperature))
    return [list(own.values()) for own in found]


def compared(
    scores: Sequence[float], noise: float, levels: Sequence[float], generator: np.random.Generator
) -> tuple[list[int], int | None]:
    """What a rater says of answers.

    Args:
        scores: what each answer is worth to it.
        noise: see `SimulateConfig.noise`.
        levels: see `SimulateConfig.levels`.

    Returns:
        The answers' numbers, the best first, without those that are hard to tell from the one before; and how much
        better the first is than the second, as an index into STRENGTHS, or None where only one is left: a tie.
    """
    seen = np.asarray(scores, dtype=np.float64) + noise * generator.gumbel(size=len(scores))
    order: list[int] = []
    for n in np.argsort(-seen, kind="stable"):
        if not order or seen[order[-1]] - seen[n] >= levels[0]:
            order.append(int(n))
    if len(order) < 2:
        return order, None
    return order, int(np.searchsorted(levels, seen[order[0]] - seen[order[1]], side="right")) - 1


def _row(where: str, prompt: Messages, own: list[Candidate], scores: list[float], strength: int) -> dict[str, Any]:
    texts = [each.text for each in own]
    answers = {"chosen": texts[0], "rejected": texts[1]} if len(texts) == 2 else {"answers": texts}
    facts = {
        "models": [each.model for each in own],
        "temperatures": [each.temperature for each in own],
        "scores": scores,
    }
    return {"id": where, "prompt": prompt, **answers, "strength": STRENGTHS[strength], **facts}
