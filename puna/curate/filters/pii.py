"""Personal data: found by patterns, confirmed by the rules of each kind, masked or a reason to drop the document."""

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import re2

from puna.curate.document import Outcome, split
from puna.curate.filters.reasons import first_reason
from puna.curate.filters.texts import split_with_texts

PersonalData = Literal["email", "ip_address", "card_number", "chinese_id", "us_ssn", "phone"]

_UNICAST = ipaddress.ip_network("2000::/3")
_CHINESE_REGIONS = frozenset(
    [*range(11, 16), *range(21, 24), *range(31, 38), *range(41, 47), *range(50, 55), *range(61, 66), 71, 81, 82]
)
_CHINESE_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_CARD_ISSUERS = (
    ("4", "4", (13, 16, 19)),
    ("51", "55", (16,)),
    ("2221", "2720", (16,)),
    ("34", "34", (15,)),
    ("37", "37", (15,)),
    ("300", "305", (14,)),
    ("36", "36", (14,)),
    ("38", "39", (14,)),
    ("3528", "3589", (16,)),
    ("6011", "6011", (16, 19)),
    ("644", "659", (16, 19)),
    ("62", "62", (16, 17, 18, 19)),
)
"""First digits (from, to) and lengths: Visa, Mastercard, American Express, Diners, JCB, Discover, UnionPay."""


def is_email(text: str) -> bool:
    """Whether the two sides of the @ are well formed (RFC 5321 in what is used of it)."""
    local, _, domain = text.rpartition("@")
    labels = domain.split(".")
    return not (local.startswith(".") or local.endswith(".") or ".." in local) and not any(
        label.startswith("-") or label.endswith("-") for label in labels
    )


