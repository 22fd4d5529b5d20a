"""`puna reject`: answer each prompt several times and keep the answer that a reward model likes best.

Rejection sampling as in Llama 2 (arXiv:2307.09288, section 3.2.3) and Llama 3 (arXiv:2407.21783, section 4.2.2).
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puna.align.scoring import answer_rewards, open_reward_model
from puna.batches.preferences import Messages, read_prompts
from puna.config import to_plain
from puna.infer.config import EngineConfig
from puna.infer.draw import check_sampling, draw_answers
from puna.infer.load import load_engine
from puna.infer.sampling import SamplingParams
from puna.runtime.devices import open_device
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, write_jsonl
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import say


@dataclass(frozen=True, kw_only=True)
class RejectConfig:
    """Answer prompts several times each, and keep the best answers to learn from."""

    model: Path
    """Model directory that answers."""
    reward: Path
    """Directory of a reward model (`puna reward`): model/ or adapter/."""
    prompts: Path
    """A file of prompts, or a folder of such files: a column "prompt", or conversations and preferences, of which the
    last answers are left out."""
    output: Path
    """Gets conversations.jsonl, which `puna finetune` learns from, and samples.jsonl with every answer and reward."""
    samples: int = 8
    """Answers to each prompt, at each temperature."""
    temperatures: tuple[float, ...] = (1.0,)
    """How freely they are drawn; with several, the summary says which gives the best."""
    least_gain: float = 0.0
    """Keep a prompt only if its best answer's reward is so much above the mean of its answers."""
    max_prompts: int = 0
    """Take at most so many prompts, from the first on; 0 takes all."""
    seed: int = 0
    """Of the drawing."""
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=256))
    """How answers go on, and when they end; `temperature` and `seed` are those above."""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(max_rows=16))
    """Where the answering model computes."""

    def __post_init__(self) -> None:
        if self.samples < 1 or not self.temperatures or self.max_prompts < 0:
            raise ValueError("samples has to be at least 1, temperatures cannot be empty, max_prompts not negative.")
        if min(self.temperatures) <= 0:
            raise ValueError(f"temperatures are {self.temperatures}; they have to be above 0, for answers to differ.")
        check_sampling(self.sampling)


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer."""

    text: str
    """The assistant's words."""
    temperature: float
    """With which it was drawn."""
    reward: float
    """What the reward model gives for it."""


def main(config: RejectConfig) -> None:
    """Draw, score, keep, and write; whole or not at all.

    Raises:
        InputError: a model, the prompts or the sampling is wrong; or no prompt has a whole answer.
    """
    prompts = list(read_prompts(config.prompts, config.max_prompts))
    head = open_reward_model(config.reward)
    answers = _draw(config, [prompt for _, prompt in prompts])
    head.model.to(open_device(config.engine.device))
    rewards = answer_rewards(head, [prompt for _, prompt in prompts], [list(own) for own in answers])
    scored = [
        [Sample(text, temperature, reward) for (text, temperature), reward in zip(own.items(), given, strict=True)]
        for own, given in zip(answers, rewards, strict=True)
    ]
    _write(config, prompts, scored)


def _draw(config: RejectConfig, prompts: Sequence[Messages]) -> list[dict[str, float]]:
    """The different whole answers to each prompt, and the temperature at which each came up first."""
    engine = load_engine(config.model, config.engine)
    drawn = draw_answers(
        engine,
        prompts,
        samples=config.samples,
        temperatures=config.temperatures,
        sampling=config.sampling,
        seed=config.seed,
    )
    found: list[dict[str, float]] = []
    for answers in drawn:
        own: dict[str, float] = {}
        for answer in answers:
            if answer.finished and answer.text:
                own.setdefault(answer.text, answer.temperature)
        found.append(own)
    return found


def _write(config: RejectConfig, prompts: Sequence[tuple[str, Messages]], scored: Sequence[Sequence[Sample]]) -> None:
    kept: list[dict[str, Any]] = []
    for (where, prompt), own in zip(prompts, scored, strict=True):
        if not own:
            continue
        best = max(own, key=lambda sample: sample.reward)
        mean = statistics.fmean(sample.reward for sample in own)
        if best.reward - mean >= config.least_gain:
            answer = {"role": "assistant", "content": best.text}
            facts = {"reward": best.reward, "mean_reward": mean, "temperature": best.temperature, "samples": len(own)}
            kept.append({"id": where, "messages": [*prompt, answer], **facts})
    if not kept:
        raise InputError(
            f"None of the {len(prompts):,} prompts has an answer to keep: no answer ended by itself within "
            f"{config.sampling.max_tokens} tokens, or none was better than the others by least_gain."
        )
    results = _summary(config, scored, kept)
    with atomic_path(config.output) as folder:
        folder.mkdir()
        write_jsonl(folder / "conversations.jsonl", kept)
        write_jsonl(
            folder / "samples.jsonl",
            (
                {"id": where, "prompt": prompt, "answer": sample.text, "reward": sample.reward,
                 "temperature": sample.temperature}
                for (where, prompt), own in zip(prompts, scored, strict=True)
                for sample in own
            ),
        )  # fmt: skip
        inputs = {str(path): content_hash(path) for path in (config.model, config.reward, config.prompts)}
        Manifest("reject", to_plain(config), inputs, results).write(folder)
    say(f"Wrote {len(kept):,} conversations to {config.output / 'conversations.jsonl'}")


def _summary(
    config: RejectConfig, scored: Sequence[Sequence[Sample]], kept: Sequence[dict[str, Any]]
) -> dict[str, float]:
    drawn = len(config.temperatures) * config.samples * len(scored)
    everything = [sample for own in scored for sample in own]
    results: dict[str, float] = {
        "num_prompts": len(scored),
        "num_kept": len(kept),
        "share_whole_and_different": len(everything) / drawn,
        "mean_reward": statistics.fmean(sample.reward for sample in everything),
        "mean_reward_kept": statistics.fmean(line["reward"] for line in kept),
    }
    say(
        f"{len(kept):,} of {len(scored):,} prompts kept; {len(everything):,} of {drawn:,} answers are whole and "
        f"different; mean reward {results['mean_reward']:.3f}, of those kept {results['mean_reward_kept']:.3f}"
    )
    for temperature in config.temperatures:
        own = [sample.reward for sample in everything if sample.temperature == temperature]
        wins = sum(line["temperature"] == temperature for line in kept)
        if own:
            results[f"mean_reward_at_{temperature}"] = statistics.fmean(own)
            say(f"temperature {temperature}: mean reward {statistics.fmean(own):.3f}, {wins:,} of those kept")
    return results
