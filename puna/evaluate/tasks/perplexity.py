"""How well a model predicts documents: bits per byte, and perplexities."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from puna.evaluate.statistics.intervals import estimate
from puna.evaluate.tasks.continuation import exponential
from puna.evaluate.tasks.request import Answer, Likelihood, Request, Text
from puna.evaluate.tasks.task import Example, Metric, Score, Task
from puna.runtime.errors import InputError
from puna.runtime.files import read_documents


@dataclass(frozen=True, kw_only=True)
class Perplexity(Task):
    """The likelihood of documents, each by itself, in windows of the whole context.

    - bits_per_byte: comparable between tokenizers;
    - byte_perplexity, word_perplexity, token_perplexity: exp of the mean over all bytes, tokens, or words
      (what white space parts).

        The puna is the high Andean plateau on which llamas are raised.
    """

    kind: Literal["perplexity"] = "perplexity"
    """Its name."""
    file: Path
    """Documents with "text", Parquet or JSON Lines, a file or a folder of them."""
    stride: int | None = None
    """How many tokens each window after the first predicts, having read as many before as the context has room for;
    absent: all of them, so that windows do not overlap. A smaller stride gives better predictions, at a price."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shots or self.chat:
            raise ValueError("perplexity has neither shots nor chat: documents stand for themselves.")
        if self.stride is not None and self.stride < 1:
            raise ValueError(f"stride is {self.stride}; it has to be at least 1.")

    def read(self, data: Path | None) -> list[Example]:
        """The documents; they are looked for where `file` says, not in the folder of benchmark data."""
        examples = []
        for number, row in enumerate(read_documents(self.file), start=1):
            where, text = f"{self.file}, document {number}", row.get("text")
            if not isinstance(text, str) or not text.strip():
                raise InputError(f'{where}: "text" is {text!r}, but has to be a text that is not empty.')
            examples.append(Example(id=str(number), where=where, prompt="", target=text))
        return examples

    def inputs(self, data: Path | None) -> list[Path]:
        """The documents."""
        return [self.file]

    def requests(self, example: Example, shots: Sequence[Example]) -> list[Request]:
        """The whole document."""
        return [Text(example.target, self.stride)]

    def score(self, example: Example, answers: Sequence[Answer]) -> Score:
        """Its likelihood and its length in every unit."""
        (answer,) = cast(Sequence[Likelihood], answers)
        values = {
            "log_likelihood": answer.log_likelihood,
            "bytes": len(example.target.encode()),
            "words": len(re.split(r"\s+", example.target)),
            "tokens": answer.num_tokens,
        }
        return Score(values, {})

    def metrics(self, examples: Sequence[Example], scores: Sequence[Score]) -> dict[str, Metric]:
        """Sums over all documents, and their intervals over documents."""
        columns = {name: [score.values[name] for score in scores] for name in scores[0].values}
        nats = [-value for value in columns["log_likelihood"]]
        found = {"bits_per_byte": ratio(nats, columns["bytes"], 1 / math.log(2))}
        for unit in ("byte", "word", "token"):
            per_unit = ratio(nats, columns[f"{unit}s"], 1.0)
            found[f"{unit}_perplexity"] = exponential(per_unit, 1)
        return found


def ratio(parts: Sequence[float], wholes: Sequence[float], factor: float) -> Metric:
    """factor * sum(parts) / sum(wholes); its error from the spread of parts - ratio * wholes (the ratio estimator:
    Cochran 1977, "Sampling Techniques", section 2.11)."""
    value = sum(parts) / sum(wholes)
    found = estimate([part - value * whole for part, whole in zip(parts, wholes, strict=True)])
    scale = factor * len(parts) / sum(wholes)
    if found.standard_error == math.inf:
        return Metric(factor * value, None, None, None, len(parts), higher_is_better=False)
    low, high = (factor * value + scale * end for end in found.interval)
    return Metric(factor * value, low, high, scale * found.standard_error, len(parts), higher_is_better=False)