def is_public_ip(text: str) -> bool:
    """Whether this is an address of the public internet, version 4 or 6."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast and (address.version == 4 or address in _UNICAST)


def is_card_number(text: str) -> bool:
    """Whether an issuer gives out numbers of this beginning and length, and the check digit (Luhn) is right."""
    digits = _digits(text)
    issued = any(
        len(digits) in lengths and first <= digits[: len(first)] <= last for first, last, lengths in _CARD_ISSUERS
    )
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return issued and (doubled + sum(map(int, digits[-1::-2]))) % 10 == 0


def is_chinese_id(text: str) -> bool:
    """Whether region, date of birth and check character fit (GB 11643-1999; ISO 7064, MOD 11-2)."""
    try:
        born = date(int(text[6:10]), int(text[10:12]), int(text[12:14]))
    except ValueError:
        return False
    total = sum(weight * int(digit) for weight, digit in zip(_CHINESE_WEIGHTS, text[:17], strict=True))
    right = "10X98765432"[total % 11]
    return int(text[:2]) in _CHINESE_REGIONS and 1850 <= born.year <= 2100 and text[17].upper() == right


def is_us_ssn(text: str) -> bool:
    """Whether the Social Security Administration could have given out this number (since 2011: any area but these)."""
    area, group, serial = text[:3], text[4:6], text[7:]
    return text[3] == text[6] and area not in ("000", "666") and area[0] != "9" and group != "00" and serial != "0000"


def is_phone(text: str) -> bool:
    """Whether the number of digits fits: E.164 after a +, else as in the United States or in China."""
    length = len(_digits(text))
    return 8 <= length <= 15 if text.startswith("+") else 10 <= length <= 12


def _digits(text: str) -> str:
    return "".join(character for character in text if character in "0123456789")


_PATTERNS: dict[PersonalData, tuple[str, Callable[[str], bool], str]] = {
    "email": (r"[A-Za-z0-9._%+\-]{1,64}@(?:[A-Za-z0-9][A-Za-z0-9\-]{0,62}\.){1,6}[A-Za-z]{2,24}", is_email, "[EMAIL]"),
    "ip_address": (
        r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}|[0-9A-Fa-f]{1,4}(?::[0-9A-Fa-f]{0,4}){2,7}",
        is_public_ip,
        "[IP_ADDRESS]",
    ),
    "card_number": (
        r"[2-6][0-9]{12,18}|[2-6][0-9]{3}(?:[ \-][0-9]{4}){3}|3[0-9]{3}[ \-][0-9]{6}[ \-][0-9]{4,5}",
        is_card_number,
        "[CARD_NUMBER]",
    ),
    "chinese_id": (r"[1-8][0-9]{16}[0-9Xx]", is_chinese_id, "[CHINESE_ID]"),
    "us_ssn": (r"[0-9]{3}[ \-][0-9]{2}[ \-][0-9]{4}", is_us_ssn, "[US_SSN]"),
    "phone": (
        r"\+[1-9][0-9]{0,2}[ .\-]?(?:\([0-9]{1,4}\)[ .\-]?)?[0-9](?:[ .\-]?[0-9]){4,12}"
        r"|(?:1[ .\-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[ .\-])[2-9][0-9]{2}[ .\-][0-9]{4}"
        r"|1[3-9][0-9](?:[ \-]?[0-9]{4}){2}"
        r"|0[0-9]{2,3}-[0-9]{7,8}",
        is_phone,
        "[PHONE]",
    ),
}
"""Kind -> pattern, rule, mask; in the order in which they are looked for. RE2 takes time linear in the text."""


@dataclass(frozen=True)
class PII:
    """Mask personal data, or drop documents that hold some (Llama 3, section 3.1.1).

    Numbers count only if their check digits and the rules of who gives them out say so, network addresses only if they
    are public. Counts are by kind of data.
    """

    kind: Literal["pii"] = "pii"
    """This step's name."""
    look_for: tuple[PersonalData, ...] = get_args(PersonalData)
    """Kinds of data: email, ip_address, card_number, chinese_id, us_ssn, phone."""
    mode: Literal["mask", "drop"] = "mask"
    """mask: put [EMAIL], [IP_ADDRESS], ... in its place. drop: reject the document."""
    min_to_drop: int = 1
    """With mode = "drop": documents with fewer finds, of all kinds together, are kept as they are."""

    def __post_init__(self) -> None:
        if not self.look_for:
            raise ValueError("look_for must name at least one kind of personal data.")
        if self.min_to_drop < 1:
            raise ValueError(f"min_to_drop must be at least 1, not {self.min_to_drop}.")

    def __call__(self, documents: pa.Table) -> Outcome:
        """Mask or reject; count finds by kind."""
        texts = documents["text"].combine_chunks()
        changed: dict[int, str] = {}
        found = np.zeros(len(documents), np.int64)
        counts: dict[str, int] = {}
        for kind, (pattern, _, _) in _PATTERNS.items():
            if kind not in self.look_for:
                continue
            suspects = np.flatnonzero(pc.match_substring_regex(texts, pattern).to_numpy(zero_copy_only=False))
            for row in suspects.tolist():
                masked, count = mask(changed.get(row) or texts[row].as_py(), kind)
                if count:
                    changed[row] = masked
                    found[row] += count
                    counts[kind] = counts.get(kind, 0) + count
        if self.mode == "drop":
            return split(
                documents, first_reason(len(documents), [(found >= self.min_to_drop, "personal data")]), counts
            )
        rows = np.zeros(len(documents), bool)
        rows[list(changed)] = True
        texts = pc.replace_with_mask(texts, rows, pa.array([changed[row] for row in sorted(changed)], pa.string()))
        return split_with_texts(documents, texts, pa.nulls(len(documents), pa.string()), counts)


def mask(text: str, kind: PersonalData) -> tuple[str, int]:
    """The text with each confirmed find of one kind replaced by its mask, and how many there were."""
    _, rule, placeholder = _PATTERNS[kind]
    pieces, done = [], 0
    for match in _pattern(kind).finditer(text):
        start, end = match.span()
        if _stands_alone(text, start, end) and rule(text[start:end]):
            pieces += [text[done:start], placeholder]
            done = end
    return "".join(pieces) + text[done:], len(pieces) // 2


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Whether the find is no part of a longer word or number."""
    before, after = text[max(start - 2, 0) : start], text[end : end + 2]
    if before and (_is_word(before[-1]) or before[-1] == "@"):
        return False
    if len(before) == 2 and before[-1] in ".-" and before[-2].isdigit() and text[start] in "0123456789":
        return False
    if after and (_is_word(after[0]) or after[0] == "@"):
        return False
    return not (len(after) == 2 and after[0] in ".-" and after[1].isdigit())


def _is_word(character: str) -> bool:
    """Whether an ASCII letter, digit or underscore; Chinese is written without spaces around numbers."""
    return character == "_" or (character.isascii() and character.isalnum())


@cache
def _pattern(kind: PersonalData) -> Any:
    return re2.compile(_PATTERNS[kind][0])
