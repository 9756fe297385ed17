"""Serve the embedded handwritten digits to a Vision Transformer: seconds (8 x 8) or minutes (28 x 28) of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from lightning_iclr.embedded import load_digits, load_mnist5k
from lightning_iclr.sampling import ResumableLoader, SampleKey, sample_generator
from lightning_iclr.vit.affine import random_affine
from lightning_iclr.vit.images import PADDING

if TYPE_CHECKING:  # importing datasets takes over a second
    from datasets import Dataset as Table

Batch = tuple[Tensor, Tensor]


class _EmbeddedDataModule(LightningDataModule):
    """Serve one of the embedded sets of digits; a subclass names it.

    Args:
        batch_size: Images that one process takes at a step; the global batch is this times the world size.
        num_workers: Processes that load; 0 is fastest, as the data lie in memory.
        split_seed: Seed of the split, apart from the training seed so that runs stay comparable.
        seed: Seed of the order and of the augmentation.
        train_on_validation: Add the validation part to the training part for a final fit. The validation loader still
            serves it, so that its accuracy then says nothing about generalisation.
        num_train_labels: Size of a class-balanced subset of the training part; ``None`` takes all.
        subset_seed: Seed of that subset.
        augment: Whether training images are augmented.
        shift: Largest shift along each axis, in pixels.
        rotate: Largest turn, in degrees.
        scale: Largest relative change of scale.
        mean: Subtracted from pixels in [0, 1].
        std: Divides what is left.

    Raises:
        ValueError: A number is outside its range.
    """

    load: Callable[[], Table]  # returns the whole set with the columns image and label
    test_size: int
    val_size: int
    image_size: int
    white: float  # the largest pixel

    def __init__(
        self,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        split_seed: int = 0,
        seed: int = 0,
        train_on_validation: bool = False,
        num_train_labels: int | None = None,
        subset_seed: int = 0,
        augment: bool = True,
        shift: float = 0.5,
        rotate: float = 8.0,
        scale: float = 0.08,
        mean: float = 0.3,
        std: float = 0.35,
    ) -> None:
        super().__init__()
        self.class_names = [str(digit) for digit in range(10)]
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, got {num_workers}")
        if num_train_labels is not None and num_train_labels < self.num_classes:
            raise ValueError(
                f"num_train_labels must be at least one a class, {self.num_classes}; got {num_train_labels}"
            )
        for name, value, largest in (
            ("shift", shift, self.image_size),
            ("rotate", rotate, 180.0),
            ("scale", scale, 0.99),
        ):
            if not 0 <= value <= largest:
                raise ValueError(f"{name} must be between 0 and {largest}, got {value}")
        if not std > 0:
            raise ValueError(f"std must be positive, got {std}")
        self.batch_size, self.num_workers = batch_size, num_workers
        self.split_seed, self.seed = split_seed, seed
        self.train_on_validation = train_on_validation
        self.num_train_labels, self.subset_seed = num_train_labels, subset_seed
        self.augment = {"shift": shift, "rotate": rotate, "scale": scale} if augment else None
        self.mean, self.std = mean, std
        self.splits: dict[str, _Pixels] = {}

    @property
    def num_classes(self) -> int:
        """Classes to tell apart."""
        return len(self.class_names)

    def setup(self, stage: str | None = None) -> None:
        """Load and split once on every process; Lightning calls this again for each stage."""
        if self.splits:
            return
        table = self.load().with_format("numpy")
        pixels = torch.from_numpy(table["image"][:]).unsqueeze(1).float() / self.white
        labels = torch.from_numpy(table["label"][:]).long()
        # The splitter moves labels and rows only: it is slow on images.
        rest, test = _split(
            table.select_columns("label").add_column("row", list(range(len(table)))), self.test_size, self.split_seed
        )
        train, val = _split(rest, self.val_size, self.split_seed)
        rows = {name: torch.tensor(part["row"][:]) for name, part in (("train", train), ("val", val), ("test", test))}
        if self.train_on_validation:
            rows["train"] = torch.cat([rows["train"], rows["val"]])
        if self.num_train_labels is not None:
            chosen = balanced_subset(labels[rows["train"]], self.num_train_labels, self.subset_seed)
            rows["train"] = rows["train"][chosen]
        self.splits = {
            name: _Pixels(pixels[own], labels[own], own, self.mean, self.std, self.seed) for name, own in rows.items()
        }

    def train_dataloader(self) -> ResumableLoader:
        return self._loader(replace(self.splits["train"], affine=self.augment), shuffle=True, trainer=self.trainer)

    def val_dataloader(self) -> ResumableLoader:
        return self.evaluation_loader("val")

    def test_dataloader(self) -> ResumableLoader:
        return self.evaluation_loader("test")

    def predict_dataloader(self) -> ResumableLoader:
        """Serve the test images with their rows in the whole set instead of their labels."""
        return self._loader(replace(self.splits["test"], serve_rows=True))

    def evaluation_loader(self, split: Literal["train", "val", "test"]) -> ResumableLoader:
        """Serve a split once, in order and unaugmented.

        Raises:
            ValueError: There is no such split.
        """
        self.setup()
        if split not in self.splits:
            raise ValueError(f"split must be one of {', '.join(self.splits)}; got {split!r}")
        return self._loader(self.splits[split])

    def identify(self, rows: Tensor) -> dict[str, list[str]]:
        """Name predicted images by their row in the whole set."""
        return {"image": [str(row) for row in rows.tolist()]}

    def _loader(self, dataset: _Pixels, shuffle: bool = False, trainer: Any = None) -> ResumableLoader:
        return ResumableLoader(
            dataset,
            batch_size=self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            trainer=trainer,
            num_workers=self.num_workers,
            collate_fn=_whole_batch,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


class DigitsDataModule(_EmbeddedDataModule):
    """Serve the embedded 1,797 handwritten digits (UCI, as in scikit-learn): images (1, 8, 8), labels 0 to 9.

    The split is stratified by class: 1,257 for training, 180 for validation and 360 for testing. Pixels in [0, 1]
    become (x - mean) / std. Training images are shifted, turned and scaled at random before that, read bilinearly
    with black around them; the draws are a function of (seed, epoch, row) and nothing else. Rows that only fill up a
    process's share in evaluation have the label -100 (the row -1 in prediction).

    Args:
        batch_size: Images that one process takes at a step; the global batch is this times the world size.
        num_workers: Processes that load; 0 is fastest, as the data lie in memory.
        split_seed: Seed of the split, apart from the training seed so that runs stay comparable.
        seed: Seed of the order and of the augmentation.
        train_on_validation: Add the validation part to the training part for a final fit. The validation loader still
            serves it, so that its accuracy then says nothing about generalisation.
        num_train_labels: Size of a class-balanced subset of the training part; ``None`` takes all.
        subset_seed: Seed of that subset.
        augment: Whether training images are augmented.
        shift: Largest shift along each axis, in pixels.
        rotate: Largest turn, in degrees.
        scale: Largest relative change of scale.
        mean: Subtracted from pixels in [0, 1].
        std: Divides what is left.

    Raises:
        ValueError: A number is outside its range.

    Examples:
        >>> digits = DigitsDataModule(batch_size=32)
        >>> digits.setup()
        >>> images, labels = next(iter(digits.val_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([32, 1, 8, 8]), torch.Size([32]))
    """

    load = staticmethod(load_digits)
    test_size, val_size, image_size, white = 360, 180, 8, 16.0


class MNIST5kDataModule(_EmbeddedDataModule):
    """Serve the embedded 5,000 images of MNIST, 500 a class: images (1, 28, 28), labels 0 to 9.

    The split is stratified by class: 3,500 for training, 500 for validation and 1,000 for testing. It is a fourteenth
    of MNIST: accuracies on it are not accuracies on MNIST. The rest is as in `DigitsDataModule`.

    Args:
        shift: Largest shift along each axis, in pixels.
        kwargs: The other arguments of `DigitsDataModule`.

    Raises:
        ValueError: A number is outside its range.

    Examples:
        >>> mnist = MNIST5kDataModule(num_train_labels=100)
        >>> mnist.setup()
        >>> len(mnist.splits["train"]), len(mnist.splits["test"])
        (100, 1000)
    """

    load = staticmethod(load_mnist5k)
    test_size, val_size, image_size, white = 1000, 500, 28, 255.0

    def __init__(self, *, shift: float = 1.0, **kwargs: Any) -> None:
        super().__init__(shift=shift, **kwargs)


def balanced_subset(labels: Tensor, size: int, seed: int) -> Tensor:
    """Draw as equal numbers of each class as ``size`` allows, without repetition.

    Args:
        labels: Classes (N,).
        size: Images to draw; where the classes do not divide it, classes drawn at random get one more.
        seed: Seed of the draw.

    Returns:
        Rows (size,) in ascending order.

    Raises:
        ValueError: A class has too few images; the error names it.

    Examples:
        >>> labels = torch.tensor([0, 0, 0, 1, 1, 1])
        >>> labels[balanced_subset(labels, 4, seed=0)].tolist()
        [0, 0, 1, 1]
    """
    generator = torch.Generator().manual_seed(seed)
    classes = torch.unique(labels)
    more = torch.randperm(len(classes), generator=generator) < size % len(classes)
    rows = []
    for label, one_more in zip(classes.tolist(), more.tolist(), strict=True):
        own, wanted = (labels == label).nonzero().flatten(), size // len(classes) + one_more
        if wanted > len(own):
            raise ValueError(f"num_train_labels={size} takes {wanted} images of class {label}, which has {len(own)}")
        rows.append(own[torch.randperm(len(own), generator=generator)[:wanted]])
    return torch.cat(rows).sort().values


@dataclass(frozen=True)
class _Pixels(Dataset[Batch]):
    """Images in memory that are served, augmented and standardised a batch at a time."""

    images: Tensor
    labels: Tensor
    rows: Tensor
    mean: float
    std: float
    seed: int
    affine: dict[str, float] | None = None
    serve_rows: bool = False

    @property
    def targets(self) -> Tensor:
        """What is served beside the images (N,)."""
        return self.rows if self.serve_rows else self.labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: SampleKey) -> Batch:
        images, targets = self.__getitems__([key])
        return images[0], targets[0]

    def __getitems__(self, keys: Sequence[SampleKey]) -> Batch:
        indices = torch.tensor([key.index for key in keys])
        images = self.images[indices]
        if self.affine is not None:
            images = random_affine(images, [sample_generator(self.seed, k.epoch, k.index) for k in keys], **self.affine)
        padding = torch.tensor([key.padding for key in keys])
        targets = self.targets[indices].masked_fill(padding, -1 if self.serve_rows else PADDING)
        return (images - self.mean) / self.std, targets


def _split(table: Table, size: int, seed: int) -> tuple[Table, Table]:
    parts = table.train_test_split(test_size=size, stratify_by_column="label", seed=seed, keep_in_memory=True)
    return parts["train"], parts["test"]


def _whole_batch(batch: Batch) -> Batch:
    return batch  # __getitems__ has collated it
