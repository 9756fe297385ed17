"""Engines that run the same SQL on a database: DuckDB out of core, Daft on one machine or on a Ray cluster.

The corpus of a length lies in a folder of parquet files with a row for each position where a frequent n-gram begins:
the position, the next one, and the n-gram's number.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lightning_iclr._imports import optional_import

_PAIRS = """
    SELECT a.position AS position, a.following AS following, a.number AS left_number, b.number AS right_number
    FROM corpus AS a JOIN corpus AS b ON a.following = b.position
"""
_COUNT = f"""
    SELECT left_number, right_number, COUNT(*) AS occurrences FROM ({_PAIRS}) AS pairs
    GROUP BY left_number, right_number HAVING COUNT(*) >= {{min_count}}
"""
_RELABEL = f"""
    SELECT pairs.position AS position, pairs.following AS following, frequent.number AS number
    FROM ({_PAIRS}) AS pairs JOIN frequent
    ON pairs.left_number = frequent.left_number AND pairs.right_number = frequent.right_number
"""
_THREAD = 1 << 26  # bytes that a thread of DuckDB wants: with fewer its buffers alone fill the memory
_CORPUS = pa.schema([("position", pa.int64()), ("following", pa.int64()), ("number", pa.int32())])


class SQLEngine(ABC):
    """Count by two statements a length, one that counts pairs and one that joins their numbers back."""

    def __init__(self, folder: Path, room: int) -> None:
        self.folder, self.room, self.n = folder, room, 0

    @abstractmethod
    def query(self, statement: str, tables: dict[str, Path | pa.Table]) -> pa.Table:
        """Return what a statement selects."""

    @abstractmethod
    def write(self, statement: str, tables: dict[str, Path | pa.Table], folder: Path) -> None:
        """Write what a statement selects to parquet files in a folder, which is made."""

    def open(self, chunks: Iterable[np.ndarray], size: int) -> None:
        """Take the corpus."""
        partial = self._partial(1)
        partial.mkdir()
        position = 0
        with pq.ParquetWriter(partial / "0.parquet", _CORPUS) as writer:
            for chunk in chunks:
                places = np.flatnonzero(chunk >= 0) + position
                columns = [pa.array(places), pa.array(places + 1), pa.array(chunk[chunk >= 0])]
                writer.write_table(pa.Table.from_arrays(columns, schema=_CORPUS))
                position += len(chunk)
        partial.rename(self._path(1))
        self.n = 1

    def frequent_pairs(self, min_count: int) -> tuple[np.ndarray, np.ndarray]:
        """Count."""
        found = self.query(_COUNT.format(min_count=min_count), {"corpus": self._path(self.n)})
        left, right, counts = (found[name].to_numpy() for name in ("left_number", "right_number", "occurrences"))
        order = np.lexsort((right, left))
        pairs = np.stack([left[order], right[order]], axis=1).astype(np.int32)
        return pairs, counts[order].astype(np.int64)

    def relabel(self, pairs: np.ndarray) -> None:
        """Go on to the next length."""
        columns = {"left_number": pairs[:, 0], "right_number": pairs[:, 1], "number": np.arange(len(pairs), dtype="i4")}
        tables: dict[str, Path | pa.Table] = {"corpus": self._path(self.n), "frequent": pa.table(columns)}
        partial = self._partial(self.n + 1)
        self.write(_RELABEL, tables, partial)
        partial.rename(self._path(self.n + 1))
        self.n += 1

    def keep(self, n: int) -> None:
        """Check that the corpus is on disk, where it always is.

        Raises:
            RuntimeError: It is that of another length.
        """
        if n != self.n:
            raise RuntimeError(f"the corpus on disk is of length {self.n}, and not {n}")

    def restore(self, n: int, size: int) -> None:
        """Read the corpus."""
        self.n = n

    def forget(self, n: int) -> None:
        """Remove the files of a length."""
        shutil.rmtree(self._path(n), ignore_errors=True)

    def close(self) -> None:
        """Remove all files."""
        self.forget(self.n)
        for name in ("partial", "duckdb"):  # of runs that were killed
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _path(self, n: int) -> Path:
        return self.folder / f"corpus-{n}"

    def _partial(self, n: int) -> Path:
        for path in (self._path(n), self.folder / "partial"):
            shutil.rmtree(path, ignore_errors=True)
        return self.folder / "partial"


class DuckDBEngine(SQLEngine):
    """Count in DuckDB, which stays within ``room`` and sorts and joins out of core."""

    def __init__(self, folder: Path, room: int) -> None:
        super().__init__(folder, room)
        self._duckdb = optional_import("duckdb", "scale")

    def query(self, statement: str, tables: dict[str, Path | pa.Table]) -> pa.Table:
        """Run a statement."""
        with self._connected(tables) as connection, self._limited():
            return connection.sql(statement).to_arrow_table()

    def write(self, statement: str, tables: dict[str, Path | pa.Table], folder: Path) -> None:
        """Run a statement into files."""
        folder.mkdir()
        with self._connected(tables) as connection, self._limited():
            connection.execute(f"COPY ({statement}) TO '{_quoted(str(folder / '0.parquet'))}' (FORMAT parquet)")

    def _connected(self, tables: dict[str, Path | pa.Table]) -> Any:
        settings = {
            "memory_limit": f"{self.room // 1000}KB",
            "temp_directory": str(self.folder / "duckdb"),
            "preserve_insertion_order": False,
            # The right side of a join is what it holds; else a guess may hold the corpus, whose many equal keys must
            # lie in memory together.
            "disabled_optimizers": "join_order,build_side_probe_side",
        }
        connection = self._duckdb.connect(config=settings)
        threads = connection.sql("SELECT current_setting('threads')").fetchall()[0][0]
        connection.execute(f"SET threads = {max(1, min(threads, self.room // _THREAD))}")
        for name, table in tables.items():
            if isinstance(table, Path):
                connection.execute(f"CREATE VIEW {name} AS SELECT * FROM '{_quoted(_files(table))}'")
            else:
                connection.register(name, table)
        return connection

    @contextmanager
    def _limited(self) -> Iterator[None]:
        try:
            yield
        except self._duckdb.OutOfMemoryException as error:
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"memory_limit leaves DuckDB {self.room:,} bytes, which are too few beside spill_dir, {self.folder}: "
                f"{reason}"
            ) from error


class DaftEngine(SQLEngine):
    """Count in Daft, on this machine or on the cluster that ``daft.set_runner_ray`` has named.

    Daft looks after its memory itself; on a cluster ``spill_dir`` must be a folder that all machines see.
    """

    def __init__(self, folder: Path, room: int) -> None:
        super().__init__(folder, room)
        self._daft = optional_import("daft", "scale")

    def query(self, statement: str, tables: dict[str, Path | pa.Table]) -> pa.Table:
        """Run a statement."""
        return self._selected(statement, tables).to_arrow()

    def write(self, statement: str, tables: dict[str, Path | pa.Table], folder: Path) -> None:
        """Run a statement into files."""
        folder.mkdir()
        try:
            self._selected(statement, tables).write_parquet(str(folder))
        except self._daft.exceptions.DaftCoreException as error:  # a full disk is a "channel closed" to it
            raise OSError(f"daft could not write to spill_dir, {folder.parent}, which may be full: {error}") from error

    def _selected(self, statement: str, tables: dict[str, Path | pa.Table]) -> Any:
        frames = {
            name: self._daft.read_parquet(_files(table)) if isinstance(table, Path) else self._daft.from_arrow(table)
            for name, table in tables.items()
        }
        return self._daft.sql(statement, **frames)


def _files(folder: Path) -> str:
    return f"{escape(str(folder))}/*.parquet"  # a folder may be called a[b]


def _quoted(path: str) -> str:
    return path.replace("'", "''")
