"""The deciders without a tensor: random traffic against their own books and against what they promise."""

import random
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from puna.infer.blocks import BlockManager
from puna.infer.scheduler import Scheduler
from puna.infer.sequence import Sequence


def sequence(prompt: list[int], max_tokens: int, **more: object) -> Sequence:
    return Sequence(list(prompt), len(prompt), max_tokens, namespace=("weights", 0), **more)  # type: ignore[arg-type]


class Traffic(RuleBasedStateMachine):
    """Sequences come, are cancelled, and generate tokens at random, with drafts that are accepted in part."""

    @initialize(
        num_blocks=st.integers(6, 24),
        block_size=st.sampled_from((1, 2, 4)),
        max_rows=st.integers(1, 4),
        step_tokens=st.integers(1, 24),
        overcommit=st.sampled_from((1.0, 2.0, 4.0)),
        chunk_blocks=st.sampled_from((None, 1, 2)),
        share=st.booleans(),
    )
    def open(
        self,
        num_blocks: int,
        block_size: int,
        max_rows: int,
        step_tokens: int,
        overcommit: float,
        chunk_blocks: int | None,
        share: bool,
    ) -> None:
        chunk = chunk_blocks and chunk_blocks * block_size
        self.blocks = BlockManager(
            num_blocks, block_size, share=share, share_step=chunk or 1, share_answers=chunk is None
        )
        self.scheduler = Scheduler(
            self.blocks, max_rows=max_rows, step_tokens=step_tokens, chunk=chunk, overcommit=overcommit
        )
        self.overcommit, self.chunk = overcommit, chunk
        self.step_tokens = max(step_tokens, max_rows + (chunk or 0))
        self.live: list[Sequence] = []
        self.finished: list[Sequence] = []
        self.priorities: set[int] = set()
        # What stands in each slot of the cache: the tokens from the beginning of the text up to there.
        self.slots: dict[int, tuple[int, ...]] = {}

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        max_tokens=st.integers(0, 8),
        priority=st.sampled_from((0, 0, 0, 1)),
        most_cached=st.sampled_from((None, None, 0, 5)),
    )
    def submit(self, prompt: list[int], max_tokens: int, priority: int, most_cached: int | None) -> None:
        capacity = self.blocks.num_blocks * self.blocks.block_size
        new = sequence(prompt[: max(capacity - 8, 1)], max_tokens, priority=priority, most_cached=most_cached)
        if self.blocks.blocks_for(new.worst_length) > self.blocks.num_blocks:
            return
        self.scheduler.add(new)
        self.live.append(new)
        self.priorities.add(priority)

    @rule(which=st.integers(0, 100))
    def cancel(self, which: int) -> None:
        if self.live:
            gone = self.live.pop(which % len(self.live))
            self.scheduler.remove(gone)
            gone.finish_reason = "cancelled"

    @rule(seed=st.integers(0, 2**31), drafts=st.booleans())
    def step(self, seed: int, drafts: bool) -> None:
        chance = random.Random(seed)
        for running in self.scheduler.running:
            room = running.max_tokens - running.num_generated - 1
            if drafts and running.num_pending == 1 and room > 0 and self.chunk is None:
                running.draft = [chance.randrange(2) for _ in range(chance.randint(0, min(room, 3)))]
        before = self.scheduler.num_preemptions
        plan = self.scheduler.plan()
        assert bool(plan) == bool(self.live)
        assert sum(plan.values()) <= self.step_tokens
        if self.overcommit == 1 and len(self.priorities) == 1:
            assert self.scheduler.num_preemptions == before
        for planned, count in plan.items():
            self.compute(planned, count, chance)

    def compute(self, planned: Sequence, count: int, chance: random.Random) -> None:
        """Write the slots as a runner would, and check that it reads what belongs to this very text."""
        size, start = self.blocks.block_size, planned.num_computed
        text = [*planned.tokens, *planned.draft]
        assert count >= 1
        assert start + count <= len(text)
        assert planned.num_cached is not None
        assert planned.most_cached is None or planned.num_cached <= planned.most_cached
        if self.chunk is not None and start < planned.num_prompt:
            assert start % self.chunk == 0
            assert start + count in (start + self.chunk, planned.num_prompt)
        for position in range(start + count):
            slot = planned.blocks[position // size] * size + position % size
            if position < start:
                assert self.slots[slot] == tuple(text[: position + 1]), "another text's tokens, or rejected ones"
            else:
                self.slots[slot] = tuple(text[: position + 1])
        if start + count < planned.length:
            self.scheduler.advance(planned, count)
            return
        accepted = chance.randint(0, start + count - planned.length)
        new = [*planned.draft[:accepted], chance.randrange(2)]
        planned.draft = []
        self.scheduler.advance(planned, count if planned.length == start + count else planned.length - start)
        if planned.max_tokens:
            for token in new:
                planned.tokens.append(token)
            # Accepted guesses stand in the cache already.
            self.scheduler.advance(planned, accepted)
        if planned.num_generated >= planned.max_tokens:
            assert planned.num_generated == planned.max_tokens
            planned.finish_reason = "length"
            self.scheduler.remove(planned)
            self.live.remove(planned)

    @rule(forget=st.booleans())
    def finish_all(self, forget: bool = False) -> None:
        """Whatever has been admitted or waits comes to its end."""
        for number in range(4000):
            if not self.live:
                break
            self.step(number, drafts=False)
        assert not self.live
        assert self.scheduler.idle
        assert self.blocks.num_free == self.blocks.num_blocks
        if forget:
            self.blocks.forget()
            assert not self.blocks.find_prefix(sequence([0] * 20, 1))

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            assert set(self.live) >= set(self.scheduler.running)
            assert len(self.live) == len(self.scheduler.running) + self.scheduler.num_waiting

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            self.finish_all()


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)


