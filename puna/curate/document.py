"""The one noun of curation."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Document:
    """A text with a name."""

    text: str
    """Unicode text, line ends as \\n."""
    id: str
    """Unique within its source, and telling: a path, an address."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Whatever else is known: language, licence, score."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """What a reader or filter kept out, and why."""

    id: str
    """The document's name."""
    reason: str
    """One of a few fixed phrases, so that rejections can be counted by reason."""
