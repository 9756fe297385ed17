"""Draw samples in an order that a killed run can continue exactly.

The order is a pure function of (seed, epoch, rank, world size): nothing is read from global random state, so a resumed
run, a rerun and a run on another number of processes see the same samples at the same step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, SequentialSampler

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class SampleKey(NamedTuple):
    """What a sampler asks a dataset for.

    Attributes:
        index: Row of the dataset, from 0.
        epoch: Pass over the data, from 0; together with ``index`` it seeds the sample's augmentation.
        padding: Whether the sample only fills up a rank's share in evaluation and must not be counted.
    """

    index: int  # type: ignore[assignment]  # covers tuple.index, which nobody asks of a key
    epoch: int
    padding: bool


def _generator(purpose: bytes, *numbers: int) -> torch.Generator:
    # A hash, not a sum: seed + epoch would give run 0's epoch 1 the numbers of run 1's epoch 0. torch's CPU engine
    # keeps 32 bits of a seed, so two of many keys may share a stream, but no pattern of keys does.
    digest = hashlib.blake2b(b",".join(b"%d" % number for number in numbers), digest_size=8, person=purpose).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """Return a CPU generator that belongs to one sample in one epoch.

    The same three numbers give the same draws in every process and worker; neighbouring ones share nothing.

    Args:
        seed: Seed of the run's augmentation.
        epoch: Pass over the data.
        index: Row of the dataset.

    Examples:
        >>> first, again = sample_generator(0, 3, 7), sample_generator(0, 3, 7)
        >>> torch.equal(torch.rand(4, generator=first), torch.rand(4, generator=again))
        True
    """
    return _generator(b"sample", seed, epoch, index)


def step_generator(seed: int, epoch: int, batch_idx: int) -> torch.Generator:
    """Return a CPU generator that belongs to one training step, the same on all processes.

    It shares nothing with the generators of samples, whatever the numbers.

    Args:
        seed: Seed of the run.
        epoch: Pass over the data.
        batch_idx: Batch of the epoch.

    Examples:
        >>> first, again = step_generator(0, 3, 7), step_generator(0, 3, 7)
        >>> torch.equal(torch.rand(4, generator=first), torch.rand(4, generator=again))
        True
    """
    return _generator(b"batch", seed, epoch, batch_idx)


def seed_step(seed: int, epoch: int, batch_idx: int, rank: int) -> None:
    """Seed torch's own generators for one training step of one process.

    Dropout and stochastic depth draw from them, and no checkpoint holds their state: called in
    ``on_train_batch_start``, this lets a resumed run draw what the uninterrupted one would, and ranks draw apart.

    Args:
        seed: Seed of the run.
        epoch: Pass over the data.
        batch_idx: Batch of the epoch.
        rank: Rank of the process.

    Examples:
        >>> seed_step(0, epoch=1, batch_idx=2, rank=0)
        >>> first = torch.rand(())
        >>> seed_step(0, epoch=1, batch_idx=2, rank=0)
        >>> bool(first == torch.rand(()))
        True
    """
    number = _generator(b"step", seed, epoch, batch_idx, rank).initial_seed()
    # Not by torch.manual_seed: for devices that are not in use it formats a stack trace, a millisecond each time.
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(number)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(number)


class EpochSampler(DistributedSampler[SampleKey]):
    """Yield a rank's share of the keys of one epoch.

    All ranks draw one common order of the n rows; rank r of W takes positions r, r + W, r + 2W, ... So the s-th
    batches of b of all ranks hold together the positions sWb to (s + 1)Wb - 1, which is the s-th batch of one process
    with batch size Wb, whatever b is. Where W does not divide n, ``drop_last`` leaves off the last n mod W positions.
    Otherwise the ranks' shares are made equal with up to W - 1 further keys from the order's start: with ``shuffle``
    (training) they are ordinary samples, seen twice in that epoch; without it (evaluation) they carry
    ``padding=True`` and are not to be counted.

    Rank and world size are read when the iteration starts, from ``torch.distributed`` if that is initialised. As a
    ``DistributedSampler``, Lightning leaves it in place under every strategy and still calls ``set_epoch``.

    Args:
        dataset: What to draw from, or the number of its rows.
        shuffle: Whether to draw a new random order for every epoch.
        seed: Seed of the orders.
        drop_last: Whether to leave off the last rows where the ranks' shares would differ.
        num_replicas: World size in place of that of ``torch.distributed``.
        rank: Rank in place of that of ``torch.distributed``.

    Raises:
        ValueError: The dataset is empty, or ``rank`` and ``num_replicas`` do not fit together.

    Examples:
        >>> [key.index for key in EpochSampler(5, num_replicas=2, rank=1)]
        [1, 3, 0]
        >>> [key.padding for key in EpochSampler(5, num_replicas=2, rank=1)]
        [False, False, True]
    """

    def __init__(
        self,
        dataset: Sized | int,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        # The parent's constructor asks for the world size, which may not be known yet, and stores what it computes.
        self.size = dataset if isinstance(dataset, int) else len(dataset)
        if self.size < 1:
            raise ValueError(f"dataset must hold at least one sample, got {self.size}")
        if (num_replicas is None) != (rank is None):
            raise ValueError(f"num_replicas and rank must be given together, got {num_replicas} and {rank}")
        if num_replicas is not None and rank is not None and not 0 <= rank < num_replicas:
            raise ValueError(f"rank must lie between 0 and num_replicas - 1, got {rank} of {num_replicas}")
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0
        self._fixed_place = None if num_replicas is None or rank is None else (num_replicas, rank)
        self._start = 0

    @property
    def place(self) -> tuple[int, int]:
        """World size and rank."""
        if self._fixed_place is not None:
            return self._fixed_place
        if dist.is_available() and dist.is_initialized():
            return dist.get_world_size(), dist.get_rank()
        return 1, 0

    def start_at(self, position: int) -> None:
        """Leave off the first ``position`` keys of this rank's share, in the next iteration only."""
        self._start = position

    def __iter__(self) -> Iterator[SampleKey]:
        # A generator: epoch and start are read at the first key, so set_epoch counts up to then.
        (world_size, rank), epoch = self.place, self.epoch
        start, self._start = self._start, 0
        if self.shuffle:
            order = torch.randperm(self.size, generator=_generator(b"order", self.seed, epoch))
        else:
            order = torch.arange(self.size)
        positions = torch.arange(rank, len(self) * world_size, world_size)[start:]
        indices = order[positions % self.size].tolist()
        padding = ((positions >= self.size) & (not self.shuffle)).tolist()
        for index, is_padding in zip(indices, padding, strict=True):
            yield SampleKey(index, epoch, is_padding)

    def __len__(self) -> int:
        world_size, _ = self.place
        return self.size // world_size if self.drop_last else -(-self.size // world_size)


