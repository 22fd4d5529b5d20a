"""Rows: pure functions of their number, nothing lost, nothing leaking."""

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.batches.packing import IGNORE, PADDING, PackedRows, TokenBatch, best_fit
from puna.runtime.errors import InputError

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=20)
QUIET = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def numbered(lengths: list[int]) -> list[list[int]]:
    """Documents whose tokens are all different: document d, position p is 100 d + p."""
    return [[100 * d + p for p in range(length)] for d, length in enumerate(lengths)]


def check_rows(batch: TokenBatch) -> None:
    """Labels, positions and documents say of each token what its id says."""
    for ids, labels, positions, documents in zip(
        batch.ids_BT.tolist(),
        batch.labels_BT.tolist(),
        batch.positions_BT.tolist(),
        batch.documents_BT.tolist(),
        strict=True,
    ):
        for t, (token, label, position, document) in enumerate(zip(ids, labels, positions, documents, strict=True)):
            if document == PADDING:
                assert label == IGNORE
                continue
            assert label in (IGNORE, token + 1)
            if t and documents[t - 1] == document:
                assert token == ids[t - 1] + 1
                assert position == positions[t - 1] + 1
                assert labels[t - 1] == token
            else:
                assert position == 0


@QUIET
@given(lengths=LENGTHS, row_length=st.integers(2, 16), seed=st.integers(0, 5))
def test_cut_rows_hold_the_stream_once(make_shards, lengths: list[int], row_length: int, seed: int) -> None:  # type: ignore[no-untyped-def]
    shards = make_shards(numbered(lengths), vocab_size=100_000)
    if sum(lengths) < row_length:
        with pytest.raises(InputError, match="less than one row"):
            PackedRows(shards, row_length, seed, "cut")
        return
    rows = PackedRows(shards, row_length, seed, "cut")
    assert rows.rows_per_epoch == sum(lengths) // row_length
    for epoch in range(2):
        batch = rows.batch(range(epoch * rows.rows_per_epoch, (epoch + 1) * rows.rows_per_epoch))
        check_rows(batch)
        seen = Counter(batch.ids_BT.flatten().tolist())
        assert max(seen.values()) == 1
        assert (batch.documents_BT != PADDING).all()
        # Every token but the last of its document has a label.
        ends = {100 * d + length - 1 for d, length in enumerate(lengths)}
        unlabelled = batch.ids_BT[batch.labels_BT == IGNORE].tolist()
        assert set(unlabelled) <= ends


@QUIET
@given(lengths=LENGTHS, row_length=st.integers(4, 40), seed=st.integers(0, 5))
def test_whole_rows_hold_every_document_once(make_shards, lengths: list[int], row_length: int, seed: int) -> None:  # type: ignore[no-untyped-def]
    masks = [[p % 3 != 0 for p in range(length)] for length in lengths]
    shards = make_shards(numbered(lengths), [[int(m) for m in mask] for mask in masks], vocab_size=100_000)
    rows = PackedRows(shards, row_length, seed, "whole")
    for epoch in range(2):
        batch = rows.batch(range(epoch * rows.rows_per_epoch, (epoch + 1) * rows.rows_per_epoch))
        kept = batch.documents_BT != PADDING
        assert sorted(batch.ids_BT[kept].tolist()) == sorted(
            token for ids in numbered(lengths) for token in ids[:row_length]
        )
        labelled = batch.labels_BT != IGNORE
        expected = sum(mask[p] for mask in masks for p in range(1, min(len(mask), row_length + 1)))
        assert int(labelled.sum()) == batch.num_targets == expected


def test_rows_are_functions_of_their_number(make_shards) -> None:  # type: ignore[no-untyped-def]
    shards = make_shards(numbered([7, 20, 3, 11, 30, 2]), vocab_size=100_000)
    for packing in ("cut", "whole"):
        rows = PackedRows(shards, 32, 3, packing)
        again = PackedRows(shards, 32, 3, packing)
        backwards = {n: again.batch([n]).ids_BT for n in reversed(range(9))}
        assert all(torch.equal(rows.batch([n]).ids_BT, backwards[n]) for n in range(9))
        epochs = [rows.batch(range(e * rows.rows_per_epoch, (e + 1) * rows.rows_per_epoch)).ids_BT for e in range(4)]
        assert any(not torch.equal(epochs[0], other) for other in epochs[1:])
        other_seed = PackedRows(shards, 32, 4, packing)
        assert any(not torch.equal(rows.batch([n]).ids_BT, other_seed.batch([n]).ids_BT) for n in range(9))


def test_documents_of_a_row(make_shards) -> None:  # type: ignore[no-untyped-def]
    shards = make_shards(numbered([4, 4, 4]), vocab_size=100_000)
    rows = PackedRows(shards, 6, 0, "cut")
    for n in range(rows.rows_per_epoch):
        assert {token // 100 for token in rows.batch([n]).ids_BT.flatten().tolist()} == set(rows.documents(n))


def test_split_and_move_keep_rows(make_shards) -> None:  # type: ignore[no-untyped-def]
    batch = PackedRows(make_shards(numbered([50])), 5, 0, "cut").batch(range(7))
    parts = batch.split(3)
    assert [len(part.ids_BT) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part.to(torch.device("cpu")).labels_BT for part in parts]), batch.labels_BT)


@given(st.lists(st.integers(0, 12), max_size=60))
def test_best_fit_respects_capacity_and_wastes_little(lengths: list[int]) -> None:
    descending = sorted(lengths, reverse=True)
    bins = best_fit(descending, 12)
    assert sorted(item for members in bins for item in members) == list(range(len(lengths)))
    fills = [sum(descending[item] for item in members) for members in bins]
    assert all(fill <= 12 for fill in fills)
    # No two bins could have been one, up to one bin: a property of best-fit.
    assert sum(fill <= 6 for fill in fills) <= 1


def test_best_fit_picks_the_tightest_bin() -> None:
    assert best_fit([7, 5, 3], 10) == [[0, 2], [1]]
