"""Token shards: what goes in comes out, and damage is named."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puna.batches.shards import TokenShards
from puna.runtime.errors import InputError
from puna.runtime.manifest import Manifest


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    documents=st.lists(st.lists(st.integers(0, 99_999), min_size=1, max_size=20), min_size=1, max_size=12),
    shard_tokens=st.integers(1, 40),
)
def test_documents_come_back(make_shards, documents: list[list[int]], shard_tokens: int) -> None:  # type: ignore[no-untyped-def]
    masks = [[token % 2 for token in ids] for ids in documents]
    shards = make_shards(documents, masks, vocab_size=100_000, shard_tokens=shard_tokens)
    assert len(shards) == len(documents)
    assert shards.num_targets == sum(map(sum, masks))
    for number, ids in enumerate(documents):
        assert shards.ids(number).tolist() == ids
        assert shards.ids(number, 1, 3).tolist() == ids[1:3]
        assert shards.mask(number).tolist() == masks[number]
    assert shards.document_ids() == [f"doc{n}" for n in range(len(documents))]


def test_small_vocabularies_take_two_bytes(make_shards) -> None:  # type: ignore[no-untyped-def]
    assert make_shards([[1]], vocab_size=65_536).ids(0).dtype == np.uint16
    assert make_shards([[1]], vocab_size=65_537).ids(0).dtype == np.uint32


def test_damage_is_named(make_shards, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    shards = make_shards([[1, 2, 3]])
    with pytest.raises(InputError, match="another tokenizer"):
        TokenShards(shards.directory, "other")
    file = shards.directory / "ids-00000.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"ids-00000\.bin has 5 bytes where the manifest says 6"):
        TokenShards(shards.directory)
    with pytest.raises(InputError, match="does not exist"):
        TokenShards(tmp_path / "absent")
    Manifest("curate", {}, {}).write(tmp_path)
    with pytest.raises(InputError, match="output of `puna curate`"):
        TokenShards(tmp_path)


def test_no_document_is_refused(make_shards) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match="holds no document"):
        make_shards([])
