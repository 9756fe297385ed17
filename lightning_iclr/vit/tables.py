"""Image data in tables: check what is in them before training starts, and hold out a part."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_iclr.tables import check_columns

if TYPE_CHECKING:  # importing datasets takes over a second
    from datasets import Dataset as Table


def undecoded(table: Table, column: str, name: str) -> Table:
    """Return a table of the image column alone, whose files are not decoded on reading.

    Raises:
        ValueError: There is no such column; the error names the ones there are, and the argument to change.
    """
    from datasets import Array2D, Array3D
    from datasets import Image as ImageFeature

    check_columns(table, {"image_column": column}, name)
    table = table.select_columns(column)
    if isinstance(table.features[column], Array2D | Array3D):
        return table.with_format("numpy", dtype=np.dtype(table.features[column].dtype))  # else all integers are 64-bit
    try:
        return table.with_format(None).cast_column(column, ImageFeature(decode=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"image_column={column!r} of {name} holds no images, paths or files but {table.features[column]}"
        ) from error


def read_labels(
    table: Table, column: str, names: list[str], num_classes: int | None, name: str
) -> tuple[Tensor, list[str]]:
    """Return the labels (N,) and the names of the classes.

    Args:
        table: Holds the labels.
        column: Their column: ``ClassLabel``, integers from 0, or strings.
        names: Names of the training part's classes; empty for the training part itself.
        num_classes: Classes of an integer column, if known.
        name: What error messages call the table.

    Raises:
        ValueError: The column is missing, or a label is missing or outside of the range; the error names the row.

    Examples:
        >>> from datasets import Dataset
        >>> read_labels(Dataset.from_dict({"label": ["dog", "cat"]}), "label", [], None, "train")
        (tensor([1, 0]), ['cat', 'dog'])
    """
    from datasets import ClassLabel, Value

    check_columns(table, {"label_column": column}, name)
    feature = table.features[column]
    values = table.select_columns(column).with_format("arrow")[:][column]
    if values.null_count:
        row = values.is_null().to_pylist().index(True)
        raise ValueError(f"label_column={column!r} of {name} has no label in row {row}")
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        words = values.to_pylist()
        names = names or sorted(set(words))
        numbers = {word: number for number, word in enumerate(names)}
        unknown = next((row for row, word in enumerate(words) if word not in numbers), None)
        if unknown is not None:
            raise ValueError(f"label {words[unknown]!r} in row {unknown} of {name} is no class of the training part")
        return torch.tensor([numbers[word] for word in words]), names
    if not isinstance(feature, ClassLabel) and not (isinstance(feature, Value) and "int" in feature.dtype):
        raise ValueError(f"label_column={column!r} of {name} must hold classes, integers or strings, got {feature}")
    labels = torch.tensor(values.to_numpy(), dtype=torch.int64)
    if not names:
        count = int(labels.max()) + 1 if num_classes is None else num_classes
        names = list(feature.names) if isinstance(feature, ClassLabel) else [str(label) for label in range(count)]
    outside = ((labels < 0) | (labels >= len(names))).nonzero().flatten().tolist()
    if outside:
        raise ValueError(
            f"label {labels[outside[0]]} in row {outside[0]} of {name} is outside of 0 to {len(names) - 1}"
            f" ({len(outside)} such rows; a part without labels can only be predicted)"
        )
    return labels, names


def stratified_holdout(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Cut off round(fraction * N) rows, at least one, that hold each class in proportion.

    Each class gives the whole part of its share; the rows that are still missing come from the classes with the
    largest remainders, at random among equals.

    Args:
        labels: Classes (N,).
        fraction: Share to cut off, between 0 and 1.
        seed: Seed of the draw.

    Returns:
        The rows that stay and those that are cut off, both in ascending order.

    Raises:
        ValueError: One of the parts would be empty.

    Examples:
        >>> kept, held_out = stratified_holdout(torch.arange(4).repeat(25), 0.2, seed=0)
        >>> (held_out % 4).bincount().tolist()
        [5, 5, 5, 5]
    """
    size = max(1, round(fraction * len(labels)))
    if size >= len(labels):
        raise ValueError(f"val_fraction={fraction} leaves no training rows of {len(labels)}")
    generator = torch.Generator().manual_seed(seed)
    # A random order first, then a stable one by class: rows of a class are together, in random order.
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    shares = counts.double() * (size / len(labels))
    quotas = shares.floor().long()
    ties = torch.rand(len(counts), generator=generator, dtype=torch.float64) * 1e-6
    quotas[(shares - quotas + ties).argsort(descending=True)[: size - int(quotas.sum())]] += 1
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    chosen = place < quotas[labels[order]]
    return order[~chosen].sort().values, order[chosen].sort().values


def image_folder(folder: str, column: str) -> Table:
    """Return the paths of all images in a folder and its sub-folders, sorted.

    Raises:
        FileNotFoundError: There is no such folder, or no image in it.
    """
    from datasets import Dataset

    known = Image.registered_extensions()
    paths = sorted(str(path) for path in Path(folder).rglob("*") if path.suffix.lower() in known)
    if not paths:
        raise FileNotFoundError(f"predict_folder={folder!r} is no folder with images")
    return Dataset.from_dict({column: paths})
