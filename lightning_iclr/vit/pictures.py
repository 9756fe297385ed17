"""Draw what `analysis` computes; each function returns a matplotlib figure and knows nothing of training.

Shapes: L blocks, H heads, B images, N patches in a grid (h, w).
"""

import math
from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor


def draw_attention_distance(distances: Mapping[str, Tensor], uniform: float | None = None) -> Figure:
    """Draw a dot for each head against its block (figure 7, right), one panel for each moment of training.

    Args:
        distances: Mean attention distances (L, H) in pixels by the panel's title.
        uniform: Distance of heads that attend to all patches alike, drawn as a line.

    Examples:
        >>> figure = draw_attention_distance({"before": torch.rand(4, 2), "after": torch.rand(4, 2)})
        >>> len(figure.axes)
        2
    """
    figure = Figure(figsize=(3.2 * len(distances) + 0.6, 3.2), layout="constrained")
    axes = figure.subplots(1, len(distances), sharey=True, squeeze=False)[0]
    for axis, (title, values) in zip(axes, distances.items(), strict=True):
        for head, distance in enumerate(values.T.tolist()):
            axis.plot(range(1, len(distance) + 1), distance, "o", color=f"C{head % 10}", alpha=0.8)
        if uniform is not None:
            axis.axhline(uniform, color="grey", linestyle=":", linewidth=1, label="uniform attention")
        axis.set(title=title, xlabel="block", xticks=_ticks(len(values)))
    axes[0].set_ylabel("mean attention distance (pixels)")
    if uniform is not None:
        axes[0].legend(loc="lower left", fontsize=8)
    return figure


def draw_rollout(images: Tensor, heat: Tensor, titles: Sequence[str], columns: int = 8) -> Figure:
    """Draw images, and beneath each the same with what the network attends to.

    Args:
        images: Images (B, C, H, W) in [0, 1]; in colour if C is 3.
        heat: Weight of every patch (B, h, w).
        titles: One for each image.
        columns: Images in a row.

    Examples:
        >>> figure = draw_rollout(torch.rand(3, 1, 8, 8), torch.rand(3, 4, 4), ["a", "b", "c"])
        >>> len(figure.axes)
        6
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.3 * columns, 2.8 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    large = torch.nn.functional.interpolate(heat[:, None], size=images.shape[-2:], mode="bilinear")[:, 0]
    for axis in axes.flat:
        axis.set_axis_off()
    for i, title in enumerate(titles):
        above, below = axes[2 * (i // columns), i % columns], axes[2 * (i // columns) + 1, i % columns]
        _imshow(above, images[i])
        above.set_title(title, fontsize=8)
        _imshow(below, images[i])
        below.imshow(large[i].numpy(), cmap="inferno", alpha=0.6)
    for axis in [axis for axis in axes.flat if not axis.images]:
        axis.remove()
    return figure


def draw_position_similarity(similarity: Tensor) -> Figure:
    """Draw a tile for each patch: the cosine of its position embedding with that of every patch (figure 7, centre).

    Args:
        similarity: Cosines (h, w, h, w).

    Examples:
        >>> len(draw_position_similarity(torch.rand(2, 3, 2, 3)).axes)
        2
    """
    height, width = similarity.shape[:2]
    gap = max(1, max(height, width) // 6)
    # One image of all tiles: hundreds of axes would take a minute to lay out.
    framed = torch.nn.functional.pad(similarity, (0, gap, 0, gap), value=math.nan)
    sheet = framed.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[:-gap, :-gap]
    size = max(0.35, 4.5 / max(height, width))
    figure = Figure(figsize=(size * width + 1.2, size * height + 0.6), layout="constrained")
    axis = figure.subplots()
    tiles = axis.imshow(sheet.numpy(), vmin=-1, vmax=1, cmap="viridis", interpolation="nearest")
    middle = [[(side + gap) * i + (side - 1) / 2 for i in range(side)] for side in (height, width)]
    axis.set(xlabel="patch column", ylabel="patch row", frame_on=False)
    axis.set_xticks(middle[1], [str(i + 1) for i in range(width)])
    axis.set_yticks(middle[0], [str(i + 1) for i in range(height)])
    axis.tick_params(length=0, labelsize=8)
    figure.colorbar(tiles, ax=axis, label="cosine similarity", shrink=0.8)
    return figure


def draw_patch_filters(filters: Tensor, columns: int = 7) -> Figure:
    """Draw the principal components of the patch embedding (figure 7, left), each scaled to the whole range.

    Args:
        filters: Components (n, C, ph, pw); in colour if C is 3.
        columns: Components in a row.

    Examples:
        >>> len(draw_patch_filters(torch.randn(9, 3, 4, 4)).axes)
        9
    """
    columns = min(columns, len(filters))
    rows = -(-len(filters) // columns)
    figure = Figure(figsize=(columns, 1.05 * rows + 0.1), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for i, axis in enumerate(axes.flat):
        axis.set_axis_off()
        if i < len(filters):
            largest = filters[i].abs().max().clamp(min=1e-12)
            _imshow(axis, filters[i] / largest / 2 + 0.5)
        else:
            axis.remove()
    return figure


def draw_masked_patches(rows: Mapping[str, Tensor]) -> Figure:
    """Draw sheets of images above each other: what was given, what was predicted, what was wanted.

    Args:
        rows: Images (B, C, H, W) in [0, 1] by the row's title.

    Examples:
        >>> len(draw_masked_patches({"input": torch.rand(5, 1, 8, 8), "target": torch.rand(5, 1, 8, 8)}).axes)
        2
    """
    count = len(next(iter(rows.values())))
    figure = Figure(figsize=(1.2 * count + 0.4, 1.35 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, (title, images) in zip(axes, rows.items(), strict=True):
        gap = max(1, images.shape[-1] // 14)
        framed = torch.nn.functional.pad(images, (gap, gap, gap, gap), value=1.0)
        _imshow(axis, torch.cat(list(framed), dim=-1))
        axis.set(xticks=[], yticks=[], ylabel=title, frame_on=False)
    return figure


def draw_curves(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> Figure:
    """Draw curves over the training steps, one panel for each quantity.

    Args:
        panels: Points (step, value) by curve by panel.

    Examples:
        >>> len(draw_curves({"loss": {"train": [(1, 2.3), (2, 2.0)]}}).axes)
        1
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        for name, points in curves.items():
            finite = [(step, value) for step, value in points if math.isfinite(value)]
            axis.plot([step for step, _ in finite], [value for _, value in finite], label=name, linewidth=1.2)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend(fontsize=8)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    return figure


def _imshow(axis: Axes, image: Tensor) -> None:
    """Show an image (C, H, W), in grey by the mean of its channels unless there are three."""
    pixels = image.clamp(0, 1)
    pixels = pixels.movedim(0, -1) if len(pixels) == 3 else pixels.mean(dim=0)
    axis.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1)


def _ticks(blocks: int) -> list[int]:
    return list(range(1, blocks + 1, max(1, blocks // 6)))
