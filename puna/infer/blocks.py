"""Who owns which block of the key/value cache, and which blocks can be shared; integers only.

The cache is cut into blocks of equally many tokens. A block full of tokens is found again by those tokens and by the
block before it, so a prompt that begins like an earlier text takes over that text's blocks without a copy (as in vLLM,
Kwon et al. 2023, arXiv:2309.06180, section 4.3).
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable

from puna.infer.sequence import Sequence

Key = tuple[Hashable, tuple[int, ...]]
"""What finds a block: the name of the block before it (a namespace for the first of a text), and its tokens.

Names are never used twice, so equal keys mean equal texts; nothing rests on hashes being different.
"""


class BlockManager:
    """Hands out blocks, counts their owners, and remembers what is in those that are full.

    A block without owners is free. What it holds stays findable until the block is needed for something else; the one
    that went unused longest goes first. An owner of a block owns all blocks before it and lets go of the last first, so
    a text's end is forgotten before its beginning.

    Args:
        num_blocks: how many there are.
        block_size: tokens in each.
        share: whether blocks are found again.
        share_step: prefixes are shared in multiples of this many tokens.
        share_answers: whether that holds for generated tokens too, or for prompts only.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, share: bool = True, share_step: int = 1, share_answers: bool = True
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._share = share
        self._share_step = share_step
        self._share_answers = share_answers
        self._num_owners = [0] * num_blocks
        self._free = OrderedDict.fromkeys(range(num_blocks))  # the next to be taken comes first
        self._by_key: dict[Key, int] = {}
        self._keys: list[Key | None] = [None] * num_blocks
        self._names = [0] * num_blocks
        self._last_name = 0

    @property
    def num_free(self) -> int:
        """Blocks without owners."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self.block_size)

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """The blocks that hold the beginning of `sequence`. One token at least is left, to be computed."""
        found: list[int] = []
        if not self._share:
            return found
        parent = sequence.namespace
        for start in range(0, _most_cached(sequence) - self.block_size + 1, self.block_size):
            block = self._by_key.get((parent, tuple(sequence.tokens[start : start + self.block_size])))
            if block is None:
                break
            found.append(block)
            parent = self._names[block]
        usable = len(found) * self.block_size // self._share_step * self._share_step
        return found[: usable // self.block_size]

    def take_prefix(self, sequence: Sequence, found: list[int]) -> None:
        """Make `sequence`, which owns nothing, an owner of what `find_prefix` has just found."""
        assert not sequence.blocks
        for block in found:
            self._own(block)
        sequence.blocks = list(found)
        sequence.stale_from = 0
        sequence.num_registered = len(found)
        sequence.num_computed = len(found) * self.block_size
        sequence.parent = self._names[found[-1]] if found else sequence.namespace

    def next_key(self, sequence: Sequence, found: list[int]) -> Key | None:
        """The key of the first full block of a waiting sequence's prompt that is not among those `found`."""
        start = len(found) * self.block_size
        if not self._share or start + self.block_size > sequence.num_prompt:
            return None
        parent = self._names[found[-1]] if found else sequence.namespace
        return (parent, tuple(sequence.tokens[start : start + self.block_size]))

    def wants(self, sequence: Sequence, found: list[int]) -> bool:
        """Whether a waiting sequence would take over one more block than those `found`."""
        return (len(found) + 1) * self.block_size <= _most_cached(sequence)

    def upcoming_key(self, sequence: Sequence) -> Key | None:
        """The key under which the next block of a running sequence's prompt will be found."""
        start = sequence.num_registered * self.block_size
        if not self._share or start + self.block_size > sequence.num_prompt:
            return None
        return (sequence.parent, tuple(sequence.tokens[start : start + self.block_size]))

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give `sequence` blocks for `num_tokens` tokens in all; False, and no change, where too few are free."""
        blocks = sequence.blocks
        missing = self.blocks_for(num_tokens) - len(blocks)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            # A neighbour of the block before is liked best: what lies side by side can be read without a copy.
            block = blocks[-1] + 1 if blocks else -1
            if block not in self._free or self._keys[block] is not None:
                block = next(iter(self._free))
            self._forget(block)
            self._own(block)
            blocks.append(block)
        return True

    def register(self, sequence: Sequence) -> None:
        """Let others find the blocks of `sequence` that have become full.

        Where another sequence has been quicker with the same text, its block takes the place of the sequence's own.
        """
        limit = sequence.num_computed if self._share_answers else min(sequence.num_computed, sequence.num_prompt)
        limit = limit // self._share_step * self._share_step
        while self._share and (start := sequence.num_registered * self.block_size) + self.block_size <= limit:
            key = (sequence.parent, tuple(sequence.tokens[start : start + self.block_size]))
            block = sequence.blocks[sequence.num_registered]
            known = self._by_key.get(key)
            if known is None:
                self._last_name += 1
                self._by_key[key], self._keys[block], self._names[block] = block, key, self._last_name
            elif known != block:
                self._own(known)
                self._disown(block)
                sequence.blocks[sequence.num_registered] = known
                sequence.stale_from = min(sequence.stale_from, sequence.num_registered)
                block = known
            sequence.parent = self._names[block]
            sequence.num_registered += 1

    def release(self, sequence: Sequence) -> None:
        """Take all blocks from `sequence`, which then has nothing computed."""
        for block in reversed(sequence.blocks):
            self._disown(block)
        sequence.blocks = []
        sequence.num_computed = sequence.num_registered = sequence.stale_from = 0

    def forget(self) -> None:
        """Find nothing again, and hand blocks out as at the beginning. No block may have an owner."""
        assert self.num_free == self.num_blocks
        self._free = OrderedDict.fromkeys(range(self.num_blocks))
        self._by_key.clear()
        self._keys = [None] * self.num_blocks

    def _own(self, block: int) -> None:
        self._num_owners[block] += 1
        self._free.pop(block, None)

    def _disown(self, block: int) -> None:
        self._num_owners[block] -= 1
        if self._num_owners[block] == 0:
            self._free[block] = None
            self._free.move_to_end(block, last=self._keys[block] is not None)

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._by_key[key]
            self._keys[block] = None

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Assert that the books are consistent.

        Args:
            sequences: all that own blocks.
        """
        owned = Counter(block for sequence in sequences for block in sequence.blocks)
        assert owned == Counter({b: n for b, n in enumerate(self._num_owners) if n}), "owners are miscounted"
        assert set(self._free) == set(range(self.num_blocks)) - set(owned), "a block is lost, or both free and owned"
        assert self._by_key == {key: b for b, key in enumerate(self._keys) if key is not None}, "keys disagree"
        names = {self._names[block] for block in self._by_key.values()}
        assert len(names) == len(self._by_key), "two blocks of one name"
        for parent, tokens in self._by_key:
            assert len(tokens) == self.block_size, "a findable block is not full"
            assert not isinstance(parent, int) or parent in names, "a findable block whose predecessor is not"


def _most_cached(sequence: Sequence) -> int:
    """How many of a sequence's tokens may come from the cache: one at least is left, to be computed."""
    computed_by_others = sequence.length - 1
    return computed_by_others if sequence.most_cached is None else min(computed_by_others, sequence.most_cached)
