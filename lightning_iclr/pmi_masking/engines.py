"""What counts pairs of neighbours in a corpus that may not fit the memory: numpy here, databases elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from lightning_iclr.pmi_masking.streams import Stream, append, collapsed

_IDS = np.dtype(np.int32)
_RUN = np.dtype([("key", "<i8"), ("count", "<i4")])  # occurrences of a pair in one chunk
_BYTES = 128  # that work on one position, or on one run, takes at most, with what the allocator keeps
_LEAST = 1 << 15  # positions of a chunk: with fewer, files would be opened more often than numbers are counted


class Engine(Protocol):
    """Hold a corpus as the numbers of its frequent n-grams of one length, and bring it to the next length."""

    def open(self, chunks: Iterable[np.ndarray], size: int) -> None:
        """Take the corpus as numbers of its frequent words, below ``size``; a negative number is a break."""

    def frequent_pairs(self, min_count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the frequent pairs of neighbours (S, 2), in ascending order, and their counts (S,)."""

    def relabel(self, pairs: np.ndarray) -> None:
        """Replace each position's number by that of the frequent pair which begins there, or by a break."""

    def keep(self, n: int) -> None:
        """Have the corpus, as numbers of length ``n``, on disk."""

    def restore(self, n: int, size: int) -> None:
        """Read the corpus that has been kept."""

    def forget(self, n: int) -> None:
        """Remove what has been kept of another length."""

    def close(self) -> None:
        """Remove everything."""


def make_engine(name: str, folder: Path, room: int) -> Engine:
    """Return an engine by its name.

    Args:
        name: ``numpy``, ``duckdb`` or ``daft``.
        folder: For its files.
        room: Bytes of memory for it.

    Raises:
        ValueError: There is no engine of this name.
        ModuleNotFoundError: Its library is not installed.
    """
    if name == "numpy":
        return NumpyEngine(folder, room)
    if name in ("duckdb", "daft"):
        from lightning_iclr.pmi_masking.sql_engines import DaftEngine, DuckDBEngine  # which need pyarrow

        return DuckDBEngine(folder, room) if name == "duckdb" else DaftEngine(folder, room)
    raise ValueError(f"engine must be 'numpy', 'duckdb' or 'daft', got {name!r}")


