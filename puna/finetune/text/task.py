"""What tasks with texts for answers have in common: rows of a table become prompts with targets.

A task is one file: a frozen dataclass derived from `TextTask`, with its prompt, its target and its scores.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, ClassVar

from puna.batches.tables import Row, parallel_files, read_parallel, read_table
from puna.finetune.tasks.task import TaskData, read_both
from puna.runtime.errors import InputError
from puna.runtime.progress import say
from puna.tokenizer.base import Tokenizer

PERPLEXITY = "validation/perplexity"
"""Measured for every task: e to the mean loss of the targets' tokens, ends included."""


@dataclass(frozen=True, slots=True)
class TextExample:
    """A prompt and the text that should follow it."""

    values: dict[str, str]
    """The row's columns."""
    prompt: str
    """What the model is given."""
    target: str
    """What should follow, whole."""
    prompt_ids: list[int]
    """BOS, where the vocabulary has one, and the prompt."""
    target_ids: list[int]
    """The target and EOS; without its end where it is longer than `TextTask.target_tokens`."""


@dataclass(frozen=True, slots=True)
class OpenText:
    """A task with its data read and checked."""

    train: list[TextExample]
    """To learn from."""
    held_out: list[TextExample]
    """To measure on."""
    files: list[Path]
    """What was read."""


