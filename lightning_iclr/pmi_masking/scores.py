"""How strongly the words of an n-gram hold together: sections 3.2 and 3.3 of the paper, in nats.

The probability of an n-gram is its share of all positions of n-grams of its length, p(w_1..w_n) = count / N_n. Scores
of different lengths do not compare.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from lightning_iclr.pmi_masking.ngrams import NgramTable

Score = Literal["pmi", "naive_pmi", "frequency"]


def log_probability(table: NgramTable, n: int) -> np.ndarray:
    """Return log p of all n-grams of a length (S_n,)."""
    logarithms: np.ndarray = np.log(table.counts[n - 1]) - np.log(table.totals[n - 1])
    return logarithms


def pmi_score(table: NgramTable, n: int, count_weight: float = 1.0) -> np.ndarray:
    """Return PMI_n of all n-grams of a length (S_n,), equation 3: the score of the weakest link.

    That is the minimum of log p(w_1..w_n) - sum_g log p(g) over all cuts of the n-gram into two or more segments g. The
    lists that the authors released take log p^2 in place of log p, ``count_weight`` 2.

    Args:
        table: The counts.
        n: Length, at least 2.
        count_weight: Factor of log p(w_1..w_n).

    Raises:
        ValueError: ``n`` is below 2 or above the table's greatest length.
    """
    _check_length(table, n)
    weight_free = -_best_cut(table, n, [log_probability(table, length) for length in range(1, n)])
    score: np.ndarray = count_weight * log_probability(table, n) + weight_free
    return score


def naive_pmi_score(table: NgramTable, n: int, count_weight: float = 1.0) -> np.ndarray:
    """Return Naive-PMI_n of all n-grams of a length (S_n,), equation 2: the words against independence.

    Args:
        table: The counts.
        n: Length, at least 2.
        count_weight: Factor of log p(w_1..w_n).

    Raises:
        ValueError: ``n`` is below 2 or above the table's greatest length.
    """
    _check_length(table, n)
    single = log_probability(table, 1)
    everyone = np.arange(len(table.counts[n - 1]))
    score = count_weight * log_probability(table, n)
    for first in range(n):
        word = table.segment(table.segment(everyone, n, n - first, last=True), n - first, 1, last=False)
        score = score - single[word]
    return score


def frequency_score(table: NgramTable, n: int) -> np.ndarray:
    """Return the occurrences of all n-grams of a length (S_n,), as numbers to rank by."""
    _check_length(table, n)
    return table.counts[n - 1].astype(np.float64)


def _best_cut(table: NgramTable, n: int, logarithms: list[np.ndarray]) -> np.ndarray:
    """Return the greatest sum of log p over cuts into two or more segments, of all n-grams of a length."""
    # best[k] allows the whole (k+1)-gram as one segment, too; a cut of n words is two shorter ones side by side.
    best: list[np.ndarray] = []
    cuts = np.full(len(logarithms[0]), -np.inf)
    for length in range(2, n + 1):
        best.append(np.maximum(logarithms[length - 2], cuts))
        everyone = np.arange(len(table.counts[length - 1]))
        cuts = np.full(len(everyone), -np.inf)
        for first in range(1, length):
            left = table.segment(everyone, length, first, last=False)
            right = table.segment(everyone, length, length - first, last=True)
            np.maximum(cuts, best[first - 1][left] + best[length - first - 1][right], out=cuts)
    return cuts


def _check_length(table: NgramTable, n: int) -> None:
    if not 2 <= n <= table.max_n:
        raise ValueError(f"n must lie between 2 and {table.max_n}, got {n}")
