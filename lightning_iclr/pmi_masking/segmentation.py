"""From matches to units: which tokens are masked together.

Everything is in words, or in what a tokenizer leaves of them: groups, the tokens that belong together whatever is
matched. Rows lie one after the other, and no match crosses from one to the next.
"""

from __future__ import annotations

import numpy as np


def maximal(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and the last group of each match that no other match contains.

    Args:
        ends: The last group of the longest match that begins at each group (G,); the group itself where none does.
    """
    groups = np.arange(len(ends))
    before = np.maximum.accumulate(np.concatenate([[-1], ends[:-1]])) if len(ends) else ends
    begins = np.flatnonzero((ends > groups) & (ends > before))
    return begins, ends[begins]


def disjoint(begins: np.ndarray, ends: np.ndarray, priorities: np.ndarray) -> np.ndarray:
    """Choose among overlapping matches as a walk in the order of priorities would: whoever comes first stays.

    A match stays when it has the least priority of all that it overlaps and that are undecided; these then go. That
    settles all of them in a few rounds, each over all matches at once, and leaves what the walk leaves.

    Args:
        begins: First group of each match (K,), strictly ascending.
        ends: Last group of each (K,), strictly ascending.
        priorities: Random integers (K,); of equal ones the match that begins first is ahead.

    Returns:
        Which matches stay (K,).
    """
    count = len(begins)
    stays = np.zeros(count, bool)
    undecided = np.ones(count, bool)
    last = np.searchsorted(begins, ends, side="right") - 1  # the last match that begins inside each one
    reach = int((last - np.arange(count)).max()) if count else 0
    apart = [
        (distance, np.flatnonzero(last[: count - distance] >= np.arange(distance, count)))
        for distance in range(1, reach + 1)
    ]
    while undecided.any():
        first = undecided.copy()
        for distance, left in apart:
            both = left[undecided[left] & undecided[left + distance]]
            ahead = priorities[both] <= priorities[both + distance]
            first[both[~ahead]] = False
            first[both[ahead] + distance] = False
        stays |= first
        undecided &= ~first
        for distance, left in apart:
            undecided[left[first[left + distance]]] = False
            undecided[left[first[left]] + distance] = False
    return stays


def merge(size: int, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the number of the unit of each group (G,): a match is one unit, and every other group its own.

    Args:
        size: Number of groups G.
        begins: First group of each match (K,); matches are disjoint.
        ends: Last group of each (K,).
    """
    inside = np.zeros(size + 1, np.int64)  # groups that go on with the unit before
    inside[begins + 1] += 1
    inside[ends + 1] -= 1
    unit: np.ndarray = np.cumsum(np.cumsum(inside[:size]) == 0) - 1
    return unit


def choose(rows: np.ndarray, sizes: np.ndarray, budgets: np.ndarray, priorities: np.ndarray) -> np.ndarray:
    """Choose units at random until a row's budget is spent, and never more: skip what would exceed it, and go on.

    Where even the smallest unit exceeds the budget, that one is chosen.

    Args:
        rows: Row of each unit (U,), ascending.
        sizes: Tokens of each (U,), at least 1.
        budgets: Tokens to choose in each row (B,).
        priorities: Random 32-bit integers (U,): the order in which units are tried; of equal ones the first is ahead.

    Returns:
        Which units are chosen (U,).
    """
    chosen = np.zeros(len(rows), bool)
    left = budgets.astype(np.int64).copy()
    order = _by_row_and_priority(rows, priorities)
    order = order[sizes[order] <= left[rows[order]]]
    while len(order):
        row, size = rows[order], sizes[order]
        begins = np.flatnonzero(np.diff(row, prepend=-1))
        spent = np.cumsum(size)
        spent -= np.repeat(spent[begins] - size[begins], np.diff(begins, append=len(row)))
        fits = spent <= left[row]
        chosen[order[fits]] = True
        left -= np.bincount(row[fits], weights=size[fits], minlength=len(left)).astype(np.int64)
        order = order[~fits]
        order = order[sizes[order] <= left[rows[order]]]
    chosen[smallest(rows, sizes, budgets, chosen, priorities)] = True
    return chosen


def smallest(
    rows: np.ndarray, sizes: np.ndarray, budgets: np.ndarray, chosen: np.ndarray, priorities: np.ndarray
) -> np.ndarray:
    """Return the smallest unit of each row that has a budget and in which nothing is chosen, for all exceed it."""
    wanting = (budgets > 0) & (np.bincount(rows[chosen], minlength=len(budgets)) == 0)
    units = np.flatnonzero(wanting[rows])
    units = units[np.lexsort((priorities[units], sizes[units], rows[units]))]
    first: np.ndarray = units[np.diff(rows[units], prepend=-1) != 0]
    return first


def _by_row_and_priority(rows: np.ndarray, priorities: np.ndarray) -> np.ndarray:
    """Return the places of units, row by row, in each by priority, then by place."""
    count = len(rows)
    bits = max(1, count.bit_length())
    if count and int(rows[-1]).bit_length() + 32 + bits <= 64:
        # One number of all three: a sort of integers takes a fraction of the time of a sort by several keys.
        keys = (rows.astype(np.uint64) << np.uint64(32)) | priorities.astype(np.uint64)
        keys = (keys << np.uint64(bits)) | np.arange(count, dtype=np.uint64)
        keys.sort()
        return (keys & np.uint64((1 << bits) - 1)).astype(np.int64)
    order: np.ndarray = np.lexsort((priorities, rows))
    return order
