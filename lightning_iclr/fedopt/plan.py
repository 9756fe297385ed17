"""What the processes do in a round of federated training: tasks, slots and chunks; pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class ClientTask:
    """One client's training in one round.

    Attributes:
        client: Number of the client, from 0.
        position: Its place in the round's cohort, from 0.
        steps: Local optimizer steps.
        num_examples: Distinct examples that it trains on; n_i in the paper.
        counted: Whether its update reaches the server. What does not count only keeps a process in step with the rest.
    """

    client: int
    position: int
    steps: int
    num_examples: int
    counted: bool = True


@dataclass(frozen=True)
class Round:
    """The plan of one round.

    Attributes:
        index: Number of the round, from 0.
        cohort: Clients drawn, without those that dropped out.
        dropped: Clients drawn that dropped out.
        tasks: For each process, what it trains, in order. The local steps of all processes add up to the same number.
    """

    index: int
    cohort: tuple[int, ...]
    dropped: tuple[int, ...]
    tasks: tuple[tuple[ClientTask, ...], ...]


class Slot(NamedTuple):
    """One iteration of a process's training loop in a round.

    Attributes:
        task: Whose batch it is.
        batch: Number of the client's batch, from 0.
        first: Whether it is the client's first batch.
        last: Whether it is the client's last batch.
        opens_step: Whether it is the first of the batches whose gradients are accumulated into one step.
        empty: Whether there is no batch: it only aligns accumulation with the client's batches.
    """

    task: ClientTask
    batch: int
    first: bool
    last: bool
    opens_step: bool
    empty: bool


@dataclass(frozen=True)
class Place:
    """Where and how a loader is run; the strategy tells.

    Attributes:
        rank: Rank of the process.
        world_size: Number of processes.
        accumulate_grad_batches: Batches whose gradients make one local step.
        vectorize_clients: Clients that are trained at once; 1 for one after the other.
        current_round: Returns the number of the round to serve.
    """

    rank: int
    world_size: int
    accumulate_grad_batches: int
    vectorize_clients: int
    current_round: Callable[[], int]


class StackedBatch(NamedTuple):
    """One batch of each of several clients.

    Attributes:
        places: The clients' places in their chunk.
        batch: Their batches, each tensor with the client in its first dimension (C, B, ...).
    """

    places: list[int]
    batch: Any


class ClientChunk(NamedTuple):
    """Clients that are trained at once.

    Attributes:
        tasks: The clients, by place.
        steps: For each local step the batches of those that still train, together where they have equally many rows.
    """

    tasks: tuple[ClientTask, ...]
    steps: list[list[StackedBatch]]


def balance(tasks: list[ClientTask], world_size: int) -> list[list[ClientTask]]:
    """Share tasks out over processes so that all take about as many local steps."""
    # The longest first, each to the process with the least to do: at most 4/3 of the best makespan (Graham, 1969).
    ranks: list[list[ClientTask]] = [[] for _ in range(world_size)]
    load = [0] * world_size
    for task in sorted(tasks, key=lambda task: -task.steps):
        rank = min(range(world_size), key=load.__getitem__)
        ranks[rank].append(task)
        load[rank] += task.steps
    return ranks


def fill(ranks: list[list[ClientTask]], spare: ClientTask) -> tuple[tuple[ClientTask, ...], ...]:
    """Let processes with fewer local steps train a copy of a client that does not count."""
    # Lightning's loop meets at a collective before every batch and counts optimizer steps on each process, so all must
    # take equally many. What is left over trains a copy of a client whose update does not count.
    most = max(1, *(sum(task.steps for task in own) for own in ranks))
    return tuple(tuple(own) + _idle(own, spare, most - sum(task.steps for task in own)) for own in ranks)


def fill_chunks(ranks: list[list[ClientTask]], spare: ClientTask, size: int) -> tuple[tuple[ClientTask, ...], ...]:
    """Let processes with fewer chunks train a copy of a client that does not count."""
    most = max(1, *(len(chunks(own, size)) for own in ranks))
    filled = []
    for own in ranks:
        missing = most - len(chunks(own, size))
        filled.append(tuple(own) + sum((_idle(own, spare, 1) for _ in range(missing)), ()))
    return tuple(filled)


def _idle(own: Sequence[ClientTask], spare: ClientTask, steps: int) -> tuple[ClientTask, ...]:
    like = own[0] if own else spare
    return () if steps == 0 else (ClientTask(like.client, like.position, steps, 0, counted=False),)


def chunks(tasks: Sequence[ClientTask], size: int) -> list[tuple[ClientTask, ...]]:
    """Return which clients are trained at once; each that does not count is alone."""
    counted = [task for task in tasks if task.counted]
    together = [tuple(counted[i : i + size]) for i in range(0, len(counted), size)]
    return together + [(task,) for task in tasks if not task.counted]


def slots(task: ClientTask, length: int, accumulate: int) -> Iterator[Slot]:
    """Return the iterations of one client with ``length`` batches a pass."""
    # As in a client's own Trainer the end of a pass ends a step, so a pass's last step may have fewer batches. The
    # empty slots come first, since Lightning steps when a multiple of accumulate_grad_batches slots has gone by.
    steps_an_epoch = math.ceil(length / accumulate)
    number = 0
    for step in range(task.steps):
        own = accumulate if (step + 1) % steps_an_epoch else length - accumulate * (steps_an_epoch - 1)
        for _ in range(accumulate - own):
            yield Slot(task, number, first=False, last=False, opens_step=False, empty=True)
        for batch in range(own):
            last = step == task.steps - 1 and batch == own - 1
            yield Slot(task, number, first=number == 0, last=last, opens_step=batch == 0, empty=False)
            number += 1
