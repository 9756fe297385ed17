"""Random crops, flips and RandAugment on PIL images, every draw taken from a given generator."""

from collections.abc import Callable

import torch
from PIL import Image, ImageEnhance, ImageOps

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
Operation = Callable[[Image.Image, float, torch.Generator], Image.Image]

MAX_MAGNITUDE = 10.0  # where the operations' ranges are stated
GREY = 128  # of what an operation uncovers or cuts out


class RandomResizedCrop:
    """Cut a random part out of an image and resize it (Inception's crop).

    As in the official code the aspect ratio is uniform in ``ratio`` and then the height uniform between those that give
    the least and the largest area that fits; other libraries draw the area uniformly and so crop less on average.
    Resizing is bilinear with antialiasing; the official code has none.

    Args:
        size: Height and width of the result, in pixels.
        area: Least and largest share of the image's area, in (0, 1].
        ratio: Least and largest width over height.

    Raises:
        ValueError: A range is empty or outside its bounds.

    Examples:
        >>> crop = RandomResizedCrop((8, 8))
        >>> crop(Image.new("RGB", (40, 30)), torch.Generator().manual_seed(0)).size
        (8, 8)
    """

    def __init__(
        self,
        size: tuple[int, int],
        area: tuple[float, float] = (0.05, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
    ) -> None:
        if min(size) < 1:
            raise ValueError(f"size must be positive, got {size}")
        if not 0 < area[0] <= area[1] <= 1:
            raise ValueError(f"area must be an ascending range in (0, 1], got {area}")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio must be an ascending range of positive numbers, got {ratio}")
        self.size, self.area, self.ratio = size, area, ratio

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        """Return a random part of the image at ``size``."""
        return resize(image, self.size, self.box(image.width, image.height, generator))

    def box(self, width: int, height: int, generator: torch.Generator) -> Box:
        """Draw the part to cut out of an image of this size; the whole image where none fits after ten draws."""
        for _ in range(10):
            ratio = _uniform(*self.ratio, generator)
            least, largest = ((share * width * height / ratio) ** 0.5 for share in self.area)
            largest = min(largest, height, width / ratio)
            if least <= largest:
                rows = max(1, round(_uniform(least, largest, generator)))
                columns = min(width, max(1, round(rows * ratio)))
                left = _integer(width - columns + 1, generator)
                top = _integer(height - rows + 1, generator)
                return left, top, left + columns, top + rows
        return 0, 0, width, height


def resize(image: Image.Image, size: tuple[int, int], box: Box | None = None) -> Image.Image:
    """Resize an image, or its part ``box``, to ``size`` (height, width), bilinearly with antialiasing.

    Examples:
        >>> resize(Image.new("L", (40, 30)), size=(6, 8)).size
        (8, 6)
    """
    # The gap lets Pillow average whole blocks of pixels first, which is faster and hardly visible at twice the size.
    return image.resize(size[::-1], Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)


def random_flip(image: Image.Image, generator: torch.Generator) -> Image.Image:
    """Mirror an image left to right with probability 1/2.

    Examples:
        >>> image = Image.new("L", (2, 1))
        >>> random_flip(image, torch.Generator().manual_seed(0)).size
        (2, 1)
    """
    return ImageOps.mirror(image) if _integer(2, generator) else image


class RandAugment:
    """Apply ``num_ops`` operations, each drawn uniformly from 16, at one strength (Cubuk et al., 2020).

    With m = magnitude / 10 the operations are, as in the official Vision Transformer code:

    - AutoContrast, Equalize, Invert: no strength.
    - Rotate by 30m degrees, ShearX and ShearY by 0.3m, TranslateX and TranslateY by 100m/224 of the width and height;
      each to either side at even odds, nearest pixel.
    - Posterize keeps the upper int(4m) bits, Solarize inverts pixels from int(256m) on: both are stronger the lower
      the magnitude, and at 10 Solarize changes nothing.
    - SolarizeAdd adds int(110m) to pixels below 128.
    - Color, Contrast, Brightness and Sharpness blend with the image without it, by the factor 0.1 + 1.8m.
    - Cutout greys a square of half side int(40m * short side / 224) around a pixel drawn uniformly.

    Uncovered and cut-out pixels become grey (128). Two departures from the official code: its translations and cutouts
    are 100m and 40m pixels whatever the size, which is the same at 224 only and would blank small images; its Contrast
    blends with (number of pixels) / 256 in place of the mean grey, an oversight.

    Args:
        num_ops: Operations to apply to an image, one after another; the same may be drawn twice.
        magnitude: Strength of all of them, in [0, 30]; 10 is the usual.

    Raises:
        ValueError: A number is outside its range.

    Examples:
        >>> augment = RandAugment(num_ops=2, magnitude=10.0)
        >>> augment(Image.new("RGB", (16, 16)), torch.Generator().manual_seed(0)).size
        (16, 16)
    """

    def __init__(self, num_ops: int = 2, magnitude: float = 10.0) -> None:
        if num_ops < 0:
            raise ValueError(f"num_ops must be 0 or more, got {num_ops}")
        if not 0 <= magnitude <= 30:
            raise ValueError(f"magnitude must be between 0 and 30, got {magnitude}")
        self.num_ops, self.magnitude = num_ops, magnitude

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        """Return an augmented image of the same size and mode, ``RGB`` or ``L``."""
        for _ in range(self.num_ops):
            operation = list(OPERATIONS.values())[_integer(len(OPERATIONS), generator)]
            image = operation(image, self.magnitude / MAX_MAGNITUDE, generator)
        return image


def _rotate(image: Image.Image, m: float, generator: torch.Generator) -> Image.Image:
    return image.rotate(_sign(generator) * 30 * m, fillcolor=_grey(image))


def _shear_x(image: Image.Image, m: float, generator: torch.Generator) -> Image.Image:
    return _affine(image, (1, _sign(generator) * 0.3 * m, 0, 0, 1, 0))


def _shear_y(image: Image.Image, m: float, generator: torch.Generator) -> Image.Image:
    return _affine(image, (1, 0, 0, _sign(generator) * 0.3 * m, 1, 0))


def _translate_x(image: Image.Image, m: float, generator: torch.Generator) -> Image.Image:
    return _affine(image, (1, 0, _sign(generator) * round(100 * m * image.width / 224), 0, 1, 0))


def _translate_y(image: Image.Image, m: float, generator: torch.Generator) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, _sign(generator) * round(100 * m * image.height / 224)))


