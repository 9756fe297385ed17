"""Random numbers of rows: functions of (seed, epoch, row) alone, and otherwise as random as they should be."""

import numpy as np
import pytest
from scipy import stats

from lightning_iclr.pmi_masking.draws import RowDraws, row_keys

ROWS = np.arange(50)


def test_a_key_depends_on_seed_epoch_and_row_and_on_nothing_else():
    keys = {
        (seed, epoch, row): row_keys(seed, np.array([epoch]), np.array([row]))[0]
        for seed in (-1, 0, 1, 2**40)
        for epoch in range(4)
        for row in (0, 1, 2, 2**33)
    }
    assert len(set(keys.values())) == len(keys)
    together = row_keys(1, np.array([3, 0, 2]), np.array([0, 2**33, 1]))
    assert together.tolist() == [keys[1, 3, 0], keys[1, 0, 2**33], keys[1, 2, 1]]


def test_a_draw_does_not_depend_on_the_others_of_the_batch():
    keys = row_keys(5, np.zeros(50, int), ROWS)
    rows, places = np.divmod(np.arange(50 * 20), 20)
    batch = RowDraws(keys).bits("priority", rows, places).reshape(50, 20)
    order = np.random.default_rng(0).permutation(50)
    shuffled = RowDraws(keys[order]).bits("priority", rows, places).reshape(50, 20)
    np.testing.assert_array_equal(shuffled, batch[order])
    alone = RowDraws(keys[[7]]).bits("priority", np.zeros(20, int), np.arange(20))
    np.testing.assert_array_equal(alone, batch[7])


@pytest.mark.parametrize("axis", ["places", "rows", "epochs", "seeds"])
def test_draws_are_uniform_in_every_direction(axis):
    count = 20_000
    zeros, numbers = np.zeros(count, int), np.arange(count)
    if axis == "places":
        draws = RowDraws(row_keys(0, zeros[:1], zeros[:1])).uniform("action", zeros, numbers)
    elif axis == "seeds":
        draws = np.array(
            [
                RowDraws(row_keys(s, zeros[:1], zeros[:1])).uniform("action", zeros[:1], zeros[:1])[0]
                for s in range(2000)
            ]
        )
    else:
        keys = row_keys(0, zeros, numbers) if axis == "rows" else row_keys(0, numbers, zeros)
        draws = RowDraws(keys).uniform("action", numbers, zeros)
    assert 0 <= draws.min() < draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 4 / np.sqrt(len(draws))


def test_streams_of_different_purposes_are_not_correlated():
    draws = RowDraws(row_keys(0, np.zeros(1, int), np.zeros(1, int)))
    zeros, numbers = np.zeros(20_000, int), np.arange(20_000)
    streams = [
        draws.uniform(name, zeros, numbers) for name in ("priority", "overlap", "action", "token", "anchor", "length")
    ]
    correlation = np.corrcoef(streams) - np.eye(6)
    assert np.abs(correlation).max() < 4 / np.sqrt(20_000)


def test_bits_are_numbers_of_32_bits():
    bits = RowDraws(row_keys(0, np.zeros(1, int), np.zeros(1, int))).bits("token", np.zeros(9999, int), np.arange(9999))
    assert bits.dtype == np.uint64
    assert 2**31 < bits.max() < 2**32
