"""Shifts, turns and scalings of a batch, against scipy, exact cases and a slow loop."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from lightning_iclr.sampling import sample_generator
from lightning_iclr.vit.affine import affine, random_affine


def _one(value, size=1):
    return torch.full((size,), float(value), dtype=torch.float64)


def _apply(image, shift=(0.0, 0.0), angle=0.0, scale=1.0):
    return affine(image[None, None], torch.tensor([shift], dtype=image.dtype), _one(angle), _one(scale))[0, 0]


def test_a_shift_by_whole_pixels_moves_them_and_fills_with_zero():
    image = torch.rand(5, 7, dtype=torch.float64)
    expected = torch.zeros_like(image)
    expected[1:, 2:] = image[:-1, :-2]
    torch.testing.assert_close(_apply(image, shift=(2.0, 1.0)), expected, rtol=0, atol=1e-12)


def test_half_a_pixel_of_shift_is_the_mean_of_neighbours():
    image = torch.rand(4, 4, dtype=torch.float64)
    padded = torch.cat([torch.zeros(4, 1, dtype=torch.float64), image], dim=1)
    expected = (padded[:, :-1] + padded[:, 1:]) / 2
    torch.testing.assert_close(_apply(image, shift=(0.5, 0.0)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_equal_rot90(quarters):
    image = torch.rand(6, 6, dtype=torch.float64)
    expected = torch.rot90(image, quarters)  # counter-clockwise, as seen
    torch.testing.assert_close(_apply(image, angle=90.0 * quarters), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(9, 9), (7, 12)])
def test_any_affine_map_equals_a_slow_loop(shape):
    image = torch.rand(shape, dtype=torch.float64)
    height, width = shape
    shift, angle, scale = (0.7, -1.3), 23.0, 1.2
    expected = torch.zeros_like(image)
    turn = math.radians(angle)
    for row in range(height):
        for column in range(width):
            x, y = column - (width - 1) / 2 - shift[0], row - (height - 1) / 2 - shift[1]
            source_x = (math.cos(turn) * x - math.sin(turn) * y) / scale + (width - 1) / 2
            source_y = (math.sin(turn) * x + math.cos(turn) * y) / scale + (height - 1) / 2
            for i in (math.floor(source_y), math.floor(source_y) + 1):
                for j in (math.floor(source_x), math.floor(source_x) + 1):
                    if 0 <= i < height and 0 <= j < width:
                        weight = (1 - abs(source_y - i)) * (1 - abs(source_x - j))
                        expected[row, column] += weight * image[i, j]
    torch.testing.assert_close(_apply(image, shift, angle, scale), expected, rtol=0, atol=1e-12)


def test_random_parameters_stay_in_their_ranges_and_fill_them():
    # The centre of mass of one bright pixel moves by the shift; 400 uniform draws leave no tenth of the range empty
    # at either end except with probability 2 * 0.95^400 < 1e-8.
    image = torch.zeros(400, 1, 9, 9)
    image[..., 4, 4] = 1
    moved = random_affine(image, [sample_generator(0, 0, index) for index in range(400)], shift=2.0)
    x = (moved.sum(dim=(1, 2)) * torch.arange(-4, 5)).sum(dim=-1)
    assert x.abs().max() <= 2 + 1e-5
    assert x.max() > 1.8
    assert x.min() < -1.8


def test_random_affine_wants_a_generator_for_each_image():
    with pytest.raises(ValueError, match="generators must be one an image, got 1 for 2 images"):
        random_affine(torch.zeros(2, 1, 4, 4), [torch.Generator()])


@pytest.mark.parametrize("shape", [(11, 11), (8, 13)])
@pytest.mark.parametrize(("shift", "angle", "scale"), [((0.0, 0.0), 31.0, 1.0), ((1.6, -0.4), -75.0, 0.7)])
def test_any_affine_map_equals_scipys(shape, shift, angle, scale):
    image = torch.rand(shape, dtype=torch.float64)
    turn = math.radians(angle)
    # scipy counts (row, column): the inverse of a counter-clockwise turn, seen with rows pointing down.
    matrix = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]) / scale
    centre = (np.array(shape) - 1) / 2
    offset = centre - matrix @ (centre + np.array(shift[::-1]))
    expected = ndimage.affine_transform(image.numpy(), matrix, offset, order=1, mode="grid-constant")
    np.testing.assert_allclose(_apply(image, shift, angle, scale).numpy(), expected, atol=1e-12)


def test_an_images_draws_do_not_depend_on_its_batch():
    images = torch.rand(6, 2, 9, 9)
    arguments = {"shift": 2.0, "rotate": 30.0, "scale": 0.2}

    def moved(indices):
        return random_affine(images[indices], [sample_generator(0, 1, index) for index in indices], **arguments)

    together = moved([0, 1, 2, 3, 4, 5])
    torch.testing.assert_close(moved([4, 1]), together[[4, 1]], rtol=0, atol=1e-6)
    torch.testing.assert_close(moved([3]), together[[3]], rtol=0, atol=1e-6)
    assert not torch.allclose(together, images, atol=0.05)


def test_no_change_is_asked_for_by_default():
    images = torch.rand(2, 1, 5, 6)
    moved = random_affine(images, [sample_generator(0, 0, index) for index in range(2)])
    torch.testing.assert_close(moved, images, rtol=0, atol=1e-6)
