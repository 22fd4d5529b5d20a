"""WinoGrande: whom does a sentence mean? (Sakaguchi et al. 2020, arXiv:1907.10641)"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from puna.evaluate.tasks.choice import MultipleChoice
from puna.evaluate.tasks.hub import Published, read_questions
from puna.evaluate.tasks.request import Prompt
from puna.evaluate.tasks.task import Example, Metric, Score, means


@dataclass(frozen=True, kw_only=True)
class WinoGrande(MultipleChoice):
    """WinoGrande by partial evaluation: each name is put into the sentence, and what the sentence ends in is scored
    (Trinh and Le 2018, arXiv:1806.02847). Reads winogrande.jsonl.

        Sarah was a much better surgeon than Maria so
          - Sarah
          + Maria
        always got the easier cases.
    """

    kind: Literal["winogrande"] = "winogrande"
    """Its name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chat:
            raise ValueError("winogrande scores how sentences end, which is no answer of a chat: chat has to be false.")

    def read(self, data: Path | None) -> list[Example]:
        """The sentences."""
        examples = []
        for row in read_questions(data, "winogrande.jsonl", PUBLISHED):
            beginnings, end = row.texts("context_options"), row.get("continuation", str)
            gold = row.index("gold", len(beginnings))
            examples.append(
                Example(
                    id=row.where.rpartition(" ")[2],
                    where=row.where,
                    prompt=beginnings[gold],
                    target=f" {end}",
                    choices=beginnings,
                    gold=gold,
                )
            )
        return examples

    def contexts(self, example: Example, shots: Sequence[Example]) -> list[Prompt]:
        """The beginnings."""
        prompt = self.compose(example, shots)
        assert isinstance(prompt, str)
        before = prompt.removesuffix(example.prompt)
        return [before + beginning for beginning in example.choices]

    def continuations(self, example: Example) -> list[str]:
        """The one end."""
        return [example.target] * len(example.choices)

    def metrics(self, examples: Sequence[Example], scores: Sequence[Score]) -> dict[str, Metric]:
        """Accuracy alone: what is scored is as long for each choice."""
        return {"accuracy": means(examples, scores)["accuracy"]}


def _from_hub(row: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    before, _, after = row["sentence"].partition("_")
    names = [before + row["option1"], before + row["option2"]]
    return {"context_options": names, "continuation": after.strip(), "gold": int(row["answer"]) - 1}


PUBLISHED = Published("allenai/winogrande", "validation", _from_hub, ("winogrande_xl",))
