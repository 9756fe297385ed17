"""Pack texts into rows of one length, each as if it were alone in its row.

A text's piece is written as ``[CLS] tokens [SEP]``, or, without a ``[CLS]``, as T5's ``tokens </s>``. With
`attention_mask_of` and `positions_of` a network attends within a piece only and counts its positions from 0, so that a
packed text gets the outputs that it gets alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor


class Packer:
    """Fill rows with texts in their order.

    A text that fits a row is not cut: where the rest of a row is too short, the next one begins. A longer text fills
    whatever is left.

    Args:
        length: Tokens of a row.
        begin: Token id before each piece, ``[CLS]``; ``None`` for none, as T5 has it.
        end: Token id after each piece, ``[SEP]``.
        padding: Token id of padding.

    Raises:
        ValueError: ``length`` leaves no room for a token.

    Examples:
        >>> rows = Packer(length=8, begin=1, end=2, padding=0)
        >>> tokens, documents = next(rows.pack([[10, 11], [12], [13, 14, 15, 16]]))
        >>> tokens.tolist()
        [[1, 10, 11, 2, 1, 12, 2, 0], [1, 13, 14, 15, 16, 2, 0, 0]]
        >>> documents.tolist()
        [[0, 0, 0, 0, 1, 1, 1, -1], [0, 0, 0, 0, 0, 0, -1, -1]]
    """

    def __init__(self, length: int, begin: int | None, end: int, padding: int) -> None:
        if length < 3:
            raise ValueError(f"length must be at least 3, for a token between [CLS] and [SEP], got {length}")
        self.length, self.end, self.padding = length, end, padding
        self.begin = [] if begin is None else [begin]

    def pack(self, texts: Iterable[Sequence[int]], rows_at_once: int = 4096) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield tokens (R, L) and the number of each token's text in its row (R, L), -1 for padding."""
        rows: list[list[Sequence[int]]] = []
        left, extra = 0, len(self.begin) + 1
        for text in texts:
            rest = text
            while len(rest):
                if len(rest) + extra > left and (len(text) + extra <= self.length or left <= extra):
                    if len(rows) == rows_at_once:
                        yield self._write(rows)
                        rows = []
                    rows.append([])
                    left = self.length
                piece, rest = rest[: left - extra], rest[left - extra :]
                rows[-1].append(piece)
                left -= len(piece) + extra
        if rows:
            yield self._write(rows)

    def _write(self, rows: list[list[Sequence[int]]]) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.full((len(rows), self.length), self.padding, np.int32)
        documents = np.full((len(rows), self.length), -1, np.int16)
        for row, pieces in enumerate(rows):
            place = 0
            for number, piece in enumerate(pieces):
                written = [*self.begin, *piece, self.end]
                stop = place + len(written)
                tokens[row, place:stop] = written
                documents[row, place:stop] = number
                place = stop
        return tokens, documents


def positions_of(documents: Tensor) -> Tensor:
    """Return the position of each token in its text (B, L), from the number of its text in its row (B, L)."""
    place = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    opens = torch.ones_like(documents, dtype=torch.bool)
    opens[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return place - torch.where(opens, place, 0).cummax(dim=1).values


def attention_mask_of(documents: Tensor) -> Tensor:
    """Return which tokens each one attends to, those of its own text (B, 1, L, L)."""
    return documents[:, None, :, None] == documents[:, None, None, :]
