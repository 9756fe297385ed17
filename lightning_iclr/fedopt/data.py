"""Federated data for recipes: any data set, a partition into clients, and an encoder that makes tensors of its columns.

`FederatedDataModule` is a `FederatedLoader` that a YAML file can describe, with central loaders for evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_iclr.fedopt.encoders import Columns
from lightning_iclr.fedopt.examples import FederatedExamples, Source, encode_rows, examples_of, rows_of, whole_batch
from lightning_iclr.fedopt.loader import FederatedLoader
from lightning_iclr.fedopt.tables import hold_out
from lightning_iclr.sampling import ResumableLoader
from lightning_iclr.tables import DataFiles, check_columns, prepare_tables, read_tables, select_split

if TYPE_CHECKING:  # importing datasets takes over a second
    from datasets import Dataset as Table
    from datasets import DatasetDict

Partition = Callable[[Any], Sequence[np.ndarray]]
Split = Literal["train", "val", "test"]


class FederatedDataModule(LightningDataModule):
    """Serve any data set to `FedOptStrategy`: rounds of clients in training, all held-out rows in evaluation.

    What is held out comes from ``val_split`` and ``test_split``, or is drawn from all rows (``val_size``,
    ``test_size``), or is the last part of each client's own rows (``client_split``). A batch is ``(inputs, targets)``
    as ``encode`` makes them, in prediction ``(inputs, positions)``. Rows that only fill up a process's share in
    evaluation have the target -100 and the position -1.

    The encoder learns from training rows alone. Each part is encoded once, when its loader is first asked for, or in
    each batch anew where ``in_memory`` is false. Random crops and the like are a function of (seed, pass, example).

    Args:
        dataset: Hub id, folder, file, or, in Python, a ``Dataset`` or ``DatasetDict``.
        encode: Makes tensors of columns, such as `ImageEncoder`; see `lightning_iclr.fedopt.encoders`.
        partition: Maps the training rows, a ``Dataset``, to the rows of each client, such as `DirichletPartitioner`.
        clients_per_round: Size of a cohort, or its share of all clients where it is a float.
        config_name: Configuration of a hub dataset.
        revision: Branch, tag or commit of a hub dataset.
        data_files: Files to read, by split or all for ``train``.
        train_split: Training part, with slices such as ``train[:99%]`` and sums such as ``train+validation``.
        val_split: Validation part, likewise; ``test[:10000]`` is one.
        test_split: Test part, likewise.
        val_size: Rows to draw from the training part for validation, or their share where it is a float.
        test_size: The same for the test.
        client_split: Shares (validation, test) of each client's rows to hold out, the last ones, in the order that
            ``partition`` gives. Each client keeps a row at least, and from two rows on gives one to the test, or to
            validation where the test's share is 0.
        stratify_column: Column of classes that the parts drawn by ``val_size`` and ``test_size`` hold in proportion.
        take_every: Keep each n-th of a client's rows only: 80 leaves of windows that overlap by 79 characters those
            that do not overlap.
        max_clients: Keep so many clients at most, those with the most rows.
        max_examples_per_client: Train on so many rows of a client at most, the first.
        batch_size: Examples of a local batch.
        eval_batch_size: Examples that one process takes at a step in evaluation.
        local_epochs: Passes over a client's examples in a round.
        max_local_steps: Cap on a client's local steps, or a function of (round, client) that returns it.
        client_dropout: Chance of a drawn client not to report.
        drop_last: Whether to leave off a client's last, smaller batch.
        seed: Seed of cohorts, orders and augmentation, and of what clients draw in training.
        split_seed: Seed of ``val_size`` and ``test_size``, apart from ``seed`` so that runs stay comparable.
        num_workers: Processes that load; 0 is fastest for what lies in memory.
        in_memory: Whether rows are encoded once; ``None`` leaves it to the encoder.

    Raises:
        ValueError: A number is outside its range, or two arguments ask for the same part.

    Examples:
        >>> from datasets import Dataset
        >>> from lightning_iclr.fedopt.encoders import ImageEncoder
        >>> table = Dataset.from_dict({"image": np.zeros((12, 4, 4), np.uint8), "label": [0, 1] * 6})
        >>> data = FederatedDataModule(
        ...     table, encode=ImageEncoder(), partition=lambda rows: np.arange(len(rows)).reshape(3, -1),
        ...     clients_per_round=2, client_split=(0.0, 0.25),
        ... )
        >>> data.setup()
        >>> images, labels = next(iter(data.test_dataloader()))
        >>> images.shape, labels
        (torch.Size([3, 1, 4, 4]), tensor([1, 1, 1]))
    """

    def __init__(
        self,
        dataset: str | Table | DatasetDict,
        *,
        encode: Callable[[Columns], Any],
        partition: Partition,
        clients_per_round: int | float,
        config_name: str | None = None,
        revision: str | None = None,
        data_files: DataFiles = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        val_size: int | float | None = None,
        test_size: int | float | None = None,
        client_split: tuple[float, float] | None = None,
        stratify_column: str | None = None,
        take_every: int = 1,
        max_clients: int | None = None,
        max_examples_per_client: int | None = None,
        batch_size: int = 20,
        eval_batch_size: int = 256,
        local_epochs: int = 1,
        max_local_steps: int | Callable[[int, int], int | None] | None = None,
        client_dropout: float = 0.0,
        drop_last: bool = False,
        seed: int = 0,
        split_seed: int = 0,
        num_workers: int = 0,
        in_memory: bool | None = None,
    ) -> None:
        super().__init__()
        for name, number in (
            ("take_every", take_every),
            ("max_clients", max_clients),
            ("max_examples_per_client", max_examples_per_client),
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("local_epochs", local_epochs),
            ("val_size", val_size),
            ("test_size", test_size),
        ):
            if isinstance(number, int) and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
            if isinstance(number, float) and not 0 < number < 1:
                raise ValueError(f"{name} must be a number of rows or a share in (0, 1), got {number}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, got {num_workers}")
        for part, split, size in (("val", val_split, val_size), ("test", test_split, test_size)):
            if split is not None and size is not None:
                raise ValueError(f"{part}_split and {part}_size exclude each other, got {split!r} and {size}")
            if client_split is not None and (split is not None or size is not None):
                name = f"{part}_split" if size is None else f"{part}_size"
                raise ValueError(f"client_split already holds rows out, so leave out {name}, got both")
        if client_split is not None and not (min(client_split) >= 0 and 0 < sum(client_split) < 1):
            raise ValueError(f"client_split must be two shares with a sum in (0, 1), got {client_split}")
        self.dataset, self.config_name = dataset, config_name
        self.revision, self.data_files = revision, data_files
        self.encode, self.partition = encode, partition
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.val_size, self.test_size, self.stratify_column = val_size, test_size, stratify_column
        self.client_split, self.take_every = client_split, take_every
        self.max_clients, self.max_examples_per_client = max_clients, max_examples_per_client
        self.clients_per_round, self.client_dropout = clients_per_round, client_dropout
        self.batch_size, self.eval_batch_size, self.drop_last = batch_size, eval_batch_size, drop_last
        self.local_epochs, self.max_local_steps = local_epochs, max_local_steps
        self.seed, self.split_seed, self.num_workers = seed, split_seed, num_workers
        self.in_memory = in_memory
        self._tables: dict[str, Table] = {}  # what each part's rows are rows of
        self._rows: dict[str, list[np.ndarray]] = {}  # of each part by client; a part of its own has one entry
        self._sources: dict[str, tuple[Source, list[np.ndarray]]] = {}
        self._drawn: dict[str, np.ndarray] = {}  # rows of the training part that a table drawn from it holds

    @property
    def class_names(self) -> list[str]:
        """Names of the classes or tags, where the encoder or the data tell; else none."""
        names = getattr(self.encode, "class_names", None)
        if names is None and self._tables:
            column = getattr(self.encode, "columns", {}).get("label_column")
            names = getattr(self._tables["train"].features.get(column), "names", None)
        return list(names or ())

    @property
    def decode(self) -> Callable[[Tensor], list[str]] | None:
        """What makes texts of tokens (B, L), where the encoder tells."""
        return getattr(self.encode, "decode", None)

    def prepare_data(self) -> None:
        """Download or convert the data into the cache of ``datasets``; Lightning calls this once a machine."""
        if isinstance(self.dataset, str):
            prepare_tables(self.dataset, self.config_name, self.revision, self.data_files)

    def tables(self) -> dict[str, Table]:
        """Return the splits of the prepared data by name; override this for data of another kind."""
        return read_tables(self.dataset, self.config_name, self.revision, self.data_files)

    def setup(self, stage: str | None = None) -> None:
        """Open, split and partition the data on every process; Lightning calls this again for each stage.

        Raises:
            ValueError: The Trainer is to fit with another strategy than `FedOptStrategy`, or the data do not allow what
                the arguments ask for.
        """
        if stage == "fit":
            self._check_strategy()
        if self._rows:
            return
        tables = self.tables()
        train = select_split(tables, self.train_split, "train_split")
        held_out = {
            part: select_split(tables, split, f"{part}_split")
            for part, split in (("val", self.val_split), ("test", self.test_split))
            if split is not None
        }
        columns = dict(getattr(self.encode, "columns", {}))
        for part, table in (("train", train), *held_out.items()):
            check_columns(table, columns, self._title(part))
        train, drawn = self._draw(train)
        held_out |= drawn
        clients = self._thin([np.asarray(rows, dtype=np.int64) for rows in self.partition(train)])
        if not clients:
            raise ValueError(f"partition must make at least one client of {len(train)} rows, got none")
        parts = {"train": clients}
        if self.client_split is not None:
            cut = [_cut(rows, self.client_split) for rows in clients]
            held = zip(("train", "val", "test"), map(list, zip(*cut, strict=True)), strict=True)
            parts = {part: rows for part, rows in held if any(map(len, rows))}
        parts["train"] = [rows[: self.max_examples_per_client] for rows in parts["train"]]
        if hasattr(self.encode, "fit"):
            used = _used(parts["train"])
            self.encode = self.encode.fit(train if len(used) == len(train) else train.select(used))
        self._tables = {part: train for part in parts} | held_out
        self._rows = parts | {part: [np.arange(len(table))] for part, table in held_out.items()}

    def train_dataloader(self) -> FederatedLoader:
        """Return the loader of rounds.

        Raises:
            ValueError: The Trainer has another strategy than `FedOptStrategy`.
        """
        self._check_strategy()
        source, clients = self._encoded("train")
        return FederatedLoader(
            FederatedExamples(source, self.encode, seed=self.seed, training=True),
            clients,
            clients_per_round=self.clients_per_round,
            batch_size=self.batch_size,
            local_epochs=self.local_epochs,
            max_local_steps=self.max_local_steps,
            client_dropout=self.client_dropout,
            drop_last=self.drop_last,
            seed=self.seed,
            collate_fn=whole_batch,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        """Serve the validation part; nothing where there is none."""
        return self.evaluation_loader("val") if "val" in self._rows else []

    def test_dataloader(self) -> ResumableLoader:
        return self.evaluation_loader("test")

    def predict_dataloader(self) -> ResumableLoader:
        """Serve the test part, or else the validation part, with positions in place of targets; see `identify`."""
        return self._loader(self._predicted, serve_positions=True)

    def identify(self, positions: Tensor) -> dict[str, list[int]]:
        """Return where predicted examples (N,) come from, by name.

        ``row`` is the row of the split that the part was taken from; ``client`` the client that it belongs to, with
        ``client_split``; ``example``, where a row makes several, the number of the example among them.
        """
        part = self._predicted
        source, clients = self._encoded(part)
        own = positions.numpy()
        rows, numbers = rows_of(np.concatenate(clients)[own], source)
        rows = self._used(part)[rows]
        columns = {"row": self._drawn[part][rows] if part in self._drawn else rows}
        if self.client_split is not None:
            columns["client"] = np.repeat(np.arange(len(clients)), [len(examples) for examples in clients])[own]
        if source.starts is not None:
            columns["example"] = numbers
        return {name: column.tolist() for name, column in columns.items()}

    def evaluation_loader(self, split: Split) -> ResumableLoader:
        """Serve a part once, in order and unaugmented.

        Raises:
            ValueError: There is no such part.
        """
        self.setup()
        return self._loader(split)

    def client_datasets(self, split: Split) -> tuple[FederatedExamples, list[np.ndarray]]:
        """Return a part's examples, unaugmented, and which of them are each client's own.

        The clients are in the order of training; one with too few rows to hold any out has none in ``val`` or
        ``test``.

        Raises:
            ValueError: There is no such part, or it is not made of the clients' own rows.
        """
        self.setup()
        self._check_part(split)
        if split != "train" and self.client_split is None:
            raise ValueError(f"the rows of {split!r} belong to no client; set client_split to hold out each one's own")
        source, clients = self._encoded(split)
        return FederatedExamples(source, self.encode, seed=self.seed), clients

    def _draw(self, pool: Table) -> tuple[Table, dict[str, Table]]:
        sizes = {
            part: round(size * len(pool)) if isinstance(size, float) else size
            for part, size in (("val", self.val_size), ("test", self.test_size))
            if size is not None
        }
        if not sizes:
            return pool, {}
        columns = {} if self.stratify_column is None else {"stratify_column": self.stratify_column}
        check_columns(pool, columns, self._title("train"))
        kept, rows = hold_out(pool, sum(sizes.values()), self.split_seed, self.stratify_column)
        drawn = dict.fromkeys(sizes, rows)
        if len(sizes) == 2:
            parts = hold_out(pool.select(rows), sizes["test"], self.split_seed, self.stratify_column)
            drawn = {part: rows[own] for part, own in zip(("val", "test"), parts, strict=True)}
        self._drawn = drawn
        return pool.select(kept), {part: pool.select(own) for part, own in drawn.items()}

    def _thin(self, clients: list[np.ndarray]) -> list[np.ndarray]:
        clients = [rows[:: self.take_every] for rows in clients]
        if self.max_clients is None or len(clients) <= self.max_clients:
            return clients
        largest = np.argsort([-len(rows) for rows in clients], kind="stable")[: self.max_clients]
        return [clients[client] for client in np.sort(largest)]

    def _title(self, part: str) -> str:
        source = repr(self.dataset) if isinstance(self.dataset, str) else "the given dataset"
        return f"{source} ({part})"

    def _check_part(self, split: str) -> None:
        if split not in self._rows:
            known = ", ".join(part for part in ("train", "val", "test") if part in self._rows)
            hint = "" if split not in ("val", "test") else f"; set {split}_split, {split}_size or client_split"
            raise ValueError(f"split must be one of {known}, got {split!r}{hint}")

    def _check_strategy(self) -> None:
        from lightning_iclr.fedopt.strategy import FedOptStrategy

        strategy = None if self.trainer is None else self.trainer.strategy
        if strategy is not None and not isinstance(strategy, FedOptStrategy):
            raise ValueError(
                "federated recipes scale by trainer.devices and trainer.num_nodes alone: leave out trainer/ddp, "
                f"trainer/fsdp and other strategies, got strategy {type(strategy).__name__}"
            )

    def _encoded(self, split: str) -> tuple[Source, list[np.ndarray]]:
        """Return what a part is encoded in, and its examples there by client."""
        self._check_part(split)
        if split not in self._sources:
            table, used = self._tables[split], self._used(split)
            in_memory = getattr(self.encode, "in_memory", True) if self.in_memory is None else self.in_memory
            source = encode_rows(table, used, self.encode, in_memory)
            for part in self._together(split):
                own = [examples_of(np.searchsorted(used, rows), source) for rows in self._rows[part]]
                self._sources[part] = source, own
        return self._sources[split]

    def _together(self, split: str) -> list[str]:
        """Return the parts that are rows of the same table, which are encoded together."""
        return [part for part, own in self._tables.items() if own is self._tables[split]]

    def _used(self, split: str) -> np.ndarray:
        return _used([rows for part in self._together(split) for rows in self._rows[part]])

    @property
    def _predicted(self) -> str:
        return "test" if "test" in self._rows else "val"

    def _loader(self, split: str, serve_positions: bool = False) -> ResumableLoader:
        source, clients = self._encoded(split)
        examples = np.concatenate(clients)
        return ResumableLoader(
            FederatedExamples(source, self.encode, examples, seed=self.seed, serve_positions=serve_positions),
            batch_size=self.eval_batch_size,
            seed=self.seed,
            num_workers=self.num_workers,
            collate_fn=whole_batch,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _cut(rows: np.ndarray, shares: tuple[float, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut a client's last rows off for validation and, after these, for the test."""
    val, test = (math.floor(share * len(rows) + 0.5) for share in shares)
    if shares[1] > 0:
        test = max(test, 1)
    else:
        val = max(val, 1)
    test = min(test, len(rows) - 1)
    val = min(val, len(rows) - 1 - test)
    train, own_val, own_test = np.split(rows, [len(rows) - val - test, len(rows) - test])
    return train, own_val, own_test


def _used(clients: Sequence[np.ndarray]) -> np.ndarray:
    return np.unique(np.concatenate(clients))
