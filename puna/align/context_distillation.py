"""`puna distil_context`: answers given under a safety preprompt, to be learnt without it.

Context distillation for safety as in Llama 2 (arXiv:2307.09288, section 4.2.4): a preprompt makes a model answer more
safely; fine-tuned on those answers to the bare prompts, it answers so by itself. Preprompts fit the prompt's risk
category. On harmless prompts they can make answers worse, so an answer is kept only if a reward model likes it better
than the original one (same section, "Rejecting Context Distillation Errors with the Safety Reward Model").
"""

import math
import random
import statistics
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from puna.align.scoring import answer_rewards, open_reward_model
from puna.batches.preferences import Messages, read_prompts
from puna.batches.tables import read_table
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
from puna.runtime.seeds import derive_seed

GENERAL = "general"
"""The category of prompts that have none."""

Preprompts = Mapping[str, Sequence[str]]
"""Risk category -> what may be said before its prompts."""


@dataclass(frozen=True, kw_only=True)
class DistilContextConfig:
    """Answer prompts under a safety preprompt, and keep prompt and answer without it, to learn from."""

    model: Path
    """Model directory that answers, and that is to learn from it."""
    prompts: Path
    """A file of prompts, or a folder of such files: a column "prompt", or conversations and preferences, of which the
    last answers are left out. Take adversarial ones: on harmless prompts the preprompt makes answers evasive."""
    output: Path
    """Gets conversations.jsonl, which `puna finetune` learns from; samples.jsonl with every answer; and, with `reward`,
    preferences.jsonl, in which the kept answers are better than the original ones."""
    category_column: str = ""
    """The column of `prompts` that names a prompt's risk category; empty takes the general preprompts for all."""
    preprompts: Path | None = None
    """A file of preprompts by category, as puna/align/preprompts.toml, which is taken when absent. It has the
    categories general, illicit, hateful, self_harm, unqualified_advice, privacy and children."""
    reward: Path | None = None
    """Directory of a safety reward model (`puna reward`): an answer is kept only if it likes it better than the model's
    answer without preprompt. Without, every whole answer is kept."""
    least_gain: float = 0.0
    """How much better, in the reward model's units."""
    samples: int = 1
    """Answers to each prompt, each under a preprompt of its category, of which the reward model takes the best."""
    temperature: float = 1.0
    """How freely answers are drawn."""
    max_prompts: int = 0
    """Take at most so many prompts, from the first on; 0 takes all."""
    seed: int = 0
    """Of the drawing, and of which preprompt a prompt gets."""
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_tokens=256))
    """How answers go on, and when they end; `temperature` and `seed` are those above."""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(max_rows=16))
    """Where the answering model computes."""

    def __post_init__(self) -> None:
        if self.samples < 1 or self.max_prompts < 0 or self.temperature < 0:
            raise ValueError("samples has to be at least 1; max_prompts and temperature cannot be negative.")
        if self.reward is None and (self.samples > 1 or self.least_gain):
            raise ValueError("samples above 1 and least_gain need a reward model to choose by: set reward.")
        check_sampling(self.sampling, "temperature")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked."""

    where: str
    """File and line."""
    messages: Messages
    """Without preprompt."""
    category: str
    """Of risk."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to a prompt."""

    preprompt: str
    """Under which it was given; empty for the original answer."""
    text: str
    """The assistant's words."""
    finished: bool
    """It ended by itself, and says something."""
    reward: float | None
    """What the reward model gives for it as an answer to the bare prompt; None without reward model, or where it is not
    finished."""


def main(config: DistilContextConfig) -> None:
    """Draw, score, keep, and write; whole or not at all.

    Raises:
        InputError: a model, the prompts, a category or the preprompts are wrong; or no answer is to be kept.
    """
    preprompts = read_preprompts(config.preprompts)
    prompts = list(_read(config, preprompts))
    head = None if config.reward is None else open_reward_model(config.reward)
    chosen = [_choose(preprompts[prompt.category], number, config) for number, prompt in enumerate(prompts)]
    if head is not None:
        chosen = [["", *texts] for texts in chosen]  # the original answer, to compare with
    engine = load_engine(config.model, config.engine)
    drawn = draw_answers(
        engine,
        [_under(text, prompt.messages) for prompt, texts in zip(prompts, chosen, strict=True) for text in texts],
        samples=1,
        temperatures=[config.temperature],
        sampling=config.sampling,
        seed=config.seed,
    )
    found = iter([answer for [answer] in drawn])
    each = [
        [(text, answer.text, answer.finished and bool(answer.text)) for text in texts for answer in [next(found)]]
        for texts in chosen
    ]
    rewards: list[list[float]] = [[] for _ in prompts]
    if head is not None:
        head.model.to(open_device(config.engine.device))
        whole = [[text for _, text, finished in own if finished] for own in each]
        rewards = answer_rewards(head, [prompt.messages for prompt in prompts], whole)
    answers = []
    for own, given in zip(each, map(iter, rewards), strict=True):
        answers.append([Answer(*facts, next(given) if facts[2] and head is not None else None) for facts in own])
    _write(config, prompts, answers)


