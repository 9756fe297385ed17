"""Segmentation and budget: equal to the sequential walks of the definition, and overlaps in their exact shares."""

import random
from itertools import permutations

import numpy as np
import pytest

from lightning_iclr.pmi_masking.segmentation import _by_row_and_priority, choose, disjoint, maximal, merge, smallest


def maximal_by_hand(ends):
    """Keep the matches of two or more groups that no other contains."""
    matches = [(begin, end) for begin, end in enumerate(ends) if end > begin]
    return [
        (begin, end)
        for begin, end in matches
        if not any(a <= begin and end <= b for a, b in matches if (a, b) != (begin, end))
    ]


def walk(begins, ends, priorities):
    """Accept matches in the order of priority when they are disjoint from all that were accepted."""
    taken = set()
    stays = [False] * len(begins)
    for number in sorted(range(len(begins)), key=lambda each: (priorities[each], each)):
        groups = set(range(begins[number], ends[number] + 1))
        if not groups & taken:
            taken |= groups
            stays[number] = True
    return stays


def choose_by_hand(rows, sizes, budgets, priorities):
    """Try units row by row in the order of priority, and skip those that would exceed the budget."""
    chosen = [False] * len(rows)
    for row, budget in enumerate(budgets):
        units = [number for number in range(len(rows)) if rows[number] == row]
        left = budget
        for number in sorted(units, key=lambda each: (priorities[each], each)):
            if sizes[number] <= left:
                chosen[number] = True
                left -= sizes[number]
        if budget and units and left == budget:
            chosen[min(units, key=lambda each: (sizes[each], priorities[each], each))] = True
    return chosen


def random_matches(chance, groups):
    ends = list(range(groups))
    for begin in range(groups):
        if chance.random() < 0.4:
            ends[begin] = min(groups - 1, begin + chance.randint(1, 4))
    return ends


@pytest.mark.parametrize("ties", [False, True])
def test_a_thousand_random_rows_equal_the_sequential_walk(ties):
    chance = random.Random(0)
    overlaps = 0
    for _ in range(1000):
        ends = random_matches(chance, chance.randint(1, 25))
        begins, last = maximal(np.array(ends))
        assert list(zip(begins.tolist(), last.tolist(), strict=True)) == maximal_by_hand(ends)
        priorities = [chance.randrange(3 if ties else 2**32) for _ in begins]
        stays = disjoint(begins, last, np.array(priorities, np.uint64))
        assert stays.tolist() == walk(begins.tolist(), last.tolist(), priorities)
        overlaps += len(stays) - stays.sum()

        units, number = [], -1
        inside = {
            group: begin
            for begin, end in zip(begins[stays], last[stays], strict=True)
            for group in range(begin, end + 1)
        }
        for group in range(len(ends)):
            if inside.get(group, group) == group:
                number += 1
            units.append(number)
        assert merge(len(ends), begins[stays], last[stays]).tolist() == units
    assert overlaps > 1000


def test_many_rows_at_once_are_as_one_row_at_a_time():
    chance = random.Random(1)
    rows = [random_matches(chance, chance.randint(1, 25)) for _ in range(50)]
    offsets = np.cumsum([0, *map(len, rows)])
    together = np.concatenate([np.array(row) + offset for row, offset in zip(rows, offsets, strict=False)])
    begins, ends = maximal(together)
    priorities = np.random.default_rng(0).integers(0, 2**32, len(begins), dtype=np.uint64)
    stays = disjoint(begins, ends, priorities)
    for row, offset in zip(rows, offsets, strict=False):
        own = (begins >= offset) & (begins < offset + len(row))
        alone, alone_ends = maximal(np.array(row))
        np.testing.assert_array_equal(alone + offset, begins[own])
        np.testing.assert_array_equal(disjoint(alone, alone_ends, priorities[own]), stays[own])


