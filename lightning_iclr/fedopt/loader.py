"""Who takes part: the cohort of each round, what each of its clients trains on, and which process trains it.

The plan of a round is a pure function of (seed, round, world size). The cohort and every client's batches do not even
depend on the world size, so that any number of processes simulates the same federation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset

from lightning_iclr.fedopt.partition import check_partition
from lightning_iclr.fedopt.plan import (
    ClientChunk,
    ClientTask,
    Place,
    Round,
    Slot,
    StackedBatch,
    balance,
    chunks,
    fill,
    fill_chunks,
    slots,
)
from lightning_iclr.sampling import SampleKey

_COHORT, _DROPOUT, _ORDER, _STRAGGLERS = range(4)  # what a random stream is for


@dataclass(frozen=True)
class Stragglers:
    """Let clients at random run out of time: a cap on local steps for `FederatedLoader`, whose seed says who it is.

    Args:
        probability: Chance of a drawn client to be a straggler in a round, in [0, 1].
        local_steps: Local steps that a straggler manages.

    Raises:
        ValueError: A number is outside its range.

    Examples:
        >>> Stragglers(probability=1.0, local_steps=2)(0, 5)
        2
    """

    probability: float
    local_steps: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0:
            raise ValueError(f"probability must be in [0, 1], got {self.probability}")
        if self.local_steps < 1:
            raise ValueError(f"local_steps must be at least 1, got {self.local_steps}")

    def __call__(self, round_index: int, client: int, seed: int = 0) -> int | None:
        """Return the cap on a client's local steps in a round, or ``None``."""
        late = np.random.default_rng((seed, _STRAGGLERS, round_index, client)).random() < self.probability
        return self.local_steps if late else None


