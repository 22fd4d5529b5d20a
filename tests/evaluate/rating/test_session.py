"""Who is shown what, what is kept, and what a kill leaves."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.evaluate.rating.records import Rating, RatingLog, read_ratings
from puna.evaluate.rating.session import Answer, Comparison, Session, arrange
from puna.runtime.errors import InputError


def comparisons(number: int) -> list[Comparison]:
    return [
        Comparison(
            f"item{n}",
            [{"role": "user", "content": f"What is {n}?"}],
            "advice",
            (Answer("one", f"first {n}"), Answer("two", f"second {n}")),
        )
        for n in range(number)
    ]


@st.composite
def actions(draw: st.DrawFn) -> list[tuple[str, str]]:
    return draw(
        st.lists(
            st.tuples(st.sampled_from(["next", "rate", "rate again", "undo", "restart"]), st.sampled_from("ABC")),
            max_size=40,
        )
    )


@settings(max_examples=40)
@given(actions(), st.integers(1, 7), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 3))
def test_nothing_is_lost_and_all_is_rated(
    tmp_path_factory: pytest.TempPathFactory, acts: list[tuple[str, str]], number: int, overlap: float, seed: int
) -> None:
    """Whatever raters do, the session has what a list of (rater, item) has; in the end everything is rated."""
    path = tmp_path_factory.mktemp("log") / "ratings.jsonl"
    arranged = arrange(comparisons(number), overlap, seed)

    def opened() -> Session:
        return Session(arranged, RatingLog(path), raters=3, seed=seed)

    session = opened()
    expected: list[tuple[str, str]] = []  # the slow twin: who has rated what, the latest last
    shared = {each.item for each in arranged if each.shared}
    assert len(shared) == (0 if overlap == 0 else number if overlap == 1 else -(-number * 3 // 10))

    def check() -> None:
        assert [(rating.rater, rating.item) for rating in session.log.ratings] == expected

    def rate(rater: str) -> bool:
        turn = session.next(rater)
        if turn is None:
            return False
        item = turn.comparison.item
        assert (rater, item) not in expected
        assert item in shared or item not in [rated for _, rated in expected]
        assert session.rate(item, rater, -2, 1.0) is False
        expected.append((rater, item))
        return True

    for act, rater in acts:
        own = [pair for pair in expected if pair[0] == rater]
        if act == "restart":
            session = opened()
        elif act == "rate":
            rate(rater)
        elif act == "next":
            assert session.next(rater) == session.next(rater), "what a rater sees stays until it is rated"
        elif act == "rate again" and own:
            assert session.rate(own[0][1], rater, "both_bad", 2.0) is True
            expected.remove(own[0])
            expected.append(own[0])
        elif act == "undo":
            taken_back = session.undo(rater)
            assert (taken_back is None) == (not own)
            if taken_back is not None:
                assert expected.pop(expected.index(own[-1])) == (rater, taken_back.item)
        check()
    for rater in "ABC":
        while rate(rater):
            check()
    assert session.num_finished == number
    assert all(session.num_left(rater) == 0 for rater in "ABC")
    raters_of = Counter(item for _, item in expected)
    assert all(raters_of[each.item] == (3 if each.shared else 1) for each in arranged)
    assert read_ratings(path) == opened().log.ratings == session.log.ratings


def test_what_lies_before_somebody_is_kept_for_them_while_there_is_other_work(tmp_path: Path) -> None:
    session = Session(comparisons(2), RatingLog(tmp_path / "r.jsonl"), raters=1, seed=0)
    mine, yours = session.next("A"), session.next("B")
    assert mine is not None
    assert yours is not None
    assert mine.comparison.item != yours.comparison.item
    session.rate(yours.comparison.item, "B", 1, 1.0)
    assert session.next("B") == session.turn(mine.comparison.item, "B"), "A may have left"
    session.rate(mine.comparison.item, "B", 1, 1.0)
    assert session.next("A") is None, "somebody else has rated it"


def test_sides_are_drawn_evenly_and_differ_between_raters() -> None:
    def left_of(rater: str, seed: int) -> list[str]:
        session = Session(comparisons(400), RatingLog(Path("never/written.jsonl")), raters=1, seed=seed)
        return [session.turn(f"item{n}", rater).left.model for n in range(400)]

    one, two = left_of("A", 0), left_of("B", 0)
    assert one == left_of("A", 0)
    assert one != left_of("A", 1)
    # Both shares of fair coins: 400 throws lie within 4 standard deviations, 40, of 200.
    assert abs(one.count("one") - 200) < 40
    assert abs(sum(a == b for a, b in zip(one, two, strict=True)) - 200) < 40


def test_a_line_that_a_kill_has_cut_is_dropped_and_the_rest_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ratings.jsonl"
    session = Session(comparisons(3), RatingLog(path), raters=1, seed=0)
    for n in range(2):
        session.rate(f"item{n}", "Ann", 4, 1.5)
    whole = path.read_bytes()
    line = whole.splitlines(keepends=True)[1]
    for cut in (1, len(line) // 2, len(line) - 1):
        path.write_bytes(whole + line[:cut])
        log = RatingLog(path)
        assert [rating.item for rating in log.ratings] == ["item0", "item1"]
        assert path.read_bytes() == whole
        assert "last line was not written" in capsys.readouterr().err
    log.add(log.ratings[0])
    assert [rating.item for rating in read_ratings(path)] == ["item1", "item0"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"verdict": 5}, "line 1 is not a rating: verdict is 5"),
        ({"verdict": True}, "verdict is True"),
        ({"verdict": 0, "edited": "x"}, "Only a better answer can be edited"),
        ({"verdict": 2, "edited": " b "}, "the same as one of the answers"),
        ({"colour": 1}, "A rating has: item, prompt"),
        ({"undo": "i"}, "takes back a rating that is not there"),
    ],
)
def test_what_is_no_rating_is_refused_by_line(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    rating: dict[str, Any] = {"item": "i", "prompt": [], "category": "", "left": "one", "right": "two"}
    rating |= {"left_answer": "a", "right_answer": "b", "verdict": 1, "rater": "Ann", "seconds": 1.0}
    (tmp_path / "r.jsonl").write_text(json.dumps(line if "undo" in line else rating | line) + "\n")
    with pytest.raises(InputError, match=message):
        read_ratings(tmp_path / "r.jsonl")
    Rating(**rating)


def test_ratings_of_other_comparisons_are_refused(tmp_path: Path) -> None:
    log = RatingLog(tmp_path / "r.jsonl")
    Session(comparisons(3), log, raters=1, seed=0).rate("item2", "Ann", 1, 1.0)
    with pytest.raises(InputError, match="ratings of other comparisons"):
        Session(comparisons(2), log, raters=1, seed=0)
