"""Mixup and CutMix against slow loops, and their draws against the Beta distribution."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_iclr.vit.mixing import cutmix, mixup


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _batch(size=5, height=9, width=7):
    return torch.rand(size, 3, height, width, dtype=torch.float64), torch.eye(size, dtype=torch.float64)


def test_mixup_equals_a_slow_loop():
    images, targets = _batch()
    mixed, weights = mixup(images, targets, p=0.4, generator=_generator())
    share = float(weights[0, 0])
    assert 0.5 <= share < 1
    for index in range(5):
        before = index - 1 if index else 4
        expected = share * images[index] + (1 - share) * images[before]
        torch.testing.assert_close(mixed[index], expected, rtol=0, atol=1e-12)
        row = torch.zeros(5, dtype=torch.float64)
        row[index], row[before] = share, 1 - share
        torch.testing.assert_close(weights[index], row, rtol=0, atol=1e-12)


@pytest.mark.parametrize("p", [0.2, 1.0, 3.0])
def test_the_share_of_mixup_is_the_larger_part_of_a_beta_draw(p):
    images, targets = torch.zeros(2, 1, 1, 1), torch.eye(2)
    generator, count = _generator(), 3000
    shares = np.array([float(mixup(images, targets, p, generator)[1][0, 0]) for _ in range(count)])
    mean = stats.beta.expect(lambda b: np.maximum(b, 1 - b), (p, p))
    square = stats.beta.expect(lambda b: np.maximum(b, 1 - b) ** 2, (p, p))
    assert abs(shares.mean() - mean) < 4 * math.sqrt((square - mean**2) / count)
    assert shares.min() >= 0.5
    # Kolmogorov-Smirnov: folded at 1/2, the distribution function is 2 F(x) - 1.
    assert stats.kstest(shares, lambda x: 2 * stats.beta.cdf(x, p, p) - 1).pvalue > 1e-4


def test_cutmix_pastes_one_rectangle_of_the_image_before_and_weighs_by_area():
    images, targets = _batch()
    for seed in range(50):
        mixed, weights = cutmix(images, targets, p=1.0, generator=_generator(seed))
        pasted = (mixed != images).any(dim=(0, 1))
        rows, columns = pasted.any(dim=1), pasted.any(dim=0)
        assert torch.equal(pasted, rows[:, None] & columns)
        for line in (rows, columns):
            ones = line.nonzero().flatten()
            assert len(ones) == 0 or ones[-1] - ones[0] + 1 == len(ones)
        area = float(pasted.double().mean())
        for index in range(5):
            for row in range(9):
                for column in range(7):
                    source = images[index - 1] if pasted[row, column] else images[index]
                    assert torch.equal(mixed[index, :, row, column], source[:, row, column])
            assert weights[index, index] == pytest.approx(1 - area, abs=1e-12)
            assert weights[index, index - 1] == pytest.approx(area, abs=1e-12)


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_the_mean_area_of_cutmix_is_that_of_the_stated_draws(p):
    height, width, count = 16, 10, 3000

    def visible(length, size):  # mean over centres of the pixels that do not stick out
        starts = np.arange(length) - size // 2
        return (np.minimum(starts + size, length) - np.maximum(starts, 0)).mean()

    middles = stats.beta.ppf((np.arange(4000) + 0.5) / 4000, p, p)
    expected = np.mean(
        [visible(height, round(height * b**0.5)) * visible(width, round(width * b**0.5)) for b in middles]
    ) / (height * width)
    images, targets, generator = torch.zeros(2, 1, height, width), torch.eye(2, dtype=torch.float64), _generator()
    areas = np.array([1 - float(cutmix(images, targets, p, generator)[1][0, 0]) for _ in range(count)])
    assert abs(areas.mean() - expected) < 4 * areas.std() / math.sqrt(count)


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_mixing_is_a_function_of_its_generator_and_leaves_its_input(mix):
    images, targets = _batch()
    before = images.clone(), targets.clone()
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002  (the global state must not matter)
    first = mix(images, targets, 0.3, _generator(7))
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    again = mix(images, targets, 0.3, _generator(7))
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(mix(images, targets, 0.3, _generator(8))[0], first[0])
    assert torch.equal(images, before[0])
    assert torch.equal(targets, before[1])


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_weights_still_sum_to_one_and_keep_their_type(mix):
    images, targets = _batch()
    mixed, weights = mix(images.float(), targets.float(), 1.0, _generator(3))
    assert (mixed.dtype, weights.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(5))
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(5))


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_a_mix_of_unfit_arguments_is_refused(mix):
    images, targets = _batch()
    with pytest.raises(ValueError, match="p must be positive, got 0"):
        mix(images, targets, 0.0, _generator())
    with pytest.raises(ValueError, match=r"targets must be class weights \(5, K\), got \(5,\)"):
        mix(images, torch.arange(5), 1.0, _generator())
    with pytest.raises(ValueError, match=r"targets must be class weights \(5, K\), got \(4, 5\)"):
        mix(images, targets[:4], 1.0, _generator())
