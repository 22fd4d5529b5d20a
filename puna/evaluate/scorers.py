"""Whether an answer is right: each scorer compares an answer with a reference, and is a pure function of the two."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction

from puna.evaluate.maths import last_boxed, plain_value, same_after_normalising

_NUMBER = re.compile(r"(?:(?<![\w.)])[-−])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?:(?<![\w.)])[-−])?(?<![\w.])\.\d+")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact(answer: str, reference: str) -> bool:
    """Equal, but for case, punctuation, English articles and blanks (`normalised`).

    >>> exact("The Alhambra.", "alhambra")
    True
    """
    return normalised(answer) == normalised(reference)


def exact_any(answer: str, references: Iterable[str]) -> bool:
    """`exact` with one of several names of the same thing, as in TriviaQA."""
    return normalised(answer) in {normalised(reference) for reference in references}


def mentions(answer: str, references: Iterable[str]) -> bool:
    """One of the references stands in the answer, as whole words after `normalised`: for answers in sentences."""
    words = f" {normalised(answer)} "
    return any(name and f" {name} " in words for name in map(normalised, references))


def token_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over tokens, each as often as it occurs (SQuAD, arXiv:1606.05250)."""
    common = (Counter(answer) & Counter(reference)).total()
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


def f1(answer: str, references: Iterable[str]) -> float:
    """The best `token_f1` over words, after `normalised`, with any of the references."""
    words = normalised(answer).split()
    return max(token_f1(words, normalised(reference).split()) for reference in references)


def normalised(text: str) -> str:
    """Lower case without punctuation, English articles and needless blanks, as SQuAD's and TriviaQA's scorers do it.

    Source: Rajpurkar et al. 2016 (arXiv:1606.05250), section 6.1; Joshi et al. 2017 (arXiv:1705.03551), section 6.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def same_number(answer: str, reference: str) -> bool:
    """The last number of the answer equals the last of the reference; False where one of them has none.

    Commas between thousands, currencies and units do not matter; 0.50 equals .5, and 1/2 is the number 2.

    >>> same_number("5 + 7 = 12, so it is $12.00.", "#### 12")
    True
    """
    given, wanted = last_number(answer), last_number(reference)
    return given is not None and given == wanted


def last_number(text: str) -> Fraction | None:
    """The last number that a text names, exactly; None where there is none."""
    found = _NUMBER.findall(text)
    return plain_value(found[-1].replace("−", "-")) if found else None


def matches(answer: str, pattern: str) -> bool:
    """A regular expression occurs in the answer; ^ and $ are the ends of the answer, and a dot stands for any character
    but a line's end."""
    return re.search(pattern, answer) is not None


def same_maths(answer: str, reference: str) -> bool:
    """The final answer is the reference's: in its last \\boxed{}, or else all of it.

    They are the same if MATH's own normalisation makes them equal, or if both are plain numbers or fractions of one
    value. That needs no computer algebra, so it is quick and safe on anything; (x+1)^2 and x^2+2x+1 differ
    (`puna.evaluate.algebra.equivalent_all` knows better).

    >>> same_maths("Half of one is $\\\\boxed{\\\\frac12}$.", "0.5")
    True
    """
    given, wanted = (boxed if (boxed := last_boxed(text)) is not None else text for text in (answer, reference))
    return same_after_normalising(given, wanted)