@dataclass(frozen=True)
class TextTask(ABC):
    """The settings that all have."""

    keeps: ClassVar[str] = "start"
    """What is kept of a text in a prompt that is too long: its "start" or its "end"."""
    scored: ClassVar[tuple[str, ...]]
    """Names of the curves that `scores` draws."""

    kind: str
    """This task's name."""
    prompt: str
    """What the model is given: text with {column} for the content of a column. The target follows directly, so let it
    end in a line break or a colon, not in a blank; {{ and }} are braces."""
    target: str
    """The column with the text that should follow."""
    target_tokens: int = 64
    """The most tokens of a target. Longer ones are learnt without their ends, and prompts get the rest of
    train.row_length: the longest column of one that is too long is cut."""
    validation_examples: int = 64
    """Held-out examples that are answered at each validation during training; all are in the end."""

    def __post_init__(self) -> None:
        try:
            columns = self.prompt_columns()
        except ValueError as error:
            raise ValueError(
                f"The prompt {self.prompt!r} cannot be read ({error}); {{{{ and }}}} are braces."
            ) from error
        if any(spec or conversion for _, _, spec, conversion in Formatter().parse(self.prompt)):
            raise ValueError(f"The prompt {self.prompt!r} has a : or ! inside braces; there is only room for a column.")
        if not columns or "" in columns:
            raise ValueError(f"The prompt {self.prompt!r} names no column; write {{column}} where its content belongs.")
        if self.prompt.endswith(" "):
            raise ValueError(
                "The prompt ends in a blank. Tokenizers take a blank and the word behind it together, so end the "
                "prompt in a line break or a colon."
            )
        if self.target_tokens < 1 or self.validation_examples < 1:
            raise ValueError("target_tokens and validation_examples have to be at least 1.")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all curves that a validation draws."""
        return (PERPLEXITY, *self.scored)

    @abstractmethod
    def scores(self, examples: Sequence[TextExample], answers: Sequence[str]) -> dict[str, float]:
        """Values of the curves `scored`, from the answers to held-out prompts.

        Raises:
            InputError: a library that counts is not installed.
        """

    def check(self) -> None:  # noqa: B027 (most need nothing)
        """See before training whether `scores` will work.

        Raises:
            InputError: a library is not installed, or a file is not there.
        """

    def other_inputs(self) -> list[Path]:
        """What `scores` reads beside the answers, for the manifest."""
        return []

    def prompt_columns(self) -> list[str]:
        """The columns that the prompt names."""
        return [name for _, name, _, _ in Formatter().parse(self.prompt) if name is not None]

    def file_columns(self) -> list[str]:
        """The columns that a file has to have."""
        return [*self.prompt_columns(), self.target]

    def expand(self, row: Row) -> Iterator[dict[str, str]]:
        """The columns, as text, of each example that a row of the file holds.

        Raises:
            InputError: a column is absent or empty; names the line.
        """
        yield {name: cell(row, name) for name in dict.fromkeys(self.file_columns())}

    def render(self, values: dict[str, str]) -> str:
        """The prompt of an example."""
        parts = Formatter().parse(self.prompt)
        return "".join(text + ("" if name is None else values[name]) for text, name, _, _ in parts)

    def open(self, data: TaskData, tokenizer: Tokenizer, row_length: int) -> OpenText:
        """Read and check the data.

        Raises:
            InputError: it cannot be learnt from; names file, line and reason.
        """
        if tokenizer.eos_id is None:
            raise InputError("This tokenizer has no EOS token, with which every answer ends.")
        if row_length <= self.target_tokens:
            raise InputError(
                f"train.row_length ({row_length}) leaves no room for a prompt beside task.target_tokens "
                f"({self.target_tokens})."
            )
        self.check()
        train, held_out = read_both(data, lambda path: list(self.rows(path, data.columns)))
        files = self.other_inputs() + [
            file for path in (data.train, data.held_out) if path is not None for file in self._files(path)
        ]
        name = str(data.train)
        return OpenText(
            self._examples(train, tokenizer, row_length, name),
            self._examples(held_out, tokenizer, row_length, str(data.held_out or f"what is held out of {name}")),
            files,
        )

    def _files(self, path: Path) -> list[Path]:
        return list(parallel_files(path, self.file_columns()).values()) or [path]

    def rows(self, path: Path, columns: Sequence[str]) -> Iterator[Row]:
        """The rows of a table, or of text files that stand beside each other (`parallel_files`).

        Args:
            columns: names for the columns of files without header.

        Raises:
            InputError: see `read_table` and `read_parallel`.
        """
        files = parallel_files(path, self.file_columns())
        return read_parallel(files) if files else read_table(path, columns)

    def _examples(self, rows: Sequence[Row], tokenizer: Tokenizer, row_length: int, name: str) -> list[TextExample]:
        examples = []
        prompts_cut = targets_cut = 0
        for row in rows:
            for values in self.expand(row):
                fitted, prompt_ids = self._fit(row, values, tokenizer, row_length - self.target_tokens)
                target_ids = tokenizer.encode(values[self.target], continuation=True)
                assert tokenizer.eos_id is not None
                target_ids.append(tokenizer.eos_id)
                prompts_cut += fitted != values
                targets_cut += len(target_ids) > self.target_tokens
                examples.append(
                    TextExample(
                        values,
                        self.render(fitted),
                        values[self.target],
                        prompt_ids,
                        target_ids[: self.target_tokens],
                    )
                )
        for count, what, setting in (
            (prompts_cut, "prompts", f"train.row_length - task.target_tokens ({row_length - self.target_tokens:,})"),
            (targets_cut, "targets", f"task.target_tokens ({self.target_tokens:,})"),
        ):
            if count:
                say(f"{count:,} of {len(examples):,} {what} in {name} are longer than {setting} and were cut.")
        return examples

    def _fit(
        self, row: Row, values: dict[str, str], tokenizer: Tokenizer, limit: int
    ) -> tuple[dict[str, str], list[int]]:
        """The columns, the longest of them cut until the prompt fits, and the prompt's ids."""
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        fitted = dict(values)
        while len(ids := bos + tokenizer.encode(self.render(fitted))) > limit:
            longest = max(self.prompt_columns(), key=lambda name: len(fitted[name]))
            length = len(fitted[longest])
            if not length:
                raise InputError(
                    f"{row.where}: the prompt alone, with all columns empty, has {len(ids)} tokens, but only {limit} "
                    "are left of train.row_length. Raise it, or lower task.target_tokens."
                )
            kept = min(length - 1, length * limit // len(ids))
            fitted[longest] = fitted[longest][:kept] if self.keeps == "start" else fitted[longest][length - kept :]
        if not ids:
            raise InputError(f"{row.where}: the prompt is empty.")
        return fitted, ids


def cell(row: Row, column: str) -> str:
    """A column's content as text; the strings of a list become lines.

    Raises:
        InputError: there is none.
    """
    value: Any = row.values.get(column)
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = "\n".join(value)
    if isinstance(value, int | float):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f"{row.where} has no text in its column {column!r}. It has {', '.join(row.values) or 'nothing'}; "
            "task.prompt and task.target name the columns that are used."
        )
    return value
