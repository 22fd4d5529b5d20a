"""LAMBADA: the last word of a passage, which only the whole passage gives away.

Paperno et al. 2016, arXiv:1606.06031.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from puna.evaluate.tasks.continuation import OneContinuation
from puna.evaluate.tasks.hub import Published, read_questions
from puna.evaluate.tasks.task import Example


@dataclass(frozen=True, kw_only=True)
class Lambada(OneContinuation):
    """LAMBADA in OpenAI's version. Reads lambada_openai.jsonl.gz.

    ... Harlin tries to reach Marcus's mind again. "Give me a minute to change and I'll meet you at the docks."
    ... Shane gripped her arm and started leading her to the dock. "I can make it there on my own,
      + Shane
    """

    kind: Literal["lambada"] = "lambada"
    """Its name."""

    def read(self, data: Path | None) -> list[Example]:
        """The passages and their last words."""
        return [
            Example(
                id=row.where.rpartition(" ")[2],
                where=row.where,
                prompt=row.get("context", str),
                target=f" {row.get('continuation', str)}",
            )
            for row in read_questions(data, "lambada_openai.jsonl.gz", PUBLISHED)
        ]


def _from_hub(row: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    context, _, word = row["text"].rpartition(" ")
    return {"context": context, "continuation": word}


PUBLISHED = Published("EleutherAI/lambada_openai", "test", _from_hub)
