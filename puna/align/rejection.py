"""`puna reject`: answer each prompt several times and keep the answer that a reward model likes best.

Rejection sampling as in Llama 2 (arXiv:2307.09288, section 3.2.3) and Llama 3 (arXiv:2407.21783, section 4.2.2).

Shapes: B texts, T tokens.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puna.align.reward import HEAD
from puna.align.rows import open_tokenizer
from puna.batches.packing import IGNORE, PADDING, TokenBatch
from puna.batches.preferences import Messages, read_prompts
from puna.config import to_plain
from puna.infer.config import EngineConfig
from puna.infer.load import load_engine
from puna.infer.sampling import SamplingParams
from puna.peft.heads import HeadModel, head_logits, load_head_model
from puna.runtime.devices import open_device
from puna.runtime.errors import InputError
from puna.runtime.files import atomic_path, write_jsonl
from puna.runtime.manifest import Manifest, content_hash
from puna.runtime.progress import progress, say
from puna.runtime.seeds import derive_seed
from puna.tokenizer.chat import render_chat

_SCORED_AT_ONCE = 16


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
        if self.sampling.temperature != 1.0 or self.sampling.seed is not None:
            raise ValueError("Set temperatures and seed instead of sampling.temperature and sampling.seed.")


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
    prompts = list(_take(config))
    head = load_head_model(config.reward, dtype=torch.float32)
    if len(head.spec.labels) != 1 or head.spec.architecture != HEAD.architecture:
        raise InputError(f"The head in {config.reward} has {len(head.spec.labels)} outputs; a reward model has one.")
    if head.tokenizer.chat_template is None:
        raise InputError(f"The reward model in {config.reward} has no chat template, so it cannot read answers.")
    answers = _draw(config, [prompt for _, prompt in prompts])
    chats = [
        render_chat(head.tokenizer, [*prompt, {"role": "assistant", "content": text}]).ids
        for (_, prompt), own in zip(prompts, answers, strict=True)
        for text in own
    ]
    head.model.to(open_device(config.engine.device))
    scores = iter(score(head, chats))
    scored = [[Sample(text, temperature, next(scores)) for text, temperature in own.items()] for own in answers]
    _write(config, prompts, scored)


def _take(config: RejectConfig) -> Iterator[tuple[str, Messages]]:
    """Where each prompt stands, and it."""
    for number, found in enumerate(read_prompts(config.prompts), start=1):
        yield found
        if number == config.max_prompts:
            return


def _draw(config: RejectConfig, prompts: Sequence[Messages]) -> list[dict[str, float]]:
    """The different whole answers to each prompt, and the temperature at which each came up first."""
    tokenizer = open_tokenizer(config.model, "keep")
    engine = load_engine(config.model, config.engine)
    requests, params = [], []
    for number, prompt in enumerate(prompts):
        ids = render_chat(tokenizer, prompt, add_generation_prompt=True).ids
        for temperature in config.temperatures:
            for sample in range(config.samples):
                seed = derive_seed(config.seed, "answer", number, sample) % 2**63
                requests.append(ids)
                params.append(replace(config.sampling, temperature=temperature, seed=seed))
    with progress("Answering", total=len(requests)) as advance:
        completions = iter(engine.generate(requests, params, new_text=True, finished=advance))
    found: list[dict[str, float]] = []
    for _ in prompts:
        own: dict[str, float] = {}
        for temperature in config.temperatures:
            for _ in range(config.samples):
                completion = next(completions)
                text = completion.text.strip()
                if completion.finish_reason == "stop" and text:
                    own.setdefault(text, temperature)
        found.append(own)
    return found


@torch.no_grad()
def score(head: HeadModel, texts: Sequence[Sequence[int]]) -> list[float]:
    """The reward of each text, given by its ids."""
    device = head.model.embedding.weight.device
    by_length = sorted(range(len(texts)), key=lambda n: len(texts[n]))
    found = torch.empty(len(texts))
    with progress("Scoring", total=len(texts)) as advance:
        for start in range(0, len(texts), _SCORED_AT_ONCE):
            chosen = by_length[start : start + _SCORED_AT_ONCE]
            batch, last_B = _batch([texts[n] for n in chosen], head.tokenizer.pad_id)
            rewards_BT = head_logits(head.model, batch.to(device), head.spec.module, head.attention)[:, :, 0].cpu()
            found[chosen] = rewards_BT.gather(1, last_B[:, None]).squeeze(1)
            advance(len(chosen))
    return [float(value) for value in found]


def _batch(texts: Sequence[Sequence[int]], pad_id: int) -> tuple[TokenBatch, Tensor]:
    """Texts as rows, filled up on the right, and the place of each one's last token."""
    lengths_B = torch.tensor([len(text) for text in texts])
    places_T = torch.arange(int(lengths_B.max()))
    ids_BT = torch.full((len(texts), len(places_T)), pad_id)
    for row, text in enumerate(texts):
        ids_BT[row, : len(text)] = torch.tensor(text)
    documents_BT = torch.where(places_T < lengths_B[:, None], 0, PADDING)
    labels_BT = torch.full_like(ids_BT, IGNORE)
    return TokenBatch(ids_BT, labels_BT, places_T.expand_as(ids_BT).clone(), documents_BT), lengths_B - 1


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
