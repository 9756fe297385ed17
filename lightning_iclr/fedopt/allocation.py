"""Allocate examples to clients by Dirichlet mixtures of labels, as the paper divides CIFAR-10 and CIFAR-100."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

Indices = NDArray[np.int64]


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
