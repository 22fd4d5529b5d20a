"""Personal data: numbers that are valid by construction are found, one wrong digit is not."""

import time
from collections.abc import Callable
from datetime import date

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.curate.filters.pii import PII, is_card_number, is_chinese_id, mask

DIGITS = st.integers(0, 9)


def luhn_digit(digits: list[int]) -> int:
    """The check digit that follows: doubled digits are summed digit by digit."""
    total = sum(sum(map(int, str(digit * 2))) if place % 2 == 0 else digit for place, digit in enumerate(digits[::-1]))
    return -total % 10


def id_character(digits: str) -> str:
    """The character c with (sum of digit * 2^(17 - place) + c) = 1 modulo 11."""
    for character in "0123456789X":
        value = 10 if character == "X" else int(character)
        if (sum(int(digit) * pow(2, 17 - place) for place, digit in enumerate(digits)) + value) % 11 == 1:
            return character
    raise AssertionError


@given(st.lists(DIGITS, min_size=14, max_size=14), st.sampled_from(["{}{}{}{}", "{} {} {} {}", "{}-{}-{}-{}"]), DIGITS)
@settings(deadline=None)
def test_card_numbers(middle: list[int], form: str, other: int) -> None:
    digits = [4, *middle]
    right = luhn_digit(digits)
    number = "".join(map(str, [*digits, right]))
    written = form.format(*(number[place : place + 4] for place in range(0, 16, 4)))
    assert mask(f"card {written}, thanks", "card_number") == ("card [CARD_NUMBER], thanks", 1)
    wrong = written[:-1] + str(other)
    assert (mask(wrong, "card_number")[1] == 1) == (other == right)
    assert not is_card_number("9" + written[1:])


@given(
    st.sampled_from(["110105", "440304", "820000"]),
    st.dates(date(1900, 1, 1), date(2020, 1, 1)),
    st.integers(0, 999),
    st.integers(0, 17),
    st.integers(1, 9),
)
@settings(deadline=None)
def test_chinese_identity_numbers(region: str, born: date, serial: int, place: int, change: int) -> None:
    digits = f"{region}{born:%Y%m%d}{serial:03d}"
    number = digits + id_character(digits)
    assert mask(f"身份证{number}号", "chinese_id") == ("身份证[CHINESE_ID]号", 1)
    changed = str((int(number[place].replace("X", "0")) + change) % 10)
    wrong = number[:place] + changed + number[place + 1 :]
    assert not is_chinese_id(wrong)


@given(st.integers(0, 999), st.integers(0, 99), st.integers(0, 9999))
@settings(deadline=None)
def test_us_social_security_numbers(area: int, group: int, serial: int) -> None:
    given_out = area not in (0, 666) and area < 900 and group > 0 and serial > 0
    assert mask(f"SSN {area:03d}-{group:02d}-{serial:04d}.", "us_ssn")[1] == given_out
    assert mask(f"SSN {area:03d} {group:02d}-{serial:04d}.", "us_ssn")[1] == 0


@given(st.lists(st.integers(0, 255), min_size=4, max_size=4))
@settings(deadline=None)
def test_only_public_addresses(numbers: list[int]) -> None:
    first, second = numbers[:2]
    private = first in (0, 10, 127) or first >= 224 or (first, second) in ((169, 254), (192, 168))
    found = mask(f"from {'.'.join(map(str, numbers))}:80", "ip_address")[1]
    if private:
        assert found == 0
    elif first not in (100, 172, 192, 198, 203):
        assert found == 1


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Mail jo.doe+x@mail.example.org.", "Mail [EMAIL]."),
        ("写信给wang@example.cn吧", "写信给[EMAIL]吧"),
        ("no@where, @name, a@b, .x@y.de, x@-y.de", None),
        (
            "8.8.8.8 but not 192.168.0.1, 256.8.8.8 or v1.2.3.4.5",
            "[IP_ADDRESS] but not 192.168.0.1, 256.8.8.8 or v1.2.3.4.5",
        ),
        (
            "2001:4860:4860::8888, ::1, fe80::1, 12:30:45 and std::abs",
            "[IP_ADDRESS], ::1, fe80::1, 12:30:45 and std::abs",
        ),
        ("+1 (650) 253-0000 or (650) 253-0000 or 650.253.0000", "[PHONE] or [PHONE] or [PHONE]"),
        ("电话13812345678，010-62345678，+86 138 1234 5678", "电话[PHONE]，[PHONE]，[PHONE]"),
        ("on 2024-01-01 at 12345678901 of 150-253-0000", None),
        ("", None),
    ],
)
def test_masks(text: str, masked: str | None, table: Callable[..., pa.Table]) -> None:
    outcome = PII()(table(["nothing here", text]))
    assert outcome.kept["text"].to_pylist() == ["nothing here", text if masked is None else masked]
    assert outcome.rejected.num_rows == 0
    assert bool(outcome.counts) == (masked is not None)


def test_counts_by_kind_and_only_what_is_looked_for(table: Callable[..., pa.Table]) -> None:
    texts = ["a@b.com c@d.com 078-05-1120", "4111 1111 1111 1111 8.8.8.8"]
    assert PII()(table(texts)).counts == {"email": 2, "us_ssn": 1, "card_number": 1, "ip_address": 1}
    assert PII(look_for=("email",))(table(texts)).counts == {"email": 2}


def test_drops(reasons: Callable[..., list[str | None]]) -> None:
    texts = ["a@b.com", "none", "a@b.com and c@d.com"]
    assert reasons(PII(mode="drop"), texts) == ["personal data", None, "personal data"]
    assert reasons(PII(mode="drop", min_to_drop=2), texts) == [None, None, "personal data"]


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="at least one kind"):
        PII(look_for=())
    with pytest.raises(ValueError, match="min_to_drop"):
        PII(min_to_drop=0)


def test_five_megabytes_on_one_line_take_bounded_time(table: Callable[..., pa.Table]) -> None:
    documents = table(["a" * 5_000_000, "a." * 2_500_000 + "@" + "a." * 1000, "1:" * 1_000_000])
    start = time.process_time()
    PII()(documents)
    assert time.process_time() - start < 30
