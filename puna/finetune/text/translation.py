"""Translation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from puna.finetune.text.scores import bleu, chrf, library
from puna.finetune.text.task import TextExample, TextTask


@dataclass(frozen=True)
class Translation(TextTask):
    """Translate; from a table with a column for each language, or a text file for each (corpus.en, corpus.de)."""

    scored = ("validation/chrf", "validation/bleu")

    kind: Literal["translation"] = "translation"
    """This task's name."""
    prompt: str = "{source}\n"
    """What the model is given: text with {column} for the content of a column. The translation follows directly, so let
    it end in a line break or a colon, not in a blank; {{ and }} are braces."""
    target: str = "target"
    """The column with the translation."""
    bleu_tokenize: Literal["13a", "intl", "zh", "char"] = "13a"
    """What BLEU counts as words (sacrebleu): "zh" for Chinese, "char" for other languages without blanks."""

    def scores(self, examples: Sequence[TextExample], answers: Sequence[str]) -> dict[str, float]:
        """chrF and BLEU of the corpus."""
        references = [example.target for example in examples]
        values = chrf(answers, references), bleu(answers, references, self.bleu_tokenize)
        return dict(zip(self.scored, values, strict=True))

    def check(self) -> None:
        """See `TextTask.check`."""
        library("sacrebleu", "sacrebleu")
