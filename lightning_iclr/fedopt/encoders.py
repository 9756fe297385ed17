"""Turn a data set's columns into the tensors that the paper's tasks train on, as the original code prepares them.

An encoder is a callable from columns to tensors: it gets a dictionary of column name to the values of some rows, and
returns a tuple of tensors with one entry a row. That is done once, in memory. What else it may have is optional, so
that a plain function is an encoder too:

- ``columns``: the columns that it reads, by the name of the argument that sets each;
- ``fit(table)``: returns an encoder that has learned from the training rows, such as a vocabulary;
- ``serve(tensors, generators)``: makes a batch of encoded rows, the inputs first and the targets last, with one random
  generator a row in training where ``augments`` is true, and ``None`` otherwise;
- ``in_memory``: false where the tensors of all rows would be too large, so that each batch is encoded by itself;
- ``class_names`` and ``decode(tokens)``: names of the classes, and texts of tokens, for files of predictions.

Letters: B rows, C channels, H and W pixels. Text is in `text_encoders`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

Columns = Mapping[str, Any]


class Expanded(NamedTuple):
    """What an encoder returns that makes any number of examples of a row.

    Attributes:
        tensors: The examples, each with one entry an example.
        rows: The row of each example (E,), in ascending order.
    """

    tensors: tuple[Tensor, ...]
    rows: Tensor


@dataclass(frozen=True)
class ImageEncoder:
    """Encode images (B, C, H, W) and their classes.

    Pixels are divided by the largest, ``white``; then (x - mean) / std. With ``standardize`` each image is brought to
    mean 0 and standard deviation 1 by itself, after cropping, and the deviation counts as at least that of
    1 / sqrt(C * H * W) grey values, as in the original code for CIFAR. Training images are cropped and mirrored at
    random, all others are cropped in the centre (of an odd margin the smaller half comes first).

    Args:
        image_column: Column of images: pictures, or arrays (H, W), (H, W, C) or (C, H, W).
        label_column: Column of classes from 0; ``None`` for images without, whose labels are then all 0.
        white: The largest pixel.
        mean: Subtracted from pixels in [0, 1]: one number, or one a channel.
        std: Divides what is left: one number, or one a channel.
        standardize: Standardise each image by itself, in place of ``mean`` and ``std``.
        invert: Show 1 - x, so that EMNIST's ink is bright, as the original does for its autoencoder.
        crop: Height and width that are cut out; ``None`` keeps all.
        flip: Whether to mirror half of the training images.
        image_size: Height and width that pictures are resized to before all else; ``None`` leaves them.
        in_channels: 1 or 3 converts pictures to grey or colour; ``None`` leaves them.

    Raises:
        ValueError: A number is outside its range.

    Examples:
        >>> encode = ImageEncoder(crop=2)
        >>> tensors = encode({"image": [np.zeros((4, 4, 3), np.uint8)], "label": [7]})
        >>> [tensor.shape for tensor in encode.serve(tensors, None)]
        [torch.Size([1, 3, 2, 2]), torch.Size([1])]
    """

    image_column: str = "image"
    label_column: str | None = "label"
    white: float = 255.0
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    standardize: bool = False
    invert: bool = False
    crop: int | None = None
    flip: bool = False
    image_size: int | None = None
    in_channels: int | None = None

    def __post_init__(self) -> None:
        for name in ("crop", "image_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if self.in_channels not in (None, 1, 3):
            raise ValueError(f"in_channels must be 1, 3 or None, got {self.in_channels}")
        for name in ("white", "std"):
            if min(_tuple(getattr(self, name))) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are read, by argument."""
        named = {"image_column": self.image_column, "label_column": self.label_column}
        return {argument: column for argument, column in named.items() if column is not None}

    @property
    def augments(self) -> bool:
        """Whether training images are drawn at random."""
        return self.flip or self.crop is not None

    def __call__(self, columns: Columns) -> tuple[Tensor, ...]:
        """Return the pixels as they are (B, C, H, W) and the labels (B,)."""
        images = [self._pixels(image) for image in columns[self.image_column]]
        shapes = sorted({image.shape for image in images})
        if len(shapes) > 1:
            raise ValueError(
                f"image_column={self.image_column!r} must hold images of one shape, got {shapes[0]} and {shapes[1]}; "
                "set image_size and in_channels"
            )
        pixels = torch.from_numpy(np.stack(images))
        if self.crop is not None and self.crop > min(pixels.shape[-2:]):
            raise ValueError(f"crop must fit into images of {tuple(pixels.shape[-2:])} pixels, got {self.crop}")
        if self.label_column is None:
            return pixels, torch.zeros(len(pixels), dtype=torch.int64)
        return pixels, self._labels(columns[self.label_column])

    def serve(self, tensors: tuple[Tensor, ...], generators: Sequence[Generator] | None) -> tuple[Tensor, ...]:
        """Return images (B, C, H, W) and labels (B,)."""
        pixels, labels = tensors
        if self.augments:
            pixels = self._augment(pixels, generators) if generators is not None else self._centre(pixels)
        images = pixels.float()
        if self.standardize:
            least = images[0].numel() ** -0.5 * self.white / 255
            std, mean = torch.std_mean(images, dim=(1, 2, 3), correction=0, keepdim=True)
            images = (images - mean) / std.clamp_min(least)
            images = -images if self.invert else images
        else:
            images = images / self.white
            images = 1 - images if self.invert else images
            mean, std = (torch.tensor(_tuple(numbers)).view(-1, 1, 1) for numbers in (self.mean, self.std))
            images = (images - mean) / std
        return images, labels

    def _pixels(self, image: Any) -> np.ndarray:
        from PIL import Image

        if isinstance(image, Image.Image):
            mode = {1: "L", 3: "RGB", None: "L" if image.mode in ("1", "L") else "RGB"}[self.in_channels]
            image = image if image.mode == mode else image.convert(mode)
        elif self.image_size is not None or self.in_channels is not None:
            raise ValueError(
                f"image_size and in_channels need pictures in image_column={self.image_column!r}, got "
                f"{type(image).__name__}"
            )
        if self.image_size is not None:
            image = image.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
        array = np.asarray(image)
        if array.dtype.kind in "iu" and array.dtype != np.uint8:  # lists; larger integers than 255 stay exact
            array = array.astype(np.uint8 if self.white <= 255 else np.float32)
        elif array.dtype.kind == "f":
            array = array.astype(np.float32)
        if array.ndim == 2:
            return array[None]
        if array.ndim != 3:
            raise ValueError(f"image_column={self.image_column!r} must hold images, got an array of {array.shape}")
        return array if array.shape[0] in (1, 3) else np.ascontiguousarray(array.transpose(2, 0, 1))

    def _labels(self, values: Sequence[Any]) -> Tensor:
        labels = np.asarray(values)
        if labels.dtype.kind not in "iub" or (len(labels) and labels.min() < 0):
            raise ValueError(
                f"label_column={self.label_column!r} must hold classes from 0, got {values[0]!r}; "
                "datasets.Dataset.class_encode_column turns names into numbers"
            )
        return torch.from_numpy(labels.astype(np.int64))

    def _centre(self, pixels: Tensor) -> Tensor:
        if self.crop is None:
            return pixels
        top, left = ((side - self.crop) // 2 for side in pixels.shape[-2:])
        return pixels[..., top : top + self.crop, left : left + self.crop]

    def _augment(self, pixels: Tensor, generators: Sequence[Generator]) -> Tensor:
        height, width = pixels.shape[-2:]
        size = self.crop
        views = []
        for image, generator in zip(pixels, generators, strict=True):
            if size is not None:
                top = int(torch.randint(height - size + 1, (), generator=generator))
                left = int(torch.randint(width - size + 1, (), generator=generator))
                image = image[:, top : top + size, left : left + size]
            if self.flip and float(torch.rand((), generator=generator)) < 0.5:
                image = image.flip(-1)
            views.append(image)
        return torch.stack(views)


def _tuple(numbers: float | Sequence[float]) -> tuple[float, ...]:
    return (float(numbers),) if isinstance(numbers, int | float) else tuple(numbers)
