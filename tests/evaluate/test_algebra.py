"""Answers compared by computer algebra, those that would keep it busy for ever included."""

import multiprocessing

import pytest

from puna.evaluate import algebra
from puna.evaluate.algebra import equivalent_all
from puna.runtime.errors import InputError

ENDLESS = r"\boxed{9^{9^{9^{9}}}}"


def test_answers_are_taken_for_what_they_mean() -> None:
    pytest.importorskip("math_verify")
    pairs = {
        (r"so \boxed{x^2+2x+1}", "(x+1)^2"): True,
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}"): True,
        (r"It is \boxed{\{1,2\}}", r"\{2,1\}"): True,
        (r"the answer is $\frac12$", "0.5"): True,
        (r"\boxed{(1,2)}", "(2,1)"): False,
        (r"\boxed{x^2+2x}", "(x+1)^2"): False,
        (r"\boxed{" + "(" * 1000, "1"): False,
        ("", "1"): False,
    }
    assert equivalent_all(list(pairs), timeout_seconds=200) == list(pairs.values())
    assert not multiprocessing.active_children()


def test_an_endless_answer_is_given_up_and_the_next_one_asked_about() -> None:
    pytest.importorskip("math_verify")
    assert equivalent_all([(ENDLESS, "3")] * 2, timeout_seconds=0.1) == [False, False]
    assert not multiprocessing.active_children()


def test_without_the_library_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algebra.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs math-verify"):
        equivalent_all([("1", "1")])