def run(scheduler: Scheduler) -> Iterator[list[Sequence]]:
    """Step after step, who decoded; every sequence generates its maximum."""
    while plan := scheduler.plan():
        decoded = []
        for planned, count in plan.items():
            scheduler.advance(planned, count)
            if planned.num_pending == 0:
                planned.tokens.append(planned.num_generated)
                decoded.append(planned)
                if planned.num_generated == planned.max_tokens:
                    scheduler.remove(planned)
        yield decoded


def open_scheduler(num_blocks: int = 64, block_size: int = 4, **options: object) -> Scheduler:
    options = {"max_rows": 4, "step_tokens": 16, **options}
    return Scheduler(BlockManager(num_blocks, block_size), **options)  # type: ignore[arg-type]


def test_first_come_first_served_and_priority_first() -> None:
    scheduler = open_scheduler(max_rows=1)
    names = ["first", "second", "urgent", "third"]
    sequences = [sequence([n, n + 1], 2, priority=int(n == 2)) for n in range(4)]
    for one in sequences:
        scheduler.add(one)
    ended = [one for decoded in run(scheduler) for one in decoded if one.num_generated == 2]
    assert [names[sequences.index(one)] for one in ended] == ["urgent", "first", "second", "third"]


def test_urgent_work_takes_the_place_of_other_work_which_goes_on_later() -> None:
    scheduler = open_scheduler(max_rows=2)
    slow = [sequence([n] * 5, 6) for n in range(2)]
    for one in slow:
        scheduler.add(one)
    steps = run(scheduler)
    next(steps)
    urgent = sequence([9] * 5, 1, priority=5)
    scheduler.add(urgent)
    assert urgent in next(steps)
    assert slow[1].blocks == []
    assert slow[1].num_generated == 1
    list(steps)
    assert [one.num_generated for one in slow] == [6, 6]
    assert scheduler.num_preemptions == 1


def test_a_long_prompt_does_not_hold_up_those_that_decode() -> None:
    scheduler = open_scheduler()
    short = sequence([1], 30)
    scheduler.add(short)
    steps = run(scheduler)
    next(steps)
    scheduler.add(sequence(list(range(100, 190)), 1))
    for decoded in steps:
        assert short in decoded or short.num_generated == 30


def test_equal_prompts_are_computed_once() -> None:
    """Even where they come together: the others wait for the one that is at it."""
    scheduler = open_scheduler(step_tokens=12)
    twins = [sequence(list(range(30)), 2) for _ in range(3)]
    other = sequence([50] * 4, 2)
    for one in (*twins, other):
        scheduler.add(one)
    computed: Counter[Sequence] = Counter()
    while plan := scheduler.plan():
        for planned, count in plan.items():
            computed[planned] += count
            scheduler.advance(planned, count)
            if planned.num_pending == 0:
                planned.tokens.append(planned.num_generated)
                if planned.num_generated == planned.max_tokens:
                    scheduler.remove(planned)
    assert [computed[twin] for twin in twins] == [31, 3, 3]  # 7 full blocks of 4 are shared, 2 prompt tokens are not
    assert [twin.num_cached for twin in twins] == [0, 28, 28]


def test_cached_text_is_found_until_its_blocks_are_needed() -> None:
    blocks = BlockManager(6, 2)
    scheduler = Scheduler(blocks, max_rows=1, step_tokens=64)

    def cached(prompt: list[int]) -> int | None:
        one = sequence(prompt, 1)
        scheduler.add(one)
        list(run(scheduler))
        return one.num_cached

    assert cached([1, 2, 3, 4, 5]) == 0
    assert cached([1, 2, 3, 4, 9]) == 4
    assert cached([1, 2, 7, 7, 7]) == 2
    assert cached([8] * 11) == 0  # takes every block
    assert cached([1, 2, 3, 4, 5]) == 0
    other = sequence([1, 2, 3, 4, 5], 1)
    other.namespace = ("weights", 1)
    scheduler.add(other)
    list(run(scheduler))
    assert other.num_cached == 0


def test_side_by_side_where_possible() -> None:
    blocks = BlockManager(8, 2)
    one, other = sequence([1] * 8, 1), sequence([2] * 4, 1)
    for each in (one, other):
        blocks.take_prefix(each, [])
    assert blocks.grow(one, 4)
    assert blocks.grow(other, 4)
    assert one.blocks == [0, 1]
    assert other.blocks == [2, 3]
    assert blocks.grow(other, 6)
    assert other.blocks == [2, 3, 4]
    assert not blocks.grow(one, 13)
    assert one.blocks == [0, 1]


def test_check_integrity_sees_what_is_wrong() -> None:
    blocks = BlockManager(4, 2)
    one = sequence([1, 2, 3], 1)
    blocks.take_prefix(one, [])
    blocks.grow(one, 3)
    blocks.check_integrity([one])
    one.blocks.pop()
    with pytest.raises(AssertionError, match="miscounted"):
        blocks.check_integrity([one])
