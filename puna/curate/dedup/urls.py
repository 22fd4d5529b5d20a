"""Documents from the same address."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from puna.curate.dedup.database import keys_database, write_decisions
from puna.curate.dedup.fingerprints import hash_texts
from puna.curate.dedup.outcomes import document_numbers, keep_one
from puna.curate.document import Outcome
from puna.runtime.errors import InputError

KEYS = pa.schema({"document": pa.int64(), "low": pa.uint64(), "high": pa.uint64(), "date": pa.string()})

_ADDRESS = r"^(?:(?:[a-zA-Z][a-zA-Z0-9+.-]*:)?//)?(?:[^/?#@]*@)?(?P<host>\[[^\]]*\]|[^/?#:]*)(?P<rest>[^#]*)"
_DEFAULT_PORT = r"^:(?:80|443)?(/|\?|$)"
_TRACKING = (
    r"(?i)([?&])(?:utm_[^&=]*|gclid|gclsrc|dclid|gbraid|wbraid|fbclid|msclkid|yclid|igshid|mc_cid|mc_eid|_ga|_gl"
    r"|_hsenc|_hsmi|mkt_tok|ref_src|spm|phpsessid|jsessionid)(?:=[^&]*)?(?:&|$)"
)


def normalize_urls(urls: pa.ChunkedArray) -> pa.ChunkedArray:
    """Addresses in a form that is equal for those which usually show the same page.

    Scheme, user, default port, leading `www.`, fragment, trailing slashes and the parameters that only track (campaign,
    click and session identifiers) go; the host is in lower case. The other parameters stay, in their order.
    """
    parts = pc.extract_regex(pc.utf8_trim_whitespace(urls), _ADDRESS)
    host = pc.replace_substring_regex(pc.utf8_lower(pc.struct_field(parts, "host")), r"^www\d?\.|\.$", "")
    rest = pc.replace_substring_regex(pc.struct_field(parts, "rest"), _DEFAULT_PORT, r"\1")
    rest = pc.replace_substring_regex(rest, r"(?i);jsessionid=[^?]*", "")
    # Doubled, so that each parameter has a separator of its own on either side.
    rest = pc.replace_substring_regex(pc.replace_substring(rest, "&", "&&"), _TRACKING, r"\1")
    rest = pc.replace_substring_regex(pc.replace_substring_regex(rest, "&+", "&"), r"\?&", "?")
    rest = pc.replace_substring_regex(rest, r"[?&]$", "")
    return pc.binary_join_element_wise(host, pc.replace_substring_regex(rest, r"/+(\?|$)", r"\1"), "")


@dataclass(frozen=True)
class UrlDuplicates:
    """Keep one version of each page: the newest, or the first (Llama 3, section 3.1.1).

    Documents without an address are kept.
    """

    kind: Literal["url_duplicates"] = "url_duplicates"
    """This step's name."""
    url_column: str = "url"
    """Column of addresses."""
    date_column: str | None = None
    """Column of dates (ISO 8601): the newest version is kept, the first of equally new ones; absent, the first."""

    def keys(self, documents: pa.Table, first: int) -> pa.Table:
        """Hash of the normalised address, and the date."""
        for column in (self.url_column, self.date_column):
            if column is not None and column not in documents.column_names:
                names = ", ".join(documents.column_names)
                raise InputError(
                    f"url_duplicates needs the column {column!r}; documents have {names}. Name another one."
                )
        dates = pa.nulls(len(documents), pa.string())
        if self.date_column is not None:
            dates = documents[self.date_column].cast(pa.string())
        urls = normalize_urls(documents[self.url_column])
        keys = hash_texts(urls).append_column("date", dates)
        keys = keys.add_column(0, "document", document_numbers(documents, first))
        return keys.filter(pc.greater(pc.fill_null(pc.binary_length(urls), 0), 0))

    def decide(self, keys: Sequence[Path], work: Path, memory_bytes: int) -> None:
        """Every document whose address occurs more than once; the cluster is the number of the first one."""
        with keys_database(keys, KEYS, work, memory_bytes) as connection:
            write_decisions(
                connection,
                """
                WITH repeated AS (SELECT low, high FROM keys GROUP BY low, high HAVING count(*) > 1)
                SELECT document,
                    min(document) OVER (PARTITION BY low, high) AS cluster,
                    row_number() OVER (
                        PARTITION BY low, high
                        ORDER BY TRY_CAST(date AS TIMESTAMP WITH TIME ZONE) DESC NULLS LAST, document
                    ) = 1 AS keep
                FROM keys SEMI JOIN repeated USING (low, high) ORDER BY document
                """,
                work,
            )

    def apply(self, documents: pa.Table, first: int, decisions: pa.Table) -> Outcome:
        """Reject all versions but one."""
        reason = "older version of the same address" if self.date_column else "same address as an earlier document"
        return keep_one(documents, first, decisions, self.kind, reason)
