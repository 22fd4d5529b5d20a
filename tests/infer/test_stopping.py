"""Stop strings against a twin that looks at the whole text after every character."""

from hypothesis import given
from hypothesis import strategies as st

from puna.infer.stopping import StopStrings


def naive(text: str, stops: list[str]) -> str:
    for end in range(len(text) + 1):
        found = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: min(found)]
    return text


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_cut_as_if_seen_at_once_and_nothing_leaks(pieces: list[str], stops: list[str]) -> None:
    matcher = StopStrings(stops)
    expected = naive("".join(pieces), stops)
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        assert expected.startswith(shown)
        if matcher.found:
            break
    else:
        shown += matcher.flush()
    assert shown == expected


def test_only_what_could_become_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["END"])
    assert [
        matcher.push(piece)
        for piece in (
            "say E",
            "N",
            "d E",
            "ND",
        )
    ] == ["say ", "", "ENd ", ""]
    assert matcher.found
