"""HellaSwag: how does a scene go on? (Zellers et al. 2019, arXiv:1905.07830)"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from puna.evaluate.tasks.choice import MultipleChoice
from puna.evaluate.tasks.hub import Published, read_questions
from puna.evaluate.tasks.task import Example


@dataclass(frozen=True, kw_only=True)
class HellaSwag(MultipleChoice):
    """HellaSwag, of which accuracy_by_characters is usually given. Reads hellaswag/val_0_2500.jsonl.gz.

    Roof shingle removal: A man is sitting on a roof. he
      - is using wrap to wrap a pair of skis.
      - is ripping level tiles off.
      - is holding a rubik's cube.
      + starts pulling up roofing on a roof.
    """

    kind: Literal["hellaswag"] = "hellaswag"
    """Its name."""

    def read(self, data: Path | None) -> list[Example]:
        """The questions, cleaned as in lm-eval."""
        examples = []
        for row in read_questions(data, "hellaswag/val_0_2500.jsonl.gz", PUBLISHED):
            choices, gold = tuple(map(clean, row.texts("endings"))), row.index("label", len(row.texts("endings")))
            examples.append(
                Example(
                    id=str(row.get("ind", int)),
                    where=row.where,
                    prompt=clean(row.get("ctx", str)),
                    target=f" {choices[gold]}",
                    choices=choices,
                    gold=gold,
                )
            )
        return examples


def clean(text: str) -> str:
    """Without the marks in brackets that texts of WikiHow carry."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _from_hub(row: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    ctx = f"{row['activity_label']}: {row['ctx']}"
    return {"ind": row["ind"], "ctx": ctx, "endings": row["endings"], "label": int(row["label"])}


PUBLISHED = Published("Rowan/hellaswag", "validation", _from_hub)
