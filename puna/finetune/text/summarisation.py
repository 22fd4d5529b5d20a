"""Summaries and titles."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from puna.finetune.text.scores import ROUGE, Unit, library, rouge
from puna.finetune.text.task import TextExample, TextTask


@dataclass(frozen=True)
class Summarisation(TextTask):
    """Summarise texts, or find titles for them."""

    scored = tuple(f"validation/{name}" for name in ROUGE)

    kind: Literal["summarisation"] = "summarisation"
    """This task's name."""
    prompt: str = "{text}\nSummary:\n"
    """What the model is given: text with {column} for the content of a column. The summary follows directly, so let it
    end in a line break or a colon, not in a blank; {{ and }} are braces."""
    target: str = "summary"
    """The column with the summary."""
    unit: Unit = "words"
    """What ROUGE compares: characters for Chinese and its like."""

    def scores(self, examples: Sequence[TextExample], answers: Sequence[str]) -> dict[str, float]:
        """ROUGE-1, ROUGE-2 and ROUGE-L."""
        found = rouge(answers, [example.target for example in examples], self.unit)
        return {f"validation/{name}": value for name, value in found.items()}

    def check(self) -> None:
        """See `TextTask.check`."""
        library("rouge_score.rouge_scorer", "rouge-score")
