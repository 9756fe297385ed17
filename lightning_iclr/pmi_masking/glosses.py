"""The embedded corpus of this method: the definitions of WordNet's synsets."""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning_iclr.pmi_masking.corpora import load_glosses
from lightning_iclr.pmi_masking.data import MaskedTextDataModule
from lightning_iclr.pmi_masking.vocabulary import VocabularySettings


class GlossesDataModule(MaskedTextDataModule):
    """Serve WordNet's definitions, packed into short rows, by the WordPiece tokenizer that ships with the package.

    Args:
        split_seed: Seed of the parts of `load_glosses`.
        vocabulary_settings: How a vocabulary is built.
        tokenizer: The ``embedded`` one, or another.
        test_split: Test part, with slices such as ``test[:1000]``.
        sequence_length: Tokens of a row.
        batch_size: Rows that one process takes at a step.
        kwargs: Further arguments of `MaskedTextDataModule`.
    """

    def __init__(
        self,
        *,
        split_seed: int = 0,
        vocabulary_settings: VocabularySettings = VocabularySettings(size=10_000),  # noqa: B008  (frozen)
        tokenizer: Any = "embedded",
        test_split: str | None = "test",
        sequence_length: int = 64,
        batch_size: int = 16,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            partial(load_glosses, split_seed),
            vocabulary_settings=vocabulary_settings,
            tokenizer=tokenizer,
            test_split=test_split,
            sequence_length=sequence_length,
            batch_size=batch_size,
            **kwargs,
        )
