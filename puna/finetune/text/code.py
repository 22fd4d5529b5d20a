"""Code from descriptions, or code that goes on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from puna.finetune.text.scores import chrf, exact_match, library
from puna.finetune.text.task import TextExample, TextTask


@dataclass(frozen=True)
class Code(TextTask):
    """Write code from a description or a beginning."""

    scored = ("validation/exact_match", "validation/chrf")

    kind: Literal["code"] = "code"
    """This task's name."""
    prompt: str = "{prompt}\n"
    """What the model is given: text with {column} for the content of a column. The code follows directly, so let it end
    in a line break, not in a blank; {{ and }} are braces."""
    target: str = "completion"
    """The column with the code."""

    def scores(self, examples: Sequence[TextExample], answers: Sequence[str]) -> dict[str, float]:
        """Exact match and chrF. Neither runs the code."""
        references = [example.target for example in examples]
        values = exact_match(answers, references), chrf(answers, references)
        return dict(zip(self.scored, values, strict=True))

    def check(self) -> None:
        """See `TextTask.check`."""
        library("sacrebleu", "sacrebleu")