def test_a_long_chain_is_decided_from_its_smallest_priority_on():
    begins = np.arange(2000)  # each overlaps its two neighbours
    stays = disjoint(begins, begins + 1, begins)
    np.testing.assert_array_equal(np.flatnonzero(stays), np.arange(0, 2000, 2))


@pytest.mark.parametrize(
    ("begins", "ends", "outcomes"),
    [
        ([0, 1], [1, 2], {(0,): 1 / 2, (1,): 1 / 2}),  # a b, b c on "a b c"
        ([0, 1, 2], [1, 2, 3], {(1,): 1 / 3, (0, 2): 2 / 3}),  # a chain: the middle alone, or both ends
        ([0, 1, 2], [2, 3, 4], {(0,): 1 / 3, (1,): 1 / 3, (2,): 1 / 3}),  # each overlaps each
        ([0, 3], [2, 4], {(0, 1): 1}),  # neighbours do not overlap
    ],
)
def test_overlaps_are_drawn_in_their_exact_proportions(begins, ends, outcomes):
    found = {}
    orders = list(permutations(range(len(begins))))
    for order in orders:
        stays = disjoint(np.array(begins), np.array(ends), np.array(order))
        key = tuple(np.flatnonzero(stays).tolist())
        found[key] = found.get(key, 0) + 1 / len(orders)
    assert found == pytest.approx(outcomes)


def test_random_priorities_give_these_proportions():
    count = 30_000
    begins = (np.arange(count)[:, None] * 10 + [0, 1, 2]).ravel()
    priorities = np.random.default_rng(0).integers(0, 2**32, len(begins), dtype=np.uint64)
    stays = disjoint(begins, begins + 1, priorities).reshape(count, 3)
    np.testing.assert_array_equal(stays[:, 0], stays[:, 2])
    np.testing.assert_array_equal(stays[:, 0], ~stays[:, 1])
    assert abs(stays[:, 1].mean() - 1 / 3) < 3 * np.sqrt(2 / 9 / count)


def test_the_larger_of_two_nested_matches_is_the_unit():
    ends = np.array([0, 2, 3, 3, 4])  # d e f from 1 on, e f g and f g inside and beyond it
    assert [each.tolist() for each in maximal(ends)] == [[1, 2], [2, 3]]
    ends = np.array([1, 3, 3, 3])  # {d e f} contains {e f}; the one before overlaps it
    assert [each.tolist() for each in maximal(ends)] == [[0, 1], [1, 3]]
    assert [each.tolist() for each in maximal(np.array([3, 2, 3, 3]))] == [[0], [3]]


def test_an_entry_that_is_contained_is_not_revived_when_its_container_loses():
    # "by the way out": {by the way} overlaps {the way out}; {by the} and {way out} are inside of them.
    begins, ends = maximal(np.array([2, 3, 3, 3]))
    stays = disjoint(begins, ends, np.array([1, 0]))
    assert merge(4, begins[stays], ends[stays]).tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("ties", [False, True])
def test_the_budget_is_spent_as_in_the_sequential_walk(ties):
    chance = random.Random(2)
    skipped = alone = 0
    for _ in range(300):
        rows, sizes, budgets = [], [], []
        for row in range(chance.randint(1, 6)):
            own = [chance.choice([1, 1, 2, 3, 5, 8]) for _ in range(chance.choice([0, 1, 3, 12]))]
            if chance.random() < 0.3:
                own = [chance.randint(4, 6) for _ in own]
            rows += [row] * len(own)
            sizes += own
            budgets.append(max(1, round(chance.choice([0.15, 0.5, 1.0]) * sum(own))) if own else 0)
        priorities = [chance.randrange(3 if ties else 2**32) for _ in rows]
        chosen = choose(
            np.array(rows, int), np.array(sizes, int), np.array(budgets), np.array(priorities, np.uint64)
        ).tolist()
        assert chosen == choose_by_hand(rows, sizes, budgets, priorities)
        for row, budget in enumerate(budgets):
            own = [size for size, each, yes in zip(sizes, rows, chosen, strict=True) if each == row and yes]
            alone += len(own) == 1 and own[0] > budget
            skipped += len(own) > 1 and sum(own) < budget
            assert sum(own) <= budget or len(own) == 1
    assert alone > 30
    assert skipped > 30


