"""How near answers come to references, as the field counts it: sacrebleu's BLEU and chrF, ROUGE, exact match."""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Literal

from puna.runtime.errors import InputError

Unit = Literal["words", "characters"]


def library(name: str, package: str) -> ModuleType:
    """An optional library.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"Measuring this task needs {package}: pip install 'puna[tasks]'.") from error


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """chrF2 of a corpus, 0 to 100 (Popovic 2015, "chrF", equation 1), by sacrebleu."""
    return float(library("sacrebleu", "sacrebleu").corpus_chrf(answers, [references]).score)


def bleu(answers: Sequence[str], references: Sequence[str], tokenize: str) -> float:
    """BLEU of a corpus, 0 to 100 (Papineni et al. 2002, section 2.3), by sacrebleu.

    Args:
        tokenize: how sacrebleu finds words: "13a" where blanks part them, "zh" for Chinese, "char".
    """
    return float(library("sacrebleu", "sacrebleu").corpus_bleu(answers, [references], tokenize=tokenize).score)


class _Characters:
    """What rouge-score takes for words: every character that is not blank, which Chinese is compared by."""

    def tokenize(self, text: str) -> list[str]:
        """See above."""
        return [character for character in text.lower() if not character.isspace()]


ROUGE = ("rouge1", "rouge2", "rougeL")


def rouge(answers: Sequence[str], references: Sequence[str], unit: Unit) -> dict[str, float]:
    """Mean F-measures, 0 to 1, of common words, pairs of words, and longest common subsequences (Lin 2004, "ROUGE",
    sections 2 and 3), by rouge-score; English words without their endings (Porter)."""
    scorer = library("rouge_score.rouge_scorer", "rouge-score").RougeScorer(
        list(ROUGE), use_stemmer=unit == "words", tokenizer=_Characters() if unit == "characters" else None
    )
    found = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {name: sum(each[name].fmeasure for each in found) / len(found) for name in ROUGE}


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers that are the reference, white space at the ends of lines and of the text aside."""
    pairs = zip(answers, references, strict=True)
    return sum(_bare(answer) == _bare(reference) for answer, reference in pairs) / len(references)


def _bare(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()
