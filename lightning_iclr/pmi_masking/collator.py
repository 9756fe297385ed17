"""Collators that mask whole units: n-grams of a vocabulary, words, random spans or single tokens.

All draw units until the same share of a row's tokens is spent, and replace a chosen unit as BERT does a token: by masks
in 80 % of cases, by random tokens in 10 %, and by itself in 10 % (section 4.1 of the paper). No loop goes over rows or
tokens. Shapes: B rows, L tokens, N tokens that may be masked, U units.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lightning_iclr.pmi_masking.batches import EPOCH, Rows, make_rows, to_tensors
from lightning_iclr.pmi_masking.segmentation import choose, disjoint, maximal, merge
from lightning_iclr.pmi_masking.sentinels import find_sentinels, sentinel_batch
from lightning_iclr.pmi_masking.spelling import special_ids
from lightning_iclr.pmi_masking.vocabulary import MaskingVocabulary
from lightning_iclr.pmi_masking.words import TokenWords, Words, WordSplitter


@dataclass(frozen=True)
class Selection:
    """What is masked in a batch.

    Attributes:
        place: Place of each token that may be masked in the flattened rows (N,), ascending.
        unit: Number of its unit (N,), ascending.
        chosen: Which units are masked (U,).
    """

    place: np.ndarray
    unit: np.ndarray
    chosen: np.ndarray


class SpanMaskingCollator(ABC):
    """Make a batch for masked language modelling of tokenized examples: the interface of all maskings.

    A subclass says which units there are, or which are chosen. Examples are mappings with ``input_ids`` (as lists,
    arrays or tensors), of which every other key is kept, or sequences of token ids. Examples with a ``row_id``, and an
    ``epoch``, are masked by (seed, epoch, row id) alone, in whatever batch, process or worker; others by torch's
    generator.

    Args:
        tokenizer: A tokenizer of ``transformers`` with a mask token.
        mlm_probability: Share of a row's tokens that is predicted, in (0, 1], or a function of the epoch that returns
            it.
        mask_replace_prob: Chance that a chosen unit becomes masks.
        random_replace_prob: Chance that it becomes random tokens, one drawn for each of its tokens; else it stays.
        pad_to_multiple_of: What the length of a batch is rounded up to a multiple of.
        seed: Seed of the masks of examples with a ``row_id``.
        denoising: What stands for chosen units: BERT's ``mask``, or T5's ``sentinels`` instead of whole spans, without
            80/10/10; then the target spells the spans out.
        return_unit_ids: Whether the batch has ``unit_ids`` (B, L): the number of each token's unit in its row, -1 where
            nothing may be masked; not with sentinels.

    Raises:
        ValueError: The tokenizer has no mask token, or no sentinels, or a number is outside its range.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        mlm_probability: float | Callable[[int], float] = 0.15,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
        pad_to_multiple_of: int | None = None,
        seed: int = 0,
        denoising: Literal["mask", "sentinels"] = "mask",
        return_unit_ids: bool = False,
    ) -> None:
        if denoising not in ("mask", "sentinels"):
            raise ValueError(f"denoising must be 'mask' or 'sentinels', got {denoising!r}")
        if denoising == "sentinels" and return_unit_ids:
            raise ValueError("return_unit_ids must be False with denoising='sentinels', which moves tokens, got True")
        if denoising == "mask" and getattr(tokenizer, "mask_token_id", None) is None:
            raise ValueError(f"tokenizer must have a mask token, and {type(tokenizer).__name__} has none")
        if not callable(mlm_probability):
            _check_probability(mlm_probability)
        for name, number in (("mask_replace_prob", mask_replace_prob), ("random_replace_prob", random_replace_prob)):
            if not 0.0 <= number <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {number}")
        if mask_replace_prob + random_replace_prob > 1.0 + 1e-9:
            raise ValueError(
                "mask_replace_prob and random_replace_prob must not add up to more than 1, got "
                f"{mask_replace_prob} and {random_replace_prob}"
            )
        self.tokenizer, self.mlm_probability = tokenizer, mlm_probability
        self.mask_replace_prob, self.random_replace_prob = mask_replace_prob, random_replace_prob
        self.pad_to_multiple_of, self.seed, self.return_unit_ids = pad_to_multiple_of, seed, return_unit_ids
        self.sentinels = find_sentinels(tokenizer) if denoising == "sentinels" else None
        self.special = np.zeros(len(tokenizer), bool)
        self.special[special_ids(tokenizer)] = True
        self._ordinary = np.flatnonzero(~self.special)

    @abstractmethod
    def select(self, rows: Rows, budgets: np.ndarray) -> Selection:
        """Choose what is masked.

        Args:
            rows: The batch.
            budgets: Tokens to choose in each row (B,).
        """

    def __call__(self, examples: Any) -> dict[str, Any]:
        """Return ``input_ids``, ``labels`` (-100 where nothing is predicted), ``attention_mask`` and all other keys."""
        rows, selection = self.plan(examples)
        if self.sentinels is None:
            return to_tensors(self._masked(rows, selection))
        taken = np.zeros(rows.tokens.shape, bool)
        taken.reshape(-1)[selection.place] = selection.chosen[selection.unit]
        eos, padding = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id or 0
        return to_tensors(sentinel_batch(rows, taken, self.sentinels, eos, padding))

    def plan(self, examples: Any) -> tuple[Rows, Selection]:
        """Return the rows of a batch and what is to be masked in them."""
        rows = make_rows(examples, self.tokenizer, self.special, self.seed, self.pad_to_multiple_of)
        probability = self._probability(rows.epochs)
        tokens = rows.usable.sum(axis=1)
        budgets = np.where(tokens > 0, np.maximum(1, np.rint(probability * tokens)), 0).astype(np.int64)
        return rows, self.select(rows, budgets)

    def _masked(self, rows: Rows, selection: Selection) -> dict[str, Any]:
        tokens = rows.tokens
        labels = np.full(tokens.shape, -100, np.int64)
        taken = selection.chosen[selection.unit]
        place, unit = selection.place[taken], selection.unit[taken]
        labels.reshape(-1)[place] = tokens.reshape(-1)[place]
        row, column = rows.at(place)
        opens = np.diff(unit, prepend=-1) != 0
        first = np.flatnonzero(opens)[np.cumsum(opens) - 1] if len(unit) else unit
        action = rows.draws.uniform("action", row, column[first])  # the same for all of a unit
        masked = action < self.mask_replace_prob
        swapped = ~masked & (action < self.mask_replace_prob + self.random_replace_prob)
        flat = tokens.reshape(-1)
        flat[place[masked]] = self.tokenizer.mask_token_id
        draw = rows.draws.bits("token", row[swapped], column[swapped])
        flat[place[swapped]] = self._ordinary[(draw * np.uint64(len(self._ordinary)) >> np.uint64(32)).astype(np.int64)]
        batch = {**rows.rest, "input_ids": tokens, "labels": labels}
        if self.return_unit_ids:
            batch["unit_ids"] = unit_ids(rows, selection)
        return batch

    def _probability(self, epochs: np.ndarray | None) -> float | np.ndarray:
        if not callable(self.mlm_probability):
            return self.mlm_probability
        if epochs is None:
            raise ValueError(f"mlm_probability is a function of the epoch, and the examples have no key {EPOCH!r}")
        distinct, which = np.unique(epochs, return_inverse=True)  # one, as a rule
        probabilities = [self.mlm_probability(int(epoch)) for epoch in distinct]
        for probability in probabilities:
            _check_probability(probability)
        return np.array(probabilities)[which]


