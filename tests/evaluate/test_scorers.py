"""Scorers: cases worked by hand, what holds for any text, and the outside scorers that they follow."""

import importlib.util
import re
import string
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.evaluate.maths import between_dollars, equal_strings, exact_value, last_boxed
from puna.evaluate.scorers import (
    exact,
    exact_any,
    f1,
    last_number,
    matches,
    mentions,
    normalised,
    same_maths,
    same_number,
    token_f1,
)

PIECES = [
    *"0123456789{}$=/.,% -x\n",
    r"\frac",
    r"\dfrac",
    r"\sqrt",
    r"\text{ ",
    r"\left",
    r"\!",
    r"\\",
    r"^\circ",
    "1/2",
]
PIECES += [r"\boxed{", r"\boxed ", "0.5", "k = ", r"\frac12", r"\%", "\\"]
LATEX = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@pytest.fixture(scope="module")
def lm_eval_maths() -> ModuleType:
    """lm-eval's scorer of MATH, which imports nothing that would look for a network."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("datasets")
    import lm_eval

    path = Path(lm_eval.__file__).parent / "tasks/hendrycks_math/utils.py"
    spec = importlib.util.spec_from_file_location("lm_eval_maths", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its docstrings and strings have escapes that Python warns of.
    source = path.read_text().replace('"\\%"', '"\\\\%"')
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("The Alhambra.", "alhambra", True),
        ("  an  apple,   a day ", "apple day", True),
        ("theatre", "atre", False),
        ("U.S.A.", "usa", True),
        ("", "the", True),
        ("Lima", "Cusco", False),
    ],
)
def test_exact(answer: str, reference: str, right: bool) -> None:
    assert exact(answer, reference) is right
    assert exact(reference, answer) is right
    assert exact_any(answer, ["nothing else", reference]) is right


@given(st.text(max_size=30))
def test_normalised_as_squad_does_it(text: str) -> None:
    # The published script's four steps, one after the other.
    lower = text.lower()
    bare = "".join(character for character in lower if character not in set(string.punctuation))
    assert normalised(text) == " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())
    assert normalised(normalised(text)) == normalised(text) or "a" in normalised(text)


def test_mentions_takes_whole_words() -> None:
    assert mentions("It is a dik-dik, the smallest antelope.", ["Antelope"])
    assert not mentions("It is an antelopes' cousin.", ["Antelope"])
    assert not mentions("anything", ["the", ""])


def test_f1_by_hand() -> None:
    # "big red house" and "red house in Lima": 2 in common of 3 and of 4.
    assert f1("a big red house", ["red house in Lima"]) == pytest.approx(4 / 7)
    assert f1("a big red house", ["nothing", "the BIG red house!"]) == 1.0
    assert f1("", ["something"]) == 0.0
    assert token_f1(["so", "so"], ["so"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7.", 7),
        ("#### 1,234", 1234),
        ("$18.50 a day", Fraction(37, 2)),
        ("it is .5", Fraction(1, 2)),
        ("from 10 to -5", -5),
        ("5-3", 3),
        ("x = −2 metres", -2),
        ("1,2,3", 3),
        ("12,34", 34),
        ("v1.2.3", 3),
        ("none", None),
        ("٣", 3),
    ],
)
def test_last_number(text: str, number: Fraction | None) -> None:
    assert last_number(text) == number


def test_endless_digits_are_a_number() -> None:
    assert last_number("9" * 5000) == 10**5000 - 1
    assert same_maths("9" * 5000 + ".0", "9" * 5000)


@given(st.integers(-(10**9), 10**9), st.integers(0, 3), st.sampled_from(["is {}", "4 and then ${}.", "= {} apples!"]))
def test_any_way_to_write_a_number_is_the_same(number: int, zeros: int, sentence: str) -> None:
    written = f"{number:,}" + ("." + "0" * zeros if zeros else "")
    assert same_number(sentence.format(written), str(number))
    assert not same_number(sentence.format(written), str(number + 1))
    assert not same_number("no number at all", str(number))


def test_matches() -> None:
    assert matches("the answer is (B)", r"\(([A-D])\)$")
    assert not matches("the answer is (B).", r"\(([A-D])\)$")


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        (r"Thus \boxed{\dfrac{1}{2}}", r"\frac12", True),
        (r"\boxed{1} and then \boxed{2}", "2", True),
        (r"so $x = \boxed{\frac{\sqrt3}{2}}$ is it", r"\frac{\sqrt{3}}{2}", True),
        (r"\boxed{1,000.0}", "1000", True),
        (r"\boxed{3/4}", "0.75", True),
        (r"\boxed{-\frac{3}{4}}", "-.75", True),
        (r"\boxed{50\%}", "50", True),
        (r"$45^\circ$", "45", True),
        (r"\boxed{45^\circ}", "45", True),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", False),
        (r"\boxed{\frac{1}{0}}", "0", False),
        (r"\boxed{9^{9^{9^{9}}}}", "3", False),
        (r"\boxed{unfinished", "unfinished", False),
        ("12", "12", True),
        ("I do not know", "12", False),
    ],
)
def test_same_maths(answer: str, reference: str, right: bool) -> None:
    assert same_maths(answer, reference) is right


def test_where_answers_stand() -> None:
    assert last_boxed(r"\boxed{a{b}c} \boxed 7$ end") == "7"
    assert last_boxed("nothing") is None
    assert between_dollars("a $b$ c $d$ e") == "b$ c $d"
    assert between_dollars("costs $5") == "costs $5"


@given(LATEX, LATEX)
def test_equal_strings_as_lm_eval(lm_eval_maths: ModuleType, one: str, other: str) -> None:
    for left, right in ((one, other), (one, one.replace("dfrac", "frac")), (one, one.replace(" ", ""))):
        assert equal_strings(left, right) == lm_eval_maths.is_equiv(left, right)


@given(LATEX)
def test_last_boxed_as_lm_eval(lm_eval_maths: ModuleType, text: str) -> None:
    found = lm_eval_maths.last_boxed_only_string(text)
    assert last_boxed(text) == (lm_eval_maths.remove_boxed(found) if found is not None else None)


@given(st.fractions(max_denominator=999))
def test_exact_value_of_any_fraction(value: Fraction) -> None:
    sign = "-" if value < 0 else ""
    above, below = abs(value.numerator), value.denominator
    assert exact_value(rf"{sign}\frac{{{above}}}{{{below}}}") == value
    assert exact_value(rf"${sign}\dfrac{{{above}}}{{{below}}}$.") == value
    assert exact_value(f"{sign}{above}/{below}") == value


def test_references_of_math_equal_themselves(real_data: Path, lm_eval_maths: ModuleType) -> None:
    from puna.evaluate.tasks.data import read_rows

    for row in list(read_rows(real_data / "eval/math.jsonl.gz"))[::10]:
        solution, answer = row.get("chain_of_thought", str), row.get("answer", str)
        assert same_maths(solution, answer)
        assert equal_strings(answer, solution) == lm_eval_maths.is_equiv(answer, solution)
