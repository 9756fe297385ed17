"""Cut held-out rows from a federated data set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # importing datasets takes over a second
    from datasets import Dataset as Table


def hold_out(table: Table, size: int, seed: int, stratify_column: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Draw rows to hold out.

    With a column of classes, each class gives the whole part of its share; the rows that are still missing come from
    the classes with the largest remainders, at random among equals.

    Args:
        table: The data.
        size: Rows to hold out.
        seed: Seed of the draw.
        stratify_column: Column of classes that both parts hold in proportion; ``None`` for a plain draw.

    Returns:
        The rows that stay and those that are held out, both in ascending order.

    Raises:
        ValueError: One of the parts would be empty.

    Examples:
        >>> from datasets import Dataset
        >>> kept, held_out = hold_out(Dataset.from_dict({"label": [0, 1] * 50}), 20, seed=0, stratify_column="label")
        >>> np.bincount(held_out % 2).tolist()
        [10, 10]
    """
    rows = len(table)
    if not 0 < size < rows:
        raise ValueError(f"val_size and test_size must leave training rows of {rows}, got {size} in all")
    random = np.random.default_rng(seed)
    codes = np.zeros(rows, dtype=np.int64)
    if stratify_column is not None:
        labels = table.select_columns(stratify_column).with_format("numpy")[:][stratify_column]
        codes = np.unique(labels, return_inverse=True)[1]
    counts = np.bincount(codes)
    shares = counts * (size / rows)
    quotas = np.floor(shares).astype(np.int64)
    ties = random.random(len(counts)) * 1e-6
    quotas[np.argsort(quotas - shares + ties)[: size - quotas.sum()]] += 1
    # A random order first, then a stable one by class: rows of a class are together, in random order.
    order = random.permutation(rows)
    order = order[np.argsort(codes[order], kind="stable")]
    place = np.arange(rows) - (np.cumsum(counts) - counts)[codes[order]]
    chosen = place < quotas[codes[order]]
    return np.sort(order[~chosen]), np.sort(order[chosen])
