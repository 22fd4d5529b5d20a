"""Clusters of documents out of pairs of them."""

import duckdb
import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray

_PAIRS = 2**20
"""Pairs in memory at a time."""

Positions = NDArray[np.int64]


@njit(cache=True, nogil=True)
def _root(parents: Positions, node: int) -> int:
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = parents[node]
    return node


@njit(cache=True, nogil=True)
def unite(parents: Positions, left: Positions, right: Positions) -> None:
    """Merge the trees of each pair of nodes under the lesser of their roots."""
    for pair in range(len(left)):
        a, b = _root(parents, left[pair]), _root(parents, right[pair])
        parents[max(a, b)] = min(a, b)


@njit(cache=True, nogil=True)
def find_roots(parents: Positions) -> Positions:
    """The root of each node's tree: the least number in it, if all trees were made by `unite`."""
    roots = np.empty_like(parents)
    for node in range(len(parents)):
        roots[node] = _root(parents, node)
    return roots


def connected_components(connection: duckdb.DuckDBPyConnection, pairs: str) -> pa.Table:
    """Columns document and cluster (the component's least document) of all documents in a table of pairs.

    The pairs stream through; in memory are only the numbers of the documents in them.

    Args:
        connection: the database.
        pairs: its table with columns document and earlier.
    """
    nodes = connection.sql(f"SELECT document FROM {pairs} UNION SELECT earlier FROM {pairs} ORDER BY ALL").fetchnumpy()[
        "document"
    ]
    parents = np.arange(len(nodes))
    for batch in connection.sql(f"SELECT document, earlier FROM {pairs}").to_arrow_reader(_PAIRS):
        left, right = (np.searchsorted(nodes, batch[side].to_numpy()) for side in ("document", "earlier"))
        unite(parents, left, right)
    return pa.table({"document": nodes, "cluster": nodes[find_roots(parents)]})
