"""The embedded corpus of this method: the definitions of WordNet's synsets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_iclr.embedded import load_wordnet
from lightning_iclr.pmi_masking.data import MaskedTextDataModule, Masking
from lightning_iclr.pmi_masking.scores import Score
from lightning_iclr.pmi_masking.vocabulary import PROPORTIONS

if TYPE_CHECKING:  # importing datasets takes over a second
    from datasets import DatasetDict

HELD_OUT = {"validation": 4_000, "test": 7_000, "probe": 15_000}
_POS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}


@cache
def load_glosses(split_seed: int = 0) -> DatasetDict:
    """Load the distinct definitions of WordNet, about 112,500, in four parts without a definition in common.

    A definition is a gloss up to its first quoted example. Columns: ``text``, ``pos`` (noun, verb, adjective or adverb)
    and ``synset``, the row of `load_wordnet` that has it first. Parts: ``train``, ``validation`` (4,000), ``test``
    (7,000), and ``probe`` (15,000) for classifiers on a trained network's features.

    Args:
        split_seed: Seed of the parts.

    Examples:
        >>> load_glosses()["validation"].num_rows
        4000
    """
    from datasets import Dataset, DatasetDict

    synsets = load_wordnet()
    first: dict[str, int] = {}
    for row, gloss in enumerate(synsets["gloss"]):
        first.setdefault(gloss.split('; "')[0].strip(), row)
    texts, rows, kinds = list(first), np.array(list(first.values())), synsets["pos"]
    order = np.random.default_rng(split_seed).permutation(len(texts))
    bounds = np.cumsum(list(HELD_OUT.values()))
    *held_out, train = np.split(order, bounds)
    parts = {}
    for name, places in zip(("train", *HELD_OUT), (train, *held_out), strict=True):
        places = np.sort(places)
        columns = {
            "text": [texts[place] for place in places],
            "pos": [_POS[kinds[row]] for row in rows[places].tolist()],
            "synset": rows[places],
        }
        parts[name] = Dataset.from_dict(columns)
    return DatasetDict(parts)


class GlossesDataModule(MaskedTextDataModule):
    """Serve WordNet's definitions, packed into short rows, by the WordPiece tokenizer that ships with the package.

    Args:
        masking: What is masked: n-grams of ``vocabulary`` and words, ``whole_word``, ``random_span`` or
            ``random_token``.
        vocabulary: File of the n-grams for ``pmi``; ``None`` builds one of the training part.
        vocabulary_size: N-grams of the vocabulary that is built.
        vocabulary_score: What ranks them: ``pmi``, ``naive_pmi`` or ``frequency``.
        vocabulary_proportions: Shares of lengths 2, 3, ...
        min_count: Fewest occurrences of an n-gram that is built in.
        tokenizer: The ``embedded`` one, or another; see `MaskedTextDataModule`.
        sequence_length: Tokens of a row.
        train_split: Training part, with slices such as ``train[:10000]``.
        val_split: Validation part, likewise.
        test_split: Test part, likewise.
        split_seed: Seed of the parts of `load_glosses`.
        batch_size: Rows that one process takes at a step.
        eval_batch_size: The same in evaluation.
        mlm_probability: Share of a row's tokens that is predicted.
        seed: Seed of orders and masks.
        num_workers: Processes that load.
        cache_dir: Folder for what is made once; ``None`` for one in the cache of ``datasets``.
    """

    def __init__(
        self,
        *,
        masking: Masking = "pmi",
        vocabulary: str | None = None,
        vocabulary_size: int = 10_000,
        vocabulary_score: Score = "pmi",
        vocabulary_proportions: Sequence[float] = PROPORTIONS,
        min_count: int = 11,
        tokenizer: Any = "embedded",
        sequence_length: int = 64,
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str = "test",
        split_seed: int = 0,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        mlm_probability: float = 0.15,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(
            "",
            masking=masking,
            vocabulary=vocabulary,
            vocabulary_size=vocabulary_size,
            vocabulary_score=vocabulary_score,
            vocabulary_proportions=vocabulary_proportions,
            min_count=min_count,
            tokenizer=tokenizer,
            train_split=train_split,
            val_split=val_split,
            test_split=test_split,
            sequence_length=sequence_length,
            mlm_probability=mlm_probability,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            num_workers=num_workers,
            cache_dir=cache_dir,
        )
        self.split_seed = split_seed

    def prepare_data(self) -> None:
        """Build the vocabulary and tokenize, each where it is not done yet."""
        self.dataset = load_glosses(self.split_seed)
        super().prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Read what has been prepared."""
        self.dataset = load_glosses(self.split_seed)
        super().setup(stage)
