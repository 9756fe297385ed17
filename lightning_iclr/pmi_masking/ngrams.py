"""Exact counts of frequent n-grams, level by level.

A frequent n-gram is a pair of frequent (n-1)-grams, one position apart: each of its occurrences is one of both. So
level n is counted over the positions where level n-1 is frequent (Apriori), and every segment of a frequent n-gram,
whose probability its score needs, has been counted, too. An n-gram's number is its place in the order of its words; it
keeps the numbers of its first and of its last n-1 words, which lead to all of its segments without a search.

Shapes: T positions of the corpus, V words, S_n frequent n-grams of length n.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import numpy as np
from tqdm.auto import tqdm

from lightning_iclr.pmi_masking.engines import Engine, make_engine
from lightning_iclr.pmi_masking.streams import Stream, collapsed, naming, parse_size

Engines = Literal["numpy", "duckdb", "daft"]
_IDS = np.dtype(np.int32)
_CHUNK = 1 << 16  # positions: fewer at a time would not be worth their overhead


@dataclass(frozen=True)
class NgramTable:
    """The frequent n-grams of a corpus, each length in the order of its words.

    Attributes:
        words: Word ids of the frequent words (S_1,), ascending.
        parents: For each length n from 2 the numbers, among those of length n-1, of an n-gram's first and of its last
            n-1 words (S_n, 2).
        counts: For each length from 1 the occurrences (S_n,).
        totals: For each length from 1 the positions N_n at which an n-gram of that length lies in the corpus, frequent
            or not.
    """

    words: np.ndarray
    parents: tuple[np.ndarray, ...]
    counts: tuple[np.ndarray, ...]
    totals: tuple[int, ...]

    @property
    def max_n(self) -> int:
        """The greatest length."""
        return len(self.counts)

    def ngrams(self, n: int) -> np.ndarray:
        """Return the word ids of all n-grams of a length (S_n, n), in lexicographic order.

        Raises:
            ValueError: ``n`` is not a length of the table.
        """
        if not 1 <= n <= self.max_n:
            raise ValueError(f"n must lie between 1 and {self.max_n}, got {n}")
        columns: list[np.ndarray] = []
        place = np.arange(len(self.counts[n - 1]))
        for level in range(n, 1, -1):
            columns.append(self.segment(place, level, 1, last=True))
            place = self.parents[level - 2][place, 0]
        return np.stack([self.words[column] for column in [place, *reversed(columns)]], axis=1)

    def segment(self, numbers: np.ndarray, n: int, length: int, *, last: bool) -> np.ndarray:
        """Return the numbers of the first, or the last, ``length`` words of n-grams of length ``n``."""
        for level in range(n, length, -1):
            numbers = self.parents[level - 2][numbers, int(last)]
        return numbers


def count_ngrams(
    documents: Iterable[np.ndarray],
    *,
    max_n: int = 5,
    min_count: int = 11,
    memory_limit: int | str = "2GB",
    spill_dir: str | Path | None = None,
    engine: Engines = "numpy",
    progress_bar: bool = False,
) -> NgramTable:
    """Count all n-grams of a corpus that are frequent, exactly.

    What exceeds the memory goes to disk. With a ``spill_dir`` of its own, counting that was stopped goes on after the
    last length that it finished.

    Args:
        documents: Word ids of each document, integers from 0; a negative number breaks it: no n-gram contains or
            crosses one.
        max_n: Greatest length, in words.
        min_count: Fewest occurrences of a frequent n-gram; the paper's "more than 10".
        memory_limit: Bytes to work in, or a string such as ``"2GB"``, besides the frequent n-grams themselves.
        spill_dir: Where numbers go that exceed it, and what a resumed run needs; a temporary folder if ``None``.
        engine: What counts: ``numpy``; ``duckdb`` or ``daft`` (extra ``scale``), the latter also on a Ray cluster.
        progress_bar: Whether to show one.

    Raises:
        ValueError: A number is outside its range, the corpus is shorter than ``max_n``, ``memory_limit`` cannot hold
            the words, or ``spill_dir`` belongs to another corpus or other settings.
        OSError: The disk is full.

    Examples:
        >>> table = count_ngrams([np.array([0, 1, 2, 0, 1])], max_n=2, min_count=2)
        >>> table.ngrams(2).tolist(), table.counts[1].tolist(), table.totals
        ([[0, 1]], [2], (5, 4))
    """
    limit = parse_size(memory_limit)
    if max_n < 1:
        raise ValueError(f"max_n must be at least 1, got {max_n}")
    if min_count < 1:
        raise ValueError(f"min_count must be at least 1, got {min_count}")
    if engine not in get_args(Engines):
        raise ValueError(f"engine must be 'numpy', 'duckdb' or 'daft', got {engine!r}")
    with TemporaryDirectory(prefix="ngrams-") if spill_dir is None else nullcontext(spill_dir) as opened:
        folder = Path(opened)
        folder.mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=max_n, desc="counting n-grams", unit="length", disable=not progress_bar)
        with bar, naming(folder):
            return _Count(folder, limit, spill_dir is not None, max_n, min_count, engine, bar).run(documents)


@dataclass
class _Count:
    folder: Path
    limit: int
    resumable: bool
    max_n: int
    min_count: int
    engine_name: Engines
    bar: tqdm[None]

    def run(self, documents: Iterable[np.ndarray]) -> NgramTable:
        corpus = Stream(self.folder / "corpus.int32", _IDS, self.limit // 16)
        measured = _Measured(self.max_n)
        for chunk in _joined(documents, self.limit // 64):
            self._room(int(chunk.max()) + 1)  # before a stray number asks for a table of that length
            measured.add(chunk)
            corpus.write(chunk)
        corpus.write(np.array([-1], _IDS))
        measured.finish()
        if measured.totals[-1] < 1:
            raise ValueError(f"max_n is {self.max_n}, and no document has so many words in a row")
        room = self._room(len(measured.counts))
        engine = make_engine(self.engine_name, self.folder, room)
        state = _State(self.folder, self.resumable, measured, self.max_n, self.min_count, self.engine_name)
        words = np.flatnonzero(measured.counts >= self.min_count)
        counts, parents = [measured.counts[words]], list[np.ndarray]()
        done = state.load(counts, parents)
        if done == 1:
            numbers = np.full(len(measured.counts) + 1, -1, _IDS)  # the last entry is for breaks
            numbers[words] = np.arange(len(words), dtype=_IDS)
            del measured.counts
            engine.open(collapsed(numbers[np.maximum(chunk, -1)] for chunk in corpus.read(room // 64)), len(words))
            state.save(1, engine, counts, parents)
        else:
            engine.restore(done, len(counts[-1]))
            engine.forget(done - 1)  # where the run was stopped before it could
        corpus.close()
        self.bar.update(done)
        for n in range(done + 1, self.max_n + 1):
            self.bar.set_postfix_str(f"{len(counts[-1]):,} of length {n - 1}")
            pairs, pair_counts = engine.frequent_pairs(self.min_count)
            parents.append(pairs)
            counts.append(pair_counts)
            if n < self.max_n:
                engine.relabel(pairs)
                state.save(n, engine, counts, parents)
                engine.forget(n - 1)
            self.bar.update()
        state.close()  # first: a manifest must not outlive the files that it names
        engine.close()
        return NgramTable(words.astype(_IDS), tuple(parents), tuple(counts), tuple(measured.totals))

    def _room(self, words: int) -> int:
        room = self.limit - words * np.dtype(np.int64).itemsize * 2
        if room < _CHUNK * 64:
            raise ValueError(
                f"memory_limit must leave {_CHUNK * 64:,} bytes beside {words:,} words, of which each takes 16, got "
                f"{self.limit:,}"
            )
        return room


class _Measured:
    """What the first pass over the corpus finds: counts of words, positions of each length, and a fingerprint."""

    def __init__(self, max_n: int) -> None:
        self.counts = np.zeros(0, np.int64)
        self.totals = [0] * max_n
        self._run = 0  # words since the last break
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, chunk: np.ndarray) -> None:
        self._hash.update(np.ascontiguousarray(chunk).data)
        breaks = np.flatnonzero(chunk < 0)
        own = np.bincount(np.maximum(chunk, -1) + 1, minlength=len(self.counts) + 1)[1:]
        if len(own) > len(self.counts):
            own[: len(self.counts)] += self.counts
            self.counts = own
        else:
            self.counts += own
        if not len(breaks):
            self._run += len(chunk)
            return
        runs = np.diff(breaks, prepend=-1) - 1
        runs[0] += self._run
        self._run = len(chunk) - int(breaks[-1]) - 1
        self._count_positions(runs)

    def finish(self) -> None:
        self._count_positions(np.array([self._run]))
        self.fingerprint = self._hash.hexdigest()

    def _count_positions(self, runs: np.ndarray) -> None:
        for n in range(len(self.totals)):
            self.totals[n] += int(np.maximum(runs - n, 0).sum())


class _State:
    """What is on disk of counting that may be stopped: the finished lengths, and what they belong to."""

    def __init__(
        self, folder: Path, resumable: bool, measured: _Measured, max_n: int, min_count: int, engine: Engines
    ) -> None:
        self.path, self.resumable = folder / "manifest.json", resumable
        self.identity = {"corpus": measured.fingerprint, "max_n": max_n, "min_count": min_count, "engine": engine}

    def load(self, counts: list[np.ndarray], parents: list[np.ndarray]) -> int:
        """Read the finished lengths' tables and return how many lengths there are; 1 where counting begins."""
        if not (self.resumable and self.path.exists()):
            return 1
        manifest = json.loads(self.path.read_text())
        for name, value in self.identity.items():
            if manifest[name] != value:
                raise ValueError(
                    f"spill_dir {self.path.parent} holds the counts of another run: its {name} is {manifest[name]!r}, "
                    f"and this one's is {value!r}; give another folder, or delete it"
                )
        for n in range(2, manifest["finished"] + 1):
            with np.load(self._table(n)) as arrays:
                parents.append(arrays["parents"])
                counts.append(arrays["counts"])
        return int(manifest["finished"])

    def save(self, n: int, engine: Engine, counts: Sequence[np.ndarray], parents: Sequence[np.ndarray]) -> None:
        """Note that a length is finished; a file is whole when it has its name."""
        if not self.resumable:
            return
        engine.keep(n)
        if n > 1:
            temporary = self._table(n).with_suffix(".partial.npz")
            np.savez(temporary, parents=parents[-1], counts=counts[-1])
            temporary.replace(self._table(n))
        temporary = self.path.with_suffix(".partial")
        temporary.write_text(json.dumps({**self.identity, "finished": n}))
        temporary.replace(self.path)

    def close(self) -> None:
        self.path.unlink(missing_ok=True)
        for path in self.path.parent.glob("ngrams-*.npz"):
            path.unlink()

    def _table(self, n: int) -> Path:
        return self.path.with_name(f"ngrams-{n}.npz")


def _joined(documents: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yield the documents in larger arrays, a break after each."""
    held: list[np.ndarray] = []
    length = 0
    end = np.array([-1], _IDS)
    for document in documents:
        ids = np.asarray(document)
        if ids.ndim != 1 or (ids.dtype.kind not in "iu" and len(ids)):
            raise ValueError(f"documents must be arrays (T,) of integers, got {ids.dtype} {ids.shape}")
        for begin in range(0, len(ids), max(size, _CHUNK)):
            part = ids[begin : begin + max(size, _CHUNK)]
            if part.dtype != _IDS and len(part) and not -(2**31) <= part.min() <= part.max() < 2**31:
                raise ValueError(f"word ids must lie between -2**31 and 2**31, got {part.min()} to {part.max()}")
            held.append(part.astype(_IDS, copy=False))
            length += len(part)
            if length >= size:
                yield np.concatenate(held)
                held, length = [], 0
        held.append(end)
        length += 1
    if held:
        yield np.concatenate(held)
