"""Answers to questions with a known answer: how likely the right one was, and how near the given one came."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from puna.evaluate.likelihood import bits_per_byte, total_nats
from puna.evaluate.scorers import token_f1
from puna.infer.engine import Engine
from puna.infer.sampling import SamplingParams
from puna.runtime.errors import InputError
from puna.runtime.progress import progress
from puna.tokenizer.chat import render_chat


@dataclass(frozen=True, slots=True)
class Answer:
    """One question asked."""

    question: str
    """The last message before the reference."""
    reference: str
    """The answer that was hoped for."""
    answer: str
    """The answer that was given, greedily."""
    word_f1: float
    """Overlap of the two, see `word_f1`."""
    num_tokens: int
    """Tokens generated."""


def ask(engine: Engine, conversations: Sequence[dict[str, Any]], max_tokens: int) -> list[Answer]:
    """Answer every conversation's last question greedily.

    Raises:
        InputError: a conversation does not end in an assistant's message, which is the reference.
    """
    prompts = [
        render_chat(engine.tokenizer, conversation["messages"][:-1], add_generation_prompt=True).ids
        for conversation in map(_checked, conversations)
    ]
    greedy = SamplingParams(max_tokens=max_tokens, temperature=0)
    with progress("Answering held-out questions", total=len(prompts)) as advance:
        completions = engine.generate(prompts, greedy, finished=advance)
    answers = []
    for conversation, completion in zip(conversations, completions, strict=True):
        question, reference = (message["content"] for message in conversation["messages"][-2:])
        given = completion.text.strip()
        answers.append(Answer(question, reference, given, word_f1(given, reference), len(completion.ids)))
    return answers


def answer_bits_per_byte(engine: Engine, conversations: Sequence[dict[str, Any]]) -> float:
    """Bits per byte of the reference answers, given their questions; ends of turn count as tokens, not as bytes."""
    rendered = [render_chat(engine.tokenizer, _checked(conversation)["messages"]) for conversation in conversations]
    nats, _ = total_nats(
        engine.model,
        [(chat.ids, chat.mask) for chat in rendered],
        window=engine.max_context,
        title="Measuring likelihood of answers",
    )
    return bits_per_byte(nats, sum(len(c["messages"][-1]["content"].encode()) for c in conversations))


def shuffled_word_f1(answers: Sequence[Answer]) -> float:
    """Mean word F1 of each answer with the next question's reference: what answers of the right style get by chance."""
    references = [answer.reference for answer in answers]
    pairs = zip(answers, references[1:] + references[:1], strict=True)
    return sum(word_f1(answer.answer, reference) for answer, reference in pairs) / len(answers)


def word_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, case and punctuation aside (SQuAD, arXiv:1606.05250)."""
    given, wanted = (re.findall(r"\w+", text.lower()) for text in (answer, reference))
    return token_f1(given, wanted)


def _checked(conversation: dict[str, Any]) -> dict[str, Any]:
    messages = conversation.get("messages")
    if not isinstance(messages, list) or len(messages) < 2 or messages[-1].get("role") != "assistant":
        raise InputError('A question to evaluate needs "messages" that end with the assistant\'s reference answer.')
    return conversation
