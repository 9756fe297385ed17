import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from lightning_iclr.vit import augment
from lightning_iclr.vit.augment import OPERATIONS, RandAugment, RandomResizedCrop, random_flip, resize


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(height=28, width=36, seed=0):
    """Smooth enough to be told apart after any operation, with all grey levels."""
    values = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def inverse_map(array, matrix, fill=128):
    """Nearest-pixel affine map by loops; matrix maps output (x, y) to input, both at pixel centres."""
    height, width = array.shape[:2]
    out = np.full_like(array, fill)
    for y in range(height):
        for x in range(width):
            u, v = matrix @ np.array([x + 0.5, y + 0.5, 1.0])
            if 0 <= u < width and 0 <= v < height:
                out[y, x] = array[math.floor(v), math.floor(u)]
    return out


def blend(a, b, factor):
    return np.clip(a + factor * (b.astype(float) - a), 0, 255)


def grey(x):
    """Rec. 601 luma in Pillow's fixed point."""
    r, g, b = (x[..., i].astype(np.int64) for i in range(3))
    return (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16


def both_signs(name, matrix, m=0.7):
    """Whether the operation gives one of two results, by its sign, and gives both over several draws."""
    image = picture()
    expected = {s: inverse_map(np.asarray(image), matrix(s, m, *image.size)) for s in (-1, 1)}
    seen = set()
    for seed in range(12):
        got = np.asarray(OPERATIONS[name](image, m, generator(seed)))
        # Pixels whose source lies on an edge between two may round to either.
        shares = {s: (got == e).all(axis=-1).mean() for s, e in expected.items()}
        best = max(shares, key=shares.get)
        assert shares[best] > 0.97, shares
        seen.add(best)
    assert seen == {-1, 1}


def test_there_are_the_sixteen_operations_of_the_official_code():
    assert set(OPERATIONS) == {
        "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
        "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout",
    }  # fmt: skip


def test_shears_shift_rows_or_columns_in_proportion():
    both_signs("ShearX", lambda s, m, w, h: np.array([[1, s * 0.3 * m, 0], [0, 1, 0]]))
    both_signs("ShearY", lambda s, m, w, h: np.array([[1, 0, 0], [s * 0.3 * m, 1, 0]]))


def test_translations_are_in_proportion_to_the_image():
    both_signs("TranslateX", lambda s, m, w, h: np.array([[1, 0, s * round(100 * m * w / 224)], [0, 1, 0]]))
    both_signs("TranslateY", lambda s, m, w, h: np.array([[1, 0, 0], [0, 1, s * round(100 * m * h / 224)]]))


def test_rotate_turns_about_the_centre():
    def matrix(s, m, w, h):
        angle = math.radians(s * 30 * m)
        c, d = math.cos(angle), math.sin(angle)
        return np.array([[c, -d, w / 2 - c * w / 2 + d * h / 2], [d, c, h / 2 - d * w / 2 - c * h / 2]])

    both_signs("Rotate", matrix)


@pytest.mark.parametrize("m", [0.2, 0.55, 1.0])
def test_pixelwise_operations_equal_their_formulas(m):
    image = picture()
    x = np.asarray(image).astype(int)
    expected = {
        "Invert": 255 - x,
        "Posterize": x - x % 2 ** (8 - int(4 * m)),
        "Solarize": np.where(x < int(256 * m), x, 255 - x),
        "SolarizeAdd": np.where(x < 128, np.minimum(x + int(110 * m), 255), x),
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(np.asarray(OPERATIONS[name](image, m, generator())), values, err_msg=name)


@pytest.mark.parametrize("m", [0.2, 0.55, 1.0])
def test_enhancements_blend_with_the_image_without_them(m):
    image = picture()
    x = np.asarray(image)
    factor = 0.1 + 1.8 * m
    luma = grey(x)
    smooth = x.astype(float)
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    for i in range(1, x.shape[0] - 1):
        for j in range(1, x.shape[1] - 1):
            smooth[i, j] = np.tensordot(kernel, x[i - 1 : i + 2, j - 1 : j + 2].astype(float), 2)
    without = {
        "Color": np.repeat(luma[..., None], 3, -1),
        "Contrast": np.full(x.shape, int(luma.mean() + 0.5)),
        "Brightness": np.zeros(x.shape),
        "Sharpness": np.floor(smooth + 0.5),
    }
    for name, base in without.items():
        got = np.asarray(OPERATIONS[name](image, m, generator())).astype(float)
        assert np.abs(got - blend(base, x, factor)).max() <= 2, name  # rounding, of the base and of the blend


def test_auto_contrast_stretches_each_channel_to_the_whole_range():
    x = (np.asarray(picture()) // 3 + 40).astype(np.uint8)
    got = np.asarray(OPERATIONS["AutoContrast"](Image.fromarray(x), 0.5, generator())).astype(float)
    low, high = x.min((0, 1)), x.max((0, 1))
    np.testing.assert_allclose(got, (x - low) * 255.0 / (high - low), atol=1)


def test_equalize_makes_the_grey_levels_uniform():
    x = (np.asarray(picture(64, 64).convert("L")).astype(float) ** 2 / 255).astype(np.uint8)
    got = np.asarray(OPERATIONS["Equalize"](Image.fromarray(x), 0.5, generator()))
    rank = np.searchsorted(np.sort(x.ravel()), x.ravel(), "left").reshape(x.shape) / x.size
    assert np.abs(got / 255 - rank).max() < 0.05
    assert (np.diff(got.ravel()[np.argsort(x.ravel(), kind="stable")].astype(int)) >= 0).all()


def test_cutout_greys_a_square_around_a_pixel_anywhere():
    image = Image.new("L", (112, 112))
    tops = []
    for seed in range(200):
        x = np.asarray(OPERATIONS["Cutout"](image, 1.0, generator(seed)))
        rows, columns = np.nonzero(x.any(1))[0], np.nonzero(x.any(0))[0]
        assert set(np.unique(x)) == {0, 128}
        assert (x[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == 128).all()
        assert max(len(rows), len(columns)) <= 2 * int(40 * 112 / 224) + 1
        tops.append((rows[0] == 0) + 2 * (rows[-1] == 111))
    assert {0, 1, 2} <= set(tops)


def test_operations_are_drawn_uniformly(monkeypatch):
    drawn = []
    for name in OPERATIONS:
        operation = lambda image, m, g, name=name: (drawn.append((name, m)), image)[1]  # noqa: E731
        monkeypatch.setitem(OPERATIONS, name, operation)
    augmenter, source = RandAugment(num_ops=2, magnitude=10.0), generator(3)
    for _ in range(4000):
        augmenter(Image.new("L", (2, 2)), source)
    assert len(drawn) == 8000
    assert {m for _, m in drawn} == {1.0}
    counts = np.array([sum(name == n for n, _ in drawn) for name in OPERATIONS])
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_rand_augment_is_a_function_of_its_generator_and_keeps_size_and_mode(mode):
    image, augmenter = picture().convert(mode), RandAugment(2, 10)
    seen = set()
    for seed in range(30):
        first, again = augmenter(image, generator(seed)), augmenter(image, generator(seed))
        assert (first.size, first.mode) == (image.size, mode)
        assert first.tobytes() == again.tobytes()
        seen.add(first.tobytes())
    assert len(seen) > 20


def test_crops_have_uniform_ratios_and_areas_within_bounds():
    crop, source = RandomResizedCrop((8, 8), area=(0.05, 1.0)), generator(1)
    ratios = []
    for _ in range(2000):
        left, top, right, bottom = crop.box(400, 300, source)
        assert 0 <= left < right <= 400
        assert 0 <= top < bottom <= 300
        assert 0.045 < (right - left) * (bottom - top) / 120_000 <= 1.0
        ratios.append((right - left) / (bottom - top))
    # Rounding to pixels moves a ratio of a small crop by a few hundredths at most.
    assert stats.kstest(ratios, stats.uniform(3 / 4, 7 / 12).cdf).statistic < 1.95 / math.sqrt(2000) + 0.02


def test_a_crop_s_height_is_uniform_between_its_bounds():
    crop, source = RandomResizedCrop((8, 8), area=(0.25, 1.0), ratio=(1.0, 1.0)), generator(2)
    boxes = [crop.box(1000, 1000, source) for _ in range(2000)]
    heights = [bottom - top for _, top, _, bottom in boxes]
    assert stats.kstest(heights, stats.uniform(500, 500).cdf).pvalue > 1e-4


def test_an_image_that_no_crop_fits_is_taken_whole():
    assert RandomResizedCrop((8, 8), area=(0.9, 1.0)).box(1000, 10, generator()) == (0, 0, 1000, 10)


def test_resizing_averages_the_pixels_under_each_new_one():
    x = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    got = np.asarray(resize(Image.fromarray(x), (2, 2), box=(0, 0, 64, 64))).astype(float)
    assert np.abs(got - x.reshape(2, 32, 2, 32).mean((1, 3))).max() < 12  # a triangle, not a box, of the same width


def test_half_of_the_images_are_mirrored():
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    source, mirrored = generator(), 0
    for _ in range(1000):
        got = np.asarray(random_flip(image, source))
        mirrored += got[0, 0] == 2
        np.testing.assert_array_equal(got, np.asarray(image)[:, :: -1 if got[0, 0] == 2 else 1])
    assert abs(mirrored - 500) < 4 * math.sqrt(250)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RandAugment(num_ops=-1), "num_ops must be 0 or more, got -1"),
        (lambda: RandAugment(magnitude=31), "magnitude must be between 0 and 30, got 31"),
        (lambda: RandomResizedCrop((0, 8)), r"size must be positive, got \(0, 8\)"),
        (lambda: RandomResizedCrop((8, 8), area=(0.0, 1.0)), "area must be an ascending range"),
        (lambda: RandomResizedCrop((8, 8), ratio=(2.0, 1.0)), "ratio must be an ascending range"),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_grey_is_what_an_operation_uncovers():
    assert augment.GREY == 128
