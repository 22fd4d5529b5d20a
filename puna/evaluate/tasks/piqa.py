"""PIQA: which of two ways of doing something works? (Bisk et al. 2020, arXiv:1911.11641)"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from puna.evaluate.tasks.choice import MultipleChoice
from puna.evaluate.tasks.hub import Published, read_questions
from puna.evaluate.tasks.task import Example


@dataclass(frozen=True, kw_only=True)
class Piqa(MultipleChoice):
    """PIQA. Reads piqa.jsonl.

    Question: How do I ready a guinea pig cage for it's new occupants?
    Answer:
      + Provide the guinea pig with a cage full of a few inches of bedding made of ripped paper strips, ...
      - Provide the guinea pig with a cage full of a few inches of bedding made of ripped jeans material, ...
    """

    kind: Literal["piqa"] = "piqa"
    """Its name."""

    def read(self, data: Path | None) -> list[Example]:
        """The questions."""
        examples = []
        for row in read_questions(data, "piqa.jsonl", PUBLISHED):
            choices = row.texts("choices")
            gold = row.index("gold", len(choices))
            examples.append(
                Example(
                    id=row.where.rpartition(" ")[2],
                    where=row.where,
                    prompt=f"{row.get('query', str)}Answer:",
                    target=f" {choices[gold]}",
                    choices=choices,
                    gold=gold,
                )
            )
        return examples


def _from_hub(row: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    choices = [row["sol1"], row["sol2"]]
    return {"query": f"Question: {row['goal']}\n", "choices": choices, "gold": int(row["label"])}


PUBLISHED = Published("baber/piqa", "validation", _from_hub)