def read_preprompts(path: Path | None) -> Preprompts:
    """The preprompts of a file, or those that come with Puna.

    Raises:
        InputError: the file is not as preprompts.toml, or has no general ones.
    """
    shipped = files("puna.align").joinpath("preprompts.toml")
    try:
        text = shipped.read_text(encoding="utf-8") if path is None else path.read_text(encoding="utf-8")
        found = {str(each["category"]): each["texts"] for each in tomllib.loads(text)["preprompt"]}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a file of preprompts ({error}): it has tables [[preprompt]] with category and texts, as "
            "puna/align/preprompts.toml."
        ) from error
    for category, texts in found.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise InputError(f"{path}: the texts of category {category!r} are not a list of texts.")
    if GENERAL not in found:
        raise InputError(f"{path} has no category {GENERAL!r}, for prompts without a category.")
    return found


def _read(config: DistilContextConfig, preprompts: Preprompts) -> Iterator[Prompt]:
    """The prompts with their categories."""
    found = read_prompts(config.prompts, config.max_prompts)
    for (where, messages), row in zip(found, read_table(config.prompts), strict=False):
        category = row.values.get(config.category_column) or GENERAL
        if category not in preprompts:
            raise InputError(
                f"{where}: there is no preprompt for the category {category!r}, only for {', '.join(preprompts)}. "
                "Rename it, or give a file with its own preprompts: --set preprompts=FILE."
            )
        yield Prompt(where, messages, str(category))


def _choose(texts: Sequence[str], number: int, config: DistilContextConfig) -> list[str]:
    """The preprompts of the answers to the `number`-th prompt: in an order of its own, each as often as the others."""
    order = list(texts)
    random.Random(derive_seed(config.seed, "preprompt", number)).shuffle(order)
    return [order[sample % len(order)] for sample in range(config.samples)]


def _under(preprompt: str, messages: Messages) -> Messages:
    """A prompt under a preprompt; a system message of its own stays, after it."""
    if not preprompt:
        return messages
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{preprompt}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": preprompt}, *messages]


def _with_answer(messages: Messages, text: str) -> Messages:
    return [*messages, {"role": "assistant", "content": text}]


def _keep(own: Sequence[Answer], least_gain: float) -> tuple[Answer | None, str]:
    """The answer to learn, and why there is none."""
    whole = [answer for answer in own if answer.preprompt and answer.finished]
    if not whole:
        return None, "no whole answer"
    if whole[0].reward is None:
        return whole[0], ""
    original = own[0]
    best = max(whole, key=lambda answer: -math.inf if answer.reward is None else answer.reward)
    assert best.reward is not None
    # An original that never ended is no answer: whatever is whole is better.
    if original.reward is None or best.reward > original.reward + least_gain:
        return best, ""
    return None, "not better than the original"


def _write(config: DistilContextConfig, prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]) -> None:
    kept: list[dict[str, Any]] = []
    preferences: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    for prompt, own in zip(prompts, answers, strict=True):
        best, reason = _keep(own, config.least_gain)
        if best is None:
            reasons[reason] += 1
            continue
        line: dict[str, Any] = {"id": prompt.where, "messages": _with_answer(prompt.messages, best.text)}
        line |= {"category": prompt.category, "preprompt": best.preprompt}
        if best.reward is not None:
            line |= {"reward": best.reward, "original_reward": own[0].reward}
            if own[0].finished:
                preferences.append({"prompt": prompt.messages, "chosen": best.text, "rejected": own[0].text})
        kept.append(line)
    left_out = "; ".join(f"{count:,}: {reason}" for reason, count in reasons.most_common())
    if not kept:
        raise InputError(f"None of the {len(prompts):,} prompts has an answer to keep ({left_out}).")
    results: dict[str, Any] = {"num_prompts": len(prompts), "num_kept": len(kept), "num_left_out": dict(reasons)}
    results["kept_by_category"] = dict(Counter(line["category"] for line in kept))
    gains = [line["reward"] - line["original_reward"] for line in kept if line.get("original_reward") is not None]
    if gains:
        results["mean_gain"] = statistics.fmean(gains)
    with atomic_path(config.output) as folder:
        folder.mkdir()
        write_jsonl(folder / "conversations.jsonl", kept)
        if config.reward is not None:
            write_jsonl(folder / "preferences.jsonl", preferences)
        write_jsonl(
            folder / "samples.jsonl",
            (
                {"id": prompt.where, "prompt": prompt.messages, "category": prompt.category,
                 "preprompt": answer.preprompt, "answer": answer.text, "finished": answer.finished,
                 "reward": answer.reward}
                for prompt, own in zip(prompts, answers, strict=True)
                for answer in own
            ),
        )  # fmt: skip
        paths = [config.model, config.prompts, config.preprompts, config.reward]
        inputs = {str(path): content_hash(path) for path in paths if path is not None}
        Manifest("distil_context", to_plain(config), inputs, results).write(folder)
    gained = f"; mean gain in reward {statistics.fmean(gains):.3f}" if gains else ""
    say(
        f"Wrote {len(kept):,} of {len(prompts):,} conversations to {config.output / 'conversations.jsonl'}{gained}"
        + (f". Left out: {left_out}" if left_out else "")
    )
