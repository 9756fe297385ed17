import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from lightning_iclr.vit.positions import resize_position_embedding, sincos2d


@pytest.mark.parametrize(("old", "new"), [((4, 4), (7, 7)), ((14, 14), (24, 24)), ((3, 5), (6, 4)), ((6, 2), (3, 7))])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_the_official_resizing_is_scipy_s_linear_zoom(old, new, prefix):
    positions = torch.randn(1, prefix + old[0] * old[1], 6, dtype=torch.float64)
    resized = resize_position_embedding(positions, old, new, num_prefix_tokens=prefix)
    assert torch.equal(resized[:, :prefix], positions[:, :prefix])
    grid = positions[0, prefix:].view(*old, 6).numpy()
    zoomed = ndimage.zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1)
    expected = torch.from_numpy(zoomed).reshape(-1, 6)
    torch.testing.assert_close(resized[0, prefix:], expected, rtol=0, atol=1e-12)


def test_equal_grids_leave_the_embedding_alone():
    positions = torch.randn(1, 13, 4)
    assert resize_position_embedding(positions, (3, 4), (3, 4)) is positions


def test_bilinear_resizing_reads_between_the_centres_of_patches():
    (height, width), (rows, columns) = (6, 5), (4, 9)
    positions = torch.randn(1, height * width, 3, dtype=torch.float64)
    resized = resize_position_embedding(positions, (height, width), (rows, columns), 0, mode="bilinear")
    grid = positions.view(height, width, 3)
    for row, column in itertools.product(range(rows), range(columns)):
        y = min(max((row + 0.5) * height / rows - 0.5, 0), height - 1)
        x = min(max((column + 0.5) * width / columns - 0.5, 0), width - 1)
        expected = sum(
            max(1 - abs(i - y), 0) * max(1 - abs(j - x), 0) * grid[i, j]
            for i, j in itertools.product(range(height), range(width))
        )
        torch.testing.assert_close(resized[0, row * columns + column], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("mode", "arguments"),
    [
        ("bicubic", {"mode": "bicubic", "align_corners": False}),
        ("bicubic_antialias", {"mode": "bicubic", "align_corners": False, "antialias": True}),
    ],
)
def test_the_cubic_modes_are_torch_s_on_the_grid_of_patches(mode, arguments):
    positions = torch.randn(1, 36, 3, dtype=torch.float64)
    image = positions.view(6, 6, 3).permute(2, 0, 1)[None]
    expected = F.interpolate(image, (4, 9), **arguments)[0].flatten(1).T
    resized = resize_position_embedding(positions, (6, 6), (4, 9), num_prefix_tokens=0, mode=mode)
    torch.testing.assert_close(resized[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["bilinear_corners", "bilinear", "bicubic", "bicubic_antialias"])
def test_half_precision_is_rounded_once_after_interpolating(mode, dtype):
    positions = torch.randn(1, 1 + 14 * 14, 8).to(dtype)
    expected = resize_position_embedding(positions.float(), (14, 14), (24, 24), mode=mode).to(dtype)
    resized = resize_position_embedding(positions, (14, 14), (24, 24), mode=mode)
    assert resized.dtype == dtype
    assert torch.equal(resized, expected)


def test_fixed_positions_are_sines_and_cosines_of_column_and_row():
    dim, grid = 12, (2, 5)
    table = sincos2d(dim, grid, dtype=torch.float64)
    assert table.shape == (10, dim)
    assert sincos2d(dim, grid).dtype == torch.float32
    for row, column in itertools.product(*map(range, grid)):
        expected = np.zeros(dim)
        for i in range(dim // 4):
            frequency = 10_000 ** -(i / (dim // 4 - 1))
            expected[i], expected[3 + i] = np.sin(column * frequency), np.cos(column * frequency)
            expected[6 + i], expected[9 + i] = np.sin(row * frequency), np.cos(row * frequency)
        np.testing.assert_allclose(table[row * grid[1] + column].numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"old_grid": (2, 3)}, r"position_embedding must be \(1, 7, D\) for old_grid \(2, 3\).*got \(1, 5, 8\)"),
        ({"new_grid": (0, 3)}, r"new_grid must be two numbers of at least 1 .*got \(0, 3\)"),
        ({"mode": "nearest"}, "mode must be one of .*'bilinear_corners'.*got 'nearest'"),
        ({"num_prefix_tokens": -1}, "num_prefix_tokens must be 0 or more, got -1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        resize_position_embedding(torch.zeros(1, 5, 8), **{"old_grid": (2, 2), "new_grid": (3, 3), **arguments})


def test_fixed_positions_need_a_width_of_quarters():
    with pytest.raises(ValueError, match="dim must be .*4.*got 10"):
        sincos2d(10, (2, 2))
