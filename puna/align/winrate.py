"""`puna winrate`: how often a model's answers are better than another's, and how far it has moved from it.

Both answer the same prompts, once greedily and some times freely. A reward model gives each answer a number without
seeing the other, so there is no first or second place to favour. How far the model has moved is its divergence from the
baseline on its own free answers, KL(model || baseline), in nats an answer: what a higher reward was paid with (Gao et
al. 2022, arXiv:2210.10760).

Shapes: B rows, T tokens, N tokens of an answer, D model dimension, V vocabulary.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from puna.align.scoring import answer_rewards, open_reward_model
from puna.batches.preferences import Messages, read_prompts
from puna.config import to_plain
from puna.evaluate.rating.winrates import length_controlled
from puna.evaluate.statistics.intervals import estimate, wilson
from puna.infer.config import EngineConfig
from puna.infer.draw import Drawn, draw_answers
from puna.infer.load import load_engine
from puna.infer.sampling import SamplingParams
from puna.model.transformer import Transformer
from puna.runtime.devices import open_device
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, write_jsonl
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import progress, say
from puna.tokenizer.chat import render_chat
from puna.tokenizer.load import load_tokenizer
from puna.weights.load import load_model

_TOKENS_AT_ONCE = 256
"""Of which the logits of both models are held."""


@dataclass(frozen=True, kw_only=True)
class WinRateConfig:
    """Let two models answer held-out prompts, and a reward model say whose answers are better."""

    model: Path
    """Model directory to measure."""
    baseline: Path
    """Model directory to measure it beside, such as the one that it was trained from."""
    judge: Path
    """Directory of a reward model (`puna reward`). One that the model was trained against likes what it was made to
    like; take one that was learnt from other preferences."""
    prompts: Path
    """Prompts that neither model was trained on: a file, or a folder of such files, as for `puna reject`."""
    output: Path
    """Gets comparisons.jsonl, with every greedy answer and its reward, and puna.json with the figures."""
    samples: int = 2
    """Free answers to each prompt (temperature 1), besides the greedy one; 0 leaves them and the divergence out."""
    max_tokens: int = 128
    """Answers are cut off there, and judged as they are."""
    max_prompts: int = 0
    """Take at most so many prompts, from the first on; 0 takes all."""
    seed: int = 0
    """Of the drawing."""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(max_rows=16))
    """Where both models answer."""

    def __post_init__(self) -> None:
        if self.samples < 0 or self.max_tokens < 1 or self.max_prompts < 0:
            raise ValueError("samples and max_prompts cannot be negative, and max_tokens has to be at least 1.")


@dataclass(frozen=True, slots=True)
class Answered:
    """A model's answers to all prompts, and what the judge gives for them."""

    greedy: list[Drawn]
    """One to each prompt."""
    free: list[list[Drawn]]
    """Those drawn at temperature 1, to each prompt."""
    greedy_rewards: list[float]
    """Of `greedy`."""
    free_rewards: list[list[float]]
    """Of `free`."""

    def rewarded(self, name: Literal["greedy", "free"]) -> list[list[tuple[float, int]]]:
        """Reward and number of tokens of each answer of a kind, prompt by prompt."""
        if name == "greedy":
            return [[(reward, len(own.ids))] for own, reward in zip(self.greedy, self.greedy_rewards, strict=True)]
        return [
            [(reward, len(answer.ids)) for answer, reward in zip(own, rewards, strict=True)]
            for own, rewards in zip(self.free, self.free_rewards, strict=True)
        ]


def main(config: WinRateConfig) -> None:
    """Answer, judge, measure, and write; whole or not at all.

    Raises:
        InputError: a model, the judge or the prompts are wrong.
    """
    where, prompts = zip(*read_prompts(config.prompts, config.max_prompts), strict=True)
    if config.samples and load_tokenizer(config.model).hash != load_tokenizer(config.baseline).hash:
        raise InputError(
            f"{config.model} and {config.baseline} have different tokenizers, so the divergence of one from the other "
            "cannot be measured. Set samples=0 to compare their greedy answers only."
        )
    judge = open_reward_model(config.judge)
    judge.model.to(open_device(config.engine.device))
    sides = []
    for directory in (config.model, config.baseline):
        greedy, free = _answers(config, directory, prompts)
        rewards = answer_rewards(
            judge,
            prompts,
            [[answer.text for answer in (first, *more)] for first, more in zip(greedy, free, strict=True)],
        )
        sides.append(Answered(greedy, free, [own[0] for own in rewards], [own[1:] for own in rewards]))
    ours, theirs = sides
    results = figures(ours, theirs)
    if config.samples:
        results |= _divergence(config, prompts, ours.free)
    with atomic_path(config.output) as folder:
        folder.mkdir()
        rows = zip(where, prompts, ours.greedy, theirs.greedy, ours.greedy_rewards, theirs.greedy_rewards, strict=True)
        write_jsonl(
            folder / "comparisons.jsonl",
            (
                {"id": place, "prompt": prompt, "answer": own.text, "baseline_answer": other.text, "reward": reward,
                 "baseline_reward": other_reward}
                for place, prompt, own, other, reward, other_reward in rows
            ),
        )  # fmt: skip
        paths = (config.model, config.baseline, config.judge, config.prompts)
        inputs = {str(path): content_hash(path) for path in paths}
        Manifest("winrate", to_plain(config), inputs, results).write(folder)
    for name, value in results.items():
        say(f"{name:34} {value:,.4f}" if isinstance(value, float) else f"{name:34} {value:,}")