def leave_finished_epoch(trainer: Trainer) -> None:
    """Let a Trainer that has restored its loops at the end of an epoch go on with the next one.

    Args:
        trainer: The Trainer, in the middle of restoring a checkpoint.
    """
    # Lightning 2.6 miscounts epochs when it resumes from a checkpoint of an epoch's very end, and then skips or repeats
    # batches: with max_steps it restarts inside the finished epoch and counts that twice; from the checkpoint of the
    # epoch's last batch it enters the next epoch without counting its start, so that a second resume goes wrong. What
    # it gets right is a run with max_epochs whose checkpoint was written after the epoch, so bring all to that form.
    fit_loop: Any = trainer.fit_loop
    epochs, batches = fit_loop.epoch_progress, fit_loop.epoch_loop.batch_progress
    done = batches.current.completed + 1 == batches.current.processed == batches.current.ready
    if done and batches.is_last_batch and epochs.current.processed + 1 == epochs.current.ready:
        epochs.increment_processed()
        batches.increment_completed()
        fit_loop.epoch_loop._batches_that_stepped += 1
    if epochs.current.ready == epochs.current.started == epochs.current.processed:
        loops = [fit_loop]
        for loop in loops:
            loop._restarting = False
            loops += [child for child in vars(loop).values() if hasattr(child, "_restarting")]


def estimated_steps(trainer: Trainer) -> int | float:
    """Return the optimizer steps of a fit, infinite where it has no end; for ``configure_optimizers``.

    Args:
        trainer: The Trainer of the module.
    """
    # Lightning 2.6 sets the training loader up to count its batches, which is before it restores a checkpoint, and does
    # not give it its place in the epoch later. A loader that was not there before is set up again at the run's start.
    fit_loop: Any = trainer.fit_loop
    is_set_up = fit_loop._combined_loader is not None
    steps = trainer.estimated_stepping_batches
    if not is_set_up:
        fit_loop._combined_loader = None
    return steps


@dataclass
class _Place:
    epoch: int
    batches: int  # handed out; worker processes are further ahead


