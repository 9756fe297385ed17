"""T5's form of a masked batch: each chosen span gives way to a sentinel, and the target spells the spans out."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from lightning_iclr.pmi_masking.batches import DOCUMENTS, Rows


def find_sentinels(tokenizer: Any) -> np.ndarray:
    """Return the ids of a tokenizer's sentinels ``<extra_id_0>``, ``<extra_id_1>``, ... in this order (S,).

    Raises:
        ValueError: It has none.
    """
    numbers = {}
    for token, number in tokenizer.get_vocab().items():
        match = re.fullmatch(r"<extra_id_(\d+)>", token)
        if match:
            numbers[int(match[1])] = number
    if not numbers:
        raise ValueError(f"tokenizer must have sentinels <extra_id_0>, ..., and {type(tokenizer).__name__} has none")
    return np.array([numbers[key] for key in sorted(numbers)])


def sentinel_batch(
    rows: Rows, taken: np.ndarray, sentinels: np.ndarray, eos: int | None, padding: int
) -> dict[str, Any]:
    """Return input and target (Raffel et al., JMLR 2020, figure 2), which together spell the rows.

    The target is sentinel, span, sentinel, span, ..., a last sentinel, and the end of sequence. Spans without a token
    between them are one.

    Args:
        rows: The batch.
        taken: Which tokens are in chosen units (B, L).
        sentinels: Their token ids, in the order of use (S,).
        eos: Token id that ends a target; ``None`` for none.
        padding: Token id of padding.

    Raises:
        ValueError: A row has more spans than there are sentinels to tell them apart and to end with.
    """
    before = np.zeros_like(taken)
    before[:, 1:] = taken[:, :-1]
    if rows.documents is not None:
        before[:, 1:] &= rows.documents[:, 1:] == rows.documents[:, :-1]
    opens = taken & ~before
    spans = opens.sum(axis=1)
    if len(spans) and spans.max() + 1 > len(sentinels):
        raise ValueError(
            f"tokenizer has {len(sentinels)} sentinels, and a row has {spans.max()} spans, which need one more than "
            "that; shorten the rows, or lower mlm_probability"
        )
    which = np.cumsum(opens, axis=1) - 1
    filled = np.asarray(rows.rest["attention_mask"]).astype(bool)
    keep = filled & (~taken | opens)
    tokens = np.where(opens, sentinels[np.maximum(which, 0)], rows.tokens)
    batch: dict[str, Any] = {"input_ids": _compact(tokens, keep, padding)}
    for name, values in rows.rest.items():
        aligned = isinstance(values, np.ndarray) and values.shape == keep.shape
        batch[name] = _compact(values, keep, 0) if aligned else values

    row, column = np.nonzero(taken)
    repeats = 1 + opens[row, column].astype(np.int64)
    ends = np.cumsum(repeats)
    target = np.repeat(rows.tokens[row, column], repeats)
    target[ends[repeats == 2] - 2] = sentinels[which[row, column]][repeats == 2]
    lengths = np.bincount(row, weights=repeats, minlength=len(taken)).astype(np.int64)
    labels = np.full((len(taken), int(lengths.max(initial=0)) + 1 + (eos is not None)), -100, np.int64)
    labels[np.arange(labels.shape[1]) < lengths[:, None]] = target
    everyone = np.arange(len(taken))
    labels[everyone, lengths] = sentinels[spans]
    if eos is not None:
        labels[everyone, lengths + 1] = eos
    batch["labels"] = labels
    batch.pop(DOCUMENTS, None)
    return batch


def _compact(values: np.ndarray, keep: np.ndarray, padding: int) -> np.ndarray:
    lengths = keep.sum(axis=1)
    out = np.full((len(keep), int(lengths.max(initial=0))), padding, values.dtype)
    out[np.arange(out.shape[1]) < lengths[:, None]] = values[keep]
    return out
