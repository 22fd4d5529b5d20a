"""Dialogue: what is said next."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from puna.batches.tables import Row
from puna.finetune.text.scores import chrf, library
from puna.finetune.text.task import TextExample, TextTask, cell
from puna.runtime.errors import InputError


@dataclass(frozen=True)
class Dialogue(TextTask):
    """Say what comes next in a dialogue, of which the beginning is forgotten where it is too long."""

    keeps: ClassVar[str] = "end"
    scored = ("validation/chrf",)

    kind: Literal["dialogue"] = "dialogue"
    """This task's name."""
    prompt: str = "{context}\n"
    """What the model is given: text with {column} for the content of a column. The answer follows directly, so let it
    end in a line break or a colon, not in a blank; {{ and }} are braces."""
    target: str = "response"
    """The column with the answer."""
    turns: str = ""
    """A column with whole dialogues, a line or an element of a list for each turn. Every turn but the first is then a
    target, called as `target` says, and the turns before it are the column context."""

    def file_columns(self) -> list[str]:
        """See `TextTask.file_columns`."""
        made = {"context", self.target} if self.turns else set()
        return [*(name for name in super().file_columns() if name not in made), *([self.turns] if self.turns else [])]

    def expand(self, row: Row) -> Iterator[dict[str, str]]:
        """See `TextTask.expand`."""
        if not self.turns:
            yield from super().expand(row)
            return
        values = {name: cell(row, name) for name in self.file_columns()}
        turns = [turn.strip() for turn in values[self.turns].splitlines() if turn.strip()]
        if len(turns) < 2:
            raise InputError(f"{row.where}: the dialogue has {len(turns)} turn; there is nothing to answer.")
        for number, turn in enumerate(turns[1:], start=1):
            yield {**values, "context": "\n".join(turns[:number]), self.target: turn}

    def scores(self, examples: Sequence[TextExample], answers: Sequence[str]) -> dict[str, float]:
        """chrF beside the perplexity, which says more where many answers are right."""
        return {"validation/chrf": chrf(answers, [example.target for example in examples])}

    def check(self) -> None:
        """See `TextTask.check`."""
        library("sacrebleu", "sacrebleu")
