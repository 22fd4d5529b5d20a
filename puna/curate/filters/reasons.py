"""From measurements to reasons."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def first_reason(num_documents: int, tests: Iterable[tuple[NDArray[np.bool_], str]]) -> pa.Array:
    """For each document the reason of the first test that rejects it, else null, as `split` takes it."""
    reasons = np.full(num_documents, None, object)
    for rejected, reason in reversed(list(tests)):
        reasons[rejected] = reason
    return pa.array(reasons, pa.string())


def ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    """part / whole; 0 of nothing is 0."""
    return part / np.maximum(whole, 1)


def require_shares(settings: object, *names: str) -> None:
    """Raise ValueError unless each of these settings is between 0 and 1."""
    for name in names:
        value = getattr(settings, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is a share and must be between 0 and 1, not {value}.")


def require_not_negative(settings: object, *names: str) -> None:
    """Raise ValueError if one of these settings is below 0."""
    for name in names:
        value = getattr(settings, name)
        if value < 0:
            raise ValueError(f"{name} must be 0 or more, not {value}.")
