"""Read image files of any kind, and turn them into a Vision Transformer's inputs."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from lightning_iclr.sampling import SampleKey, sample_generator
from lightning_iclr.vit.augment import Box, RandAugment, RandomResizedCrop, random_flip, resize

if TYPE_CHECKING:  # importing datasets takes over a second
    from datasets import Dataset as Table

Mode = Literal["RGB", "L"]
Transform = Callable[[Image.Image, torch.Generator], Tensor]
PADDING = -100  # label of rows that only fill up a process's last batch; losses and metrics ignore it

_log = logging.getLogger(__name__)
_ORIENTATION = 0x0112  # EXIF tag; from 5 on the picture lies on its side


class BrokenImageError(ValueError):
    """An image cannot be read."""


def open_image(source: Any) -> Image.Image:
    """Open an image without decoding its pixels yet.

    Args:
        source: A path, a file's bytes, a dictionary of these (``path``, ``bytes``) as ``datasets`` stores images, an
            array (H, W) or (H, W, C) of bytes, or an image.

    Raises:
        BrokenImageError: It is none of these, or no image.

    Examples:
        >>> open_image(np.zeros((2, 3), dtype=np.uint8)).size
        (3, 2)
    """
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray) and source.dtype == np.uint8:
        return Image.fromarray(source[..., 0] if source.ndim == 3 and source.shape[2] == 1 else source)
    if not isinstance(source, str | bytes):
        raise BrokenImageError(f"expected a path, bytes, an image or an array of bytes; got {type(source).__name__}")
    try:
        # Not by its path: Pillow would leave a damaged file open.
        return Image.open(io.BytesIO(source if isinstance(source, bytes) else Path(source).read_bytes()))
    except Exception as error:  # Pillow's readers raise almost anything on a damaged file
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error


def decode(image: Image.Image, mode: Mode = "RGB", share: float = 1.0) -> Image.Image:
    """Decode an opened image, turn it upright and convert it to 8 bits of ``mode``.

    - Pictures are turned as their EXIF data say; the official code ignores these.
    - 16-bit grey values are scaled (65,535 becomes 255), not clipped; 32-bit integers count as 16-bit ones.
    - Transparent pixels are laid over white, also those of palettes; dropping transparency would show hidden colours.
    - CMYK, palettes, black and white and the rest are converted by Pillow.

    Args:
        image: An image from `open_image`.
        mode: Colour or grey.
        share: Share of the resolution that is enough; a JPEG is then decoded at 1/2, 1/4 or 1/8 if that has it, several
            times as fast.

    Raises:
        BrokenImageError: The file is damaged, or has floating point pixels, whose range is unknown.

    Examples:
        >>> decode(Image.new("RGBA", (1, 1), (255, 0, 0, 0))).getpixel((0, 0))
        (255, 255, 255)
    """
    try:
        if share < 1 and image.format == "JPEG":
            image.draft(None, (math.ceil(image.width * share), math.ceil(image.height * share)))
        image.load()
        return _convert(ImageOps.exif_transpose(image), mode)
    except Exception as error:  # Pillow's readers raise almost anything on a damaged file
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error


def _convert(image: Image.Image, mode: Mode) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating point pixels have no known range; convert the image to 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    try:
        lies = image.getexif().get(_ORIENTATION, 1) >= 5
    except Exception as error:  # as in decode
        raise BrokenImageError(f"{type(error).__name__}: {error}") from error
    return (image.height, image.width) if lies else image.size


def _decode_part(image: Image.Image, mode: Mode, box: Box, size: tuple[int, int]) -> Image.Image:
    width, height = _upright_size(image)
    # Twice the pixels that are needed, as in resize(): decoding at a lower resolution would then be seen.
    share = 2 * max(size[0] / (box[3] - box[1]), size[1] / (box[2] - box[0]))
    decoded = decode(image, mode, share)
    across, down = decoded.width / width, decoded.height / height
    return resize(decoded, size, (box[0] * across, box[1] * down, box[2] * across, box[3] * down))


def to_tensor(image: Image.Image, mean: float | Sequence[float] = 0.5, std: float | Sequence[float] = 0.5) -> Tensor:
    """Map an 8-bit image to a tensor (C, H, W) of (x - mean) / std with x in [0, 1].

    Args:
        image: Image of mode ``RGB`` or ``L``.
        mean: Subtracted, one number or one a channel.
        std: Divides what is left, one number or one a channel.

    Examples:
        >>> to_tensor(Image.new("RGB", (2, 2), (0, 0, 255)))[:, 0, 0].tolist()
        [-1.0, -1.0, 1.0]
    """
    pixels = torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)
    return pixels.to(torch.float32).div_(255).sub_(_per_channel(mean)).div_(_per_channel(std)).contiguous()


def _per_channel(value: float | Sequence[float]) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32).reshape(-1, 1, 1)


@dataclass(frozen=True)
class TrainTransform:
    """Crop, mirror and augment an image at random.

    Args:
        size: Height and width of the result, in pixels.
        mode: Colour or grey.
        crop: Draws the part to show; ``None`` shows the centre, as in evaluation.
        flip: Whether to mirror half of the images left to right.
        rand_augment: Applied to the cropped image.
        mean: As in `to_tensor`.
        std: As in `to_tensor`.

    Examples:
        >>> transform = TrainTransform((8, 8), crop=RandomResizedCrop((8, 8)))
        >>> transform(Image.new("RGB", (40, 30)), torch.Generator()).shape
        torch.Size([3, 8, 8])
    """

    size: tuple[int, int]
    mode: Mode = "RGB"
    crop: RandomResizedCrop | None = None
    flip: bool = True
    rand_augment: RandAugment | None = None
    mean: float | Sequence[float] = 0.5
    std: float | Sequence[float] = 0.5

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        """Map an image from `open_image` to a tensor (C, H, W)."""
        width, height = _upright_size(image)
        box = centre_box(width, height, self.size) if self.crop is None else self.crop.box(width, height, generator)
        image = _decode_part(image, self.mode, box, self.size)
        if self.flip:
            image = random_flip(image, generator)
        if self.rand_augment is not None:
            image = self.rand_augment(image, generator)
        return to_tensor(image, self.mean, self.std)


@dataclass(frozen=True)
class EvaluationTransform:
    """Show the centre of an image, or squash the whole, with nothing random.

    Args:
        size: Height and width of the result, in pixels.
        mode: Colour or grey.
        resize: ``crop`` resizes so that 224/256 of the shorter side fills the result, and cuts out the centre;
            ``squash`` resizes the whole image and ignores its aspect ratio, as the original code does.
        mean: As in `to_tensor`.
        std: As in `to_tensor`.

    Examples:
        >>> EvaluationTransform((8, 8))(Image.new("RGB", (40, 30)), torch.Generator()).shape
        torch.Size([3, 8, 8])
    """

    size: tuple[int, int]
    mode: Mode = "RGB"
    resize: Literal["crop", "squash"] = "crop"
    mean: float | Sequence[float] = 0.5
    std: float | Sequence[float] = 0.5

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        """Map an image from `open_image` to a tensor (C, H, W)."""
        width, height = _upright_size(image)
        box = (0, 0, width, height) if self.resize == "squash" else centre_box(width, height, self.size)
        return to_tensor(_decode_part(image, self.mode, box, self.size), self.mean, self.std)


def centre_box(width: int, height: int, size: tuple[int, int]) -> Box:
    """Return the central part of an image that evaluation shows at ``size`` (height, width).

    Examples:
        >>> centre_box(512, 256, (224, 224))
        (144.0, 16.0, 368.0, 240.0)
    """
    scale = max(size[0] / height, size[1] / width) * 256 / 224
    columns, rows = size[1] / scale, size[0] / scale
    left, top = (width - columns) / 2, (height - rows) / 2
    return left, top, left + columns, top + rows


class ImageRows(Dataset[tuple[Tensor, int]]):
    """Images of a ``datasets`` table as pairs of a tensor and a label, or a row number.

    Args:
        table: Holds the images, undecoded.
        column: Its image column.
        targets: What is returned beside each image (N,).
        transform: Maps an opened image and its own generator to a tensor.
        name: What error messages call the table.
        seed: Seed of the generators, with the epoch and the row.
        padding: Target of an image that is not to be counted; ``None`` in training.
        on_error: ``raise`` stops at an image that cannot be read. ``skip`` logs and counts it, and shows the next
            readable row in training or, in evaluation, an empty image with the target ``padding``.
        blank: Shown to the transform in place of a skipped image.
    """

    def __init__(
        self,
        table: Table,
        column: str,
        targets: Tensor,
        transform: Transform,
        name: str,
        seed: int = 0,
        padding: int | None = PADDING,
        on_error: Literal["raise", "skip"] = "raise",
        blank: Image.Image | None = None,
    ) -> None:
        self.table, self.column, self.targets = table, column, targets
        self.transform, self.name, self.seed = transform, name, seed
        self.padding, self.on_error = padding, on_error
        self.blank = Image.new("RGB", (1, 1)) if blank is None else blank
        self.broken = torch.zeros(len(table), dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]  # written by worker processes too

    @property
    def skipped(self) -> int:
        """How many images could not be read so far, in all worker processes together."""
        return int(self.broken.sum())

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int]:
        index = key.index
        for _ in range(len(self) if self.padding is None else 1):
            image = self._read(index, key.epoch)
            if image is not None:
                padded = key.padding and self.padding is not None
                return image, self.padding if padded and self.padding is not None else int(self.targets[index])
            index = (index + 1) % len(self)
        if self.padding is None:
            raise BrokenImageError(f"{self.name}: not one image can be read")
        return self.transform(self.blank.copy(), sample_generator(self.seed, key.epoch, key.index)), self.padding

    def _read(self, index: int, epoch: int) -> Tensor | None:
        if self.broken[index]:
            return None
        try:
            image = open_image(self.table[index][self.column])
            return self.transform(image, sample_generator(self.seed, epoch, index))
        except BrokenImageError as error:
            message = f"{self.name}, row {index}: the image cannot be read ({error})"
            if self.on_error == "raise":
                raise BrokenImageError(f"{message}; on_error='skip' passes over it") from error
        self.broken[index] = True
        _log.warning("%s; skipped, the %d. in this data", message, self.skipped)
        return None
