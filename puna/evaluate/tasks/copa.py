"""COPA: what is the cause, what the effect? (Roemmele et al. 2011, "Choice of Plausible Alternatives")"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from puna.evaluate.tasks.choice import MultipleChoice
from puna.evaluate.tasks.data import data_file, read_rows
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
        for row in read_rows(data_file(data, "copa.jsonl")):
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
