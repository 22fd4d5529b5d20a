"""What a reward model makes of answers, outside its training."""

from collections.abc import Sequence
from pathlib import Path

import torch

from puna.align.reward_loss import HEAD
from puna.batches.preferences import Messages
from puna.peft.heads import HeadModel, last_logits, load_head_model
from puna.runtime.errors import InputError
from puna.runtime.progress import progress
from puna.tokenizer.chat import render_chat


def open_reward_model(directory: Path) -> HeadModel:
    """What `puna reward` wrote (model/ or adapter/), in float32.

    Raises:
        InputError: the directory holds no model with a head, or one that gives no single number, or no chat template.
    """
    head = load_head_model(directory, dtype=torch.float32)
    if len(head.spec.labels) != 1 or head.spec.architecture != HEAD.architecture:
        raise InputError(f"The head in {directory} has {len(head.spec.labels)} outputs; a reward model has one.")
    if head.tokenizer.chat_template is None:
        raise InputError(f"The reward model in {directory} has no chat template, so it cannot read answers.")
    return head


def answer_rewards(head: HeadModel, prompts: Sequence[Messages], answers: Sequence[Sequence[str]]) -> list[list[float]]:
    """The reward of each answer to each prompt."""
    rendered = [
        render_chat(head.tokenizer, [*prompt, {"role": "assistant", "content": text}]).ids
        for prompt, own in zip(prompts, answers, strict=True)
        for text in own
    ]
    rewards = iter(score(head, rendered))
    return [[next(rewards) for _ in own] for own in answers]


def score(head: HeadModel, texts: Sequence[Sequence[int]]) -> list[float]:
    """The reward of each text, given by its ids."""
    with progress("Scoring", total=len(texts)) as advance:
        return [float(reward) for reward in last_logits(head, texts, advance)[:, 0]]
