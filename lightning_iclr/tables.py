"""Find a data set wherever it lies: on the hub, in a folder or a file, saved, or in memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing datasets takes over a second
    from datasets import Dataset as Table
    from datasets import DatasetBuilder, DatasetDict

DataFiles = str | list[str] | dict[str, str] | None
_FILE_FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


def prepare_tables(dataset: str, config_name: str | None, revision: str | None, data_files: DataFiles) -> None:
    """Download a hub dataset, or convert local files, into the cache of ``datasets``.

    Raises:
        ConnectionError: The hub cannot be reached; the error names the dataset.
        FileNotFoundError: There is no such dataset or file.
    """
    if not _is_saved(dataset):
        builder = _builder(dataset, config_name, revision, data_files)
        try:
            builder.download_and_prepare()
        except ConnectionError as error:
            raise _unreachable(dataset, error) from error


def read_tables(
    dataset: str | Table | DatasetDict, config_name: str | None, revision: str | None, data_files: DataFiles
) -> dict[str, Table]:
    """Return the splits of prepared data by name; a lone table is called ``train``.

    Raises:
        FileNotFoundError: The data are not prepared.
        TypeError: ``dataset`` is a streamed dataset or another object.
    """
    from datasets import Dataset, load_from_disk

    if isinstance(dataset, str) and _is_saved(dataset):
        dataset = load_from_disk(dataset)
    elif isinstance(dataset, str):
        builder = _builder(dataset, config_name, revision, data_files)
        try:
            dataset = builder.as_dataset()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{dataset} is not prepared on this machine; call prepare_data() first") from error
    if isinstance(dataset, Dataset):
        return {"train": dataset}
    if isinstance(dataset, dict) and dataset and all(isinstance(table, Dataset) for table in dataset.values()):
        return dict(dataset)
    raise TypeError(f"dataset must be a name, a Dataset or a DatasetDict, got {type(dataset).__name__}")


def select_split(tables: dict[str, Table], spec: str, argument: str) -> Table:
    """Return the rows that ``spec`` names, such as ``test[:10000]`` or ``train+validation``.

    Raises:
        ValueError: There is no such split; the error names the ones there are, and the argument to change.

    Examples:
        >>> from datasets import Dataset
        >>> len(select_split({"test": Dataset.from_dict({"x": range(20)})}, "test[:5]", "val_split"))
        5
    """
    from datasets import ReadInstruction, concatenate_datasets

    sizes = {name: len(table) for name, table in tables.items()}
    try:
        parts = ReadInstruction.from_spec(spec).to_absolute(sizes)
    except (AssertionError, ValueError) as error:
        known = ", ".join(f"{name} ({size})" for name, size in sizes.items())
        raise ValueError(f"{argument}={spec!r} is no split of this dataset, which has: {known}") from error
    whole = [part.from_ == 0 and part.to == sizes[part.splitname] for part in parts]
    rows = [
        tables[part.splitname] if all_rows else tables[part.splitname].select(range(part.from_, part.to))
        for part, all_rows in zip(parts, whole, strict=True)
    ]
    table = rows[0] if len(rows) == 1 else concatenate_datasets(rows)
    if len(table) == 0:
        raise ValueError(f"{argument}={spec!r} holds no rows")
    return table


def check_columns(table: Table, columns: Mapping[str, str], name: str) -> None:
    """Refuse a table without a column that is needed.

    Args:
        table: The data.
        columns: The columns that are needed, by the argument that names each.
        name: What the error calls the table.

    Raises:
        ValueError: There is no such column; the error names the ones there are, and the argument to change.
    """
    for argument, column in columns.items():
        if column not in table.column_names:
            known = ", ".join(table.column_names)
            raise ValueError(f"{argument}={column!r} is no column of {name}, which has: {known}; set {argument}")


def _is_saved(dataset: str) -> bool:
    return any((Path(dataset) / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _builder(dataset: str, config_name: str | None, revision: str | None, data_files: DataFiles) -> DatasetBuilder:
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError

    path = Path(dataset)
    try:
        if path.is_file():
            if path.suffix not in _FILE_FORMATS:
                raise ValueError(
                    f"dataset must be a folder, a hub id or a file ({', '.join(_FILE_FORMATS)}), got {path}"
                )
            return load_dataset_builder(_FILE_FORMATS[path.suffix], config_name, data_files=data_files or dataset)
        if not path.is_dir() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset) is None:
            raise FileNotFoundError(f"dataset {dataset!r} is no file or folder, and cannot be a hub id")
        return load_dataset_builder(dataset, config_name, data_files=data_files, revision=revision)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"dataset {dataset!r} is no local file or folder, and the hub does not show it: is the id right, and are "
            f"you logged in if it is gated? ({error})"
        ) from error
    except ConnectionError as error:
        raise _unreachable(dataset, error) from error


def _unreachable(dataset: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"dataset {dataset!r} is no local file or folder and not in the cache, and the Hugging Face hub cannot be "
        f"reached: it needs a network once ({error})"
    )
