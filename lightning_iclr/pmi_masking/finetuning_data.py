"""Data of a fine-tuning task: any data set in the columns of the hub's, a tokenizer, rows padded to their batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from lightning_iclr.pmi_masking.finetuning import LabelledBatch
from lightning_iclr.pmi_masking.pairs import PairEncoder
from lightning_iclr.sampling import ResumableLoader, SampleKey
from lightning_iclr.tables import DataFiles, check_columns, prepare_tables, read_tables, select_split

if TYPE_CHECKING:  # importing datasets takes over a second
    from datasets import Dataset as Table
    from datasets import DatasetDict

Split = Literal["train", "val", "test", "predict"]
_STAGES: dict[str | None, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
    None: ("train", "val", "test", "predict"),
}


class FineTuningDataModule(LightningDataModule):
    """Serve the rows of a task; the base of the paper's three.

    A subclass writes `columns` and `features`, whose rows it may also join in another way than `collate` does. Rows are
    tokenized when a stage is set up, and padded to the longest of their batch. All of them are trained on in an epoch.

    Args:
        dataset: Hub id, folder, file, or, in Python, a ``Dataset`` or ``DatasetDict``.
        tokenizer: Name or folder of the network's tokenizer, a ``tokenizer.json``, ``embedded`` or, in Python, a fast
            tokenizer of ``transformers``.
        config_name: Configuration of a hub dataset.
        revision: Branch, tag or commit of a hub dataset.
        data_files: Files to read, by split or all for ``train``.
        train_split: Training part, with slices and sums.
        val_split: Validation part, likewise.
        test_split: Test part, likewise; ``None`` for none.
        predict_split: Part to predict, whose labels are not read; ``None`` takes the test or else validation part.
        max_length: Tokens of a row, special ones included.
        batch_size: Rows that one process takes at a step.
        eval_batch_size: The same in evaluation.
        seed: Seed of the orders.
        num_workers: Processes that load.

    Raises:
        ValueError: A number is outside its range.
    """

    def __init__(
        self,
        dataset: str | Table | DatasetDict,
        *,
        tokenizer: Any,
        config_name: str | None = None,
        revision: str | None = None,
        data_files: DataFiles = None,
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str | None = None,
        predict_split: str | None = None,
        max_length: int = 512,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, number, least in (
            ("max_length", max_length, 4),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        self.dataset, self.tokenizer_source = dataset, tokenizer
        self.source = (config_name, revision, data_files)
        self.splits: dict[Split, str | None] = {
            "train": train_split,
            "val": val_split,
            "test": test_split,
            "predict": predict_split or test_split or val_split,
        }
        self.max_length, self.batch_size, self.eval_batch_size = max_length, batch_size, eval_batch_size
        self.seed, self.num_workers = seed, num_workers
        self.rows: dict[Split, Any] = {}

    def columns(self, split: Split) -> Mapping[str, str]:
        """Return the columns that a part must have, by the argument that names each."""
        raise NotImplementedError

    def features(self, table: Table, split: Split) -> Any:
        """Return the data set that a part's batches are made of, by ``collate``."""
        raise NotImplementedError

    def collate(self, samples: Sequence[Any]) -> Any:
        """Return a batch."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Download or convert the data into the cache of ``datasets``; Lightning calls this once a machine."""
        if isinstance(self.dataset, str):
            prepare_tables(self.dataset, *self.source)

    def setup(self, stage: str | None = None) -> None:
        """Tokenize what a stage needs, on every process."""
        wanted = [split for split in _STAGES[stage] if self.splits[split] is not None and split not in self.rows]
        if not wanted:
            return
        self.encoder = PairEncoder(self.tokenizer_source)
        self.tokenizer = self.encoder.tokenizer
        tables = read_tables(self.dataset, *self.source)
        for split in wanted:
            table = self.select(tables, str(self.splits[split]), f"{split}_split")
            check_columns(table, self.columns(split), f"{split}_split")
            self.rows[split] = self.features(table, split)

    def select(self, tables: dict[str, Table], spec: str, argument: str) -> Table:
        """Return the rows that a split names."""
        return select_split(tables, spec, argument)

    def train_dataloader(self) -> ResumableLoader:
        return self._loader("train", self.batch_size)

    def val_dataloader(self) -> ResumableLoader:
        return self._loader("val", self.eval_batch_size)

    def test_dataloader(self) -> ResumableLoader:
        if "test" not in self.rows:
            raise ValueError("test_split must name a part of the data to test on, got None")
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> ResumableLoader:
        return self._loader("predict", self.eval_batch_size)

    def _loader(self, split: Split, batch_size: int) -> ResumableLoader:
        training = split == "train"
        return ResumableLoader(
            self.rows[split],
            batch_size=batch_size,
            shuffle=training,
            seed=self.seed,
            trainer=self.trainer if training else None,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


class LabelledRows(Dataset[tuple[Any, Any, int, int]]):
    """Inputs with a label each, by number or by `SampleKey`: (input, label, group, row).

    Args:
        inputs: What `PairEncoder.join` is given for each row, or a list of that for each option.
        labels: Each row's label.
        groups: Part of the data that each row belongs to, -1 for none.
        ids: Each row's name.
    """

    takes_sample_keys = True

    def __init__(self, inputs: Sequence[Any], labels: Sequence[Any], groups: Sequence[int], ids: Sequence[Any]) -> None:
        self.inputs, self.labels, self.groups, self.ids = inputs, labels, groups, ids

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, key: int | SampleKey) -> tuple[Any, Any, int, int]:
        index, _, padding = key if isinstance(key, SampleKey) else (key, 0, False)
        return self.inputs[index], self.labels[index], self.groups[index], -1 if padding else index


class LabelledDataModule(FineTuningDataModule):
    """Serve rows with one label each, in batches of `LabelledBatch`; predicted rows are named by their ids.

    Attributes:
        class_names: Names of the classes in the order of their numbers; empty for numbers.
    """

    class_names: list[str]

    def identify(self, rows: Tensor) -> dict[str, list[Any]]:
        """Name predicted rows."""
        ids = self.rows["predict"].ids
        return {"id": [ids[row] for row in rows.tolist()]}

    def collate(self, samples: Sequence[tuple[Any, Any, int, int]]) -> LabelledBatch:
        inputs, labels, groups, rows = zip(*samples, strict=True)
        found = self.collate_inputs(inputs)
        targets = torch.from_numpy(np.asarray(labels, np.float32 if isinstance(labels[0], float) else np.int64))
        return LabelledBatch(found, targets, torch.tensor(groups), torch.tensor(rows))

    def collate_inputs(self, inputs: Sequence[Any]) -> dict[str, Tensor]:
        """Return the network's inputs by name, each (B, L)."""
        return self.encoder.inputs([self.encoder.join(*texts) for texts in inputs])
