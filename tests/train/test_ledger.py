"""The ledger: every moment is booked once, over kills, rollbacks and pauses."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.train.ledger import FILE_NAME, Goodput, Ledger, read_goodput


class Clock:
    """Time that moves when it is told to."""

    now = 1000.0

    def time(self) -> float:
        return self.now + 5e8

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("puna.train.ledger.time", clock)
    return clock


def die(ledger: Ledger) -> None:
    """End without a word, as far as the file goes."""
    ledger.__exit__(RuntimeError, RuntimeError(), None)


def total(goodput: Goodput) -> float:
    return sum(value for name, value in asdict(goodput).items() if name not in ("wall", "restarts"))


def test_each_phase_gets_its_time(tmp_path: Path, clock: Clock) -> None:
    with Ledger(tmp_path) as ledger:
        clock.now += 3
        ledger.flush(0)
        for step in range(1, 5):
            with ledger.during("data"):
                clock.now += 0.25
            clock.now += 2
            ledger.advance(step)
        with ledger.during("validation"):
            clock.now += 1
        with ledger.during("checkpoint"):
            clock.now += 0.5
        ledger.flush(4)
    assert read_goodput(tmp_path) == Goodput(
        wall=13.5, compute=8, data=1, validation=1, checkpoint=0.5, start_up=3, restart=0, lost=0, restarts=0
    )
    assert str(read_goodput(tmp_path)).startswith("effective training time 59.3% of 14 s; data 7.4%, validation 7.4%")


def test_going_back_loses_what_was_not_yet_written_too(tmp_path: Path, clock: Clock) -> None:
    with Ledger(tmp_path, every_seconds=1e9) as ledger:
        ledger.flush(0)
        for step in (1, 2, 3, 4):
            clock.now += 2
            ledger.advance(step)
            if step == 2:
                ledger.flush(step)  # a checkpoint
        ledger.went_back(2)
        clock.now += 3
        ledger.advance(3)
    assert read_goodput(tmp_path) == Goodput(wall=11, compute=7, lost=4)


def test_a_kill_loses_what_is_done_again_and_a_pause_counts_for_nothing(tmp_path: Path, clock: Clock) -> None:
    killed = Ledger(tmp_path, every_seconds=0.0)
    for step in (1, 2, 3):
        clock.now += 2
        killed.advance(step)
    clock.now += 1  # never written
    die(killed)
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"event": "spe')
    clock.now += 9
    second = Ledger(tmp_path)
    clock.now += 4
    second.went_back(1)
    clock.now += 2
    second.flush(2)
    second.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    clock.now += 3600
    with Ledger(tmp_path) as third:
        third.went_back(2)
        clock.now += 2
        third.flush(3)
    goodput = read_goodput(tmp_path)
    # The first step of the first process is booked as its start-up: nothing told them apart.
    assert goodput == Goodput(wall=24, compute=4, start_up=6, restart=10, lost=4, restarts=1)
    assert total(goodput) == goodput.wall


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["data", "validation", "checkpoint", "checks"]), st.integers(0, 50)),
            st.tuples(st.sampled_from(["step", "kill", "rollback"]), st.integers(0, 50)),
        ),
        max_size=40,
    )
)
def test_the_parts_add_up_to_the_whole(tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, int]]) -> None:
    """Against a plain simulation: seconds of each step are kept by step, and moved to lost when it is done again."""
    folder, clock = tmp_path_factory.mktemp("ledger"), Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("puna.train.ledger.time", clock)
        ledger, step, compute, start, dead = Ledger(folder, every_seconds=0.0), 0, dict[int, float](), clock.now, 0.0
        ledger.flush(0)
        for event, amount in events:
            if event == "step":
                clock.now += amount
                step += 1
                compute[step] = amount
                ledger.advance(step)
            elif event == "kill":
                ledger.flush(step)
                die(ledger)
                clock.now += amount
                dead += amount
                ledger = Ledger(folder, every_seconds=0.0)
                ledger.went_back(step)
            elif event == "rollback":
                step = min(step, amount)
                compute = {done: seconds for done, seconds in compute.items() if done <= step}
                ledger.went_back(step)
            else:
                with ledger.during(event):  # type: ignore[arg-type]
                    clock.now += amount
        ledger.flush(step)
        die(ledger)
        wall = clock.now - start
    goodput = read_goodput(folder)
    assert goodput.wall == pytest.approx(wall)
    assert total(goodput) == pytest.approx(wall)
    assert goodput.compute == pytest.approx(sum(compute.values()))
    assert goodput.restart == pytest.approx(dead)


def test_other_ranks_write_nothing_and_no_ledger_is_all_zeros(tmp_path: Path) -> None:
    with Ledger(tmp_path, writes=False) as ledger:
        ledger.flush(1)
    assert list(tmp_path.iterdir()) == []
    assert read_goodput(tmp_path) == Goodput()


def test_lines_are_json(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        ledger.flush(0)
    lines = [json.loads(line) for line in (tmp_path / FILE_NAME).read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "spent", "spent", "stop"]
