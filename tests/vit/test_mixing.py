import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from lightning_iclr.vit import affine, cutmix, mixup, random_affine


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_mixup_blends_with_the_image_before_by_one_share_of_at_least_half():
    images, targets = torch.randn(5, 3, 4, 4, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    shares = []
    for seed in range(400):
        mixed, weights = mixup(images, targets, 0.2, generator(seed))
        share = weights[0, 0].item()
        for i in range(5):
            expected = share * images[i] + (1 - share) * images[i - 1]
            torch.testing.assert_close(mixed[i], expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(weights[i], share * targets[i] + (1 - share) * targets[i - 1])
        shares.append(share)
    assert min(shares) >= 0.5
    # E max(b, 1 - b) of Beta(p, p) and its deviation, by quadrature of the density
    b = (np.arange(200_000) + 0.5) / 200_000
    density = (b * (1 - b)) ** (0.2 - 1)
    density /= density.sum()
    folded = np.maximum(b, 1 - b)
    mean = (density * folded).sum()
    deviation = math.sqrt((density * (folded - mean) ** 2).sum())
    assert abs(np.mean(shares) - mean) < 4 * deviation / 20 + 0.005


def test_cutmix_pastes_one_rectangle_and_weighs_the_targets_by_its_area():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 2, 10, 12).contiguous()
    targets = torch.eye(4)
    areas = []
    for seed in range(400):
        mixed, weights = cutmix(images, targets, 1.0, generator(seed))
        pasted = mixed[1, 0] == 0
        rows, columns = pasted.any(1).nonzero().flatten(), pasted.any(0).nonzero().flatten()
        if len(rows):
            assert pasted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        for i in range(4):
            expected = torch.where(pasted, float((i - 1) % 4), float(i)).expand(2, -1, -1)
            torch.testing.assert_close(mixed[i], expected)
        area = pasted.double().mean().item()
        torch.testing.assert_close(weights, (1 - area) * targets + area * targets.roll(1, 0), rtol=0, atol=1e-6)
        areas.append(area)
    # The share is uniform; clipping at the border can only make the area smaller.
    assert 0.25 < np.mean(areas) < 0.5
    assert max(areas) > 0.8
    assert torch.equal(images[:, 0, 0, 0], torch.arange(4.0))


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_mixing_is_a_function_of_its_generator_and_refuses_what_does_not_fit(mix):
    images, targets = torch.randn(4, 1, 6, 6), torch.eye(4)
    torch.testing.assert_close(mix(images, targets, 0.5, generator(1)), mix(images, targets, 0.5, generator(1)))
    with pytest.raises(ValueError, match="p must be positive, got 0"):
        mix(images, targets, 0.0, generator())
    with pytest.raises(ValueError, match=r"targets must be class weights \(4, K\), got \(4,\)"):
        mix(images, torch.arange(4), 0.5, generator())


@pytest.mark.parametrize(("shift", "angle", "scale"), [((1.3, -0.6), 0, 1), ((0, 0), 20, 1), ((0.4, 0.2), -35, 1.25)])
def test_affine_equals_scipy_s(shift, angle, scale):
    images = torch.rand(2, 1, 9, 12, dtype=torch.float64)
    got = affine(images, *(torch.tensor([v] * 2, dtype=torch.float64) for v in (shift, angle, scale)))
    theta = math.radians(angle)
    # scipy indexes (row, column), and its axis 0 points down: counter-clockwise on screen maps output to input by
    inverse = np.array([[math.cos(theta), math.sin(theta)], [-math.sin(theta), math.cos(theta)]]) / scale
    centre = np.array([(9 - 1) / 2, (12 - 1) / 2])
    offset = centre - inverse @ (centre + np.array([shift[1], shift[0]]))
    for image, out in zip(images[:, 0].numpy(), got[:, 0].numpy(), strict=True):
        padded = np.pad(image, 3)  # scipy's own border is not black between the last pixel and the outside
        moved = ndimage.affine_transform(padded, inverse, offset + 3 - inverse @ np.array([3, 3]), order=1)
        np.testing.assert_allclose(out, moved[3:-3, 3:-3], rtol=0, atol=1e-10)


def test_a_quarter_turn_is_exact():
    images = torch.rand(1, 3, 6, 6)
    got = affine(images, torch.zeros(1, 2), torch.tensor([90.0]), torch.ones(1))
    torch.testing.assert_close(got, images.rot90(1, (2, 3)), rtol=0, atol=1e-5)


def test_an_image_s_draws_are_its_own_and_within_bounds():
    images = torch.rand(6, 1, 8, 8)
    together = random_affine(images, [generator(i) for i in range(6)], shift=1.0, rotate=8.0, scale=0.1)
    alone = torch.cat([random_affine(images[i : i + 1], [generator(i)], 1.0, 8.0, 0.1) for i in range(6)])
    torch.testing.assert_close(together, alone)
    assert torch.equal(random_affine(images, [generator(i) for i in range(6)]), affine(
        images, torch.zeros(6, 2), torch.zeros(6), torch.ones(6)))  # fmt: skip
    with pytest.raises(ValueError, match="generators must be one an image, got 2 for 6 images"):
        random_affine(images, [generator(), generator()])
