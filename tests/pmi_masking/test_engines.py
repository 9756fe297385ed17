"""Engines by themselves: one level of counting against a loop, and what is missing or misspelt."""

import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from lightning_iclr.pmi_masking.engines import NumpyEngine, _merged, _scattered, make_engine

ENGINES = ["numpy", "duckdb", "daft"]
ROOM = 1 << 26


def chunks(seed, size, words):
    """Return a corpus as a list of chunks, one of them empty, without two breaks in a row."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, words, size).astype(np.int32)
    ids[3::7] = -1
    return [ids[:10], ids[10:10], ids[10:100], ids[100:]]


def pairs_by_hand(ids, min_count):
    counts = Counter(pair for pair in pairwise(ids) if min(pair) >= 0)
    return sorted((pair, count) for pair, count in counts.items() if count >= min_count)


@pytest.mark.parametrize("name", ENGINES)
def test_two_levels_equal_a_loop_over_neighbours(name, tmp_path):
    engine = make_engine(name, tmp_path, ROOM)
    corpus = chunks(0, 4000, 12)
    ids = np.concatenate(corpus).tolist()
    engine.open(corpus, 12)
    for _ in range(2):
        expected = pairs_by_hand(ids, min_count=9)
        pairs, counts = engine.frequent_pairs(9)
        assert [(tuple(pair), count) for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True)] == expected
        assert (pairs.dtype, counts.dtype) == (np.int32, np.int64)
        engine.relabel(pairs)
        number = {pair: place for place, (pair, _) in enumerate(expected)}
        ids = [number.get(pair, -1) for pair in pairwise(ids)]
    engine.close()


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_pairs_and_breaks_at_the_borders_of_chunks_are_counted_as_elsewhere(chunk, tmp_path):
    ids = np.random.default_rng(chunk).integers(-1, 3, 120).astype(np.int32)
    ids = ids[np.append(True, (ids[1:] >= 0) | (ids[:-1] >= 0))]  # without two breaks in a row, as engines get them
    whole, cut = NumpyEngine(tmp_path / "a", ROOM), NumpyEngine(tmp_path / "b", ROOM)
    (tmp_path / "b").mkdir()
    cut.chunk, cut.in_memory = chunk, 0
    for engine in (whole, cut):
        engine.open([ids], 3)
    for n in range(2, 5):
        expected, found = whole.frequent_pairs(2), cut.frequent_pairs(2)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert n > 2 or len(found[0]) == 9
        for engine in (whole, cut):
            engine.relabel(expected[0])
        numbers = [np.concatenate(list(engine.stream.read(1000))) for engine in (whole, cut)]
        np.testing.assert_array_equal(*numbers)


@pytest.mark.parametrize("bits", [20, 31])
def test_ids_too_large_for_one_sort_of_key_and_place_are_counted_as_well(bits, tmp_path):
    size = 1 << bits  # keys of 62 bits leave no room for the place
    engine = NumpyEngine(tmp_path, ROOM)
    ids = np.array([size - 1, size - 2, -1, size - 1, size - 2, size - 1, 0], np.int64).astype(np.int32)
    engine.open([ids], size)
    pairs, counts = engine.frequent_pairs(1)
    assert pairs.tolist() == [[size - 2, size - 1], [size - 1, 0], [size - 1, size - 2]]
    assert counts.tolist() == [1, 1, 2]


def test_runs_of_many_chunks_are_added_up():
    runs = np.array([(5, 2), (7, 1), (5, 3), (9, 4), (7, 1)], np.dtype([("key", "<i8"), ("count", "<i4")]))
    assert [values.tolist() for values in _merged(runs, 3)] == [[5, 9], [5, 4]]
    assert [values.tolist() for values in _merged(runs[:0], 3)] == [[], []]


@pytest.mark.parametrize("keys", [np.arange(10**5), np.arange(10**5) * 10**6, np.arange(10**5) << 31])
def test_keys_are_spread_evenly_over_the_files(keys):
    parts = np.bincount(_scattered(keys, 40), minlength=40)
    assert len(parts) == 40
    assert abs(parts - 2500).max() < 5 * 50  # five standard deviations of a random spread


def test_an_unknown_engine_is_refused(tmp_path):
    with pytest.raises(ValueError, match="engine must be 'numpy', 'duckdb' or 'daft', got 'spark'"):
        make_engine("spark", tmp_path, ROOM)


@pytest.mark.parametrize("name", ["duckdb", "daft"])
def test_an_engine_whose_library_is_missing_says_what_to_install(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=f"{name} is needed here .* pip install 'lightning-iclr\\[scale\\]'"):
        make_engine(name, tmp_path, ROOM)
