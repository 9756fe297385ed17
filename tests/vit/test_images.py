import io

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_iclr.vit.augment import RandomResizedCrop
from lightning_iclr.vit.images import (
    BrokenImageError,
    EvaluationTransform,
    TrainTransform,
    centre_box,
    decode,
    open_image,
    to_tensor,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


def encode(image, kind="PNG", **arguments):
    buffer = io.BytesIO()
    image.save(buffer, kind, **arguments)
    return buffer.getvalue()


def decoded(data, mode="RGB"):
    return np.asarray(decode(open_image(data), mode)).astype(int)


@pytest.mark.parametrize("source", ["path", "bytes", "dict", "array", "image"])
def test_an_image_comes_from_anything_that_holds_one(tmp_path, source):
    image = Image.fromarray(PIXELS)
    image.save(tmp_path / "x.png")
    given = {
        "path": str(tmp_path / "x.png"),
        "bytes": encode(image),
        "dict": {"bytes": None, "path": str(tmp_path / "x.png")},
        "array": PIXELS,
        "image": image,
    }[source]
    np.testing.assert_array_equal(decoded(given), PIXELS)


def test_cmyk_becomes_rgb():
    magenta = Image.new("CMYK", (8, 8), (0, 255, 0, 0))
    got = decoded(encode(magenta, "TIFF"))
    np.testing.assert_array_equal(got, np.broadcast_to([255, 0, 255], (8, 8, 3)))


def test_16_bit_grey_is_scaled_and_not_clipped():
    values = np.array([[0, 257, 32_768, 65_535]], dtype=np.uint16)
    got = decoded(encode(Image.fromarray(values)), "L")
    assert got.tolist() == [[0, 1, 128, 255]]


def test_palettes_grey_and_black_and_white_become_rgb():
    image = Image.fromarray(PIXELS).quantize(16)
    np.testing.assert_array_equal(decoded(encode(image)), np.asarray(image.convert("RGB")))
    grey = Image.fromarray(PIXELS[..., 0])
    np.testing.assert_array_equal(decoded(encode(grey)), np.repeat(PIXELS[..., :1], 3, -1))
    assert set(np.unique(decoded(encode(grey.convert("1"))))) == {0, 255}


def test_transparency_is_laid_over_white():
    rgba = np.dstack([PIXELS, np.full(PIXELS.shape[:2], 51, np.uint8)])  # a fifth
    got = decoded(encode(Image.fromarray(rgba)))
    assert np.abs(got - (0.2 * PIXELS + 0.8 * 255)).max() <= 1


def test_a_picture_on_its_side_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    got = decoded(encode(Image.fromarray(PIXELS), exif=exif))
    np.testing.assert_array_equal(got, np.rot90(PIXELS, -1))
    box = EvaluationTransform((8, 8))(open_image(encode(Image.fromarray(PIXELS), exif=exif)), torch.Generator())
    upright = EvaluationTransform((8, 8))(
        Image.fromarray(np.ascontiguousarray(np.rot90(PIXELS, -1))), torch.Generator()
    )
    torch.testing.assert_close(box, upright)


@pytest.mark.parametrize(
    "data", [encode(Image.fromarray(np.tile(PIXELS, (9, 9, 1))), "JPEG")[:-900], b"", b"not an image"]
)
def test_damaged_files_are_broken_images(data):
    with pytest.raises(BrokenImageError):
        decode(open_image(data))


@pytest.mark.parametrize("source", [None, 3.5, np.zeros((2, 2))])
def test_what_holds_no_image_is_named(source):
    with pytest.raises(BrokenImageError, match="expected a path, bytes, an image or an array of bytes; got"):
        open_image(source)


def test_a_jpeg_decoded_at_less_resolution_shows_the_same():
    smooth = Image.fromarray(PIXELS).resize((1024, 768), Image.Resampling.BICUBIC)
    data = encode(smooth, "JPEG", quality=95)
    transform = EvaluationTransform((48, 64), resize="squash", mean=0.0, std=1.0)
    fast = transform(open_image(data), torch.Generator())
    full = open_image(data)
    full.load()
    slow = transform(full.copy(), torch.Generator())  # a copy knows no format, so no draft
    assert (fast - slow).abs().max() < 0.02


def test_evaluation_shows_the_centre_of_the_official_resize():
    # 256 pixels for the shorter side and the middle 224 of it
    assert centre_box(512, 256, (224, 224)) == (144.0, 16.0, 368.0, 240.0)
    assert centre_box(300, 600, (448, 224)) == pytest.approx((18.75, 37.5, 281.25, 562.5))


def test_tensors_are_standardised_channel_by_channel():
    got = to_tensor(Image.fromarray(PIXELS), mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 1.0), (0.3, 2.0)]):
        expected = (PIXELS[..., channel] / 255 - mean) / std
        np.testing.assert_allclose(got[channel].numpy(), expected, atol=1e-6)
    ends = to_tensor(Image.fromarray(np.array([[0, 255]], np.uint8)))
    assert ends.tolist() == [[[-1.0, 1.0]]]


def test_training_crops_then_flips_and_is_a_function_of_its_generator():
    transform = TrainTransform((6, 6), crop=RandomResizedCrop((6, 6)), mean=0.0, std=1.0)
    source = Image.fromarray(PIXELS)
    for seed in range(10):
        got = transform(source, torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed)
        box = transform.crop.box(16, 12, generator)
        cut = np.asarray(source.resize((6, 6), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)) / 255
        flipped = bool(torch.randint(2, (), generator=generator))
        expected = cut[:, ::-1] if flipped else cut
        np.testing.assert_allclose(got.permute(1, 2, 0).numpy(), expected, atol=1e-6)
