"""Small random shifts, rotations and scalings of a whole batch at once."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def affine(images: Tensor, shift: Tensor, angle: Tensor, scale: Tensor) -> Tensor:
    """Scale and rotate each image about its centre, then shift it.

    An output pixel at x, in pixels from the centre, shows the input at R(angle)^-1 (x - shift) / scale, read
    bilinearly; what comes from outside of the image is 0, so apply this before pixels are standardised.

    Args:
        images: Images (B, C, H, W) of floating point.
        shift: Pixels to the right and down (B, 2).
        angle: Counter-clockwise turns in degrees (B,).
        scale: Factors (B,); above 1 enlarges what is shown.

    Returns:
        Images (B, C, H, W).

    Examples:
        >>> image = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
        >>> right = affine(image, torch.tensor([[1.0, 0.0]]), torch.zeros(1), torch.ones(1))
        >>> right[0, 0].tolist()
        [[0.0, 1.0], [0.0, 3.0]]
    """
    height, width = images.shape[-2:]
    half = images.new_tensor([width / 2, height / 2])  # pixels in one unit of grid_sample's coordinates
    radians = angle * (math.pi / 180)
    cos, sin = radians.cos(), radians.sin()
    # The y axis points down, so this is the inverse of a turn that looks counter-clockwise.
    inverse = torch.stack([cos, -sin, sin, cos], dim=-1).view(-1, 2, 2) / scale.view(-1, 1, 1)
    offset = -(inverse @ shift.unsqueeze(-1))
    theta = torch.cat([inverse * half / half.unsqueeze(-1), offset / half.unsqueeze(-1)], dim=-1)
    grid = F.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def random_affine(
    images: Tensor, generators: Sequence[torch.Generator], shift: float = 0.0, rotate: float = 0.0, scale: float = 0.0
) -> Tensor:
    """Apply `affine` with parameters that are drawn for each image from its own generator.

    Args:
        images: Images (B, C, H, W) of floating point.
        generators: One CPU generator an image.
        shift: Largest shift along each axis, in pixels; drawn uniformly from [-shift, shift].
        rotate: Largest turn, in degrees; drawn uniformly from [-rotate, rotate].
        scale: Largest change of scale; the factor is drawn uniformly from [1 - scale, 1 + scale].

    Returns:
        Images (B, C, H, W).

    Raises:
        ValueError: The numbers of images and generators differ.

    Examples:
        >>> generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        >>> random_affine(torch.rand(4, 1, 8, 8), generators, shift=0.5, rotate=8.0, scale=0.08).shape
        torch.Size([4, 1, 8, 8])
    """
    if len(generators) != len(images):
        raise ValueError(f"generators must be one an image, got {len(generators)} for {len(images)} images")
    draws = torch.stack([torch.rand(4, generator=generator) for generator in generators]) * 2 - 1
    draws = draws.to(images)
    return affine(images, draws[:, :2] * shift, draws[:, 2] * rotate, 1 + draws[:, 3] * scale)
