"""Random numbers of a row that depend on (seed, epoch, row) alone: not on its batch, its process or its worker."""

from __future__ import annotations

import numpy as np

from lightning_iclr.pmi_masking.hashing import mix


def row_keys(seed: int, epoch: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Return a 64-bit key of each row (B,), of the seed of the run, the pass over the data and the row's number."""
    start = mix(np.full(len(row), seed, np.int64))
    return mix(mix(start + epoch.astype(np.uint64)) + row.astype(np.uint64))


class RowDraws:
    """Draw for many rows at once from streams of their own, one for each purpose.

    Args:
        keys: A 64-bit number for each row of a batch (B,), such as `row_keys`.

    Examples:
        >>> two = RowDraws(row_keys(0, np.array([1, 1]), np.array([7, 8])))
        >>> one = RowDraws(row_keys(0, np.array([1]), np.array([8])))
        >>> first = one.uniform("action", np.array([0]), np.array([0]))
        >>> bool(two.uniform("action", np.array([0, 1]), np.array([0, 0]))[1] == first[0])
        True
    """

    def __init__(self, keys: np.ndarray) -> None:
        self.keys = keys.astype(np.uint64)

    def bits(self, purpose: str, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return 32 random bits for each of N pairs of a row of the batch and a place in its stream, as uint64 (N,)."""
        stream = mix(self.keys ^ np.uint64(int.from_bytes(purpose.encode()[:8], "big")))
        bits: np.ndarray = mix(stream[rows] + places.astype(np.uint64)) >> np.uint64(32)
        return bits

    def uniform(self, purpose: str, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return a number in [0, 1) for each pair of a row and a place (N,)."""
        return self.bits(purpose, rows, places) / 2.0**32
