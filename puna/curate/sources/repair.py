"""Text that was decoded wrongly on its way here (mojibake), mended by ftfy (Speer 2019)."""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from puna.curate.document import Outcome
from puna.curate.filters.texts import split_with_texts

if TYPE_CHECKING:
    from ftfy import TextFixerConfig


@dataclass(frozen=True)
class RepairText:
    """Mends mojibake such as â€™ for ’, and stray control characters; all else stays as it is written."""

    kind: Literal["repair_text"] = "repair_text"
    """Mend text that was decoded in a wrong encoding (ftfy)."""

    def __call__(self, documents: pa.Table) -> Outcome:
        """Reject nothing; count the documents that changed."""
        from ftfy import fix_text

        before = documents["text"].to_pylist()
        after = [fix_text(text, _settings()) for text in before]
        counts = {"documents repaired": sum(old != new for old, new in zip(before, after, strict=True))}
        reasons = pa.nulls(len(after), pa.string())
        return split_with_texts(documents, pa.array(after, pa.string()), reasons, counts)


@functools.cache
def _settings() -> "TextFixerConfig":
    from ftfy import TextFixerConfig

    return TextFixerConfig(
        unescape_html=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        normalization=None,
        explain=False,
    )
