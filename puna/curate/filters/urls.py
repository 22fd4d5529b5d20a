"""Reject pages by their address."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from puna.curate.document import Outcome, split
from puna.curate.filters.lists import read_list
from puna.curate.filters.reasons import first_reason

_HOST = r"^(?:[a-z][a-z0-9+.\-]*:)?(?://)?(?:[^/@?#]*@)?(?P<host>\[[^\]]*\]|[^/:?#]*)"
_MAX_LEVELS = 8
"""Levels of a domain name, such as 3 in a.example.org, that are looked up one by one."""


@dataclass(frozen=True)
class URLs:
    """Reject documents whose address is on a list of yours, or holds words that are.

    Llama 3 (section 3.1.1) removes domains known for personal data, harm and adult content. No list is carried here;
    lists of such domains by subject are published, one domain a line.
    """

    kind: Literal["urls"] = "urls"
    """This step's name."""
    blocked_domains: tuple[Path, ...] = ()
    """Files of domains; one blocks all below it: example.org blocks www.example.org."""
    blocked_words: tuple[str, ...] = ()
    """Words that may not stand in an address between what is neither letter nor digit, in any case."""
    column: str = "url"
    """Column that holds the address; documents without one are kept."""

    def __post_init__(self) -> None:
        if not self.blocked_domains and not self.blocked_words:
            raise ValueError("urls has nothing to look for: set blocked_domains, blocked_words or both.")
        for word in self.blocked_words:
            if not word.isalnum():
                raise ValueError(f"blocked_words may only hold letters and digits, not {word!r}.")

    def __call__(self, documents: pa.Table) -> Outcome:
        """Reject documents with a blocked address.

        Raises:
            InputError: a list is not there, or broken.
        """
        if self.column not in documents.column_names:
            return split(documents, pa.nulls(len(documents), pa.string()))
        addresses = pc.fill_null(pc.utf8_lower(documents[self.column]), "").combine_chunks()
        tests = []
        if self.blocked_domains:
            domains = pa.array(sorted({entry for path in self.blocked_domains for entry in read_list(path)}))
            tests.append((_is_below(addresses, domains), "blocked domain"))
        if self.blocked_words:
            words = "|".join(self.blocked_words).lower()
            found = pc.match_substring_regex(addresses, rf"(^|[^\pL\pN])({words})($|[^\pL\pN])")
            tests.append((found.to_numpy(zero_copy_only=False), "blocked word in address"))
        return split(documents, first_reason(len(documents), tests))


def _is_below(addresses: pa.Array, domains: pa.Array) -> NDArray[np.bool_]:
    """Whether the host of each address is one of the domains, or below one."""
    hosts = pc.fill_null(pc.struct_field(pc.extract_regex(addresses, _HOST), "host"), "")
    hosts = pc.utf8_rtrim(hosts, ".")
    found = np.zeros(len(addresses), bool)
    for _ in range(_MAX_LEVELS):
        found |= pc.is_in(hosts, domains).to_numpy(zero_copy_only=False)
        hosts = pc.replace_substring_regex(hosts, r"^[^.]*\.?", "")
    return found