def _posterize(image: Image.Image, m: float, generator: torch.Generator) -> Image.Image:
    dropped = 8 - min(8, int(4 * m))
    return _lookup(image, [value >> dropped << dropped for value in range(256)])


def _solarize(image: Image.Image, m: float, generator: torch.Generator) -> Image.Image:
    return _lookup(image, [value if value < int(256 * m) else 255 - value for value in range(256)])


def _solarize_add(image: Image.Image, m: float, generator: torch.Generator) -> Image.Image:
    return _lookup(image, [min(255, value + int(110 * m)) if value < 128 else value for value in range(256)])


def _cutout(image: Image.Image, m: float, generator: torch.Generator) -> Image.Image:
    half = int(40 * m * min(image.size) / 224)
    x, y = _integer(image.width, generator), _integer(image.height, generator)
    image = image.copy()
    image.paste(
        _grey(image), (max(0, x - half), max(0, y - half), min(image.width, x + half), min(image.height, y + half))
    )
    return image


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda image, m, generator: kind(image).enhance(0.1 + 1.8 * m)


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda image, m, generator: ImageOps.autocontrast(image),
    "Equalize": lambda image, m, generator: ImageOps.equalize(image),
    "Invert": lambda image, m, generator: ImageOps.invert(image),
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Cutout": _cutout,
}


def _affine(image: Image.Image, coefficients: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, fillcolor=_grey(image))


def _lookup(image: Image.Image, table: list[int]) -> Image.Image:
    return image.point(table * len(image.getbands()))


def _grey(image: Image.Image) -> int | tuple[int, ...]:
    bands = len(image.getbands())
    return GREY if bands == 1 else (GREY,) * bands


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def _integer(bound: int, generator: torch.Generator) -> int:
    return int(torch.randint(bound, (), generator=generator))


def _sign(generator: torch.Generator) -> int:
    return 2 * _integer(2, generator) - 1
