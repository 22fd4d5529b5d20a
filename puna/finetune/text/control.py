"""Texts with wanted properties: control tokens before the text say what it shall be like."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from puna.batches.tables import Row
from puna.finetune.predict import classify
from puna.finetune.text.scores import Unit
from puna.finetune.text.task import TextExample, TextTask, cell
from puna.runtime.errors import InputError

OBEDIENCE = "validation/obedience"


@dataclass(frozen=True)
class Control(TextTask):
    """Write texts that obey what a control token before them says, such as a sentiment or a length.

    As in CTRL (Keskar et al. 2019, arXiv:1909.05858, section 3).
    """

    scored = (OBEDIENCE,)

    kind: Literal["control"] = "control"
    """This task's name."""
    control: str = "label"
    """The column with the property that the text has."""
    prompt: str = "<{label}>\n{opening}"
    """What the model is given: text with {column} for the content of a column, {opening} for the first words. The
    control column and what stands around it make the control token: one token where `puna extend` has put "<positive>"
    and its like into the vocabulary, and several otherwise."""
    target: str = "text"
    """The column with the text."""
    opening: int = 0
    """How many words of the text are given in {opening}, so that not all prompts of a property are the same."""
    unit: Unit = "words"
    """What `opening` counts; characters for Chinese and its like."""
    rules: dict[str, str] = field(default_factory=dict)
    """Property -> regular expression that is found in the texts that have it. Measures how many answers obey."""
    classifier: Path | None = None
    """In place of rules, a directory of a classification by `puna finetune` whose classes are the properties."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.opening < 0:
            raise ValueError(f"opening is {self.opening}; it cannot be negative.")
        wanted = {self.control, "opening"} if self.opening else {self.control}
        if missing := sorted(wanted - {*self.prompt_columns()}):
            raise ValueError(f"The prompt {self.prompt!r} has no {{{missing[0]}}}, so the text cannot depend on it.")
        if self.rules and self.classifier is not None:
            raise ValueError("Set one of rules and classifier: by which it is judged whether a text obeys.")
        for name, rule in self.rules.items():
            try:
                re.compile(rule)
            except re.error as error:
                raise ValueError(f"The rule of {name!r}, {rule!r}, is no regular expression: {error}.") from error

    @property
    def metrics(self) -> tuple[str, ...]:
        """See `TextTask.metrics`; obedience where something judges it."""
        return super().metrics if self.rules or self.classifier else super().metrics[:-1]

    def file_columns(self) -> list[str]:
        """See `TextTask.file_columns`."""
        return [name for name in (*super().file_columns(), self.control) if name != "opening"]

    def expand(self, row: Row) -> Iterator[dict[str, str]]:
        """See `TextTask.expand`. The target is what is behind the opening."""
        values = {name: cell(row, name) for name in dict.fromkeys(self.file_columns())}
        if self.rules and values[self.control] not in self.rules:
            known = ", ".join(self.rules)
            raise InputError(f"{row.where}: task.rules has no rule for {values[self.control]!r}; it has {known}.")
        text = values[self.target]
        if self.unit == "words":
            starts = [word.start() for word in re.finditer(r"\S+", text)]
            cut = starts[min(self.opening, len(starts) - 1)] if self.opening else 0
            cut = len(text[:cut].rstrip())
        else:
            cut = min(self.opening, len(text) - 1)
        yield {**values, "opening": text[:cut], self.target: text[cut:]}

    def scores(self, examples: Sequence[TextExample], answers: Sequence[str]) -> dict[str, float]:
        """The share of texts, their openings included, that obey."""
        wanted = [example.values[self.control] for example in examples]
        between = " " if self.unit == "words" else ""
        texts = [
            f"{example.values['opening']}{between}{answer}".strip()
            for example, answer in zip(examples, answers, strict=True)
        ]
        if self.rules:
            obeying = [re.search(self.rules[name], text) is not None for name, text in zip(wanted, texts, strict=True)]
        elif self.classifier is not None:
            # Nothing is of no class.
            given = iter(classify(self.classifier, [text for text in texts if text]))
            obeying = [bool(text) and next(given) == name for name, text in zip(wanted, texts, strict=True)]
        else:
            return {}
        return {OBEDIENCE: sum(obeying) / len(obeying)}

    def check(self) -> None:
        """See `TextTask.check`."""
        if self.classifier is not None:
            classify(self.classifier, [])

    def other_inputs(self) -> list[Path]:
        """See `TextTask.other_inputs`."""
        return [] if self.classifier is None else [self.classifier]
