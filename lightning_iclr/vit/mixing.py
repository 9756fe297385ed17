"""Mix the images and targets of a batch: mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019)."""

import math

import numpy as np
import torch
from torch import Tensor


def mixup(images: Tensor, targets: Tensor, p: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Blend each image, and its target, with the one before it in the batch: a * x + (1 - a) * roll(x).

    As in the official code there is one a for the whole batch, max(b, 1 - b) of b ~ Beta(p, p), so that an image
    always counts for at least half of its blend.

    Args:
        images: Images (B, C, H, W).
        targets: Class weights (B, K), such as one-hot rows.
        p: Both parameters of the Beta distribution, positive.
        generator: CPU generator that the draw comes from.

    Returns:
        Mixed images (B, C, H, W) and targets (B, K).

    Raises:
        ValueError: ``p`` is not positive, or images and targets do not fit together.

    Examples:
        >>> images, targets = torch.rand(4, 3, 8, 8), torch.eye(4)
        >>> mixed, weights = mixup(images, targets, p=0.2, generator=torch.Generator().manual_seed(0))
        >>> weights.sum(dim=1).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    _check(images, targets, p)
    share = _beta(p, generator)
    share = max(share, 1 - share)
    return _blend(images, share), _blend(targets, share)


def cutmix(images: Tensor, targets: Tensor, p: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Paste a rectangle of the image before it in the batch into each image, and mix the targets by area.

    The rectangle, one for the whole batch, has the image's shape and a share b ~ Beta(p, p) of its area; its centre
    is uniform over the pixels and what sticks out is cut off. Targets are mixed by the share that is left.

    Args:
        images: Images (B, C, H, W).
        targets: Class weights (B, K), such as one-hot rows.
        p: Both parameters of the Beta distribution, positive.
        generator: CPU generator that the draws come from.

    Returns:
        Mixed images (B, C, H, W) and targets (B, K).

    Raises:
        ValueError: ``p`` is not positive, or images and targets do not fit together.

    Examples:
        >>> images, targets = torch.rand(4, 3, 8, 8), torch.eye(4)
        >>> mixed, weights = cutmix(images, targets, p=1.0, generator=torch.Generator().manual_seed(0))
        >>> mixed.shape
        torch.Size([4, 3, 8, 8])
    """
    _check(images, targets, p)
    height, width = images.shape[-2:]
    side = math.sqrt(_beta(p, generator))
    top, bottom = _interval(height, round(height * side), generator)
    left, right = _interval(width, round(width * side), generator)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images.roll(1, dims=0)[..., top:bottom, left:right]
    pasted = (bottom - top) * (right - left) / (height * width)
    return mixed, _blend(targets, 1 - pasted)


def _check(images: Tensor, targets: Tensor, p: float) -> None:
    if not p > 0:
        raise ValueError(f"p must be positive, got {p}")
    if targets.ndim != 2 or len(targets) != len(images):
        raise ValueError(f"targets must be class weights ({len(images)}, K), got {tuple(targets.shape)}")


def _beta(p: float, generator: torch.Generator) -> float:
    # torch's distributions take no generator; numpy's do, and seeding one from ours keeps the draw reproducible.
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return float(np.random.default_rng(seed).beta(p, p))


def _blend(values: Tensor, share: float) -> Tensor:
    return share * values + (1 - share) * values.roll(1, dims=0)


def _interval(length: int, size: int, generator: torch.Generator) -> tuple[int, int]:
    start = int(torch.randint(length, (), generator=generator)) - size // 2
    return max(start, 0), min(start + size, length)