def _answers(
    config: WinRateConfig, directory: Path, prompts: Sequence[Messages]
) -> tuple[list[Drawn], list[list[Drawn]]]:
    """A model's greedy answer and its free ones to each prompt."""
    engine = load_engine(directory, config.engine)
    sampling = SamplingParams(max_tokens=config.max_tokens)

    def drawn(samples: int, temperature: float) -> list[list[Drawn]]:
        return draw_answers(
            engine, prompts, samples=samples, temperatures=(temperature,), sampling=sampling, seed=config.seed
        )

    return [own[0] for own in drawn(1, 0.0)], drawn(config.samples, 1.0)


def figures(ours: Answered, theirs: Answered) -> dict[str, float]:
    """What is compared of two models' answers to the same prompts.

    A tie is half a win. For each prompt the share of pairs (an answer of ours, one of theirs) that ours win is one
    value between 0 and 1; the interval is Wilson's, as if it were a coin, which is never too narrow. At equal length is
    what a logistic regression gives for answers that are (Dubois et al. 2024, arXiv:2404.04475).
    """
    found: dict[str, float] = {"num_prompts": len(ours.greedy)}
    kinds: tuple[Literal["greedy", "free"], ...] = ("greedy", "free") if ours.free[0] else ("greedy",)
    for name in kinds:
        both = list(zip(ours.rewarded(name), theirs.rewarded(name), strict=True))
        won = [statistics.fmean((x > y) + (x == y) / 2 for x, _ in own for y, _ in other) for own, other in both]
        found[f"{name}_win_rate"] = statistics.fmean(won)
        found[f"{name}_win_rate_low"], found[f"{name}_win_rate_high"] = wilson(round(sum(won)), len(won))
        pairs = [(str(n), *x, *y) for n, (own, other) in enumerate(both) for x in own for y in other]
        prompts, rewards, lengths, other_rewards, other_lengths = zip(*pairs, strict=True)
        scores = [(x > y) + (x == y) / 2 for x, y in zip(rewards, other_rewards, strict=True)]
        controlled, interval = length_controlled(scores, lengths, other_lengths, prompts)
        found[f"{name}_win_rate_equal_length"] = controlled
        found[f"{name}_win_rate_equal_length_low"], found[f"{name}_win_rate_equal_length_high"] = interval
        found[f"{name}_tie_rate"] = statistics.fmean(score == 0.5 for score in scores)
        gains = [statistics.fmean(x for x, _ in own) - statistics.fmean(y for y, _ in other) for own, other in both]
        found[f"{name}_reward"] = statistics.fmean(statistics.fmean(x for x, _ in own) for own, _ in both)
        gain = estimate(gains)
        found[f"{name}_reward_gain"], found[f"{name}_reward_gain_error"] = gain.mean, gain.standard_error
    for prefix, side in (("", ours), ("baseline_", theirs)):
        everything = [*side.greedy, *(answer for own in side.free for answer in own)]
        found[f"{prefix}mean_tokens"] = statistics.fmean(len(answer.ids) for answer in everything)
        found[f"{prefix}share_cut_off"] = statistics.fmean(float(not answer.finished) for answer in everything)
    return found


def _divergence(
    config: WinRateConfig, prompts: Sequence[Messages], answers: Sequence[Sequence[Drawn]]
) -> dict[str, float]:
    """Mean divergence of an answer, in nats, with its standard error."""
    device = open_device(config.engine.device)
    model, baseline = (load_model(path, dtype=torch.float32, device=device) for path in (config.model, config.baseline))
    tokenizer = load_tokenizer(config.model)
    values, clusters = [], []
    with progress("Measuring the divergence", total=sum(map(len, answers))) as advance:
        for number, (prompt, own) in enumerate(zip(prompts, answers, strict=True)):
            asked = render_chat(tokenizer, prompt, add_generation_prompt=True).ids
            for answer in own:
                values.append(answer_divergence(model, baseline, asked, answer.ids))
                clusters.append(number)
                advance()
    found = estimate(values, clusters)
    return {"divergence_nats": found.mean, "divergence_nats_error": found.standard_error}


@torch.no_grad()
def answer_divergence(model: Transformer, baseline: Transformer, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """The sum over an answer's tokens of KL(model || baseline) of the token there, in nats.

    Its mean over answers that the model drew is the divergence of whole answers, with less variance than the mean of
    their log ratios (Amini et al. 2025, arXiv:2504.10637, section 4).
    """
    ids = torch.tensor([[*prompt, *answer]], device=model.embedding.weight.device)

    def told(each: Transformer) -> Tensor:
        """The layers' result wherever the next token is the answer's, [N, D]."""
        h_BTD: Tensor = each(ids, head=lambda h_BTD, _: h_BTD)
        return h_BTD[0, len(prompt) - 1 : -1]

    total, own_ND, other_ND = 0.0, told(model), told(baseline)
    for start in range(0, len(own_ND), _TOKENS_AT_ONCE):
        chosen = slice(start, start + _TOKENS_AT_ONCE)
        own_NV = model.output(own_ND[chosen]).float().log_softmax(-1)
        other_NV = baseline.output(other_ND[chosen]).float().log_softmax(-1)
        total += float((own_NV.exp() * (own_NV - other_NV)).sum())
    return total
