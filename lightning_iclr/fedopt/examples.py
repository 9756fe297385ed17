"""Serve encoded rows a batch at a time, with random draws that belong to (seed, epoch, example) alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_iclr.fedopt.encoders import Columns, Expanded
from lightning_iclr.sampling import SampleKey, sample_generator

if TYPE_CHECKING:  # importing datasets takes over a second
    from datasets import Dataset as Table

Batch = tuple[Tensor, ...]
Encode = Callable[[Columns], Batch | Expanded]
PADDING = -100  # target of rows that only fill up a process's last batch; losses and metrics ignore it
_ROWS_AT_ONCE = 2_000


class Source(Protocol):
    """Encoded rows of a table, and where each row's examples are."""

    @property
    def starts(self) -> np.ndarray | None:
        """First example of each row, and their number at the end; ``None`` where a row is an example."""

    def __len__(self) -> int: ...

    def read(self, examples: Tensor) -> Batch:
        """Return encoded examples (B, ...)."""


@dataclass(frozen=True)
class InMemory:
    """Rows that were encoded once."""

    tensors: Batch
    starts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tensors[0])

    def read(self, examples: Tensor) -> Batch:
        return tuple(tensor[examples] for tensor in self.tensors)


@dataclass(frozen=True)
class OnDemand:
    """Rows that are encoded in each batch anew."""

    table: Table
    rows: np.ndarray
    encode: Encode
    starts = None

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, examples: Tensor) -> Batch:
        return _as_rows(self.encode(self.table[self.rows[examples.numpy()]]))


def encode_rows(table: Table, rows: np.ndarray, encode: Encode, in_memory: bool) -> Source:
    """Encode some rows of a table, now or on demand.

    Raises:
        ValueError: There are no rows, or the encoder returns another number of entries than rows.
    """
    if len(rows) == 0:
        raise ValueError("there are no rows to encode")
    table = _readable(table, encode)
    if not in_memory:
        return OnDemand(table, rows, encode)
    parts, counts = [], []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        own = rows[start : start + _ROWS_AT_ONCE]
        together = own[-1] - own[0] + 1 == len(own)
        encoded = encode(table[int(own[0]) : int(own[-1]) + 1] if together else table[own])
        if isinstance(encoded, Expanded):
            counts.append(torch.bincount(encoded.rows, minlength=len(own)).numpy())
            encoded = encoded.tensors
        elif any(len(tensor) != len(own) for tensor in encoded):
            raise ValueError(f"encode must return one entry a row, got {len(encoded[0])} for {len(own)} rows")
        parts.append(encoded)
    tensors = tuple(torch.cat(column) for column in zip(*parts, strict=True))
    starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))]) if counts else None
    return InMemory(tensors, starts)


def examples_of(rows: np.ndarray, source: Source) -> np.ndarray:
    """Return the examples that come from some rows of a source, in the rows' order."""
    if source.starts is None:
        return rows
    first = source.starts[rows]
    counts = source.starts[rows + 1] - first
    before = np.cumsum(counts) - counts
    examples: np.ndarray = np.repeat(first - before, counts) + np.arange(counts.sum())
    return examples


def rows_of(examples: np.ndarray, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Return the row of a source that each example comes from, and its number among that row's examples."""
    if source.starts is None:
        return examples, np.zeros_like(examples)
    rows: np.ndarray = np.searchsorted(source.starts, examples, side="right") - 1
    return rows, examples - source.starts[rows]


class FederatedExamples(Dataset[Batch]):
    """Encoded examples as a map-style dataset; ``dataset[i]`` is ``(inputs, targets)`` of one.

    `FederatedLoader` and `ResumableLoader` ask it for a `SampleKey`; a plain index is one of epoch 0. A list of keys,
    in ``__getitems__``, gives a whole batch, which needs no further collation (see `whole_batch`).

    Args:
        source: The encoded rows.
        encode: What encoded them.
        examples: The source's examples to serve, in order; ``None`` for all.
        seed: Seed of the augmentation.
        training: Whether examples are augmented.
        serve_positions: Whether to serve each example's position here in place of its targets.
    """

    takes_sample_keys = True

    def __init__(
        self,
        source: Source,
        encode: Encode,
        examples: np.ndarray | None = None,
        *,
        seed: int = 0,
        training: bool = False,
        serve_positions: bool = False,
    ) -> None:
        self.source, self.encode = source, encode
        self.examples = None if examples is None else torch.from_numpy(np.asarray(examples, dtype=np.int64))
        self.seed, self.serve_positions = seed, serve_positions
        self._serve = getattr(encode, "serve", None)
        self._augments = training and self._serve is not None and getattr(encode, "augments", True)

    def __len__(self) -> int:
        return len(self.source) if self.examples is None else len(self.examples)

    def __getitem__(self, key: SampleKey | int) -> Batch:
        return tuple(tensor[0] for tensor in self.__getitems__([key]))

    def __getitems__(self, keys: Sequence[SampleKey | int]) -> Batch:
        full = [key if isinstance(key, SampleKey) else SampleKey(int(key), 0, False) for key in keys]
        positions = torch.tensor([key.index for key in full])
        batch = self.source.read(positions if self.examples is None else self.examples[positions])
        if self._serve is not None:
            generators = [sample_generator(self.seed, key.epoch, key.index) for key in full] if self._augments else None
            batch = self._serve(batch, generators)
        padding = torch.tensor([key.padding for key in full]) if any(key.padding for key in full) else None
        if self.serve_positions:
            return (*batch[:-1], positions if padding is None else positions.masked_fill(padding, -1))
        if padding is not None:
            targets = batch[-1].clone()  # which may share its memory with the inputs
            targets[padding] = PADDING
            batch = (*batch[:-1], targets)
        return batch


def whole_batch(batch: Any) -> Any:
    """Return a batch as it is: what `FederatedExamples` serves is collated already."""
    return batch


def _readable(table: Table, encode: Encode) -> Table:
    from datasets import Array2D, Array3D

    columns = getattr(encode, "columns", None)
    if columns is not None:
        table = table.select_columns(list(dict.fromkeys(columns.values())))
    arrays = any(isinstance(feature, Array2D | Array3D) for feature in table.features.values())
    return table.with_format("numpy" if arrays else None)  # plain lists of arrays are slow


def _as_rows(encoded: Batch | Expanded) -> Batch:
    if isinstance(encoded, Expanded):
        raise ValueError("in_memory=false needs one example a row, and this encoder makes several; set in_memory")
    return encoded
