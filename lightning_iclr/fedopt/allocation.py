"""Allocate examples to clients by arrays of labels or keys: at random, by mixtures of labels, by shards, by key.

Each function returns a partition: one array of row numbers (int64, ascending) a client; no row belongs to two clients.
The same seed gives the same partition with the same version of numpy.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

Indices = NDArray[np.int64]


def iid(num_examples: int, num_clients: int, seed: int) -> list[Indices]:
    """Deal all examples out at random, so that clients' sizes differ by at most one.

    Args:
        num_examples: Rows of the data set.
        num_clients: Clients, from 1 to ``num_examples``.
        seed: Seed of the deal.

    Raises:
        ValueError: ``num_clients`` is out of range.

    Examples:
        >>> [len(rows) for rows in iid(10, 3, seed=0)]
        [4, 3, 3]
    """
    check_clients(num_clients, num_examples)
    order = np.random.default_rng(seed).permutation(num_examples)
    return [np.sort(rows) for rows in np.array_split(order, num_clients)]


def dirichlet(
    labels: ArrayLike, num_clients: int, alpha: float, seed: int, examples_per_client: int | None = None
) -> list[Indices]:
    """Let each client draw its examples by a mixture of classes of its own (Hsu et al. 2019).

    The paper's split of CIFAR-10. A client's mixture q is a draw from the symmetric Dirichlet distribution with
    concentration ``alpha`` for each class, as in the paper's code. (Hsu et al. write Dir(alpha p) with a prior p of the
    classes: for K balanced ones that is ``alpha / K`` here.) Clients are filled one after the other: a label is drawn
    from q, then an example of it that nobody has. A class that is exhausted is struck out of all mixtures, which are
    scaled back to 1; the last clients get what is left. A mixture with all its mass on exhausted classes, where the
    paper's code divides 0 by 0, is drawn anew over the classes that are left: in exact arithmetic, scaling back gives
    that same distribution.

    Args:
        labels: Class of each example (N,), of any kind that sorts.
        num_clients: Clients, from 1 to N.
        alpha: Concentration, above 0: near 0 a client has one class, at infinity all classes alike.
        seed: Seed of the mixtures and draws.
        examples_per_client: Size of each client; ``None`` for ``N // num_clients``. Other examples stay unused.

    Raises:
        ValueError: A number is out of range, or there are fewer examples than the clients take.

    Examples:
        >>> parts = dirichlet(np.arange(100) % 10, num_clients=5, alpha=0.1, seed=0)
        >>> [len(rows) for rows in parts]
        [20, 20, 20, 20, 20]
    """
    return pachinko(labels, labels, num_clients, alpha, 1.0, seed, examples_per_client)


def pachinko(
    coarse: ArrayLike,
    fine: ArrayLike,
    num_clients: int,
    alpha: float = 0.1,
    beta: float = 10.0,
    seed: int = 0,
    examples_per_client: int | None = None,
) -> list[Indices]:
    """Let each client draw its examples by a mixture over coarse labels and, in each, one over its fine labels.

    The paper's split of CIFAR-100 (Pachinko allocation, Li and McCallum 2006): both mixtures are draws from symmetric
    Dirichlet distributions. A label is drawn in two stages, then an example of it that nobody has. An exhausted fine
    label is struck out of its coarse label's mixtures, a coarse label with nothing left out of the clients'; what is
    left is scaled back to 1, or drawn anew where it has no mass, as in `dirichlet`.

    Args:
        coarse: Coarse label of each example (N,).
        fine: Fine label of each example (N,); equal ones under different coarse labels count as different.
        num_clients: Clients, from 1 to N.
        alpha: Concentration of the mixtures over coarse labels, above 0.
        beta: Concentration of the mixtures over a coarse label's fine labels, above 0.
        seed: Seed of the mixtures and draws.
        examples_per_client: Size of each client; ``None`` for ``N // num_clients``. Other examples stay unused.

    Raises:
        ValueError: A number is out of range, there are fewer examples than the clients take, or the labels differ in
            length.

    Examples:
        >>> fine = np.arange(200) % 20
        >>> parts = pachinko(fine // 5, fine, num_clients=8, seed=0)
        >>> sorted(len(rows) for rows in parts)
        [25, 25, 25, 25, 25, 25, 25, 25]
    """
    check_concentration("alpha", alpha)
    check_concentration("beta", beta)
    coarse_codes, fine_codes = encode(coarse), encode(fine)
    if len(coarse_codes) != len(fine_codes):
        raise ValueError(
            f"coarse and fine must hold one label an example each, got {len(coarse_codes)} and {len(fine_codes)}"
        )
    num_examples = len(fine_codes)
    check_clients(num_clients, num_examples)
    size = num_examples // num_clients if examples_per_client is None else examples_per_client
    if not 1 <= size <= num_examples // num_clients:
        raise ValueError(
            f"examples_per_client must be between 1 and {num_examples // num_clients}, so that {num_clients} clients "
            f"can share {num_examples} examples; got {size}"
        )
    leaf_of_row = encode(coarse_codes * (fine_codes.max() + 1) + fine_codes)
    rng = np.random.default_rng(seed)
    pools = _Pools([rng.permutation(rows) for rows in rows_by_code(leaf_of_row)])
    root_of_leaf = np.array([coarse_codes[rows[0]] for rows in pools.rows])
    one_group = np.zeros(root_of_leaf.max() + 1, dtype=np.int64)
    roots = rng.dirichlet(np.full(len(one_group), alpha), size=num_clients)
    leaves = np.empty((num_clients, len(root_of_leaf)))
    for members in rows_by_code(root_of_leaf):
        leaves[:, members] = rng.dirichlet(np.full(len(members), beta), size=num_clients)

    def shares(client: int) -> NDArray[np.float64]:
        left = pools.left > 0
        _restrict(roots[client], np.bincount(root_of_leaf, left) > 0, one_group, alpha, rng)
        _restrict(leaves[client], left, root_of_leaf, beta, rng)
        return np.asarray(roots[client][root_of_leaf] * leaves[client])

    return [pools.take(size, partial(shares, client), rng) for client in range(num_clients)]


def pathological(labels: ArrayLike, num_clients: int, classes_per_client: int, seed: int) -> list[Indices]:
    """Give each client shards of ``classes_per_client`` classes at most (McMahan et al. 2017, section 3).

    Each class is shuffled and cut into shards, in all ``num_clients * classes_per_client``, as equal in size as
    classes allow; every client gets ``classes_per_client`` of them at random, which may be of the same class. All
    examples are used. McMahan et al. cut the whole sorted data set into equal shards instead, so that a shard on the
    border of two classes holds both; here none does, and sizes differ a little.

    Args:
        labels: Class of each example (N,), of any kind that sorts.
        num_clients: Clients, from 1 to N.
        classes_per_client: Shards of each client, from 1 to the number of classes.
        seed: Seed of shards and deal.

    Raises:
        ValueError: A number is out of range, or there are fewer shards than classes or more than examples.

    Examples:
        >>> labels = np.arange(100) % 10
        >>> max(len(set(labels[rows])) for rows in pathological(labels, num_clients=10, classes_per_client=2, seed=0))
        2
    """
    codes = encode(labels)
    check_clients(num_clients, len(codes))
    classes = rows_by_code(codes)
    if not 1 <= classes_per_client <= len(classes):
        raise ValueError(
            f"classes_per_client must be between 1 and the {len(classes)} classes, got {classes_per_client}"
        )
    num_shards = num_clients * classes_per_client
    if not len(classes) <= num_shards <= len(codes):
        raise ValueError(
            f"num_clients * classes_per_client must be between the {len(classes)} classes and the {len(codes)} "
            f"examples, got {num_clients} * {classes_per_client}"
        )
    rng = np.random.default_rng(seed)
    cuts = _shards_by_class([len(rows) for rows in classes], num_shards)
    shards = [s for rows, n in zip(classes, cuts, strict=True) for s in np.array_split(rng.permutation(rows), n)]
    deal = rng.permutation(num_shards).reshape(num_clients, classes_per_client)
    return [np.sort(np.concatenate([shards[shard] for shard in own])) for own in deal]


def by_key(values: ArrayLike, min_examples: int = 1) -> list[Indices]:
    """Make one client of each value: natural clients, such as writers, roles or users.

    Clients are in the order of their sorted values, so that their numbers do not depend on the order of the rows.

    Args:
        values: Key of each example (N,), of any kind that sorts.
        min_examples: Size below which a client is left out, 1 or more.

    Raises:
        ValueError: ``min_examples`` is below 1, or no client is that large.

    Examples:
        >>> by_key(["Romeo", "Juliet", "Romeo"])
        [array([1]), array([0, 2])]
    """
    if min_examples < 1:
        raise ValueError(f"min_examples must be at least 1, got {min_examples}")
    clients = rows_by_code(encode(values))
    kept = [rows for rows in clients if len(rows) >= min_examples]
    if not kept:
        largest = max(len(rows) for rows in clients)
        raise ValueError(f"min_examples must be at most the largest client's {largest} examples, got {min_examples}")
    return kept


class _Pools:
    """The examples that nobody has yet, by label."""

    def __init__(self, rows: list[Indices]) -> None:
        self.rows = rows
        self.left = np.array([len(own) for own in rows])

    def take(self, size: int, shares: Callable[[], NDArray[np.float64]], rng: np.random.Generator) -> Indices:
        """Draw labels one by one, asking for their shares at the start and after each that is exhausted."""
        taken: list[Indices] = []
        while size:
            draws = rng.choice(len(self.rows), size=size, p=shares())
            counts = np.bincount(draws, minlength=len(self.rows))
            last = np.flatnonzero((counts > 0) & (counts >= self.left))
            if last.size:  # what was drawn after the first exhaustion does not count
                end = min(np.flatnonzero(draws == label)[self.left[label] - 1] for label in last) + 1
                draws = draws[:end]
                counts = np.bincount(draws, minlength=len(self.rows))
            for label in np.flatnonzero(counts):
                taken.append(self.rows[label][self.left[label] - counts[label] : self.left[label]])
            self.left -= counts
            size -= len(draws)
        return np.sort(np.concatenate(taken))


def _restrict(
    shares: NDArray[np.float64],
    left: NDArray[np.bool_],
    group: Indices,
    concentration: float,
    rng: np.random.Generator,
) -> None:
    """Strike labels out of each group's mixture, in place, and scale what is left of it back to 1."""
    shares *= left
    mass = np.bincount(group, shares)
    for empty in np.flatnonzero((np.bincount(group, left) > 0) & (mass == 0)):
        members = left & (group == empty)
        shares[members] = rng.dirichlet(np.full(members.sum(), concentration))
        mass[empty] = 1.0
    shares /= np.where(mass > 0, mass, 1.0)[group]


def _shards_by_class(sizes: Sequence[int], num_shards: int) -> list[int]:
    # One more shard each time for the class whose shards are largest, so that the largest is as small as it can be.
    cuts = [1] * len(sizes)
    heap = [(-float(size), label) for label, size in enumerate(sizes)]
    heapq.heapify(heap)
    for _ in range(num_shards - len(sizes)):
        label = heap[0][1]
        cuts[label] += 1
        heapq.heapreplace(heap, (-sizes[label] / cuts[label], label))
    return cuts


def encode(values: ArrayLike) -> Indices:
    """Number values from 0 in sorted order."""
    array = np.asarray(values)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"labels must be a flat array of one example or more, got shape {array.shape}")
    return np.unique(array, return_inverse=True)[1].astype(np.int64)


def rows_by_code(codes: Indices) -> list[Indices]:
    """Return the rows of each code in ascending order; every code up to the largest must occur."""
    order = np.argsort(codes, kind="stable").astype(np.int64)
    return np.split(order, np.cumsum(np.bincount(codes))[:-1])


def check_clients(num_clients: int, num_examples: int | None = None) -> None:
    """Refuse a number of clients that is below 1 or exceeds the examples."""
    if num_clients < 1:
        raise ValueError(f"num_clients must be at least 1, got {num_clients}")
    if num_examples is not None and num_clients > num_examples:
        raise ValueError(f"num_clients must be at most the {num_examples} examples, got {num_clients}")


def check_concentration(name: str, value: float) -> None:
    """Refuse a concentration that is not positive."""
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_size(examples_per_client: int | None) -> None:
    """Refuse a client size below 1."""
    if examples_per_client is not None and examples_per_client < 1:
        raise ValueError(f"examples_per_client must be at least 1, or None; got {examples_per_client}")
