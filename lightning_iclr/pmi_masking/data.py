"""Texts for masked language modelling: any data set of texts, a tokenizer, packed rows, and a masking."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from lightning_iclr.pmi_masking.batches import DOCUMENTS, EPOCH, ROW_ID
from lightning_iclr.pmi_masking.collator import (
    PMIMaskingCollator,
    RandomTokenCollator,
    SpanMaskingCollator,
    WholeWordCollator,
)
from lightning_iclr.pmi_masking.packing import Packer
from lightning_iclr.pmi_masking.scores import Score
from lightning_iclr.pmi_masking.spans import RandomSpanCollator
from lightning_iclr.pmi_masking.streams import append
from lightning_iclr.pmi_masking.tokenizers import load_tokenizer, train_wordpiece
from lightning_iclr.pmi_masking.vocabulary import PROPORTIONS, MaskingVocabulary
from lightning_iclr.sampling import ResumableLoader, SampleKey
from lightning_iclr.tables import DataFiles, check_columns, prepare_tables, read_tables, select_split

if TYPE_CHECKING:  # importing datasets takes over a second
    from datasets import Dataset as Table
    from datasets import DatasetDict

Masking = Literal["pmi", "whole_word", "random_span", "random_token"]
Split = Literal["train", "val", "test"]
_BATCH = 1000  # texts that are tokenized at once


class MaskedTextDataModule(LightningDataModule):
    """Serve texts as packed rows of tokens, masked anew in each epoch.

    A row is masked as a function of (``seed``, epoch, row) alone, whatever the number of workers and processes, and a
    validation or test row always the same way. Tokens, a tokenizer that is trained here and a vocabulary that is built
    here are kept under ``cache_dir``, by the content of the texts and the settings, and made once.

    Args:
        dataset: Hub id, folder, file, or, in Python, a ``Dataset`` or ``DatasetDict``.
        masking: What is masked: n-grams of ``vocabulary`` and words, ``whole_word``, ``random_span`` or
            ``random_token``.
        vocabulary: File of the n-grams for ``pmi``; ``None`` builds one of the training texts.
        vocabulary_size: N-grams of the vocabulary that is built.
        vocabulary_score: What ranks them: ``pmi``, ``naive_pmi`` or ``frequency``.
        vocabulary_proportions: Shares of lengths 2, 3, ...
        min_count: Fewest occurrences of an n-gram that is built in.
        tokenizer: Name or folder of a tokenizer of ``transformers``, a ``tokenizer.json`` or, in Python, a tokenizer;
            ``None`` trains an uncased WordPiece on the training texts, as the paper does.
        tokenizer_size: Pieces of the tokenizer that is trained.
        config_name: Configuration of a hub dataset.
        revision: Branch, tag or commit of a hub dataset.
        data_files: Files to read, by split or all for ``train``.
        train_split: Training part, with slices and sums.
        val_split: Validation part, likewise.
        test_split: Test part, likewise; ``None`` for none.
        text_column: Column of texts.
        sequence_length: Tokens of a row.
        mlm_probability: Share of a row's tokens that is predicted.
        mask_replace_prob: Chance that a chosen unit becomes masks.
        random_replace_prob: Chance that it becomes random tokens.
        batch_size: Rows that one process takes at a step.
        eval_batch_size: The same in evaluation.
        seed: Seed of orders and masks.
        num_workers: Processes that load.
        cache_dir: Folder for what is made once; ``None`` for one in the cache of ``datasets``.

    Raises:
        ValueError: A number is outside its range, or ``masking`` is unknown.
    """

    def __init__(
        self,
        dataset: str | Table | DatasetDict,
        *,
        masking: Masking = "pmi",
        vocabulary: str | None = None,
        vocabulary_size: int = 800_000,
        vocabulary_score: Score = "pmi",
        vocabulary_proportions: Sequence[float] = PROPORTIONS,
        min_count: int = 11,
        tokenizer: Any = None,
        tokenizer_size: int = 30_000,
        config_name: str | None = None,
        revision: str | None = None,
        data_files: DataFiles = None,
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str | None = None,
        text_column: str = "text",
        sequence_length: int = 512,
        mlm_probability: float = 0.15,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        for name, number in (
            ("vocabulary_size", vocabulary_size),
            ("min_count", min_count),
            ("tokenizer_size", tokenizer_size),
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
        ):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if sequence_length < 3:
            raise ValueError(f"sequence_length must be at least 3, got {sequence_length}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, got {num_workers}")
        if masking not in ("pmi", "whole_word", "random_span", "random_token"):
            raise ValueError(f"masking must be 'pmi', 'whole_word', 'random_span' or 'random_token', got {masking!r}")
        self.dataset, self.masking = dataset, masking
        self.vocabulary, self.vocabulary_size, self.min_count = vocabulary, vocabulary_size, min_count
        self.vocabulary_score, self.vocabulary_proportions = vocabulary_score, tuple(vocabulary_proportions)
        self.tokenizer_source, self.tokenizer_size = tokenizer, tokenizer_size
        self.source = (config_name, revision, data_files)
        self.splits: dict[Split, str | None] = {"train": train_split, "val": val_split, "test": test_split}
        self.text_column, self.sequence_length = text_column, sequence_length
        self.masks = {
            "mlm_probability": mlm_probability,
            "mask_replace_prob": mask_replace_prob,
            "random_replace_prob": random_replace_prob,
        }
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        self.num_workers, self.cache_dir = num_workers, cache_dir
        self.rows: dict[Split, PackedRows] = {}

    def prepare_data(self) -> None:
        """Download, train the tokenizer, build the vocabulary and tokenize, each where it is not done yet."""
        if isinstance(self.dataset, str):
            prepare_tables(self.dataset, *self.source)
        tables = self._tables()
        tokenizer = self._tokenizer(tables["train"])
        if self.masking == "pmi" and self.vocabulary is None:
            self._vocabulary(tables["train"])
        for split, table in tables.items():
            self._pack(table, tokenizer, split)

    def setup(self, stage: str | None = None) -> None:
        """Read what has been prepared."""
        if self.rows:
            return
        tables = self._tables()
        self.tokenizer = self._tokenizer(tables["train"])
        self.collator = self._collator(tables["train"])
        self.rows = {
            split: PackedRows(self._pack(table, self.tokenizer, split), anew=split == "train")
            for split, table in tables.items()
        }

    def train_dataloader(self) -> ResumableLoader:
        return self._loader("train", self.batch_size, shuffle=True)

    def val_dataloader(self) -> ResumableLoader:
        return self._loader("val", self.eval_batch_size, shuffle=False)

    def test_dataloader(self) -> ResumableLoader:
        if "test" not in self.rows:
            raise ValueError("test_split must name a part of the data to test on, got None")
        return self._loader("test", self.eval_batch_size, shuffle=False)

    def predict_dataloader(self) -> ResumableLoader:
        return self.test_dataloader() if "test" in self.rows else self.val_dataloader()

    def decode(self, tokens: Tensor) -> list[str]:
        """Return the text of each row of tokens (N, L), padding left off."""
        padding = self.tokenizer.pad_token_id
        return [self.tokenizer.decode([number for number in row if number != padding]) for row in tokens.tolist()]

    def _loader(self, split: Split, batch_size: int, shuffle: bool) -> ResumableLoader:
        return ResumableLoader(
            self.rows[split],
            batch_size=batch_size,
            shuffle=shuffle,
            seed=self.seed,
            drop_last=shuffle,
            trainer=self.trainer if shuffle else None,
            collate_fn=self.collator,
            num_workers=self.num_workers,
        )

    def _tables(self) -> dict[Split, Table]:
        tables = read_tables(self.dataset, *self.source)
        found: dict[Split, Table] = {}
        for split, spec in self.splits.items():
            if spec is not None:
                found[split] = select_split(tables, spec, f"{split}_split")
                check_columns(found[split], {"text_column": self.text_column}, f"{split}_split")
        return found

    def _tokenizer(self, train: Table) -> Any:
        if self.tokenizer_source is not None:
            return load_tokenizer(self.tokenizer_source)
        folder = self._cached(train, "wordpiece", {"size": self.tokenizer_size})
        if not folder.exists():
            rank_zero_info(f"training a WordPiece tokenizer of {self.tokenizer_size:,} pieces")
            partial = _partial(folder)
            train_wordpiece(self._texts(train), self.tokenizer_size).save_pretrained(partial)
            partial.rename(folder)
        return load_tokenizer(str(folder))

    def _vocabulary(self, train: Table) -> MaskingVocabulary:
        if self.vocabulary is not None:
            return MaskingVocabulary.from_file(self.vocabulary)
        settings = {
            "size": self.vocabulary_size,
            "proportions": self.vocabulary_proportions,
            "score": self.vocabulary_score,
            "min_count": self.min_count,
        }
        path = self._cached(train, "vocabulary", settings).with_suffix(".parquet")
        if not path.exists():
            built = MaskingVocabulary.build(self._texts(train), **settings, progress_bar=True)  # type: ignore[arg-type]
            built.save(path)
        return MaskingVocabulary.from_file(path)

    def _collator(self, train: Table) -> SpanMaskingCollator:
        options: dict[str, Any] = {**self.masks, "seed": self.seed, "return_unit_ids": True}
        if self.masking == "pmi":
            return PMIMaskingCollator(self.tokenizer, self._vocabulary(train), **options)
        kinds: dict[str, Callable[..., SpanMaskingCollator]] = {
            "whole_word": WholeWordCollator,
            "random_span": RandomSpanCollator,
            "random_token": RandomTokenCollator,
        }
        return kinds[self.masking](self.tokenizer, **options)

    def _pack(self, table: Table, tokenizer: Any, split: Split) -> Path:
        """Return the folder of a part's rows, and make it where there is none."""
        own = hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=8).hexdigest()
        folder = self._cached(table, f"rows-{split}", {"length": self.sequence_length, "tokenizer": own})
        if folder.exists():
            return folder
        partial = _partial(folder)
        partial.mkdir(parents=True)
        packer = Packer(self.sequence_length, tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
        ids = _tokenized(self._texts(table), tokenizer, len(table), f"tokenizing {split}")
        for tokens, documents in packer.pack(ids):
            append(partial / "tokens.int32", tokens)
            append(partial / "documents.int16", documents)
        if not any(partial.iterdir()):
            raise ValueError(f"{split}_split has no text with a token in column {self.text_column!r}")
        (partial / "length").write_text(str(self.sequence_length))
        partial.rename(folder)
        return folder

    def _texts(self, table: Table) -> Iterator[str]:
        for begin in range(0, len(table), _BATCH):
            yield from table[begin : begin + _BATCH][self.text_column]

    def _cached(self, table: Table, kind: str, settings: dict[str, Any]) -> Path:
        from datasets import config

        root = Path(self.cache_dir) if self.cache_dir is not None else Path(config.HF_DATASETS_CACHE) / "lightning_iclr"
        key = {"texts": self._content(table), "column": self.text_column, **settings}
        digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()
        root.mkdir(parents=True, exist_ok=True)
        return root / f"{kind}-{digest}"

    def _content(self, table: Table) -> str:
        if table.cache_files:  # the library's own fingerprint tells these apart, and to read them takes minutes
            return str(table._fingerprint)
        content = hashlib.blake2b(digest_size=16)
        for text in self._texts(table):
            content.update(text.encode() + b"\0")
        return content.hexdigest()


class PackedRows(Dataset[dict[str, Any]]):
    """Rows of tokens on disk, by number or by `SampleKey`.

    Args:
        folder: What `MaskedTextDataModule` has made.
        anew: Whether each epoch has masks of its own.
    """

    takes_sample_keys = True

    def __init__(self, folder: Path, anew: bool = True) -> None:
        self.anew = anew
        length = int((folder / "length").read_text())
        self.tokens = np.memmap(folder / "tokens.int32", np.int32, mode="r").reshape(-1, length)
        self.documents = np.memmap(folder / "documents.int16", np.int16, mode="r").reshape(-1, length)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        index, epoch, padding = key if isinstance(key, SampleKey) else (key, 0, False)
        documents = np.asarray(self.documents[index], np.int64)
        attention = (documents >= 0) & (not padding)  # what only fills up a process's share is not predicted
        return {
            "input_ids": np.asarray(self.tokens[index], np.int64),
            "attention_mask": attention.astype(np.int64),
            DOCUMENTS: documents,
            ROW_ID: index,
            EPOCH: epoch if self.anew else 0,
        }


def _tokenized(texts: Iterator[str], tokenizer: Any, total: int, title: str) -> Iterator[list[int]]:
    with tqdm(total=total, desc=title, unit="text", disable=total < 20 * _BATCH) as bar:
        batch: list[str] = []
        for text in texts:
            batch.append(text)
            if len(batch) == _BATCH:
                yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
                bar.update(len(batch))
                batch = []
        if batch:
            yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            bar.update(len(batch))


def _partial(path: Path) -> Path:
    """Return an unused name beside a path, for what is not finished."""
    import os

    return path.with_name(f"{path.name}.{os.getpid()}.partial")
