"""Mixtures: exact shares in every stretch, rows that depend on their number alone, epochs that are counted."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.batches.mixture import (
    PERIOD,
    Ingredient,
    MixedRows,
    MixtureConfig,
    MixtureSource,
    Rotation,
    fair_order,
    open_mixture,
    temperature_shares,
    whole_counts,
)
from puna.batches.packing import PackedRows
from puna.batches.shards import TokenShards
from puna.runtime.errors import InputError
from puna.runtime.manifest import Manifest

SHARES = st.lists(st.floats(0.001, 1), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(any))
def test_every_prefix_has_its_share(counts: list[int]) -> None:
    order = fair_order(counts)
    assert np.bincount(order, minlength=len(counts)).tolist() == counts
    places = np.arange(1, len(order) + 1)
    for number, count in enumerate(counts):
        exact = places * count / sum(counts)
        assert np.abs(np.cumsum(order == number) - exact).max(initial=0) < 1


@given(shares=SHARES, total=st.integers(20, 10_000))
def test_whole_counts_add_up_and_forget_nobody(shares: list[float], total: int) -> None:
    counts = whole_counts([*shares, 0.0], total)
    assert sum(counts) == total
    assert counts.pop() == 0
    for count, share in zip(counts, shares, strict=True):
        assert count >= 1
        assert abs(count - share / sum(shares) * total) < 1 + len(shares)


def test_published_proportions_are_met_exactly() -> None:
    shares = [0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02]
    rotation = Rotation(shares)
    assert rotation.counts == [round(share * PERIOD) for share in shares]
    window = [rotation.at(place) for place in range(123_456, 124_456)]
    for number, share in enumerate(shares):
        assert abs(window.count(number) - share * 1000) < 2
        assert rotation.count(number, 124_456) - rotation.count(number, 123_456) == window.count(number)


def test_temperature_brings_small_languages_up() -> None:
    assert temperature_shares([90, 10], 1) == pytest.approx([0.9, 0.1])
    assert temperature_shares([81, 16], 2) == pytest.approx([9 / 13, 4 / 13])
    assert temperature_shares([90, 10], 1e9) == pytest.approx([0.5, 0.5])


@pytest.fixture
def sources(make_shards) -> list[TokenShards]:  # type: ignore[no-untyped-def]
    """Three sources whose tokens tell which they are."""
    return [
        make_shards([[100 * n + p for p in range(9)] for _ in range(documents)])
        for n, documents in enumerate((40, 20, 10))
    ]


def mixed(sources: list[TokenShards], shares: list[float], later: list[float], start: int, seed: int = 0) -> MixedRows:
    return MixedRows(
        [
            Ingredient(str(n), PackedRows(shards, 6, seed, "cut"), share, after)
            for n, (shards, share, after) in enumerate(zip(sources, shares, later, strict=True))
        ],
        start,
    )


def test_rows_come_from_their_source_in_order_and_by_number(sources: list[TokenShards]) -> None:
    rows = mixed(sources, [0.5, 0.3, 0.2], [0.0, 0.1, 0.9], start=30)
    whole = rows.batch(range(60))
    origin = (whole.ids_BT[:, 0] // 100).tolist()
    assert [origin[:30].count(n) for n in range(3)] == [15, 9, 6]
    assert [origin[30:].count(n) for n in range(3)] == [0, 3, 27]
    for number, shards in enumerate(sources):
        mine = whole.ids_BT[[place for place, source in enumerate(origin) if source == number]]
        alone = PackedRows(shards, 6, 0, "cut").batch(range(len(mine)))
        assert torch.equal(mine, alone.ids_BT)
        assert rows.count(number, 60) == len(mine)
    again = mixed(sources, [0.5, 0.3, 0.2], [0.0, 0.1, 0.9], start=30)
    for row in (59, 3, 30, 29):
        for name in ("ids_BT", "labels_BT", "positions_BT", "documents_BT"):
            assert torch.equal(getattr(again.batch([row]), name)[0], getattr(whole, name)[row])
    assert rows.epochs(60)["2"] == (6 + 27) / (10 * 9 // 6)


def test_one_source_is_that_source(sources: list[TokenShards]) -> None:
    alone = PackedRows(sources[0], 6, 5, "cut").batch(range(100))
    one = mixed(sources[:1], [0.3], [0.3], start=10, seed=5).batch(range(100))
    assert torch.equal(one.ids_BT, alone.ids_BT)
    assert torch.equal(one.labels_BT, alone.labels_BT)


TOKENIZER = SimpleNamespace(hash="hash", pad_id=0)


def opened(config: MixtureConfig, steps: int = 10, batch_rows: int = 4) -> MixedRows:
    return open_mixture(config, tokenizer=TOKENIZER, row_length=6, seed=0, steps=steps, batch_rows=batch_rows)  # type: ignore[arg-type]


def test_a_configured_mixture(sources: list[TokenShards]) -> None:
    a, b, c = (shards.directory for shards in sources)
    config = MixtureConfig(
        (
            MixtureSource("web", a, 3),
            MixtureSource("books", b, 1, annealing_proportion=3),
            MixtureSource("maths", c, 0, annealing_proportion=3),
        ),
        annealing_share=0.25,
    )
    rows = opened(config, steps=10)
    assert rows.annealing_start == 4 * (10 - 2)  # a quarter of ten steps, to whole steps
    assert [i.share for i in rows.ingredients] == [0.75, 0.25, 0]
    assert [i.annealing_share for i in rows.ingredients] == pytest.approx([1 / 3] * 3)
    with pytest.raises(InputError, match=r"books 4\.4 times, maths 8\.8 times, more often than max_epochs \(4\)"):
        opened(replace(config, annealing_share=0.99), steps=100)
    assert opened(replace(config, annealing_share=0.99, max_epochs=100), steps=100)


def test_folders_of_one_source_are_weighed_by_temperature(sources: list[TokenShards], tmp_path: Path) -> None:
    whole = tmp_path / "wiki"
    whole.mkdir()
    for name, shards in zip(("en", "de"), (sources[0], sources[2]), strict=True):
        shards.directory.rename(whole / name)
    Manifest("tokenize", {}, {}, {"folders": ["en", "de"], "split_by": "language"}).write(whole)
    with pytest.raises(InputError, match=r"for each language \(en, de\)"):
        TokenShards(whole)
    config = MixtureConfig(
        (MixtureSource("wiki", whole, 1, temperature=2), MixtureSource("b", sources[1].directory, 1))
    )
    shares = {i.name: i.share for i in opened(config).ingredients}
    assert shares == pytest.approx({"wiki/en": 1 / 3, "wiki/de": 1 / 6, "b": 1 / 2})


@pytest.mark.parametrize(
    ("sources", "values", "message"),
    [
        ((("a", 1.0), ("a", 1.0)), {}, "same name"),
        ((("a", 0.0),), {}, "above 0"),
        ((("a", 1.0),), {"annealing_share": 1.0}, "at least 0 and less than 1"),
        ((("a", 1.0),), {"annealing_share": 0.5}, "or neither"),
    ],
)
def test_wrong_mixtures_are_explained(
    sources: tuple[tuple[str, float], ...], values: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureConfig(tuple(MixtureSource(name, Path(name), share) for name, share in sources), **values)


def test_wrong_sources_are_explained() -> None:
    with pytest.raises(ValueError, match="proportions of a have to be 0 or more"):
        MixtureSource("a", Path("a"), -1)
    with pytest.raises(ValueError, match="temperature of a is 0"):
        MixtureSource("a", Path("a"), 1, temperature=0)
    with pytest.raises(ValueError, match="Annealing needs a source"):
        MixtureConfig((MixtureSource("a", Path("a"), 1, annealing_proportion=0),), annealing_share=0.5)
