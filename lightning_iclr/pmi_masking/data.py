"""Texts for masked language modelling: any data set of texts, a tokenizer, packed rows, and a masking."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeGuard
from uuid import uuid4

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
from lightning_iclr.pmi_masking.corpora import Corpus, TextSource, read_corpora
from lightning_iclr.pmi_masking.packing import Packer
from lightning_iclr.pmi_masking.spans import RandomSpanCollator
from lightning_iclr.pmi_masking.streams import append
from lightning_iclr.pmi_masking.tokenizers import load_tokenizer, train_wordpiece
from lightning_iclr.pmi_masking.vocabulary import MaskingVocabulary, VocabularySettings
from lightning_iclr.sampling import ResumableLoader, SampleKey
from lightning_iclr.tables import DataFiles

if TYPE_CHECKING:  # importing datasets takes over a second
    from datasets import Dataset as Table
    from datasets import DatasetDict

Masking = Literal["pmi", "whole_word", "random_span", "random_token"]
Split = Literal["train", "val", "test"]
_MASKINGS: dict[str, MakeCollator] = {
    "pmi": PMIMaskingCollator,
    "whole_word": WholeWordCollator,
    "random_span": RandomSpanCollator,
    "random_token": RandomTokenCollator,
}
_BATCH = 1000  # texts that are tokenized at once


class MakeCollator(Protocol):
    """A masking that wants a tokenizer: a class of collators, or one with some of its arguments given."""

    def __call__(self, tokenizer: Any, /, *, seed: int) -> SpanMaskingCollator:
        """Return the collator."""


class MaskedTextDataModule(LightningDataModule):
    """Serve texts as packed rows of tokens, masked anew in each epoch.

    A row is masked as a function of (``seed``, epoch, row) alone, whatever the number of workers and processes, and a
    validation or test row always the same way. Tokens, a tokenizer that is trained here and a vocabulary that is built
    here are kept under ``cache_dir``, by the content of the texts and the settings, and made once.

    Args:
        dataset: Hub id, folder, file, or an embedded corpus (``glosses``, ``wikipedia``, ``shakespeare``), or several
            sources, whose texts are served together; in Python also a ``Dataset`` or ``DatasetDict``.
        masking: ``pmi`` (n-grams of a vocabulary and words), ``whole_word``, ``random_span`` or ``random_token``, each
            as its class has it; or the class of a collator with arguments of its own, such as ``mlm_probability``.
            Batches have ``unit_ids``, but for sentinels.
        vocabulary: File of the n-grams for a `PMIMaskingCollator` without any; ``None`` builds them of the training
            texts.
        vocabulary_settings: How they are built.
        tokenizer: Name or folder of a tokenizer of ``transformers``, a ``tokenizer.json`` or, in Python, a tokenizer;
            ``None`` trains an uncased WordPiece on the training texts, as the paper does.
        tokenizer_size: Pieces of the tokenizer that is trained.
        config_name: Configuration of a hub dataset.
        revision: Branch, tag or commit of a hub dataset.
        data_files: Files to read, by split or all for ``train``.
        train_split: Training part, with slices and sums; of several sources that of each.
        val_split: Validation part, likewise.
        test_split: Test part, likewise; ``None`` for none.
        text_column: Column of texts.
        sequence_length: Tokens of a row.
        batch_size: Rows that one process takes at a step.
        eval_batch_size: The same in evaluation.
        seed: Seed of orders and masks.
        num_workers: Processes that load.
        cache_dir: Folder for what is made once; ``None`` for one in the cache of ``datasets``.

    Raises:
        ValueError: A number is outside its range, ``masking`` is unknown, or of several sources one is none, or
            arguments tell how to read another.
        FileNotFoundError: There is no file ``vocabulary``.
    """

    def __init__(
        self,
        dataset: str | list[TextSource] | Table | DatasetDict | Callable[[], DatasetDict],
        *,
        masking: Masking | MakeCollator = "pmi",
        vocabulary: str | None = None,
        vocabulary_settings: VocabularySettings = VocabularySettings(),  # noqa: B008  (frozen)
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
        batch_size: int = 32,
        eval_batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        for name, number, least in (
            ("tokenizer_size", tokenizer_size, 1),
            ("sequence_length", sequence_length, 3),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        if not callable(masking) and masking not in _MASKINGS:
            raise ValueError(f"masking must be one of {', '.join(_MASKINGS)} or a class of collators, got {masking!r}")
        if vocabulary is not None and not Path(vocabulary).is_file():
            raise FileNotFoundError(f"vocabulary must be a file, such as pmi-vocabulary writes, got {vocabulary}")
        own = TextSource(dataset, config_name, revision, data_files, text_column)
        if isinstance(dataset, list):
            _check_sources(dataset, own)
        self.sources = dataset if isinstance(dataset, list) else [own]
        self.make_collator: MakeCollator = masking if callable(masking) else _MASKINGS[masking]
        self.vocabulary, self.vocabulary_settings = vocabulary, vocabulary_settings
        self.tokenizer_source, self.tokenizer_size = tokenizer, tokenizer_size
        self.splits: dict[Split, str | None] = {"train": train_split, "val": val_split, "test": test_split}
        self.sequence_length = sequence_length
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        self.num_workers, self.cache_dir = num_workers, cache_dir
        self.rows: dict[Split, PackedRows] = {}

    def prepare_data(self) -> None:
        """Download, train the tokenizer, build the vocabulary and tokenize, each where it is not done yet."""
        # Any tokenizer tells what is wrong with the masking's arguments, and that before hours of work.
        stand_in = load_tokenizer("embedded" if self.tokenizer_source is None else self.tokenizer_source)
        wants_vocabulary = _wants_vocabulary(self.make_collator(stand_in, seed=self.seed))
        for source in self.sources:
            source.prepare()
        corpora = self._corpora()
        tokenizer = self._tokenizer(corpora["train"])
        if wants_vocabulary:
            self._vocabulary(corpora["train"])
        for split, corpus in corpora.items():
            self._pack(corpus, tokenizer, split)

    def setup(self, stage: str | None = None) -> None:
        """Read what has been prepared."""
        if self.rows:
            return
        corpora = self._corpora()
        self.tokenizer = self._tokenizer(corpora["train"])
        self.collator = self._collator(self.tokenizer, corpora["train"])
        self.rows = {
            split: PackedRows(self._pack(corpus, self.tokenizer, split), anew=split == "train")
            for split, corpus in corpora.items()
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

    def _corpora(self) -> dict[Split, Corpus]:
        found = read_corpora(self.sources, {f"{split}_split": spec for split, spec in self.splits.items()})
        return {split: found[f"{split}_split"] for split, spec in self.splits.items() if spec is not None}

    def _tokenizer(self, train: Corpus) -> Any:
        if self.tokenizer_source is not None:
            return load_tokenizer(self.tokenizer_source)
        folder = self._cached(train, "wordpiece", {"size": self.tokenizer_size})
        if not folder.exists():
            rank_zero_info(f"training a WordPiece tokenizer of {self.tokenizer_size:,} pieces")
            with _finish(folder) as partial:
                train_wordpiece(train, self.tokenizer_size).save_pretrained(partial)
        return load_tokenizer(str(folder))

    def _collator(self, tokenizer: Any, train: Corpus) -> SpanMaskingCollator:
        collator = self.make_collator(tokenizer, seed=self.seed)
        collator.return_unit_ids = collator.sentinels is None
        if _wants_vocabulary(collator):
            collator.set_vocabulary(self._vocabulary(train))
        return collator

    def _vocabulary(self, train: Corpus) -> str:
        """Return the vocabulary's file, and make that of the training texts where none is given."""
        if self.vocabulary is not None:
            return self.vocabulary
        settings = {**asdict(self.vocabulary_settings), "memory_limit": None, "engine": None}  # any give the same
        path = self._cached(train, "vocabulary", settings).with_suffix(".parquet")
        if not path.exists():
            built = MaskingVocabulary.build(train, **asdict(self.vocabulary_settings), progress_bar=True)
            built.save(path)
        return str(path)

    def _pack(self, corpus: Corpus, tokenizer: Any, split: Split) -> Path:
        """Return the folder of a part's rows, and make it where there is none."""
        own = hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=8).hexdigest()
        folder = self._cached(corpus, f"rows-{split}", {"length": self.sequence_length, "tokenizer": own})
        if folder.exists():
            return folder
        end = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
        packer = Packer(self.sequence_length, tokenizer.cls_token_id, end, tokenizer.pad_token_id)
        ids = _tokenized(corpus, tokenizer, f"tokenizing {split}")
        with _finish(folder) as partial:
            for tokens, documents in packer.pack(ids):
                append(partial / "tokens.int32", tokens)
                append(partial / "documents.int16", documents)
            if not any(partial.iterdir()):
                raise ValueError(f"{split}_split has no text with a token")
            (partial / "length").write_text(str(self.sequence_length))
        return folder

    def _cached(self, corpus: Corpus, kind: str, settings: dict[str, Any]) -> Path:
        from datasets import config

        root = Path(self.cache_dir) if self.cache_dir is not None else Path(config.HF_DATASETS_CACHE) / "lightning_iclr"
        key = {"texts": corpus.fingerprint, **settings}
        digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8).hexdigest()
        root.mkdir(parents=True, exist_ok=True)
        return root / f"{kind}-{digest}"


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


