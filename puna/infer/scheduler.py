"""Which sequences compute how many tokens in the next step; integers only."""

from bisect import bisect_left, insort

from puna.infer.blocks import BlockManager, Key
from puna.infer.sequence import Sequence

Plan = dict[Sequence, int]
"""For each sequence of a step, how many tokens of it are computed, its draft's included."""


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


class Scheduler:
    """Continuous batching: in each step sequences join, advance, and leave.

    A step computes at most `step_tokens` tokens. Sequences that decode come first, with one token each, so that a long
    prompt never holds up the others; what is left of the step goes to prompts, in pieces (chunked prefill, Agrawal et
    al. 2023, arXiv:2308.16369). Within each kind, rank decides: priority, then arrival.

    A sequence is admitted when the worst case of all that run, with it, fits into the cache `overcommit` times. With
    the usual 1 a running sequence thus always finds its next block. With more, one may not: then the last in rank gives
    its blocks up and waits, to be computed again. So does one of lower priority where a sequence of higher priority
    finds no room.

    Args:
        blocks: the books on the cache.
        max_rows: most sequences that run at once.
        step_tokens: most tokens in a step; at least `max_rows`.
        chunk: prompts are computed in pieces of exactly this many tokens, counted from the beginning, except for the
            last, and answers token by token even when they are computed again. `step_tokens` is at least
            `max_rows + chunk`. Where absent, a piece is what the step has left.
        overcommit: how often the cache is given away, at least 1.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_rows: int,
        step_tokens: int,
        chunk: int | None = None,
        overcommit: float = 1.0,
    ) -> None:
        self.blocks = blocks
        self.running: list[Sequence] = []  # by rank
        self.num_preemptions = 0
        self._waiting: list[Sequence] = []  # by rank, the first at the end
        self._max_rows = max_rows
        self._step_tokens = max(step_tokens, max_rows + (chunk or 0))
        self._chunk = chunk
        self._room = int(blocks.num_blocks * overcommit)
        self._promised = 0  # worst cases of those that run, in blocks
        self._num_arrivals = 0

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        return not self.running and not self._waiting

    @property
    def num_waiting(self) -> int:
        """Sequences that are not admitted yet, or not any more."""
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Alone it fits into the cache."""
        assert self._worst(sequence) <= self.blocks.num_blocks
        self._num_arrivals += 1
        sequence.arrival = self._num_arrivals
        self._wait(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Let a sequence go, wherever it is."""
        if (place := _place(self.running, sequence)) is not None:
            del self.running[place]
            self._promised -= self._worst(sequence)
            self.blocks.release(sequence)
        elif (place := _place(self._waiting, sequence, reverse=True)) is not None:
            del self._waiting[place]

    def preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to wait at its old rank; its tokens stay."""
        self.remove(sequence)
        self.num_preemptions += 1
        sequence.draft.clear()
        self._wait(sequence)

    def preempt_all(self) -> list[Sequence]:
        """Send all that run back to wait; returns all that wait then, whether they ran or not."""
        for sequence in reversed(self.running.copy()):
            self.preempt(sequence)
        return list(self._waiting)

    def plan(self) -> Plan:
        """What the next step computes; it has blocks for all of it.

        Empty only if nothing waits or runs. Report back with `advance`.
        """
        plan: Plan = {}
        budget = self._step_tokens
        decoding = [sequence for sequence in self.running if sequence.num_pending == 1]
        reserved = len(decoding)  # a draft must not take another's one token
        for sequence in decoding:
            reserved -= 1
            if not sequence.blocks:
                continue  # preempted a moment ago
            del sequence.draft[max(budget - reserved - 1, 0) :]
            if sequence.draft and not self.blocks.grow(sequence, sequence.length + len(sequence.draft)):
                sequence.draft.clear()
            budget -= self._schedule(plan, sequence, 1 + len(sequence.draft))
        if len(plan) < len(self.running):
            for sequence in [sequence for sequence in self.running if sequence not in plan]:
                if sequence.blocks and (piece := self._piece(sequence, budget)) > 0:
                    budget -= self._schedule(plan, sequence, piece)
        self._admit(plan, budget)
        return plan

    def advance(self, sequence: Sequence, num_tokens: int) -> None:
        """Note that a planned sequence has `num_tokens` more tokens in the cache."""
        sequence.num_computed += num_tokens
        self.blocks.register(sequence)

    def _schedule(self, plan: Plan, sequence: Sequence, num_tokens: int) -> int:
        """Put a running sequence into the plan, at the cost of the last in rank if need be.

        Returns what that takes of the step's budget, which is negative when more is given back.
        """
        given_back = 0
        while not self.blocks.grow(sequence, sequence.num_computed + num_tokens):
            victim = self.running[-1]
            self.preempt(victim)
            given_back += plan.pop(victim, 0)
            if victim is sequence:
                return -given_back
        plan[sequence] = num_tokens
        return num_tokens - given_back

    def _admit(self, plan: Plan, budget: int) -> None:
        """Let waiting sequences in, as far as budget, rows and memory go."""
        coming: set[Key | None] | None = None
        place = len(self._waiting)
        while budget > 0 and place > 0:
            place -= 1
            sequence = self._waiting[place]
            if not self._has_room(sequence) and not self._make_room(sequence, plan):
                break
            place = self._place_waiting(sequence)
            found = self.blocks.find_prefix(sequence)
            coming = coming if coming is not None else self._keys_to_come()
            key = self.blocks.next_key(sequence, found)
            if key is not None and key in coming and self.blocks.wants(sequence, found):
                continue  # another computes the very block that is next here; soon it can be shared
            self.blocks.take_prefix(sequence, found)
            piece = self._piece(sequence, budget)
            if piece <= 0 or not self.blocks.grow(sequence, sequence.num_computed + piece):
                self.blocks.release(sequence)
                break
            del self._waiting[place]
            insort(self.running, sequence, key=_rank)
            self._promised += self._worst(sequence)
            if sequence.num_cached is None:
                sequence.num_cached = min(sequence.num_computed, sequence.num_prompt)
            plan[sequence] = piece
            budget -= piece
            coming.add(key)

    def _piece(self, sequence: Sequence, budget: int) -> int:
        """How many pending tokens are computed at once; 0 where the budget does not reach for a fixed piece."""
        if self._chunk is None:
            return min(sequence.num_pending, budget)
        prompt = sequence.num_prompt - sequence.num_computed
        piece = min(prompt, self._chunk - sequence.num_computed % self._chunk) if prompt > 0 else 1
        return piece if piece <= budget else 0

    def _keys_to_come(self) -> set[Key | None]:
        prefilling = (sequence for sequence in self.running if sequence.num_pending > 1)
        return {self.blocks.upcoming_key(sequence) for sequence in prefilling}

    def _has_room(self, sequence: Sequence) -> bool:
        fits = self._promised + self._worst(sequence) <= self._room
        return fits and len(self.running) < self._max_rows

    def _make_room(self, sequence: Sequence, plan: Plan) -> bool:
        """Preempt the last in rank of lower priority, if that lets `sequence` in."""
        lower = [other for other in self.running if other.priority < sequence.priority]
        left = self._promised - sum(map(self._worst, lower))
        if not lower or left + self._worst(sequence) > self._room:
            return False
        while not self._has_room(sequence):
            victim = self.running[-1]
            self.preempt(victim)
            plan.pop(victim, None)
        return True

    def _worst(self, sequence: Sequence) -> int:
        return self.blocks.blocks_for(max(sequence.worst_length, 1))

    def _wait(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=_reversed_rank)

    def _place_waiting(self, sequence: Sequence) -> int:
        place = _place(self._waiting, sequence, reverse=True)
        assert place is not None
        return place

    def check_integrity(self) -> None:
        """Assert that the books are consistent."""
        self.blocks.check_integrity(self.running)
        assert all(not sequence.blocks for sequence in self._waiting), "one that waits owns blocks"
        assert self.running == sorted(self.running, key=_rank)
        assert self._waiting == sorted(self._waiting, key=_reversed_rank)
        assert not set(self.running) & set(self._waiting)
        assert all(sequence.finish_reason is None for sequence in (*self.running, *self._waiting))
        assert self._promised == sum(map(self._worst, self.running)), "promises are miscounted"
        assert len(self.running) <= self._max_rows
        for sequence in self.running:
            assert sequence.num_computed <= len(sequence.blocks) * self.blocks.block_size
            assert sequence.num_computed < sequence.length


def _reversed_rank(sequence: Sequence) -> tuple[int, int]:
    return (sequence.priority, -sequence.arrival)


def _place(ranked: list[Sequence], sequence: Sequence, *, reverse: bool = False) -> int | None:
    """Where in a list sorted by rank `sequence` stands."""
    key = _reversed_rank if reverse else _rank
    place = bisect_left(ranked, key(sequence), key=key)
    return place if place < len(ranked) and ranked[place] is sequence else None