def test_the_budget_is_met_exactly_where_single_tokens_are_left():
    rng = np.random.default_rng(0)
    rows = np.repeat(np.arange(400), 60)
    sizes = np.where(rng.random(len(rows)) < 0.3, rng.integers(2, 6, len(rows)), 1)
    tokens = np.bincount(rows, weights=sizes)
    budgets = np.maximum(1, np.rint(0.15 * tokens)).astype(int)
    chosen = choose(rows, sizes, budgets, rng.integers(0, 2**32, len(rows), dtype=np.uint64))
    np.testing.assert_array_equal(np.bincount(rows[chosen], weights=sizes[chosen]), budgets)


def test_many_rows_are_sorted_by_several_keys_as_by_one():
    rng = np.random.default_rng(0)
    rows = np.sort(rng.integers(0, 40, 3000))
    sizes, budgets = rng.integers(1, 6, 3000), np.full(40, 17)
    priorities = rng.integers(0, 1000, 3000, dtype=np.uint64)
    far = np.int64(2**31)  # so many rows that row, priority and place do not fit 64 bits
    chosen = choose(rows, sizes, budgets, priorities)
    np.testing.assert_array_equal(_by_row_and_priority(rows, priorities), _by_row_and_priority(rows + far, priorities))
    assert chosen.tolist() == choose_by_hand(rows.tolist(), sizes.tolist(), budgets.tolist(), priorities.tolist())


def test_units_of_equal_size_are_drawn_uniformly():
    # 10 units of 2 tokens, of which a budget of 6 takes 3.
    count = 6000
    rows = np.repeat(np.arange(count), 10)
    priorities = np.random.default_rng(0).integers(0, 2**32, len(rows), dtype=np.uint64)
    chosen = choose(rows, np.full(len(rows), 2), np.full(count, 6), priorities).reshape(count, 10)
    assert (chosen.sum(axis=1) == 3).all()
    assert np.abs(chosen.mean(axis=0) - 0.3).max() < 4 * np.sqrt(0.3 * 0.7 / count)


def test_the_smallest_unit_is_taken_where_all_exceed_the_budget():
    rows, sizes = np.array([0, 0, 0, 1, 2, 2]), np.array([5, 3, 3, 2, 4, 4])
    budgets, nothing = np.array([1, 1, 0]), np.zeros(6, bool)
    assert smallest(rows, sizes, budgets, nothing, np.array([0, 9, 2, 0, 0, 0])).tolist() == [2, 3]
    assert choose(rows, sizes, budgets, np.array([0, 9, 2, 0, 0, 0], np.uint64)).tolist() == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]


def test_nothing_gives_nothing():
    none = np.array([], int)
    assert [len(each) for each in maximal(none)] == [0, 0]
    assert len(disjoint(none, none, none)) == len(merge(0, none, none)) == 0
    assert len(choose(none, none, np.array([0, 0]), none)) == 0
    assert merge(3, none, none).tolist() == [0, 1, 2]


def test_the_skip_rule_takes_a_long_unit_only_while_there_is_room():
    # Of 3, 1, 1, 1, 1, 1 tokens a budget of 3 takes the long one when it is drawn first: in 1 of 6 orders.
    sizes, rows = np.array([3, 1, 1, 1, 1, 1]), np.zeros(6, int)
    orders = [np.array(order, np.uint64) for order in permutations(range(6))]
    taken = [choose(rows, sizes, np.array([3]), order) for order in orders]
    assert np.mean([each[0] for each in taken]) == pytest.approx(1 / 6)
    assert {int(sizes[each].sum()) for each in taken} == {3}
