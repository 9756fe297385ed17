"""The engines on databases: what only they do."""

import numpy as np
import pytest

from lightning_iclr.pmi_masking.ngrams import count_ngrams
from lightning_iclr.pmi_masking.sql_engines import DaftEngine, DuckDBEngine
from tests.pmi_masking.toys import assert_equal_tables

ROOM = 1 << 26


@pytest.mark.parametrize("kind", [DuckDBEngine, DaftEngine])
def test_a_corpus_that_is_kept_is_restored_by_another_engine(kind, tmp_path):
    ids = np.random.default_rng(0).integers(0, 9, 2000).astype(np.int32)
    first = kind(tmp_path, ROOM)
    first.open([ids], 9)
    pairs, _ = first.frequent_pairs(3)
    first.relabel(pairs)
    first.keep(2)
    expected = first.frequent_pairs(2)
    second = kind(tmp_path, ROOM)
    second.restore(2, len(pairs))
    for ours, theirs in zip(second.frequent_pairs(2), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    first.forget(1)
    second.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [DuckDBEngine, DaftEngine])
def test_half_written_files_of_a_killed_run_are_removed(kind, tmp_path):
    for name in ("partial", "corpus-1", "duckdb"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.parquet").write_bytes(b"PAR1 and no more")
    engine = kind(tmp_path, ROOM)
    engine.open([np.array([0, 1, -1, 0, 1], np.int32)], 2)
    pairs, counts = engine.frequent_pairs(1)
    assert (pairs.tolist(), counts.tolist()) == ([[0, 1]], [2])
    engine.close()
    assert not list(tmp_path.iterdir())


def test_duckdb_holds_the_right_side_of_its_joins_within_the_limit():
    # A guess of its own holds the corpus instead, of which the rows with a frequent pair do not fit the memory.
    ids = np.random.default_rng(0).zipf(1.3, 600_000) % 3000
    table = count_ngrams([ids], min_count=5, memory_limit="40MB", engine="duckdb")
    assert_equal_tables(table, count_ngrams([ids], min_count=5))


def test_duckdb_takes_fewer_threads_where_memory_is_short(tmp_path):
    engine = DuckDBEngine(tmp_path, 1 << 26)
    with engine._connected({}) as connection:
        assert connection.sql("SELECT current_setting('threads')").fetchall() == [(1,)]