def _check_sources(sources: list[Any], own: TextSource) -> None:
    if not sources or not all(isinstance(source, TextSource) for source in sources):
        kinds = ", ".join(type(source).__name__ for source in sources) or "none"
        raise ValueError(f"dataset must be one or more TextSource where it is a list, got {kinds}")
    for name in ("config_name", "revision", "data_files", "text_column"):
        value = getattr(own, name)
        if value != getattr(TextSource(None), name):
            raise ValueError(f"{name} must be an argument of each source where dataset is a list, got {value!r} beside")


def _tokenized(corpus: Corpus, tokenizer: Any, title: str) -> Iterator[list[int]]:
    texts = iter(corpus)
    with tqdm(total=len(corpus), desc=title, unit="text", disable=len(corpus) < 20 * _BATCH) as bar:
        while batch := list(islice(texts, _BATCH)):
            yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            bar.update(len(batch))


def _wants_vocabulary(collator: SpanMaskingCollator) -> TypeGuard[PMIMaskingCollator]:
    return isinstance(collator, PMIMaskingCollator) and collator.vocabulary is None


@contextmanager
def _finish(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which then gets its name, or is dropped where another process was first."""
    partial = folder.with_name(f"{folder.name}.{uuid4().hex}.partial")  # two machines may have the same process id
    partial.mkdir()
    try:
        yield partial
        try:
            partial.rename(folder)
        except OSError:  # of a folder that is there and not empty, which errno it is depends on the file system
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
