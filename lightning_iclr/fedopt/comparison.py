"""Draw methods against each other, over runs; each function takes plain arrays and returns a matplotlib figure.

Letters: T rounds, S seeds. Rounds count from 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from lightning_iclr.fedopt.pictures import as_percent
from lightning_iclr.fedopt.summaries import rounds_to_target

# Okabe and Ito's colours, which colour-blind readers can tell apart. A method has its own in every picture.
_COLOURS = {
    "FedAvg": "#000000",
    "FedAvgM": "#999999",
    "FedAdagrad": "#009E73",
    "FedAdam": "#0072B2",
    "FedYogi": "#D55E00",
}
_OTHER_COLOURS = ("#CC79A7", "#56B4E9", "#E69F00", "#F0E442")


def draw_methods(
    curves: Mapping[str, ArrayLike], target: float | None = None, metric: str = "accuracy", window: int = 3
) -> Figure:
    """Draw methods against each other over rounds: the mean over seeds, and a band from the lowest to the highest.

    A dot on the target's line marks the rounds that a method needs to reach it, averaged over the seeds that do; it is
    hollow where some do not. Each seed's number is that of `rounds_to_target`.

    Args:
        curves: One number a seed and round (S, T), by method.
        target: Number to reach; ``None`` draws none.
        metric: What the numbers are.
        window: Rounds whose mean must reach the target.

    Examples:
        >>> len(draw_methods({"FedAvg": [[0.1, 0.5, 0.6]], "FedYogi": [[0.2, 0.7, 0.8]]}, target=0.5).axes)
        1
    """
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axis = figure.subplots()
    for name, colour in zip(curves, _colours(curves), strict=True):
        seeds = np.atleast_2d(np.asarray(curves[name], dtype=np.float64))
        number, mean = np.arange(1, seeds.shape[1] + 1), seeds.mean(axis=0)
        label = name
        if target is not None:
            needed = [rounds_to_target(seed, target, window=window) for seed in seeds]
            reached = [count for count in needed if count is not None]
            label = f"{name}: {np.mean(reached):.0f} rounds" if reached else f"{name}: not reached"
            if reached and len(reached) < len(needed):
                label += f" ({len(reached)} of {len(needed)} seeds)"
            if reached:
                at = float(np.mean(reached))
                axis.plot([at, at], [0, target], color=colour, linestyle=":", linewidth=1, zorder=2)
                whole = len(reached) == len(needed)
                edge, face = ("white", colour) if whole else (colour, "white")
                axis.plot([at], [target], "o", color=face, markeredgecolor=edge, markersize=8, zorder=4)
        axis.fill_between(number, seeds.min(axis=0), seeds.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        axis.plot(number, mean, color=colour, linewidth=1.7, label=label, zorder=3)
    lows, highs = zip(*(_limits(values) for values in curves.values()), strict=True)
    axis.set(xlabel="round", ylabel=metric, xlim=(1, None), ylim=_margins(min(lows), max(highs)))
    if target is not None:
        axis.axhline(target, color="grey", linestyle="--", linewidth=1, zorder=1)
        axis.annotate(
            f"target {target:g}", (1, target), xycoords=("axes fraction", "data"), xytext=(-4, 3),
            textcoords="offset points", ha="right", va="bottom", fontsize=8, color="dimgrey",
        )  # fmt: skip
    axis.grid(alpha=0.3, linewidth=0.5)
    axis.legend(loc="lower right", fontsize=9, framealpha=0.9)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    return figure


def draw_rate_maps(
    accuracy: Mapping[str, ArrayLike],
    client_rates: Sequence[float] | Mapping[str, Sequence[float]],
    server_rates: Sequence[float] | Mapping[str, Sequence[float]],
    metric: str = "accuracy",
) -> Figure:
    """Draw how well each method does over client and server rates, as in the paper's robustness figure.

    All maps share one colour scale. Each method's best cell is framed; a grey cell's run diverged.

    Args:
        accuracy: Accuracy (client rates, server rates), NaN where a run diverged, by method.
        client_rates: Client rates eta_l of the rows, of all methods or by method.
        server_rates: Server rates eta of the columns, likewise.
        metric: What the numbers are.

    Examples:
        >>> maps = {"FedAvg": [[0.1, 0.6], [0.7, 0.2]], "FedYogi": [[0.7, 0.8], [0.8, 0.7]]}
        >>> len(draw_rate_maps(maps, client_rates=[0.01, 0.1], server_rates=[0.1, 1.0]).axes)
        3
    """
    tables = {name: np.asarray(values, dtype=np.float64) for name, values in accuracy.items()}
    rows, columns = (max(table.shape[side] for table in tables.values()) for side in (0, 1))
    cell = float(np.clip(9.5 / (columns * len(tables)), 0.38, 0.62))
    size = (len(tables) * (cell * columns + 0.55) + 1.3, cell * rows + 1.25)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(tables), squeeze=False)[0]
    known = np.concatenate([table[np.isfinite(table)] for table in tables.values()])
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    for place, (axis, (name, table)) in enumerate(zip(axes, tables.items(), strict=True)):
        axis.set_facecolor("0.85")
        image = axis.imshow(table, cmap="viridis", vmin=low, vmax=high, origin="lower", aspect="equal")
        for (row, column), value in np.ndenumerate(table):
            text = f"{100 * value:.0f}" if high <= 1 else f"{value:.3g}"
            bright = math.isfinite(value) and _luminance(image.cmap(image.norm(value))) > 0.45
            axis.text(
                column, row, text if math.isfinite(value) else "\N{EN DASH}", ha="center", va="center",
                fontsize=8 if cell > 0.45 else 7, color="black" if bright or not math.isfinite(value) else "white",
            )  # fmt: skip
        if np.isfinite(table).any():
            row, column = np.unravel_index(np.nanargmax(table), table.shape)
            frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#D55E00", linewidth=2.2)
            frame.set_clip_on(False)
            axis.add_patch(frame)
        axis.set_title(name, fontsize=10)
        axis.set_xticks(range(table.shape[1]), _powers(_of(server_rates, name)), fontsize=8)
        own = _powers(_of(client_rates, name))
        hidden = place > 0 and not isinstance(client_rates, Mapping)
        axis.set_yticks(range(table.shape[0]), [""] * len(own) if hidden else own, fontsize=8)
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
    axes[0].set_ylabel(r"client rate, $\log_{10}\eta_l$")
    figure.supxlabel(r"server rate, $\log_{10}\eta$", fontsize=10)
    percent = " (%)" if high <= 1 else ""
    bar = figure.colorbar(image, ax=list(axes), pad=0.015, fraction=0.046, aspect=18)
    bar.set_label(metric + percent)
    if high <= 1:
        bar.ax.yaxis.set_major_formatter(as_percent)
    bar.outline.set_visible(False)
    return figure


def _limits(values: ArrayLike) -> tuple[float, float]:
    known = np.asarray(values, dtype=np.float64)
    return float(np.nanmin(known)), float(np.nanmax(known))


def _margins(low: float, high: float) -> tuple[float, float]:
    margin = 0.04 * max(high - low, 1e-3)
    return low - margin, high + margin


def _colours(names: Mapping[str, Any]) -> list[str]:
    others = [name for name in names if name not in _COLOURS]
    return [_COLOURS.get(name) or _OTHER_COLOURS[others.index(name) % len(_OTHER_COLOURS)] for name in names]


def _of(rates: Sequence[float] | Mapping[str, Sequence[float]], method: str) -> Sequence[float]:
    return rates[method] if isinstance(rates, Mapping) else rates


def _powers(rates: Sequence[float]) -> list[str]:
    return [f"{math.log10(rate):.1f}".removesuffix(".0").replace("-", "\N{MINUS SIGN}") for rate in rates]


def _luminance(colour: Any) -> float:
    red, green, blue = to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue
