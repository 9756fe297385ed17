"""Position embeddings of a grid of patches: fixed sines and cosines, and the resizing of learned ones.

Shapes: N = h w patches of a grid (h, w), row by row; T = N tokens, plus class or register tokens in front; D width.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]
ResizeMode = Literal["bilinear_corners", "bilinear", "bicubic", "bicubic_antialias"]


def sincos2d(dim: int, grid: Grid, temperature: float = 10_000.0, dtype: torch.dtype | None = None) -> Tensor:
    """Build the fixed two-dimensional position embedding of Beyer et al. 2022, after MoCo v3 (Chen et al. 2021).

    With F = D / 4 frequencies w_i = temperature^(-i / (F - 1)), a patch in row y and column x gets
    [sin(x w), cos(x w), sin(y w), cos(y w)]. The division by F - 1 is the code's; Vaswani et al. divide by F.

    Args:
        dim: Width D; a multiple of 4.
        grid: Rows and columns of patches.
        temperature: Ratio of the highest frequency to the lowest.
        dtype: Type of the result; ``None`` for torch's default.

    Returns:
        Embeddings (N, D).

    Raises:
        ValueError: ``dim`` is not a positive multiple of 4, or a number is not positive.

    Examples:
        >>> sincos2d(8, (2, 3)).shape
        torch.Size([6, 8])
    """
    if dim < 4 or dim % 4:
        raise ValueError(f"dim must be a positive multiple of 4 for sincos2d positions, got {dim}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    height, width = _check_grid("grid", grid)
    dtype = dtype or torch.get_default_dtype()
    frequencies = dim // 4
    omega = temperature ** -(torch.arange(frequencies, dtype=dtype) / max(frequencies - 1, 1))
    y = torch.arange(height, dtype=dtype).repeat_interleave(width).outer(omega)
    x = torch.arange(width, dtype=dtype).repeat(height).outer(omega)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)


def resize_position_embedding(
    position_embedding: Tensor,
    old_grid: Grid,
    new_grid: Grid,
    num_prefix_tokens: int = 1,
    mode: ResizeMode = "bilinear_corners",
) -> Tensor:
    """Interpolate learned position embeddings to another grid (section 3.2), leaving those of the prefix alone.

    The implementations disagree on how: the official code interpolates linearly with the outermost patches staying
    in the corners (``scipy.ndimage.zoom(order=1)``), timm linearly between patch centres when it reads ``.npz``
    files and by an antialiased cubic otherwise, Hugging Face by a cubic without antialiasing.

    Args:
        position_embedding: Embeddings (1, T, D); the prefix, such as the class token, comes first.
        old_grid: Rows and columns that they were learned for.
        new_grid: Rows and columns wanted.
        num_prefix_tokens: Leading rows that belong to no patch.
        mode: ``bilinear_corners`` (official), ``bilinear`` (timm's loader), ``bicubic`` (Hugging Face) or
            ``bicubic_antialias`` (timm at run time).

    Returns:
        Embeddings (1, T', D); the argument itself when the grids are equal.

    Raises:
        ValueError: ``position_embedding`` does not have the tokens of ``old_grid``, a grid is empty, or ``mode`` is
            unknown.

    Examples:
        >>> import torch
        >>> resize_position_embedding(torch.zeros(1, 1 + 4, 8), (2, 2), (3, 5)).shape
        torch.Size([1, 16, 8])
    """
    check_mode(mode)
    old_grid, new_grid = _check_grid("old_grid", old_grid), _check_grid("new_grid", new_grid)
    if num_prefix_tokens < 0:
        raise ValueError(f"num_prefix_tokens must be 0 or more, got {num_prefix_tokens}")
    expected = num_prefix_tokens + math.prod(old_grid)
    shape = tuple(position_embedding.shape)
    if len(shape) != 3 or shape[:2] != (1, expected):
        raise ValueError(
            f"position_embedding must be (1, {expected}, D) for old_grid {old_grid} and {num_prefix_tokens} prefix "
            f"tokens, got {shape}"
        )
    if old_grid == new_grid:
        return position_embedding
    prefix, patches = position_embedding[:, :num_prefix_tokens], position_embedding[:, num_prefix_tokens:]
    dtype = patches.dtype
    # Half precision would round the interpolation weights, which are shared by all of D.
    image = patches.to(torch.promote_types(dtype, torch.float32)).transpose(1, 2).reshape(1, -1, *old_grid)
    kind: Literal["bilinear", "bicubic"] = "bilinear" if mode.startswith("bilinear") else "bicubic"
    image = F.interpolate(
        image, new_grid, mode=kind, align_corners=mode == "bilinear_corners", antialias=mode == "bicubic_antialias"
    )
    return torch.cat([prefix, image.flatten(2).transpose(1, 2).to(dtype)], dim=1)


def check_mode(mode: str) -> None:
    """Raise a ValueError unless ``mode`` is one that `resize_position_embedding` knows."""
    if mode not in get_args(ResizeMode):
        raise ValueError(f"mode must be one of {', '.join(map(repr, get_args(ResizeMode)))}, got {mode!r}")


def _check_grid(name: str, grid: Grid) -> Grid:
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"{name} must be two numbers of at least 1 (rows, columns), got {grid}")
    return grid[0], grid[1]