@dataclass(frozen=True)
class LinearProbability:
    """A ``mlm_probability`` that goes from one share to another in equal steps, epoch by epoch, and stays there.

    Validation and test rows are masked as in the first epoch.

    Args:
        start: Share in the first epoch.
        end: Share after ``epochs`` epochs.
        epochs: Epochs from the one to the other.

    Raises:
        ValueError: A share is not in (0, 1], or ``epochs`` is below 1.

    Examples:
        >>> schedule = LinearProbability(start=0.3, end=0.15, epochs=3)
        >>> [round(schedule(epoch), 2) for epoch in range(5)]
        [0.3, 0.25, 0.2, 0.15, 0.15]
    """

    start: float
    end: float
    epochs: int

    def __post_init__(self) -> None:
        for name, share in (("start", self.start), ("end", self.end)):
            if not 0.0 < share <= 1.0:
                raise ValueError(f"{name} must be in (0, 1], got {share}")
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")

    def __call__(self, epoch: int) -> float:
        """Return the share in an epoch, from 0."""
        return self.start + (self.end - self.start) * min(epoch / self.epochs, 1.0)


class RandomTokenCollator(SpanMaskingCollator):
    """Mask single tokens: BERT's first masking, with an exact share."""

    def select(self, rows: Rows, budgets: np.ndarray) -> Selection:
        """Choose tokens."""
        place = np.flatnonzero(rows.usable)
        if not len(place):
            return Selection(place, place, np.zeros(0, bool))
        row, column = rows.at(place)
        # The tokens with the smallest numbers of a row; its columns make them distinct.
        bits = max(1, rows.tokens.shape[1].bit_length())
        numbers = rows.draws.bits("priority", row, column) << np.uint64(bits) | column.astype(np.uint64)
        table = np.full(rows.tokens.shape, np.iinfo(np.uint64).max, np.uint64)
        table.reshape(-1)[place] = numbers
        table.sort(axis=1)
        limit = table[np.arange(len(table)), np.maximum(budgets - 1, 0)]
        return Selection(place, np.arange(len(place)), (numbers <= limit[row]) & (budgets[row] > 0))


