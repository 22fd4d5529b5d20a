"""COPA: what is the cause, what the effect? (Roemmele et al. 2011, "Choice of Plausible Alternatives")"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from puna.evaluate.tasks.choice import MultipleChoice
from puna.evaluate.tasks.hub import Published, read_questions
from puna.evaluate.tasks.task import Example


@dataclass(frozen=True, kw_only=True)
class Copa(MultipleChoice):
    """COPA. Reads copa.jsonl.

    As in lm-eval, two blanks stand before an answer, and count as one character of it.

        The man turned on the faucet, therefore
          - the toilet filled with water.
          + water flowed from the spout.
    """

    kind: Literal["copa"] = "copa"
    """Its name."""

    def read(self, data: Path | None) -> list[Example]:
        """The questions."""
        examples = []
        for row in read_questions(data, "copa.jsonl", PUBLISHED):
            choices = tuple(f" {choice}" for choice in row.texts("choices"))
            gold = row.index("gold", len(choices))
            examples.append(
                Example(
                    id=row.where.rpartition(" ")[2],
                    where=row.where,
                    prompt=row.get("query", str),
                    target=f" {choices[gold]}",
                    choices=choices,
                    gold=gold,
                )
            )
        return examples


def _from_hub(row: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    connector = {"cause": "because", "effect": "therefore"}[row["question"]]
    choices = [choice[0].lower() + choice[1:] for choice in (row["choice1"], row["choice2"])]
    return {"query": f"{row['premise'].strip()[:-1]}, {connector}", "choices": choices, "gold": row["label"]}


PUBLISHED = Published("aps/super_glue", "validation", _from_hub, ("copa",))