class _Pass(Iterator[Any]):
    # One iteration of a loader. It starts at the first batch and not at iter(): Lightning creates the first iterator
    # of a run before it tells the sampler the epoch, and worker processes would fetch ahead from the wrong one.
    # The loader keeps the place and not the pass, so that dropping the pass ends its workers at once.

    def __init__(self, loader: ResumableLoader) -> None:
        self.loader = loader
        self.place: _Place | None = None
        self.batches: Iterator[Any] = iter(())

    def __next__(self) -> Any:
        if self.place is None:
            self.place, self.batches = self.loader._begin()
        batch = next(self.batches)
        self.place.batches += 1
        return batch


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` whose place in an epoch is kept in Lightning's checkpoints.

    Lightning saves ``state_dict()`` with its fit loop and gives it back before the first batch, so that a run killed
    in mid-epoch goes on with the batch after its newest checkpoint. The dataset gets a :class:`SampleKey` (or, in
    ``__getitems__``, a list of them) where it would get an index from a plain ``DataLoader``. ``len`` is always that
    of a whole epoch.

    In a loop without Lightning call ``loader.sampler.set_epoch(epoch)`` before each epoch.

    Args:
        dataset: Maps a ``SampleKey`` to a sample.
        batch_size: Samples that one process takes at a step.
        shuffle: Whether each epoch has a new random order. Where the ranks' shares are unequal, a shuffled loader
            repeats samples and an unshuffled one marks them as padding; see :class:`EpochSampler`.
        seed: Seed of the orders.
        drop_last: Whether to leave off the last, smaller batch.
        trainer: The Trainer that runs the loader, as in ``LightningDataModule.trainer``. With it a checkpoint that is
            written because a step failed repeats that step's batch; without it the batch is skipped.
        sampler: An :class:`EpochSampler` in place of the one that is built; Lightning passes it on rebuilding.
        batch_sampler: Batches of keys in place of those that are built; Lightning passes them on rebuilding.
        kwargs: Further arguments of ``DataLoader``: ``num_workers``, ``collate_fn``, ``pin_memory``, ...

    Raises:
        TypeError: ``sampler`` yields something else than sample keys.
        ValueError: The dataset is empty or, with ``drop_last``, smaller than a batch; ``batch_size`` is below 1.

    Examples:
        >>> class Squares(Dataset):
        ...     def __len__(self):
        ...         return 6
        ...     def __getitem__(self, key):
        ...         return key.index**2
        >>> loader = ResumableLoader(Squares(), batch_size=2)
        >>> batches = iter(loader)
        >>> next(batches)
        tensor([0, 1])
        >>> resumed = ResumableLoader(Squares(), batch_size=2)
        >>> resumed.load_state_dict(loader.state_dict())
        >>> list(resumed)
        [tensor([4, 9]), tensor([16, 25])]
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,  # by keyword: Trainer.predict cannot rebuild a loader with positional arguments
        batch_size: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        trainer: Trainer | None = None,
        sampler: Sampler[Any] | None = None,
        batch_sampler: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(dataset, Sized):
            raise TypeError(f"dataset must have a length, got {type(dataset).__name__}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {batch_size}")
        if batch_sampler is not None:
            super().__init__(dataset, batch_sampler=batch_sampler, **kwargs)
            keys = getattr(batch_sampler, "sampler", None)
        else:
            keys = sampler
            if sampler is None or isinstance(sampler, SequentialSampler):  # the latter for Trainer(overfit_batches=...)
                keys = EpochSampler(dataset, shuffle, seed, drop_last)
            super().__init__(dataset, batch_size=batch_size, sampler=keys, drop_last=drop_last, **kwargs)
        if not isinstance(keys, EpochSampler):
            raise TypeError(f"sampler must be an EpochSampler, got {type(keys).__name__}")
        if len(self) == 0:
            raise ValueError(
                f"batch_size must not exceed a process's {len(keys)} samples with drop_last, got {batch_size}"
            )
        self.shuffle = keys.shuffle  # under the arguments' names, from which Lightning rebuilds a loader
        self.seed = keys.seed
        self._keys = keys
        self._trainer = trainer
        self._current: _Place | None = None
        self._resume: dict[str, int] | None = None

    def __iter__(self) -> Any:
        return _Pass(self)

    def state_dict(self) -> dict[str, int]:
        """Return the place in the epoch, and what it depends on, as plain numbers."""
        if self._resume is not None:
            return dict(self._resume)
        place = self._current or _Place(self._keys.epoch, 0)
        batches = place.batches
        if self._trainer is not None:
            # A batch that was handed out to a step that then failed was not trained on.
            progress: Any = self._trainer.fit_loop.epoch_loop.batch_progress.current
            batches = min(batches, progress.processed)
        return {"epoch": place.epoch, "batches": batches, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next iteration start at a saved place, unless it is one of another epoch."""
        self._resume = dict(state_dict)
        self._keys.set_epoch(state_dict["epoch"])
        if self._trainer is not None:
            leave_finished_epoch(self._trainer)

    def _identity(self) -> dict[str, int]:
        return {
            "global_batch_size": self._keys.place[0] * self._batch_size,
            "dataset_size": self._keys.size,
            "seed": self._keys.seed,
            "shuffle": int(self._keys.shuffle),
        }

    @property
    def _batch_size(self) -> int:
        return self.batch_size or int(getattr(self.batch_sampler, "batch_size", 1))

    def _begin(self) -> tuple[_Place, Iterator[Any]]:
        place = _Place(self._keys.epoch, 0)
        if self._resume is not None and self._resume["epoch"] == place.epoch and self._resume["batches"]:
            for name, value in self._identity().items():
                if self._resume[name] != value:
                    raise ValueError(
                        f"a run can only be resumed in mid-epoch with its own {name}, got {value} instead of "
                        f"{self._resume[name]}; keep it or resume from a checkpoint of an epoch's end"
                    )
            place.batches = self._resume["batches"]
        self._resume = None
        self._current = place
        self._keys.start_at(place.batches * self._batch_size)
        return place, super().__iter__()
