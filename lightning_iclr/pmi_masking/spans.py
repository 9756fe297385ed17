"""Random spans of whole words: SpanBERT's masking (Joshi et al., TACL 2020, section 3.1), a baseline of the paper."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from lightning_iclr.pmi_masking.batches import Rows
from lightning_iclr.pmi_masking.collator import Selection, SpanMaskingCollator
from lightning_iclr.pmi_masking.segmentation import smallest
from lightning_iclr.pmi_masking.words import TokenWords, WordSplitter

_LOOK = 8  # proposals between two looks at whether any word still fits


def span_lengths(uniform: np.ndarray, p: float, max_words: int, beyond: Literal["truncate", "clip"]) -> np.ndarray:
    """Return lengths in words of a geometric distribution, from numbers in [0, 1).

    Args:
        uniform: Random numbers.
        p: Chance that a span ends at a word.
        max_words: Greatest length.
        beyond: Whether longer ones are left out, as SpanBERT's code does (mean 3.797 for 0.2 and 10), or cut to it
            (mean 4.463).
    """
    share = (1 - p) ** np.arange(max_words)  # of lengths above 0, 1, ...
    below = 1 - share * (1 - p)  # cumulative, of lengths 1, 2, ...
    if beyond == "truncate":
        below = below / below[-1]
    lengths: np.ndarray = np.minimum(np.searchsorted(below, uniform, side="right") + 1, max_words)
    return lengths


class RandomSpanCollator(SpanMaskingCollator):
    """Mask spans of words at random places.

    A span begins at the word of a random token, which favours long words as in SpanBERT's code, and has a geometric
    number of words; it ends before a word that is taken, a special token or the end of the text. The last one is
    shortened to the words that the budget allows; where none does, another is drawn. SpanBERT cuts it in mid-word, and
    takes adjacent spans for one.

    Args:
        tokenizer: See `SpanMaskingCollator`.
        p: Chance that a span ends at a word.
        max_words: Greatest length.
        beyond: Whether longer lengths are left out of the distribution, or cut to the greatest.
        kwargs: Further arguments of `SpanMaskingCollator`.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        p: float = 0.2,
        max_words: int = 10,
        beyond: Literal["truncate", "clip"] = "truncate",
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, **kwargs)
        if not 0.0 < p <= 1.0:
            raise ValueError(f"p must be in (0, 1], got {p}")
        if max_words < 1:
            raise ValueError(f"max_words must be at least 1, got {max_words}")
        if beyond not in ("truncate", "clip"):
            raise ValueError(f"beyond must be 'truncate' or 'clip', got {beyond!r}")
        self.p, self.max_words, self.beyond = p, max_words, beyond
        self.words = TokenWords(tokenizer, WordSplitter())

    def select(self, rows: Rows, budgets: np.ndarray) -> Selection:
        """Draw spans, one in each unfinished row at a time."""
        words = self.words.read(rows.tokens, rows.usable, rows.documents)
        group = np.cumsum(words.unit_begins) - 1  # of each token
        begins = np.flatnonzero(words.unit_begins)
        sizes = np.diff(begins, append=len(group))
        run = np.cumsum(~words.adjacent)[begins]
        row = words.place[begins] // rows.tokens.shape[1]
        tokens = rows.usable.sum(axis=1)
        first_token = np.cumsum(tokens) - tokens
        span = np.full(len(begins), -1, np.int64)
        left = budgets.copy()
        active = np.flatnonzero(left)
        ahead = np.arange(self.max_words)
        number = 0
        while len(active):
            turn = np.full(len(active), number)
            anchor = rows.draws.bits("anchor", active, turn) * tokens[active].astype(np.uint64) >> np.uint64(32)
            start = group[first_token[active] + anchor.astype(np.int64)]
            length = span_lengths(rows.draws.uniform("length", active, turn), self.p, self.max_words, self.beyond)
            reached = np.minimum(start[:, None] + ahead, len(begins) - 1)
            goes_on = (start[:, None] + ahead < len(begins)) & (ahead < length[:, None])
            goes_on &= (run[reached] == run[start][:, None]) & (span[reached] < 0)
            goes_on = np.logical_and.accumulate(goes_on, axis=1)
            spent = np.cumsum(np.where(goes_on, sizes[reached], 0), axis=1)
            goes_on &= spent <= left[active][:, None]
            span[reached[goes_on]] = number
            left[active] -= np.where(goes_on, sizes[reached], 0).sum(axis=1)
            active = active[left[active] > 0]
            number += 1
            if number % _LOOK == 0 and len(active):
                fits = np.zeros(len(left), bool)
                fits[row[(span < 0) & (sizes <= left[row])]] = True
                active = active[fits[active]]
        _, column = rows.at(words.place[begins])
        alone = smallest(row, sizes, budgets, span >= 0, rows.draws.bits("priority", row, column))
        span[alone] = number
        chosen = span >= 0
        opens = np.diff(run, prepend=-1) != 0
        opens |= ~chosen | np.concatenate([[True], span[1:] != span[:-1]])
        unit = np.cumsum(opens) - 1
        return Selection(words.place, unit[group], chosen[opens])