class _UnitCollator(SpanMaskingCollator):
    """Choose among units that do not depend on which are chosen."""

    words: TokenWords

    @abstractmethod
    def units(self, rows: Rows, words: Words) -> np.ndarray:
        """Return the number of the unit of each token that may be masked (N,), ascending from 0."""

    def select(self, rows: Rows, budgets: np.ndarray) -> Selection:
        """Choose units."""
        words = self.words.read(rows.tokens, rows.usable, rows.documents)
        unit = self.units(rows, words)
        begins = np.flatnonzero(np.diff(unit, prepend=-1))
        row, column = rows.at(words.place[begins])
        sizes = np.diff(begins, append=len(unit))
        chosen = choose(row, sizes, budgets, rows.draws.bits("priority", row, column))
        return Selection(words.place, unit, chosen)


class WholeWordCollator(_UnitCollator):
    """Mask whole words, whatever tokens they are made of.

    Args:
        tokenizer: See `SpanMaskingCollator`.
        kwargs: Its further arguments.
    """

    def __init__(self, tokenizer: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, **kwargs)
        self.words = TokenWords(tokenizer, WordSplitter())

    def units(self, rows: Rows, words: Words) -> np.ndarray:
        """Return the words."""
        unit: np.ndarray = np.cumsum(words.unit_begins) - 1
        return unit


class PMIMaskingCollator(_UnitCollator):
    """Mask the n-grams of a vocabulary, and all other words, as units (section 3.4 of the paper).

    Of two n-grams in a text the one that contains the other is the unit. Of several that overlap otherwise one after
    the other is drawn at random, and stays where it is disjoint from those that stayed; the words of the others are
    units of their own. With a vocabulary by Naive-PMI or by frequency this is the paper's baseline of that name.

    Args:
        tokenizer: See `SpanMaskingCollator`.
        vocabulary: The n-grams, or the path of their file; ``None`` where a data module is to give those that it loads
            or builds.
        kwargs: Further arguments of `SpanMaskingCollator`.
    """

    def __init__(self, tokenizer: Any, vocabulary: MaskingVocabulary | str | None = None, **kwargs: Any) -> None:
        super().__init__(tokenizer, **kwargs)
        self.vocabulary: MaskingVocabulary | None = None
        if vocabulary is not None:
            self.set_vocabulary(vocabulary)

    def set_vocabulary(self, vocabulary: MaskingVocabulary | str) -> None:
        """Take the n-grams, or the path of their file."""
        if not isinstance(vocabulary, MaskingVocabulary):
            vocabulary = MaskingVocabulary.from_file(vocabulary)
        self.vocabulary = vocabulary
        self.matcher = vocabulary.compile(self.tokenizer)
        self.words = self.matcher.tokens

    def select(self, rows: Rows, budgets: np.ndarray) -> Selection:
        """Choose units."""
        if self.vocabulary is None:
            raise ValueError("vocabulary must be given, or set by set_vocabulary, before a batch is masked, got None")
        return super().select(rows, budgets)

    def units(self, rows: Rows, words: Words) -> np.ndarray:
        """Return n-grams and words."""
        group = np.cumsum(words.unit_begins) - 1
        begins, ends = maximal(self.matcher.ends(words))
        row, column = rows.at(words.place[words.unit_begins][begins])
        stays = disjoint(begins, ends, rows.draws.bits("overlap", row, column))
        size = int(group[-1]) + 1 if len(group) else 0
        unit: np.ndarray = merge(size, begins[stays], ends[stays])[group]
        return unit


def unit_ids(rows: Rows, selection: Selection) -> np.ndarray:
    """Return the number of each token's unit in its row (B, L), -1 where nothing may be masked."""
    width = rows.tokens.shape[1]
    ids = np.full(rows.tokens.shape, -1, np.int64)
    row = selection.place // width
    begins = np.flatnonzero(np.diff(row, prepend=-1))
    first = np.repeat(selection.unit[begins], np.diff(begins, append=len(row)))
    ids.reshape(-1)[selection.place] = selection.unit - first
    return ids


def units_by_length(collator: SpanMaskingCollator, examples: Any, longest: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Return how many units of 1, 2, ... tokens there are in a batch, and how many are chosen, each (``longest``,).

    Their ratio is the rate at which units are chosen. A unit that exceeds the rest of the budget is passed over, so it
    is below ``mlm_probability`` for long units and above it for single tokens, the more so the shorter the rows.
    `RandomSpanCollator` has no units but those that it chooses, and the words between them.

    Args:
        collator: A masking.
        examples: A batch of it.
        longest: Tokens of the last length, which includes all longer ones.
    """
    _, selection = collator.plan(examples)
    kinds = np.minimum(np.bincount(selection.unit), longest)
    there, chosen = (np.bincount(own, minlength=longest + 1)[1:] for own in (kinds, kinds[selection.chosen]))
    return there, chosen


def _check_probability(probability: float) -> None:
    if not 0.0 < probability <= 1.0:
        raise ValueError(f"mlm_probability must be in (0, 1], got {probability}")