class NumpyEngine:
    """Sort pairs, chunk by chunk; counts of many chunks meet on disk, in parts that fit the memory."""

    def __init__(self, folder: Path, room: int) -> None:
        self.folder, self.room, self.chunk = folder, room, room // _BYTES
        self.in_memory = room // 8
        self.size = 0
        self._before: Stream | None = None
        self._runs: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def open(self, chunks: Iterable[np.ndarray], size: int) -> None:
        """Take the corpus."""
        self.stream = self._new_stream(1)
        for chunk in chunks:
            self.stream.write(chunk)
        self.n, self.size = 1, size

    def frequent_pairs(self, min_count: int) -> tuple[np.ndarray, np.ndarray]:
        """Count."""
        self._runs = None
        if self.stream.length <= self.chunk:
            keys = next(self._keys(), np.empty(0, np.int64))  # none where no n-gram is frequent any more
            self._runs = self._sorted(keys)
            unique, begins, _ = self._runs
            counts = np.diff(begins)
            often = counts >= min_count
            unique, counts = unique[often], counts[often]
        else:
            unique, counts = self._count_on_disk(min_count)
        pairs = np.empty((len(unique), 2), _IDS)
        pairs[:, 0], pairs[:, 1] = unique // max(self.size, 1), unique % max(self.size, 1)
        self.room -= pairs.nbytes + counts.nbytes  # the caller keeps them
        self.chunk = min(self.chunk, max(_LEAST, self.room // _BYTES))
        return pairs, counts

    def relabel(self, pairs: np.ndarray) -> None:
        """Go on to the next length."""
        following = self._new_stream(self.n + 1)
        for numbers in collapsed(self._relabelled(pairs)):
            following.write(numbers)
        self._runs = None
        self._before = self.stream  # until `forget`: a run that is stopped here goes on from it
        self.stream, self.n, self.size = following, self.n + 1, len(pairs)

    def _relabelled(self, pairs: np.ndarray) -> Iterator[np.ndarray]:
        frequent = pairs[:, 0].astype(np.int64) * self.size + pairs[:, 1]
        for keys in self._keys():
            unique, begins, positions = self._runs or self._sorted(keys)
            place = np.searchsorted(frequent, unique)
            place[place == len(frequent)] = 0
            known = frequent[place] == unique if len(frequent) else np.zeros(len(unique), bool)
            place[~known] = -1
            numbers = np.full(len(keys), -1, _IDS)
            numbers[positions] = np.repeat(place.astype(_IDS), np.diff(begins))
            yield numbers

    def keep(self, n: int) -> None:
        """Have the corpus on disk."""
        self.stream.keep()

    def restore(self, n: int, size: int) -> None:
        """Read the corpus."""
        self.stream = Stream.of_file(self._path(n), _IDS)
        self.n, self.size = n, size

    def forget(self, n: int) -> None:
        """Remove the numbers of a length."""
        if self._before is not None:
            self._before.close()
        self._before = None
        self._path(n).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove all files."""
        self.stream.close()
        shutil.rmtree(self.folder / "runs", ignore_errors=True)

    def _path(self, n: int) -> Path:
        return self.folder / f"corpus-{n}.int32"

    def _new_stream(self, n: int) -> Stream:
        return Stream(self._path(n), _IDS, self.in_memory)

    def _keys(self) -> Iterator[np.ndarray]:
        """Yield, for each position but the last, the key of the pair that begins there; -1 where there is none."""
        before = np.empty(0, _IDS)
        for chunk in self.stream.read(self.chunk):
            numbers = np.concatenate([before, chunk])
            before = chunk[-1:].copy()
            keys = numbers[:-1] * np.int64(self.size)
            keys += numbers[1:]
            keys[(numbers[:-1] < 0) | (numbers[1:] < 0)] = -1
            yield keys

    def _sorted(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the distinct keys (U,), where each begins among the sorted ones (U + 1,), and their positions."""
        positions = np.flatnonzero(keys >= 0)
        present = keys[positions]
        bits = len(keys).bit_length()
        if (self.size**2).bit_length() + bits < 64:
            # One sort of both together: numpy sorts integers by vector instructions, and argsort takes twice as long.
            present <<= bits
            present |= positions
            present.sort()
            positions = present & ((1 << bits) - 1)
            present >>= bits
        else:
            order = np.argsort(present)
            present, positions = present[order], positions[order]
        begins = np.flatnonzero(np.concatenate([[True], present[1:] != present[:-1]])) if len(present) else positions
        return present[begins], np.append(begins, len(present)), positions

    def _count_on_disk(self, min_count: int) -> tuple[np.ndarray, np.ndarray]:
        parts = -(-self.stream.length // self.chunk)
        folder = self.folder / "runs"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for keys in self._keys():
            unique, begins, _ = self._sorted(keys)
            runs = np.empty(len(unique), _RUN)
            runs["key"], runs["count"] = unique, np.diff(begins)
            part = _scattered(unique, parts)
            order = np.argsort(part, kind="stable")
            bounds = np.searchsorted(part[order], np.arange(parts + 1))
            runs = runs[order]
            for number in range(parts):
                append(folder / str(number), runs[bounds[number] : bounds[number + 1]])
        found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for number in range(parts):
            path = folder / str(number)
            runs = np.fromfile(path, _RUN)
            path.unlink()
            for held, values in zip(found, _merged(runs, min_count), strict=True):
                held.append(values)
        folder.rmdir()
        return _in_order(*found)


def _in_order(keys: list[np.ndarray], sums: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Join keys and their sums, ascending, and empty both lists: a table fills much of a small memory."""
    joined = np.concatenate(keys)
    keys.clear()
    order = np.argsort(joined)
    joined.sort()
    added = np.concatenate(sums)
    sums.clear()
    return joined, added[order]


def _scattered(keys: np.ndarray, parts: int) -> np.ndarray:
    """Return a part for each key, about equally many in each."""
    mixed = keys.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing: the upper bits are mixed
    return ((mixed >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32)).astype(np.uint16 if parts < 2**16 else _IDS)


def _merged(runs: np.ndarray, min_count: int) -> tuple[np.ndarray, np.ndarray]:
    """Add up runs of the same key and return the frequent keys, and their counts."""
    if not len(runs):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    order = np.argsort(runs["key"])
    keys, counts = runs["key"][order], runs["count"][order]
    begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    sums = np.add.reduceat(counts, begins, dtype=np.int64)
    often = sums >= min_count
    return keys[begins[often]], sums[often]
