"""`puna sums`: additions made up for trying out reinforcement with a reward that can be verified."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.config import to_plain
from puna.runtime.files import atomic_path, write_jsonl
from puna.runtime.manifest import Manifest
from puna.runtime.progress import say
from puna.runtime.seeds import derive_seed


@dataclass(frozen=True, kw_only=True)
class SumsConfig:
    """Make up additions: texts to train a tokenizer and a model on, and questions with their answers."""

    output: Path
    """Gets documents/ (texts), conversations.jsonl (to fine-tune on), prompts.jsonl and held_out.jsonl (questions with
    a column "answer"; the latter's are in no other file)."""
    largest: int = 99
    """The numbers that are added are 0 to this."""
    held_out: int = 200
    """Questions that are kept from training."""
    conversations: int = 2000
    """Questions with worked answers to fine-tune on; the same may come twice."""
    seed: int = 0
    """Of the choice."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out < (self.largest + 1) ** 2:
            raise ValueError(
                f"held_out is {self.held_out}; it has to be above 0 and below the {(self.largest + 1) ** 2} questions "
                "that there are."
            )
        if self.conversations < 1:
            raise ValueError(f"conversations is {self.conversations}; it has to be at least 1.")


def main(config: SumsConfig) -> None:
    """Write all files; whole or not at all."""
    chance = random.Random(derive_seed(config.seed, "sums"))
    numbers = range(config.largest + 1)
    pairs = [(one, other) for one in numbers for other in numbers]
    chance.shuffle(pairs)
    held_out, known = pairs[: config.held_out], pairs[config.held_out :]
    worked = [chance.choice(known) for _ in range(config.conversations)]
    with atomic_path(config.output) as folder:
        (folder / "documents").mkdir(parents=True)
        documents = ({"id": str(n), "text": f"{one}+{other}={one + other}"} for n, (one, other) in enumerate(worked))
        write_jsonl(folder / "documents" / "sums.jsonl", documents)
        write_jsonl(folder / "conversations.jsonl", map(_conversation, _prompts(worked)))
        write_jsonl(folder / "prompts.jsonl", _prompts(known))
        write_jsonl(folder / "held_out.jsonl", _prompts(held_out))
        results = {"num_questions": len(known), "num_held_out_questions": len(held_out)}
        Manifest("sums", to_plain(config), {}, results).write(folder)
    say(f"Wrote {len(known):,} questions, {len(held_out):,} held out, to {config.output}")


def _prompts(pairs: list[tuple[int, int]]) -> Iterator[dict[str, str]]:
    for one, other in pairs:
        yield {"prompt": f"{one}+{other}=", "answer": str(one + other)}


def _conversation(row: dict[str, str]) -> dict[str, Any]:
    sides = {"user": row["prompt"], "assistant": row["answer"]}
    return {"messages": [{"role": role, "content": content} for role, content in sides.items()]}
