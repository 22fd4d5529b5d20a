"""Final answers of mathematics problems: where they stand in a solution, and whether two are the same.

Source: the MATH data set (Hendrycks et al. 2021, arXiv:2103.03874), whose published scorer this follows string by
string, so that scores compare; `exact_value` then looks at numbers that it leaves different.
"""

import re
from decimal import Decimal
from fractions import Fraction

_FRACTION = re.compile(r"(-?)\\frac\{(-?\d+)\}\{(-?\d+)\}")
_PLAIN = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?")


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{} (or \\boxed followed by a blank), braces balanced; None where there is none."""
    if r"\boxed " in text:
        return text.rpartition(r"\boxed ")[2].partition("$")[0]
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 0
    first = start + len(r"\boxed{")
    for place in range(first - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[first:place]
    return None


def between_dollars(text: str) -> str:
    """What stands between the first and the last dollar sign, or all where there are not two."""
    first, last = text.find("$"), text.rfind("$")
    return text[first + 1 : last] if first < last else text


def equal_strings(one: str, other: str) -> bool:
    """Equal after `normalise`; where that fails on one of them, equal as they are: MATH's `is_equiv`."""
    try:
        return normalise(one) == normalise(other)
    except (IndexError, ValueError):
        return one == other


def same_after_normalising(one: str, other: str) -> bool:
    """`equal_strings`, or numbers of one value."""
    if equal_strings(one, other):
        return True
    value = exact_value(one)
    return value is not None and value == exact_value(other)


def exact_value(text: str) -> Fraction | None:
    """The value of a plain number or of a fraction of whole numbers, such as 1,000.50, \\frac{1}{2} or 3/4, with or
    without dollar signs; None of anything else."""
    try:
        text = normalise(text.strip().rstrip(".").strip("$"))
    except (IndexError, ValueError):
        return None
    if found := _FRACTION.fullmatch(text):
        sign, *parts = found.groups()
        above, below = map(plain_value, parts)
        return None if below == 0 else (-above if sign else above) / below
    if text.lstrip("-") and _PLAIN.fullmatch(text):
        return plain_value(text)
    return None


def plain_value(text: str) -> Fraction:
    """The value of digits, however many (Python's own conversion stops at some thousands)."""
    return Fraction(Decimal(text.replace(",", "")))


def normalise(text: str) -> str:
    """MATH's normal form of an answer in LaTeX: without units, blanks and sizes, with all braces.

    Raises:
        ValueError, IndexError: an unfinished command, or something that looks like a fraction and is none.
    """
    for old, new in (
        ("\n", ""),
        (r"\!", ""),
        (r"\\", "\\"),
        ("tfrac", "frac"),
        ("dfrac", "frac"),
        (r"\left", ""),
        (r"\right", ""),
        (r"^{\circ}", ""),
        (r"^\circ", ""),
        (r"\$", ""),
    ):
        text = text.replace(old, new)
    text = _without_units(text)
    for old, new in ((r"\%", ""), (" .", " 0."), ("{.", "{0.")):
        text = text.replace(old, new)
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:  # Such as "k =".
        text = sides[1]
    text = _brace_fractions(_brace_roots(text).replace(" ", ""))
    return _slash_to_fraction(r"\frac{1}{2}" if text == "0.5" else text)


def _without_units(text: str) -> str:
    if r"\text{ " not in text:
        return text
    number, _ = text.split(r"\text{ ")
    return number


def _brace_roots(text: str) -> str:
    first, *rest = text.split(r"\sqrt")
    return r"\sqrt".join([first, *(part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}" for part in rest)])


def _brace_fractions(text: str) -> str:
    first, *rest = text.split(r"\frac")
    parts = [first]
    for part in rest:
        if part[0] == "{":
            parts.append(part)
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            parts.append(f"{{{part[0]}}}{part[1:]}")
        else:
            parts.append(f"{{{part[0]}}}{{{part[1]}}}{part[2:]}")
    return r"\frac".join(parts)


def _slash_to_fraction(text: str) -> str:
    parts = text.split("/")
    if len(parts) != 2:
        return text
    above, below = map(int, parts)
    return rf"\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text