class FederatedLoader:
    """Serve rounds of federated training under `FedOptStrategy`: one iteration is one round.

    In each round a cohort is drawn uniformly without replacement (section 5 of the paper), and each of its clients
    goes over its own examples. It is a plain iterable, without a length, since rounds differ in theirs.

    Args:
        dataset: What all clients' examples are rows of: a map-style dataset, or a ``datasets.Dataset``. It is asked
            for integers or, where it has a true attribute ``takes_sample_keys``, for a `SampleKey` whose ``epoch``
            counts a client's passes, to seed augmentation by.
        partition: Rows of each client.
        clients_per_round: Size of a cohort, or its share of all clients where it is a float.
        batch_size: Examples of a local batch.
        local_epochs: Passes over a client's examples in a round; E in the paper.
        max_local_steps: Cap on a client's local steps, or a function of (round, client) that returns it, such as
            `Stragglers`.
        client_dropout: Chance of a drawn client not to report, in [0, 1).
        shuffle: Whether a client's examples have a new random order in each pass.
        drop_last: Whether to leave off a client's last, smaller batch.
        seed: Seed of cohorts, orders, dropout and stragglers, and of what clients draw in training.
        collate_fn: Makes a batch of examples; torch's default where ``None``.
        num_workers: Processes that load.
        pin_memory: Whether batches are put into pinned memory.

    Raises:
        TypeError: ``dataset`` has no length.
        ValueError: A number is outside its range, the cohort exceeds the clients, or a client's rows are empty,
            repeated or not in the dataset; the error names the client.

    Examples:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> rows = TensorDataset(torch.arange(6))
        >>> loader = FederatedLoader(rows, [[0, 1, 2], [3], [4, 5]], clients_per_round=2, batch_size=2)
        >>> loader.plan(0).cohort
        (1, 2)
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        partition: Sequence[Sequence[int]] | Sequence[np.ndarray],
        *,
        clients_per_round: int | float,
        batch_size: int,
        local_epochs: int = 1,
        max_local_steps: int | Callable[[int, int], int | None] | None = None,
        client_dropout: float = 0.0,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if not isinstance(dataset, Sized):
            raise TypeError(f"dataset must have a length, got {type(dataset).__name__}")
        for name, number in (("batch_size", batch_size), ("local_epochs", local_epochs)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if isinstance(max_local_steps, int) and max_local_steps < 1:
            raise ValueError(f"max_local_steps must be at least 1, got {max_local_steps}")
        if not 0.0 <= client_dropout < 1.0:
            raise ValueError(f"client_dropout must be in [0, 1), got {client_dropout}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.partition = [np.asarray(rows, dtype=np.int64) for rows in partition]
        check_partition(self.partition, len(dataset))
        self.clients_per_round = _cohort_size(clients_per_round, len(self.partition))
        self.batch_size, self.local_epochs, self.drop_last = batch_size, local_epochs, drop_last
        if drop_last:
            self._refuse_small_clients()
        self.dataset, self.shuffle, self.seed = dataset, shuffle, seed
        self.max_local_steps, self.client_dropout = max_local_steps, client_dropout
        self._keyed = bool(getattr(dataset, "takes_sample_keys", False))
        self._rows: list[list[Any]] = []  # of each batch of the round; filled before each iteration
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=_Current(self._rows),
            collate_fn=collate_fn,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
        )
        self._place: Place | None = None
        self._warned = False

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return len(self.partition)

    def connect(self, place: Place) -> None:
        """Tell where the loader runs; called by `FedOptStrategy`."""
        self._place = place
        if self.clients_per_round < place.world_size and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"a cohort of {self.clients_per_round} on {place.world_size} processes leaves "
                f"{place.world_size - self.clients_per_round} of them without a client of their own"
            )

    def plan(
        self, index: int, world_size: int = 1, accumulate_grad_batches: int = 1, vectorize_clients: int = 1
    ) -> Round:
        """Return who takes part in a round, what each client does, and where.

        Args:
            index: Number of the round, from 0.
            world_size: Number of processes.
            accumulate_grad_batches: Batches whose gradients make one local step.
            vectorize_clients: Clients that one process trains at once.
        """
        draw = self._random(_COHORT, index).choice(self.num_clients, self.clients_per_round, replace=False)
        stays = self._random(_DROPOUT, index).random(self.clients_per_round) >= self.client_dropout
        cohort = tuple(int(client) for client in draw[stays])
        tasks = [self._task(index, client, position, accumulate_grad_batches) for position, client in enumerate(cohort)]
        spare = tasks[0] if tasks else self._task(index, int(draw[0]), 0, accumulate_grad_batches)
        ranks = balance(tasks, world_size)
        filled = fill(ranks, spare) if vectorize_clients == 1 else fill_chunks(ranks, spare, vectorize_clients)
        return Round(index, cohort, tuple(int(client) for client in draw[~stays]), filled)

    def slots(self, index: int) -> list[Slot]:
        """Return what this process's iterations of a round hold, in order; not for clients that are trained at once."""
        batches = self._batches_an_epoch
        accumulate = self._connected().accumulate_grad_batches
        own = self._own_tasks(index)
        return [slot for task in own for slot in slots(task, batches(task.client), accumulate)]

    def chunks(self, index: int) -> list[tuple[ClientTask, ...]]:
        """Return which clients this process trains at once in each of its iterations of a round."""
        return chunks(self._own_tasks(index), self._connected().vectorize_clients)

    def __iter__(self) -> Iterator[Any]:
        """Serve the batches of this process's clients in the current round, one client after the other.

        Yields ``None`` where nothing but the accumulation of gradients goes on; with ``vectorize_clients`` a
        `ClientChunk` at a time.
        """
        place = self._connected()
        index = place.current_round()
        if place.vectorize_clients > 1:
            yield from self._iterate_chunks(index)
            return
        self._rows[:] = [rows for task in self._own_tasks(index) for rows in self._task_rows(index, task)]
        batches = iter(self._loader)
        for slot in self.slots(index):
            yield None if slot.empty else next(batches)

    def _iterate_chunks(self, index: int) -> Iterator[ClientChunk]:
        chunks = self.chunks(index)
        groups: list[list[list[tuple[list[int], list[Any]]]]] = []  # of chunks, of steps: places and rows
        for chunk in chunks:
            groups.append([])
            for step in zip_longest(*(self._task_rows(index, task) for task in chunk)):
                alike: dict[int, tuple[list[int], list[Any]]] = {}
                for place, rows in enumerate(step):
                    if rows is not None:
                        places, together = alike.setdefault(len(rows), ([], []))
                        places.append(place)
                        together.extend(rows)
                groups[-1].append(list(alike.values()))
        self._rows[:] = [rows for steps in groups for step in steps for _, rows in step]
        batches = iter(self._loader)
        for chunk, steps in zip(chunks, groups, strict=True):
            stacked = [
                [StackedBatch(places, _stacked(next(batches), len(places), len(rows))) for places, rows in step]
                for step in steps
            ]
            yield ClientChunk(chunk, stacked)

    def _own_tasks(self, index: int) -> tuple[ClientTask, ...]:
        place = self._connected()
        plan = self.plan(index, place.world_size, place.accumulate_grad_batches, place.vectorize_clients)
        return plan.tasks[place.rank]

    def _connected(self) -> Place:
        if self._place is None:
            raise RuntimeError(
                "FederatedLoader serves FedOptStrategy only; pass Trainer(strategy=FedOptStrategy(...)), or train on "
                "its dataset with a plain DataLoader"
            )
        return self._place

    def _random(self, purpose: int, *numbers: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, purpose, *numbers))

    def _batches_an_epoch(self, client: int) -> int:
        full = len(self.partition[client]) / self.batch_size
        return math.floor(full) if self.drop_last else math.ceil(full)

    def _task(self, index: int, client: int, position: int, accumulate: int) -> ClientTask:
        batches = self._batches_an_epoch(client)
        steps_an_epoch = math.ceil(batches / accumulate)
        cap = self.max_local_steps
        if isinstance(cap, Stragglers):
            cap = cap(index, client, self.seed)
        elif callable(cap):
            cap = cap(index, client)
        steps = self.local_epochs * steps_an_epoch
        if cap is not None:
            if cap < 1:
                raise ValueError(f"max_local_steps must give at least 1, got {cap} for client {client}")
            steps = min(steps, cap)
        seen = min(steps * accumulate, batches) * self.batch_size
        return ClientTask(client, position, steps, min(seen, len(self.partition[client])))

    def _task_rows(self, index: int, task: ClientTask) -> Iterator[list[Any]]:
        """Yield the rows of each batch; a task that does not count repeats passes until its steps are done."""
        rows, length = self.partition[task.client], self._batches_an_epoch(task.client)
        accumulate = self._connected().accumulate_grad_batches
        steps_an_epoch = math.ceil(length / accumulate)
        for epoch in range(math.ceil(task.steps / steps_an_epoch)):
            order = self._random(_ORDER, index, task.client, epoch).permutation(rows) if self.shuffle else rows
            keys: list[Any] = order.tolist()
            if self._keyed:
                keys = [SampleKey(row, index * self.local_epochs + epoch, False) for row in keys]
            steps = min(steps_an_epoch, task.steps - epoch * steps_an_epoch)
            for batch in range(min(length, steps * accumulate)):
                yield keys[batch * self.batch_size : (batch + 1) * self.batch_size]

    def _refuse_small_clients(self) -> None:
        for client, rows in enumerate(self.partition):
            if len(rows) < self.batch_size:
                raise ValueError(
                    f"client {client} has {len(rows)} examples, less than a batch_size of {self.batch_size}, and "
                    "drop_last would leave it none"
                )


@dataclass
class _Current(Iterable[list[Any]]):
    """A batch sampler over a list that is filled anew for each round."""

    batches: list[list[Any]]

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _stacked(batch: Any, clients: int, rows: int) -> Any:
    def stack(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or len(leaf) != rows:
            raise ValueError(
                "vectorize_clients needs batches of tensors with one row an example, got "
                f"{tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__} for {rows} examples"
            )
        return leaf.view(clients, rows // clients, *leaf.shape[1:])

    return tree_map(stack, batch)


def _cohort_size(clients_per_round: int | float, num_clients: int) -> int:
    if isinstance(clients_per_round, float):
        if not 0.0 < clients_per_round <= 1.0:
            raise ValueError(f"clients_per_round must be a number or a share in (0, 1], got {clients_per_round}")
        return max(1, round(clients_per_round * num_clients))
    if not 1 <= clients_per_round <= num_clients:
        raise ValueError(
            f"clients_per_round must lie between 1 and the {num_clients} clients of the partition, got "
            f"{clients_per_round}"
        )
    return clients_per_round
