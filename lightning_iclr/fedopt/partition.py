"""Divide a data set among clients: at random, by label (as the paper does, or by shards), or by a natural key.

A partition is a list with one array of row numbers (int64, ascending) a client; no row belongs to two clients. Each
class applies the function of its name, which takes arrays (see `lightning_iclr.fedopt.allocation`), to columns of any
``datasets.Dataset``; recipes build it by its class path.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from lightning_iclr.fedopt.allocation import (
    Indices,
    by_key,
    check_clients,
    check_concentration,
    check_size,
    dirichlet,
    encode,
    iid,
    pachinko,
    pathological,
)

if TYPE_CHECKING:  # importing datasets takes over a second
    from datasets import Dataset

_PIECE = 1 << 20  # rows of a column that are read at once


def check_partition(partition: Sequence[ArrayLike], num_examples: int) -> None:
    """Refuse a partition that no client could train on as meant, and warn once where clients share examples.

    Args:
        partition: Row numbers of each client.
        num_examples: Rows of the data set.

    Raises:
        TypeError: A client's rows are not integers.
        ValueError: There is no client, or a client is empty, holds a row twice or one outside of the data set.

    Examples:
        >>> check_partition([[0, 1], [2, 2]], num_examples=3)
        Traceback (most recent call last):
        ValueError: client 1 must hold each example once, got row 2 twice
    """
    clients = [np.asarray(rows) for rows in partition]
    if not clients:
        raise ValueError("partition must hold at least one client, got none")
    for client, rows in enumerate(clients):
        if rows.ndim != 1 or not rows.size:
            raise ValueError(f"client {client} must hold a flat array of one row or more, got shape {rows.shape}")
        if not np.issubdtype(rows.dtype, np.integer):
            raise TypeError(f"client {client} must hold integers, got {rows.dtype}")
    rows = np.concatenate(clients).astype(np.int64)
    owner = np.repeat(np.arange(len(clients)), [len(own) for own in clients])
    outside = np.flatnonzero((rows < 0) | (rows >= num_examples))
    if outside.size:
        client, row = owner[outside[0]], rows[outside[0]]
        raise ValueError(f"client {client} must hold rows from 0 to {num_examples - 1}, got {row}")
    order = np.lexsort((owner, rows))
    rows, owner = rows[order], owner[order]
    again = np.flatnonzero(rows[1:] == rows[:-1])
    twice = again[owner[again + 1] == owner[again]]
    if twice.size:
        client, row = owner[twice[0]], rows[twice[0]]
        raise ValueError(f"client {client} must hold each example once, got row {row} twice")
    if again.size:
        first, second, row = owner[again[0]], owner[again[0] + 1], rows[again[0]]
        shared = np.unique(rows[again]).size
        warnings.warn(
            f"clients share {shared} of the data set's {num_examples} examples; the first is row {row}, of clients "
            f"{first} and {second}",
            stacklevel=2,
        )


def label_matrix(partition: Sequence[ArrayLike], labels: ArrayLike, num_classes: int) -> Indices:
    """Count each client's examples of each class, for a picture.

    Args:
        partition: Row numbers of each client.
        labels: Class of each example (N,), from 0 to ``num_classes - 1``.
        num_classes: Classes.

    Returns:
        Counts (clients, classes).

    Raises:
        ValueError: A label is out of range.

    Examples:
        >>> label_matrix([[0, 1], [2]], labels=[0, 1, 1], num_classes=2).tolist()
        [[1, 1], [0, 1]]
    """
    classes = np.asarray(labels)
    if classes.size and not (classes.min() >= 0 and classes.max() < num_classes):
        raise ValueError(f"labels must be from 0 to {num_classes - 1}, got {classes.min()} to {classes.max()}")
    return np.stack([np.bincount(classes[np.asarray(rows)], minlength=num_classes) for rows in partition])


@dataclass(frozen=True)
class IIDPartitioner:
    """Deal a data set out at random; see `iid`.

    Args:
        num_clients: Clients, from 1 to the number of examples.
        seed: Seed of the deal.

    Raises:
        ValueError: ``num_clients`` is below 1; on the call, above the number of examples.

    Examples:
        >>> from datasets import Dataset
        >>> [len(rows) for rows in IIDPartitioner(num_clients=2)(Dataset.from_dict({"text": ["a", "b", "c"]}))]
        [2, 1]
    """

    num_clients: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_clients(self.num_clients)

    def __call__(self, dataset: Sized) -> list[Indices]:
        """Return the rows of each client; any data set with a length will do."""
        return iid(len(dataset), self.num_clients, self.seed)


@dataclass(frozen=True)
class DirichletPartitioner:
    """Divide a data set by a Dirichlet mixture of classes for each client; see `dirichlet`.

    Args:
        num_clients: Clients, from 1 to the number of examples.
        alpha: Concentration, above 0: near 0 a client has one class, at infinity all classes alike.
        label_column: Column of the classes.
        examples_per_client: Size of each client; ``None`` for an equal share.
        seed: Seed of the mixtures and draws.

    Raises:
        ValueError: A number is out of range; on the call, the column is missing or there are too few examples.

    Examples:
        >>> from datasets import Dataset
        >>> flowers = Dataset.from_dict({"label": ["rose", "lily"] * 10})
        >>> [len(rows) for rows in DirichletPartitioner(num_clients=4, alpha=0.5)(flowers)]
        [5, 5, 5, 5]
    """

    num_clients: int
    alpha: float
    label_column: str = "label"
    examples_per_client: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_clients(self.num_clients)
        check_concentration("alpha", self.alpha)
        check_size(self.examples_per_client)

    def __call__(self, dataset: Dataset) -> list[Indices]:
        """Return the rows of each client."""
        labels = _column(dataset, self.label_column, "label_column")
        return dirichlet(labels, self.num_clients, self.alpha, self.seed, self.examples_per_client)


@dataclass(frozen=True)
class PachinkoPartitioner:
    """Divide a data set by Dirichlet mixtures of coarse and of fine labels for each client; see `pachinko`.

    Args:
        num_clients: Clients, from 1 to the number of examples.
        coarse_column: Column of the coarse labels.
        fine_column: Column of the fine labels.
        alpha: Concentration of the mixtures over coarse labels, above 0.
        beta: Concentration of the mixtures over a coarse label's fine labels, above 0.
        examples_per_client: Size of each client; ``None`` for an equal share.
        seed: Seed of the mixtures and draws.

    Raises:
        ValueError: A number is out of range; on the call, a column is missing or there are too few examples.

    Examples:
        >>> from datasets import Dataset
        >>> images = Dataset.from_dict({"coarse_label": [0, 0, 1, 1], "fine_label": [0, 1, 2, 3]})
        >>> partitioner = PachinkoPartitioner(2, coarse_column="coarse_label", fine_column="fine_label")
        >>> [len(rows) for rows in partitioner(images)]
        [2, 2]
    """

    num_clients: int
    coarse_column: str
    fine_column: str
    alpha: float = 0.1
    beta: float = 10.0
    examples_per_client: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_clients(self.num_clients)
        check_concentration("alpha", self.alpha)
        check_concentration("beta", self.beta)
        check_size(self.examples_per_client)

    def __call__(self, dataset: Dataset) -> list[Indices]:
        """Return the rows of each client."""
        coarse = _column(dataset, self.coarse_column, "coarse_column")
        fine = _column(dataset, self.fine_column, "fine_column")
        return pachinko(coarse, fine, self.num_clients, self.alpha, self.beta, self.seed, self.examples_per_client)


@dataclass(frozen=True)
class KeyPartitioner:
    """Make one client of each value of a column, or of each combination of values of several; see `by_key`.

    Clients are in the order of the sorted values, the first column first.

    Args:
        columns: Column of the key, or several.
        min_examples: Size below which a client is left out, 1 or more.

    Raises:
        ValueError: There is no column, or ``min_examples`` is below 1; on the call, a column is missing or no client is
            large enough.

    Examples:
        >>> from datasets import Dataset
        >>> lines = Dataset.from_dict({"play": ["Hamlet", "Hamlet", "Lear"], "role": ["King", "Ghost", "King"]})
        >>> KeyPartitioner(["play", "role"])(lines)
        [array([1]), array([0]), array([2])]
    """

    columns: str | Sequence[str]
    min_examples: int = 1

    def __post_init__(self) -> None:
        if not self.columns:
            raise ValueError(f"columns must name at least one column, got {self.columns!r}")
        if self.min_examples < 1:
            raise ValueError(f"min_examples must be at least 1, got {self.min_examples}")

    def __call__(self, dataset: Dataset) -> list[Indices]:
        """Return the rows of each client."""
        columns = [self.columns] if isinstance(self.columns, str) else self.columns
        key = _column(dataset, columns[0], "columns")
        for name in columns[1:]:
            codes = _column(dataset, name, "columns")
            key = encode(key * (codes.max() + 1) + codes)
        return by_key(key, self.min_examples)


@dataclass(frozen=True)
class PathologicalPartitioner:
    """Give each client of a data set shards of few classes; see `pathological`.

    Args:
        num_clients: Clients, from 1 to the number of examples.
        classes_per_client: Shards of each client, from 1 to the number of classes.
        label_column: Column of the classes.
        seed: Seed of shards and deal.

    Raises:
        ValueError: A number is out of range; on the call, the column is missing or has too few classes or examples.

    Examples:
        >>> from datasets import Dataset
        >>> flowers = Dataset.from_dict({"label": ["rose", "lily"] * 10})
        >>> [len(rows) for rows in PathologicalPartitioner(num_clients=4, classes_per_client=1)(flowers)]
        [5, 5, 5, 5]
    """

    num_clients: int
    classes_per_client: int
    label_column: str = "label"
    seed: int = 0

    def __post_init__(self) -> None:
        check_clients(self.num_clients)
        if self.classes_per_client < 1:
            raise ValueError(f"classes_per_client must be at least 1, got {self.classes_per_client}")

    def __call__(self, dataset: Dataset) -> list[Indices]:
        """Return the rows of each client."""
        labels = _column(dataset, self.label_column, "label_column")
        return pathological(labels, self.num_clients, self.classes_per_client, self.seed)


def _column(dataset: Dataset, name: str, argument: str) -> Indices:
    """Number a column's values from 0 in sorted order."""
    if name not in dataset.column_names:
        raise ValueError(
            f"{argument} must name columns of the data set, which are {', '.join(dataset.column_names)}; got {name!r}"
        )
    if not len(dataset):
        raise ValueError("dataset must hold at least one example, got none")
    # In pieces, as Arrow cannot join more than 2 GiB of strings, and sorting the distinct values only: a column of
    # users holds the same strings again and again.
    table = dataset.select_columns([name]).with_format("arrow")
    pieces = [batch[name].combine_chunks() for batch in table.iter(batch_size=_PIECE)]
    if pieces[0].type.num_fields:
        raise ValueError(f"{argument} must name columns of numbers or strings, got {name!r} of {pieces[0].type}")
    if missing := sum(piece.null_count for piece in pieces):
        raise ValueError(f"{argument} must name columns with a value in each row, got {name!r} with {missing} empty")
    encoded = [piece.dictionary_encode() for piece in pieces]
    ranks = encode(np.concatenate([piece.dictionary.to_numpy(zero_copy_only=False) for piece in encoded]))
    starts = np.cumsum([0] + [len(piece.dictionary) for piece in encoded])
    return np.concatenate([ranks[start + p.indices.to_numpy()] for start, p in zip(starts[:-1], encoded, strict=True)])
