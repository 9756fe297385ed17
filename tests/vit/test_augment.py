"""Random crops, flips and the operations of RandAugment, against numpy by hand."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_iclr.vit import augment
from lightning_iclr.vit.augment import OPERATIONS, RandAugment, RandomResizedCrop, random_flip, resize

WIDTH, HEIGHT = 24, 20


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def picture():
    # Smooth with some noise, and with neither black nor white, so that every operation changes it.
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    ramps = np.stack([60 + 5 * columns, 200 - 6 * rows, 40 + 3 * (rows + columns)], axis=-1)
    noise = np.random.default_rng(0).integers(-9, 10, ramps.shape)
    return (ramps + noise).clip(20, 230).astype(np.uint8)


def _apply(name, pixels, m, seed=0):
    result = OPERATIONS[name](Image.fromarray(pixels), m, _generator(seed))
    assert result.size == (pixels.shape[1], pixels.shape[0])
    return np.asarray(result)


def _channels(function, pixels):
    return np.stack([function(pixels[..., channel]) for channel in range(pixels.shape[2])], axis=-1)


def _stretched(values):
    low, high = int(values.min()), int(values.max())
    return (values.astype(float) - low) * 255 / (high - low)


def _equalized(values):
    counts = np.bincount(values.reshape(-1), minlength=256)
    step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
    below = counts.cumsum() - counts
    return ((below + step // 2) // step).clip(0, 255)[values]


def _grey(pixels):
    return pixels @ np.array([0.299, 0.587, 0.114])


def _smooth(values):
    result = values.astype(float)
    for row in range(1, values.shape[0] - 1):
        for column in range(1, values.shape[1] - 1):
            window = values[row - 1 : row + 2, column - 1 : column + 2].astype(float)
            result[row, column] = round((window.sum() + 4 * window[1, 1]) / 13)
    return result


def _blend(degenerate, pixels, m):
    return (degenerate + (0.1 + 1.8 * m) * (pixels.astype(float) - degenerate)).clip(0, 255)


REFERENCES = {
    "AutoContrast": lambda x, m: _channels(_stretched, x),
    "Invert": lambda x, m: 255 - x.astype(int),
    "Posterize": lambda x, m: x & {1.0: 0b11110000, 0.5: 0b11000000}[m],
    "Solarize": lambda x, m: np.where(x < {1.0: 256, 0.5: 128}[m], x, 255 - x.astype(int)),
    "SolarizeAdd": lambda x, m: np.where(x < 128, np.minimum(x.astype(int) + {1.0: 110, 0.5: 55}[m], 255), x),
    "Color": lambda x, m: _blend(_grey(x).round()[..., None], x, m),
    "Contrast": lambda x, m: _blend(np.full_like(x, round(_grey(x).mean()), dtype=float), x, m),
    "Brightness": lambda x, m: _blend(np.zeros(x.shape), x, m),
    "Sharpness": lambda x, m: _blend(_channels(_smooth, x), x, m),
}
EXACT = {"Invert", "Posterize", "Solarize", "SolarizeAdd"}


@pytest.mark.parametrize("m", [1.0, 0.5])
@pytest.mark.parametrize("name", REFERENCES)
def test_an_operation_on_colours_equals_numpy_by_hand(name, m, picture):
    result = _apply(name, picture, m).astype(float)
    difference = np.abs(result - REFERENCES[name](picture, m))
    # Pillow truncates where the reference rounds, also the grey that the factor of up to 0.9 then multiplies.
    assert difference.max() <= (0 if name in EXACT else 2)
    if (name, m) not in {("Solarize", 1.0)}:
        assert (result != picture).mean() > 0.05 or m == 0.5


def test_equalize_equals_numpy_by_hand():
    # Pillow's table is of whole numbers of pixels, so the picture needs many more than 255.
    pixels = np.random.default_rng(0).normal(120, 20, (60, 50, 3)).clip(0, 255).astype(np.uint8)
    np.testing.assert_array_equal(_apply("Equalize", pixels, 1.0), _channels(_equalized, pixels))


def _moved(pixels, matrix, offset):
    """Read the input at matrix (x, y) + offset from pixel centres; return also where rounding cannot matter."""
    height, width = pixels.shape[:2]
    result, sure = np.full_like(pixels, 128), np.ones((height, width), dtype=bool)
    for row in range(height):
        for column in range(width):
            x, y = np.asarray(matrix) @ (column + 0.5, row + 0.5) + offset
            sure[row, column] = min(abs(x - round(x)), abs(y - round(y))) > 1e-3
            if 0 <= x < width and 0 <= y < height:
                result[row, column] = pixels[math.floor(y), math.floor(x)]
    return result, sure


def _rotation(sign, m):
    angle = math.radians(30 * m * sign)
    # The y axis points down and the map leads from the output to the input.
    matrix = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    centre = np.array([WIDTH / 2, HEIGHT / 2])
    return matrix, centre - matrix @ centre


MAPS = {
    "Rotate": _rotation,
    "ShearX": lambda sign, m: (np.array([[1, 0.3 * m * sign], [0, 1]]), np.zeros(2)),
    "ShearY": lambda sign, m: (np.array([[1, 0], [0.3 * m * sign, 1]]), np.zeros(2)),
    "TranslateX": lambda sign, m: (np.eye(2), np.array([sign * round(WIDTH * m * 100 / 224) + 1e-2, 1e-2])),
    "TranslateY": lambda sign, m: (np.eye(2), np.array([1e-2, sign * round(HEIGHT * m * 100 / 224) + 1e-2])),
}


@pytest.mark.parametrize("m", [1.0, 0.4])
@pytest.mark.parametrize("name", MAPS)
def test_a_movement_equals_a_slow_loop_to_either_side_at_even_odds(name, m, picture):
    expected = {sign: _moved(picture, *MAPS[name](sign, m)) for sign in (-1, 1)}
    signs = []
    for seed in range(100):
        result = _apply(name, picture, m, seed)
        fits = [sign for sign, (pixels, sure) in expected.items() if np.array_equal(result[sure], pixels[sure])]
        assert len(fits) == 1
        signs += fits
    assert abs(sum(signs)) <= 4 * math.sqrt(100)


def test_cutout_greys_a_square_around_a_uniform_pixel(picture):
    half = 3  # int(40 * 20 / 224)
    lefts, tops = [], []
    for seed in range(300):
        result = _apply("Cutout", picture, 1.0, seed)
        ys, xs = np.nonzero((result != picture).any(axis=-1))
        assert (result[ys, xs] == 128).all()
        lefts.append(xs.min())
        tops.append(ys.min())
        # The square's side, less what sticks out; pixels that were grey before cannot hide a whole row of it.
        assert len(xs) == (xs.max() - xs.min() + 1) * (ys.max() - ys.min() + 1)
        inside = xs.min() > 0 and ys.min() > 0 and xs.max() < WIDTH - 1 and ys.max() < HEIGHT - 1
        assert len(xs) == 4 * half * half if inside else len(xs) <= 4 * half * half
    for starts, length in ((lefts, WIDTH), (tops, HEIGHT)):
        expected = np.maximum(np.arange(length) - half, 0)
        assert abs(np.mean(starts) - expected.mean()) < 4 * expected.std() / math.sqrt(300)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_keeps_grey_images_grey_and_equal_to_coloured_ones(name, picture):
    grey = picture[..., 0]
    result = OPERATIONS[name](Image.fromarray(grey), 1.0, _generator(3))
    assert result.mode == "L"
    np.testing.assert_allclose(
        np.asarray(result).astype(int), _apply(name, np.stack([grey] * 3, axis=-1), 1.0, 3)[..., 1], atol=1
    )


@pytest.mark.parametrize("magnitude", [0.0, 10.0, 30.0])
def test_rand_augment_keeps_size_and_mode_at_any_magnitude(magnitude, picture):
    image = Image.fromarray(picture)
    for name, operation in OPERATIONS.items():
        result = operation(image, magnitude / 10, _generator())
        assert (result.size, result.mode) == (image.size, "RGB"), name


def test_the_operations_are_the_official_sixteen():
    assert set(OPERATIONS) == {*REFERENCES, *MAPS, "Equalize", "Cutout"}
    assert len(OPERATIONS) == 16


def test_rand_augment_draws_each_operation_equally_often(monkeypatch):
    drawn = []

    def recorder(name):
        def record(image, m, generator):
            drawn.append((name, m))
            return image

        return record

    monkeypatch.setattr(augment, "OPERATIONS", {name: recorder(name) for name in OPERATIONS})
    generator, image = _generator(), Image.new("L", (1, 1))
    for _ in range(4000):
        RandAugment(2, 7.0)(image, generator)
    counts = Counter(name for name, _ in drawn)
    assert {m for _, m in drawn} == {0.7}
    assert sum(counts.values()) == 8000
    sigma = math.sqrt(8000 * (1 / 16) * (15 / 16))
    assert all(abs(counts[name] - 500) < 4 * sigma for name in OPERATIONS)
    # Successive draws are independent: a sixteenth of the images get the same operation twice.
    twice = sum(first == second for first, second in zip(drawn[::2], drawn[1::2], strict=True))
    assert abs(twice - 250) < 4 * math.sqrt(4000 * (1 / 16) * (15 / 16))


def test_rand_augment_is_a_function_of_its_generator_alone(picture):
    image = Image.fromarray(picture)
    torch.manual_seed(1)
    first = [RandAugment(2, 10)(image, _generator(seed)).tobytes() for seed in range(20)]
    torch.manual_seed(2)
    again = [RandAugment(2, 10)(image, _generator(seed)).tobytes() for seed in range(20)]
    assert first == again
    assert len(set(first)) > 15
    np.testing.assert_array_equal(np.asarray(image), picture)  # the original is left as it was


def test_crops_stay_within_the_image_and_the_ranges():
    crop, generator = RandomResizedCrop((8, 8), (0.1, 0.6), (0.5, 1.5)), _generator()
    for width, height in ((200, 100), (90, 301), (128, 128)):
        for _ in range(100):
            left, top, right, bottom = crop.box(width, height, generator)
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            columns, rows = right - left, bottom - top
            # Rounding moves each side by half a pixel at most.
            assert (columns - 0.5) * (rows - 0.5) <= 0.6 * width * height
            assert (columns + 1) * (rows + 1) >= 0.1 * width * height
            assert (columns - 1) / (rows + 1) <= 1.5
            assert (columns + 1) / (rows - 1) >= 0.5


def test_crops_have_uniform_aspect_ratios_heights_and_places():
    # In a large square no draw is cut short: the height times sqrt(ratio) is uniform between the roots of the areas.
    crop, generator, count = RandomResizedCrop((8, 8), (0.05, 0.4)), _generator(), 2000
    left, top, right, bottom = np.array([crop.box(10_000, 10_000, generator) for _ in range(count)]).T
    ratio, rows = (right - left) / (bottom - top), bottom - top
    for values, low, high in (
        (ratio, 3 / 4, 4 / 3),
        (rows * np.sqrt(ratio), 10_000 * math.sqrt(0.05), 10_000 * math.sqrt(0.4)),
        (left / (10_000 - (right - left)), 0, 1),
        (top / (10_000 - rows), 0, 1),
    ):
        sigma = (high - low) / math.sqrt(12)
        assert abs(values.mean() - (low + high) / 2) < 4 * sigma / math.sqrt(count)
        # A uniform draw's standard deviation, whose own is sigma * sqrt((9/5 - 1) / 4n).
        assert abs(values.std() - sigma) < 4 * sigma * math.sqrt(0.2 / count)


def test_the_whole_image_is_shown_where_no_crop_fits():
    assert RandomResizedCrop((8, 8), (1.0, 1.0), (1.0, 1.0)).box(100, 10, _generator()) == (0, 0, 100, 10)
    assert RandomResizedCrop((8, 8)).box(1, 1, _generator()) == (0, 0, 1, 1)


def test_a_crop_shows_its_box():
    # On a plane every interior pixel of the result is the plane's value at its centre in the source.
    rows, columns = np.mgrid[:120, :160]
    image = Image.fromarray((columns + 0.5 * rows).round().astype(np.uint8))
    crop = RandomResizedCrop((10, 12), (0.3, 0.8))
    left, top, right, bottom = crop.box(160, 120, _generator(4))
    result = np.asarray(crop(image, _generator(4)))
    x = left + (np.arange(12) + 0.5) * (right - left) / 12 - 0.5
    y = top + (np.arange(10) + 0.5) * (bottom - top) / 10 - 0.5
    assert result.shape == (10, 12)
    np.testing.assert_allclose(result[1:-1, 1:-1], (x + 0.5 * y[:, None])[1:-1, 1:-1], atol=1.5)


def test_resizing_to_the_same_size_changes_nothing(picture):
    np.testing.assert_array_equal(np.asarray(resize(Image.fromarray(picture), (HEIGHT, WIDTH))), picture)


def test_half_of_the_images_are_mirrored(picture):
    image, generator = Image.fromarray(picture), _generator()
    results = [np.asarray(random_flip(image, generator)) for _ in range(1000)]
    mirrored = [np.array_equal(result, picture[:, ::-1]) for result in results]
    assert all(flag or np.array_equal(result, picture) for flag, result in zip(mirrored, results, strict=True))
    assert abs(sum(mirrored) - 500) < 4 * math.sqrt(250)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomResizedCrop((0, 8)), "size must be positive, got \\(0, 8\\)"),
        (lambda: RandomResizedCrop((8, 8), area=(0.0, 1.0)), "area must be an ascending range in"),
        (lambda: RandomResizedCrop((8, 8), area=(0.5, 0.4)), "area must be an ascending range in"),
        (lambda: RandomResizedCrop((8, 8), ratio=(2.0, 1.0)), "ratio must be an ascending range"),
        (lambda: RandAugment(-1), "num_ops must be 0 or more, got -1"),
        (lambda: RandAugment(2, 31), "magnitude must be between 0 and 30, got 31"),
    ],
)
def test_a_range_that_is_none_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
