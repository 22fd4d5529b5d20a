"""Find pages about code and pages that reason, by their lines."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from puna.curate.document import REQUIRED, Outcome, split
from puna.curate.filters.reasons import first_reason, require_shares
from puna.curate.filters.texts import with_column

_CODE = (
    r"[;{}]\s*$"
    r"|^\s*(?:def|class|import|from|return|if|for|while|elif|else|try|except|func|fn|let|const|var|public|private|static"
    r"|void|int|struct|#include|using|package|SELECT|INSERT|UPDATE|CREATE)\b.*[:;(){=]"
    r"|^\s*(?:\$|>>>|In \[\d+\]:)\s+\S"
    r"|\w+\(.*\)\s*(?:->|=>|==|!=|&&|\|\|)"
    r"|^\s*[\w.\[\]]+\s*(?:=|\+=|:=)\s*[\w\"'(\[{]"
    r"|^\s*(?://|/\*|#!|<!--|</?\w+[^>]*>)"
    r"|^```"
)
_REASONING = (
    r"(?i)(?:^|[^\pL])(?:therefore|thus|hence|it follows that|implies that|proof|theorem|lemma|corollary|suppose that"
    r"|we get|solve for|substitut(?:e|ing)|equations?|step \d+)(?:[^\pL]|$)"
    r"|\$[^$]*[\\^_=+][^$]*\$|\\(?:frac|sum|int|sqrt|begin|cdot|times|alpha|beta|theta|leq|geq)\b"
    r"|[\d\pL)]\s*(?:=|≤|≥|≠|≈|<=|>=)\s*[-+]?[\d\pL(√∑∫]"
    r"|\d\s*[-+*/×÷^]\s*\d.*=|[∀∃∈∑∏∫√∞⇒∴]"
    r"|因此|所以|证明|定理|方程|假设|解得|由此可得|したがって|よって"
)
_PATTERNS = {"code": _CODE, "reasoning": _REASONING}
_PARTS = {"code": r"\n", "reasoning": r"\n|[.!?]\s|[。！？]"}


@dataclass(frozen=True)
class Pages:
    """Score how much of a page is code, or is reasoning: the share of its lines, or sentences, that look so.

    Llama 3 (section 3.1.1) extracts code and reasoning pages by classifiers of their own, since their words are unlike
    prose. This is the plain beginning, by pattern, for sorting pages or for choosing examples to train a
    `classifier` on. Chinese and Japanese turns of proof count as reasoning too.
    """

    kind: Literal["pages"] = "pages"
    """This step's name."""
    about: Literal["code", "reasoning"] = "code"
    """What to look for."""
    min_score: float = 0.0
    """Pages with a smaller share of such lines or sentences are rejected."""
    max_score: float = 1.0
    """Pages with a larger share of such lines or sentences are rejected."""
    column: str = ""
    """Column for the share; if empty, code_score or reasoning_score."""

    def __post_init__(self) -> None:
        require_shares(self, "min_score", "max_score")
        if self.min_score > self.max_score:
            raise ValueError(f"min_score ({self.min_score}) is larger than max_score ({self.max_score}).")
        if self.column in REQUIRED.names:
            raise ValueError(f"column must not be {self.column!r}, which every document has.")

    def __call__(self, documents: pa.Table) -> Outcome:
        """Add the share; reject what is out of bounds."""
        lines = pc.split_pattern_regex(documents["text"], _PARTS[self.about]).combine_chunks()
        texts = lines.flatten()
        counted = pc.match_substring_regex(texts, r"\S").to_numpy(zero_copy_only=False)
        found = pc.match_substring_regex(texts, _PATTERNS[self.about])
        found = found.to_numpy(zero_copy_only=False) & counted
        ends = lines.offsets.to_numpy() - lines.offsets[0].as_py()
        sums = np.concatenate([[[0, 0]], np.cumsum([found, counted], axis=1).T])
        of_text = sums[ends[1:]] - sums[ends[:-1]]
        scores = of_text[:, 0] / np.maximum(of_text[:, 1], 1)
        tests = [
            (scores < self.min_score, f"{self.about} score under {self.min_score:g}"),
            (scores > self.max_score, f"{self.about} score over {self.max_score:g}"),
        ]
        scored = with_column(documents, self.column or f"{self.about}_score", pa.array(scores))
        return split(scored, first_reason(len(documents), tests))
