"""Preferences in the forms in which people publish them: a prompt, and answers to it in order, the best first.

transcripts     {"chosen", "rejected"}: texts "\\n\\nHuman: ... \\n\\nAssistant: ..."                    HH-RLHF
pairs           {"prompt", "chosen", "rejected"}: texts, messages, or lists of messages               TRL
                {"instruction", "input", "chosen", "rejected"}, {"conversations", "chosen", "rejected"}
                {"question", "response_j", "response_k"}                                   Stack Exchange
common start    {"chosen", "rejected"}: lists of messages that begin alike                            TRL
edited          any pair with "edited": an answer that somebody made better than the chosen one
rankings        {"prompt", "answers"}: the best first                                         InstructGPT
judged          {"prompt", "completion", "label"}, {"messages", "label"}: one answer, good or bad      KTO

A column "strength" says how much better the first answer is than the second: one of `STRENGTHS`.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from puna.batches.conversations import to_conversation
from puna.batches.tables import Row, read_table
from puna.runtime.errors import InputError

Messages = list[dict[str, Any]]

STRENGTHS = ("negligibly better", "slightly better", "better", "significantly better")
"""How much better, in the words of the Llama 2 paper (arXiv:2307.09288, section 3.2.1), the least first."""

GOOD, BAD, MISMATCHED = 0, 1, -1
"""The rank of a judged answer, and of an answer to something else that stands beside it (`with_mismatched`)."""


@dataclass(frozen=True, slots=True)
class Preference:
    """Answers to one prompt, in order."""

    where: str
    """File and line, for errors."""
    prompt: Messages
    """What was said before; ends with the user."""
    answers: tuple[Messages, ...]
    """What may follow, the best first; one alone was judged by itself."""
    ranks: tuple[int, ...]
    """Place of each answer, 0 being the best; of a judged one GOOD or BAD, of one beside it MISMATCHED."""
    strength: int | None = None
    """How much better the first is than the second: an index into STRENGTHS."""

    @property
    def is_judged(self) -> bool:
        """Whether there is an answer with a judgement, not several in order."""
        return len(self.answers) == 1 or MISMATCHED in self.ranks


def read_preferences(path: Path) -> Iterator[Preference | InputError]:
    """The preferences of a file or folder (`puna.batches.tables.read_table`); for a row that holds none, why not."""
    for row in read_table(path):
        try:
            yield to_preference(row)
        except InputError as error:
            yield error


def to_preference(row: Row) -> Preference:
    """One row as a preference.

    Raises:
        InputError: it is of none of the forms, an answer is empty, or answers are the same; names the line.
    """
    try:
        preference = _read(row)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{row.where} is not a preference: {reason}.") from error
    if not preference.prompt or preference.prompt[-1]["role"] == "assistant":
        raise InputError(f"{row.where}: the prompt does not end with something to answer.")
    for answer in preference.answers:
        if not answer or any(message["role"] not in ("assistant", "tool") for message in answer):
            raise InputError(f"{row.where}: an answer is not the assistant's.")
        if not any(str(message.get("content") or "").strip() or message.get("tool_calls") for message in answer):
            raise InputError(f"{row.where}: an answer is empty.")
    if any(answer in preference.answers[:n] for n, answer in enumerate(preference.answers)):
        raise InputError(f"{row.where}: two answers are the same.")
    return preference


def read_prompts(path: Path, most: int = 0) -> Iterator[tuple[str, Messages]]:
    """Prompts of a file or folder, each with the line that it stands in: a column "prompt" (a text or messages), or
    what was said before the last answers of conversations and preferences.

    Args:
        most: end after so many; 0 takes all.

    Raises:
        InputError: a row has none; names its line. Or there is no row.
    """
    number = 0
    for number, row in enumerate(read_table(path), start=1):
        yield row.where, prompt_of(row)
        if number == most:
            return
    if not number:
        raise InputError(f"There is no prompt in {path}.")


def prompt_of(row: Row) -> Messages:
    """What there is to answer in a row; see `read_prompts`.

    Raises:
        InputError: nothing; names its line.
    """
    if "chosen" in row.values or "answers" in row.values or "label" in row.values:
        prompt = to_preference(row).prompt
    elif "prompt" in row.values:
        prompt = _prompt(row.where, row.values) or []
    else:
        prompt = to_conversation(row).messages
        while prompt and prompt[-1]["role"] in ("assistant", "tool"):
            prompt = prompt[:-1]
    if not prompt or prompt[-1]["role"] == "assistant":
        raise InputError(f"{row.where}: there is nothing to answer.")
    return prompt


def with_mismatched(preferences: Iterable[Preference | InputError]) -> Iterator[Preference | InputError]:
    """To each judged answer the answer before it, which belongs to another prompt (that of the last to the first):
    what KTO measures how far the model is from the reference on (arXiv:2402.01306, section 4.1)."""
    everything = list(preferences)
    judged = [each for each in everything if isinstance(each, Preference) and len(each.answers) == 1]
    others = iter([*judged[-1:], *judged[:-1]])
    for each in everything:
        if isinstance(each, Preference) and len(each.answers) == 1:
            other = next(others)
            yield replace(each, answers=(*each.answers, *other.answers), ranks=(*each.ranks, MISMATCHED))
        else:
            yield each


def _read(row: Row) -> Preference:
    values = row.values
    if "label" in values and "chosen" not in values:
        messages = to_conversation(Row(row.where, {k: v for k, v in values.items() if k != "label"})).messages
        good = _judgement(values["label"])
        return Preference(row.where, messages[:-1], (messages[-1:],), (GOOD if good else BAD,))
    if "response_j" in values:
        values = values | {
            "prompt": values["question"],
            "chosen": values["response_j"],
            "rejected": values["response_k"],
        }
    if "answers" in values:
        answers = list(values["answers"])
        if len(answers) < 2:
            raise ValueError("answers has fewer than two")
    elif "chosen" in values and "rejected" in values:
        answers = [values["chosen"], values["rejected"]]
        if values.get("edited"):
            answers.insert(0, values["edited"])
    else:
        raise ValueError(
            f"it has {', '.join(values) or 'nothing'}; needed are a prompt with chosen and rejected, with answers (the "
            "best first), or with a completion and a label; or transcripts as in HH-RLHF"
        )
    prompt = _prompt(row.where, values)
    if prompt is None:
        conversations = [_transcript(answer) if isinstance(answer, str) else list(answer) for answer in answers]
        shared = _common_start(conversations)
        prompt, sequences = conversations[0][:shared], [each[shared:] for each in conversations]
    else:
        sequences = [_answer(answer) for answer in answers]
    return Preference(row.where, prompt, tuple(sequences), tuple(range(len(sequences))), _strength(values))


def _prompt(where: str, values: dict[str, Any]) -> Messages | None:
    """The conversation so far, where it stands in columns of its own."""
    system = [{"role": "system", "content": values["system"]}] if values.get("system") else []
    if "prompt" in values:
        prompt = values["prompt"]
        return system + (list(prompt) if isinstance(prompt, list) else [{"role": "user", "content": prompt}])
    if "instruction" in values:
        question = "\n\n".join(part for part in (values["instruction"], values.get("input")) if part)
        return [*system, {"role": "user", "content": question}]
    for column in ("conversations", "messages"):
        if column in values:
            return to_conversation(
                Row(where, {key: values[key] for key in (column, "system", "tools") if key in values})
            ).messages
    return None


def _answer(value: Any) -> Messages:
    """An answer that is a text, a message, or a list of messages."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value.strip()}]
    if isinstance(value, dict):
        return to_conversation(Row("", {"conversations": [value]})).messages if "from" in value else [value]
    return list(value)


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def _transcript(text: str) -> Messages:
    """The turns of an HH-RLHF transcript."""
    before, *parts = _TURN.split(text)
    if before.strip() or not parts:
        raise ValueError("a transcript does not begin with Human: or Assistant:")
    turns = [(_SPEAKERS[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]
    if any(one == other for (one, _), (other, _) in pairwise(turns)):
        raise ValueError("the same side speaks twice in a row")
    return [{"role": role, "content": content} for role, content in turns]


def _common_start(conversations: list[Messages]) -> int:
    """Messages that all begin with, but for each one's last."""
    shared = 0
    for turn in zip(*(each[:-1] for each in conversations), strict=False):
        if any(message != turn[0] for message in turn):
            break
        shared += 1
    return shared


def _judgement(label: Any) -> bool:
    if isinstance(label, str) and label.lower() in ("true", "false"):
        return label.lower() == "true"
    if label in (0, 1):
        return bool(label)
    raise ValueError(f"label is {label!r}, and not true or false")


def _strength(values: dict[str, Any]) -> int | None:
    strength = values.get("strength")
    if strength is None or strength == "":
        return None
    if strength not in STRENGTHS:
        raise ValueError(f"strength is {strength!r}, and not one of {', '.join(STRENGTHS)}")
    return STRENGTHS.index(strength)
