"""Random streams that depend on what they are for, not on what ran before."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a tuple such as (run seed, "shuffle", epoch): equal parts give equal seeds."""
    digest = hashlib.sha256("\0".join(map(repr, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
