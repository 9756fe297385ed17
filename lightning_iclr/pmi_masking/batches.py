"""From examples to the rows of a batch: padding, what may be masked, and what rows draw from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_iclr.pmi_masking.draws import RowDraws, row_keys

ROW_ID, EPOCH, DOCUMENTS = "row_id", "epoch", "document_ids"


@dataclass(frozen=True)
class Rows:
    """Rows of tokens that are to be masked.

    Attributes:
        tokens: Token ids (B, L).
        usable: Which may be masked (B, L).
        documents: Number of the document of each token (B, L), or ``None``: no unit crosses from one to the next.
        draws: What the rows' random numbers come from.
        rest: All other keys of the batch, and ``attention_mask``.
        epochs: Epoch of each row (B,), or ``None``.
        lead: Padding on the left of each row (B,), or ``None`` where there is none.
    """

    tokens: np.ndarray
    usable: np.ndarray
    documents: np.ndarray | None
    draws: RowDraws
    rest: dict[str, Any]
    epochs: np.ndarray | None = None
    lead: np.ndarray | None = None

    def at(self, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the row of each place in the flattened rows (N,), and which of the row's tokens it is (N,).

        That does not count padding on the left, whose width depends on the other rows, so it is a place to draw from.
        """
        row, column = np.divmod(place, self.tokens.shape[1])
        return row, column if self.lead is None else column - self.lead[row]


def make_rows(examples: Any, tokenizer: Any, special: np.ndarray, seed: int, multiple: int | None) -> Rows:
    """Pad examples to one length and look up what may be masked.

    Args:
        examples: Mappings with ``input_ids`` and any other keys, sequences of token ids, or one mapping of tensors that
            are batched already. Where they have ``row_id`` and ``epoch``, a row's random numbers depend on these and
            the seed alone; else they come from torch's generator.
        tokenizer: Tells the padding.
        special: Which token ids are special (V,).
        seed: Seed of the run.
        multiple: What the length is rounded up to a multiple of.

    Raises:
        ValueError: There is no example or no ``input_ids``, or a token id is not the tokenizer's.
    """
    columns = _columns(examples)
    if "input_ids" not in columns:
        raise ValueError(f"examples must have input_ids, got {', '.join(columns)}")
    ids = columns.pop("input_ids")
    flat, lengths = _flat(ids)
    width = -(-int(lengths.max(initial=0)) // multiple) * multiple if multiple else int(lengths.max(initial=0))
    place = np.arange(width)
    filled = place >= (width - lengths)[:, None] if tokenizer.padding_side == "left" else place < lengths[:, None]
    if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < len(special):
        raise ValueError(
            f"input_ids must be this tokenizer's, from 0 to {len(special) - 1}, got {int(flat.min())} to "
            f"{int(flat.max())}"
        )
    tokens = _padded(flat, filled, tokenizer.pad_token_id or 0)
    rest: dict[str, Any] = {}
    for name, values in columns.items():
        rest[name] = _column(values, lengths, filled, tokenizer.pad_token_type_id if name == "token_type_ids" else 0)
    attention = rest.setdefault("attention_mask", filled.astype(np.int64))
    if not isinstance(attention, np.ndarray):
        raise ValueError("attention_mask must have a number for each token of input_ids, and its rows have others")
    if attention.ndim == 2:
        filled = filled & attention.astype(bool)
    lead = None if filled[:, :1].all() else filled.argmax(axis=1)
    usable = filled & ~special[tokens]
    if "special_tokens_mask" in rest:
        usable &= ~rest.pop("special_tokens_mask").astype(bool)
    row, epoch = rest.pop(ROW_ID, None), rest.pop(EPOCH, None)
    if row is None:
        keys = torch.randint(2**63 - 1, (len(lengths),)).numpy()
    else:
        keys = row_keys(seed, np.zeros(len(lengths), np.int64) if epoch is None else epoch, row)
    return Rows(tokens, usable, rest.get(DOCUMENTS), RowDraws(keys), rest, epoch, lead)


def to_tensors(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch with tensors in place of arrays; what is neither number nor token stays a list."""
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()}


def _columns(examples: Any) -> dict[str, Any]:
    if isinstance(examples, Mapping):
        return dict(examples)
    examples = list(examples)
    if not examples:
        raise ValueError("examples must be at least one, got none")
    if not isinstance(examples[0], Mapping):
        return {"input_ids": examples}
    names = examples[0].keys()
    for number, example in enumerate(examples):
        if example.keys() != names:
            raise ValueError(f"examples must have the same keys, got {list(names)} and, at {number}, {list(example)}")
    return {name: [example[name] for example in examples] for name in names}


def _flat(values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of all rows, one after the other, and how many each has."""
    if isinstance(values, (np.ndarray, Tensor)):
        array = np.asarray(values)
        return array.reshape(-1).astype(np.int64, copy=False), np.full(len(array), array.shape[1])
    lengths = np.fromiter(map(len, values), np.int64, len(values))
    if isinstance(values[0], (np.ndarray, Tensor)):
        return np.concatenate([np.asarray(value) for value in values]).astype(np.int64, copy=False), lengths
    return np.fromiter(chain.from_iterable(values), np.int64, int(lengths.sum())), lengths


def _padded(flat: np.ndarray, filled: np.ndarray, padding: int) -> np.ndarray:
    shape = (*filled.shape, *flat.shape[1:])
    if len(flat) == filled.size:
        return flat.reshape(shape).copy()
    padded = np.full(shape, padding, flat.dtype)
    padded[filled] = flat
    return padded


def _column(values: Any, lengths: np.ndarray, filled: np.ndarray, padding: int) -> Any:
    if isinstance(values, (np.ndarray, Tensor)):
        array = np.asarray(values)
        if array.ndim < 2 or array.shape[1] == filled.shape[1] or (lengths != array.shape[1]).any():
            return array
        return _padded(array.reshape(-1, *array.shape[2:]), filled, padding)
    try:
        if _are_rows(values, lengths):
            parts = [np.asarray(value) for value in values if len(value)]
            array = _padded(np.concatenate(parts) if parts else np.empty(0, np.int64), filled, padding)
        else:
            array = np.asarray([np.asarray(value) for value in values])
    except ValueError:  # of different shapes
        return values
    return array if array.dtype.kind in "biuf" else values


def _are_rows(values: Iterable[Any], lengths: np.ndarray) -> bool:
    return all(
        isinstance(value, (Sequence, np.ndarray, Tensor))
        and not isinstance(value, str)
        and getattr(value, "ndim", 1) > 0
        and len(value) == length
        for value, length in zip(values, lengths, strict=True)
    )
