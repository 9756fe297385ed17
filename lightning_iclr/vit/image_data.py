"""Serve any image data set: from the Hugging Face hub, a folder, parquet files or memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from lightning_iclr.sampling import ResumableLoader
from lightning_iclr.tables import prepare_tables, read_tables, select_split
from lightning_iclr.vit.augment import RandAugment, RandomResizedCrop
from lightning_iclr.vit.images import PADDING, EvaluationTransform, ImageRows, Mode, TrainTransform, Transform, decode
from lightning_iclr.vit.tables import image_folder, read_labels, stratified_holdout, undecoded

if TYPE_CHECKING:  # importing datasets takes over a second
    from datasets import Dataset as Table
    from datasets import DatasetDict


class ImageDataModule(LightningDataModule):
    """Serve images and labels for training, evaluation and prediction, as the official code prepares them.

    Training batches are random crops (`RandomResizedCrop`), mirrored and, if wished, augmented (`RandAugment`), drawn
    from a generator of (seed, epoch, row); evaluation shows the centre. Grey, CMYK, 16-bit, transparent and palette
    images are converted, see `decode`. A batch is ``(images, labels)``, in prediction ``(images, rows)``; rows that
    only fill up a process's share in evaluation have the label -100 and the row -1. The last, smaller training batch
    is left off, unless it is the only one.

    Args:
        dataset: Hub id, folder (of images by class, of parquet files, or from ``save_to_disk``), parquet file, a
            builder's name with ``data_files``, or, in Python, a ``Dataset`` or ``DatasetDict``.
        config_name: Configuration of a hub dataset.
        revision: Branch, tag or commit of a hub dataset.
        data_files: Files to read, by split or all for ``train``.
        train_split: Training part, with slices such as ``train[:99%]`` and sums such as ``train+validation``.
        val_split: Validation part; ``None`` cuts off a stratified part of the training part.
        test_split: Test part; ``None`` for none.
        predict_split: Part to predict; ``None`` takes the test part, or else the validation part.
        predict_folder: Folder of unlabelled images to predict instead, read with its sub-folders.
        val_fraction: Share of the training part that is cut off without a ``val_split``.
        split_seed: Seed of that cut, apart from the training seed so that runs stay comparable.
        image_column: Column of the images.
        label_column: Column of the classes: ``ClassLabel``, integers from 0, or names. ``None`` for images without
            labels, for masked pre-training; every label is then 0.
        num_classes: Classes of an integer column; ``None`` counts up to the largest training label.
        image_size: Height and width of what is served, in pixels; one number for squares.
        in_channels: 3 for colour, 1 for grey.
        batch_size: Images that one process takes at a step; the global batch is this times the world size.
        num_workers: Processes that read and decode.
        seed: Seed of the order and of the augmentation.
        crop: ``inception`` crops training images at random, ``centre`` as in evaluation.
        area: Least and largest share of a random crop, in (0, 1].
        ratio: Least and largest width over height of a random crop.
        flip: Whether to mirror half of the training images.
        rand_augment: Operations and magnitude of `RandAugment`; ``None`` for none. (2, 10) is the official choice.
        resize: Evaluation: ``crop`` fills the image with 224/256 of the shorter side and cuts out the centre,
            ``squash`` ignores the aspect ratio, as the original code does.
        mean: Subtracted from pixels in [0, 1]: one number, or one a channel.
        std: Divides what is left: one number, or one a channel.
        transform: Maps an image and a generator to a tensor in place of all of the above, in training.
        evaluation_transform: The same in evaluation and prediction; the generator is that of epoch 0.
        on_error: ``raise`` stops at an image that cannot be read and names it; ``skip`` logs and counts it, and shows
            another in training or an uncounted blank in evaluation.
        batch_format: ``tuple``, or ``dict`` with the keys ``pixel_values`` and ``labels`` (``rows`` in prediction), as
            Hugging Face's models take them.

    Raises:
        ValueError: An argument is outside its range.

    Examples:
        >>> from datasets import Dataset
        >>> pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue") * 8]
        >>> data = ImageDataModule(
        ...     Dataset.from_dict({"image": pictures, "label": [0, 1] * 8}),
        ...     image_size=8,
        ...     batch_size=4,
        ...     val_fraction=0.25,
        ... )
        >>> data.setup()
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, labels.dtype
        (torch.Size([4, 3, 8, 8]), torch.int64)
    """

    def __init__(
        self,
        dataset: str | Table | DatasetDict,
        *,
        config_name: str | None = None,
        revision: str | None = None,
        data_files: str | list[str] | dict[str, str] | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        predict_split: str | None = None,
        predict_folder: str | None = None,
        val_fraction: float = 0.01,
        split_seed: int = 0,
        image_column: str = "image",
        label_column: str | None = "label",
        num_classes: int | None = None,
        image_size: int | tuple[int, int] = 224,
        in_channels: Literal[1, 3] = 3,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        crop: Literal["inception", "centre"] = "inception",
        area: tuple[float, float] = (0.05, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = True,
        rand_augment: tuple[int, float] | None = None,
        resize: Literal["crop", "squash"] = "crop",
        mean: float | tuple[float, ...] = 0.5,
        std: float | tuple[float, ...] = 0.5,
        transform: Transform | None = None,
        evaluation_transform: Transform | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        batch_format: Literal["tuple", "dict"] = "tuple",
    ) -> None:
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, got {num_workers}")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {val_fraction}")
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"image_size must be a positive number or a height and a width, got {image_size}")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        for name, value, choices in (
            ("in_channels", in_channels, (1, 3)),
            ("crop", crop, ("inception", "centre")),
            ("resize", resize, ("crop", "squash")),
            ("on_error", on_error, ("raise", "skip")),
            ("batch_format", batch_format, ("tuple", "dict")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be {choices[0]!r} or {choices[1]!r}, got {value!r}")
        for name, numbers in (("mean", mean), ("std", std)):
            if not isinstance(numbers, int | float) and len(numbers) != in_channels:
                raise ValueError(f"{name} must be one number, or one a channel ({in_channels}); got {numbers}")
        if min([std] if isinstance(std, int | float) else std) <= 0:
            raise ValueError(f"std must be positive, got {std}")
        self.dataset, self.config_name = dataset, config_name
        self.revision, self.data_files = revision, data_files
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.predict_split, self.predict_folder = predict_split, predict_folder
        self.val_fraction, self.split_seed = val_fraction, split_seed
        self.image_column, self.label_column, self._num_classes = image_column, label_column, num_classes
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.on_error, self.batch_format = on_error, batch_format
        mode: Mode = "RGB" if in_channels == 3 else "L"
        self.blank = Image.new(mode, size[::-1])
        cropping = RandomResizedCrop(size, area, ratio) if crop == "inception" else None
        augment = None if rand_augment is None else RandAugment(*rand_augment)
        self.transform = (
            TrainTransform(size, mode, cropping, flip, augment, mean, std)
            if transform is None
            else _Decoded(transform, mode)
        )
        self.evaluation_transform = (
            EvaluationTransform(size, mode, resize, mean, std)
            if evaluation_transform is None
            else _Decoded(evaluation_transform, mode)
        )
        self.splits: dict[str, tuple[Table, Tensor]] = {}
        self._class_names: list[str] = []
        self._served: list[ImageRows] = []

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the labels; known after `setup`."""
        return self._class_names

    @property
    def num_classes(self) -> int:
        """Classes to tell apart; known after `setup`."""
        return len(self._class_names)

    @property
    def skipped(self) -> int:
        """How many images could not be read so far in all loaders, with ``on_error='skip'``."""
        return sum(rows.skipped for rows in self._served)

    def prepare_data(self) -> None:
        """Download or convert the data into the cache of ``datasets``; Lightning calls this once a machine."""
        if isinstance(self.dataset, str):
            prepare_tables(self.dataset, self.config_name, self.revision, self.data_files)

    def setup(self, stage: str | None = None) -> None:
        """Open and split the prepared data on every process; Lightning calls this again for each stage."""
        if self.splits:
            return
        tables = read_tables(self.dataset, self.config_name, self.revision, self.data_files)
        train = select_split(tables, self.train_split, "train_split")
        labels, self._class_names = self._labels(train, "train_split", self.train_split, [])
        splits: dict[str, tuple[Table, Tensor]] = {}
        if self.val_split is None:
            kept, held_out = stratified_holdout(labels, self.val_fraction, self.split_seed)
            splits["train"] = train.select(kept.tolist()), labels[kept]
            splits["val"] = train.select(held_out.tolist()), labels[held_out]
        else:
            splits["train"] = train, labels
        for name, spec in (("val", self.val_split), ("test", self.test_split)):
            if spec is not None:
                table = select_split(tables, spec, f"{name}_split")
                splits[name] = table, self._labels(table, f"{name}_split", spec, self._class_names)[0]
        if self.predict_folder is not None:
            splits["predict"] = _numbered(image_folder(self.predict_folder, self.image_column))
        elif self.predict_split is not None:
            splits["predict"] = _numbered(select_split(tables, self.predict_split, "predict_split"))
        else:
            splits["predict"] = _numbered(splits["test" if "test" in splits else "val"][0])
        self.splits = {
            name: (undecoded(table, self.image_column, self._title(name)), targets)
            for name, (table, targets) in splits.items()
        }

    def train_dataloader(self) -> ResumableLoader:
        table, labels = self.splits["train"]
        rows = self._rows("train", table, labels, self.transform, padding=None)
        world_size = 1 if self.trainer is None else self.trainer.world_size
        full = len(rows) // world_size >= self.batch_size
        return self._loader(rows, shuffle=True, drop_last=full, trainer=self.trainer)

    def val_dataloader(self) -> ResumableLoader:
        return self.evaluation_loader("val")

    def test_dataloader(self) -> ResumableLoader:
        return self.evaluation_loader("test")

    def predict_dataloader(self) -> ResumableLoader:
        """Serve the images to predict with their rows, which `identify` turns into file names."""
        table, numbers = self.splits["predict"]
        return self._loader(self._rows("predict", table, numbers, self.evaluation_transform, padding=-1), target="rows")

    def evaluation_loader(self, split: Literal["train", "val", "test"]) -> ResumableLoader:
        """Serve a split once, in order and unaugmented.

        Raises:
            ValueError: There is no such split.
        """
        self.setup()
        known = [name for name in self.splits if name != "predict"]
        if split not in known:
            hint = "; set test_split to serve one" if split == "test" else ""
            raise ValueError(f"split must be one of {', '.join(known)}; got {split!r}{hint}")
        table, labels = self.splits[split]
        return self._loader(self._rows(split, table, labels, self.evaluation_transform, padding=PADDING))

    def identify(self, rows: Tensor) -> dict[str, list[str]]:
        """Name predicted images by their file, or by their row where the data know none."""
        table = self.splits["predict"][0]
        return {"image": [self._name(table, row) for row in rows.tolist()]}

    def _name(self, table: Table, row: int) -> str:
        image = table[row][self.image_column]
        path = image.get("path") if isinstance(image, dict) else None
        if path is None:
            return str(row)
        if self.predict_folder is not None:
            return Path(path).relative_to(self.predict_folder).as_posix()
        return str(path)

    def _title(self, split: str) -> str:
        source = self.dataset if isinstance(self.dataset, str) else "the given dataset"
        if split == "predict" and self.predict_folder is not None:
            return self.predict_folder
        return f"{source} ({split})"

    def _labels(self, table: Table, argument: str, spec: str, names: list[str]) -> tuple[Tensor, list[str]]:
        if self.label_column is None:
            return torch.zeros(len(table), dtype=torch.int64), ["0"]
        return read_labels(table, self.label_column, names, self._num_classes, f"{argument}={spec!r}")

    def _rows(self, split: str, table: Table, targets: Tensor, transform: Transform, padding: int | None) -> ImageRows:
        title = self._title(split)
        rows = ImageRows(
            table, self.image_column, targets, transform, title, self.seed, padding, self.on_error, self.blank
        )
        self._served.append(rows)
        return rows

    def _loader(self, rows: ImageRows, target: str = "labels", **arguments: Any) -> ResumableLoader:
        return ResumableLoader(
            rows,
            batch_size=self.batch_size,
            seed=self.seed,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=default_collate if self.batch_format == "tuple" else _DictCollate(target),
            **arguments,
        )


class _Decoded:
    """A user's transform, which gets a decoded image."""

    def __init__(self, transform: Transform, mode: Mode) -> None:
        self.transform, self.mode = transform, mode

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        return self.transform(decode(image, self.mode), generator)


class _DictCollate:
    def __init__(self, target: str) -> None:
        self.target = target

    def __call__(self, samples: Sequence[tuple[Tensor, int]]) -> dict[str, Tensor]:
        images, targets = default_collate(list(samples))
        return {"pixel_values": images, self.target: targets}


def _numbered(table: Table) -> tuple[Table, Tensor]:
    return table, torch.arange(len(table))
