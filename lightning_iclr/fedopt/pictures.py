"""Draw what happens in a run of federated training; each function takes plain arrays and returns a matplotlib figure.

Letters: N clients or client updates, K classes, T rounds. Rounds count from 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from lightning_iclr.fedopt.summaries import evenly_spaced

Floats = NDArray[np.float64]

_MOST_COLUMNS = 60  # of a picture over rounds
_MOST_PANELS = 16


def draw_label_matrix(
    counts: ArrayLike, clients: Sequence[int] | None = None, class_names: Sequence[str] | None = None
) -> Figure:
    """Draw which classes each client holds: a dot for each client and class, its area proportional to the examples.

    Args:
        counts: Examples (N, K).
        clients: Number of each client; ``None`` for 0 to N - 1.
        class_names: Name of each class; ``None`` for its number.

    Examples:
        >>> len(draw_label_matrix([[3, 0], [1, 4]]).axes)
        1
    """
    table = np.asarray(counts)
    num_clients, num_classes = table.shape
    numbers = list(range(num_clients)) if clients is None else list(clients)
    names = [str(label) for label in range(num_classes)] if class_names is None else list(class_names)
    width = float(np.clip(0.11 * num_clients, 3.4, 11)) + 1.7
    height = float(np.clip(0.26 * num_classes, 2.0, 9)) + 0.9
    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.subplots()
    # In points: the largest dot fills its row, but reaches no further than into half of the next column.
    cell = 72 * min(1.5 * (width - 1.7) / num_clients, (height - 0.9) / num_classes)
    largest = max(int(table.max()), 1)
    scale = (0.95 * max(cell, 3.0)) ** 2 / largest  # points squared for an example
    client, label = np.nonzero(table)
    axis.scatter(client, label, s=scale * table[client, label], color="#0072B2", linewidths=0)
    axis.set(xlabel="client", ylabel="class", xlim=(-0.8, num_clients - 0.2), ylim=(-0.8, num_classes - 0.2))
    axis.set_xticks(*_sparse(numbers, 20))
    axis.set_yticks(*_sparse(names, 30))
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    sizes = sorted({max(1, round(largest * share)) for share in (0.1, 0.5, 1.0)})
    handles = [
        Line2D([], [], linestyle="", marker="o", color="#0072B2", markeredgewidth=0, markersize=math.sqrt(scale * size))
        for size in sizes
    ]
    axis.legend(
        handles, [str(size) for size in sizes], title="examples", loc="upper left", bbox_to_anchor=(1.0, 1.0),
        frameon=False, fontsize=8, title_fontsize=8, labelspacing=1.0,
    )  # fmt: skip
    return figure


def draw_client_updates(rounds: ArrayLike, norms: ArrayLike, cosines: ArrayLike) -> Figure:
    """Draw how long clients' updates are, and how well they agree with their mean: two histograms for each round.

    Args:
        rounds: Round of each update (N,).
        norms: Its norm (N,).
        cosines: Its cosine to the round's mean update (N,), in [-1, 1].

    Examples:
        >>> len(draw_client_updates([1, 1, 2], [0.5, 0.7, 0.6], [0.9, 0.2, 0.4]).axes)
        3
    """
    when = np.asarray(rounds)
    size, agreement = np.asarray(norms, dtype=np.float64), np.asarray(cosines, dtype=np.float64)
    positive = size[np.isfinite(size) & (size > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (0.5, 1.0)
    logarithmic = bool(high > 20 * low)
    bins = np.geomspace(low / 1.05, high * 1.05, 25) if logarithmic else np.linspace(0, high * 1.05, 25)
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    meshes = [
        _heat_histogram(left, when, size, bins),
        _heat_histogram(right, when, agreement, np.linspace(min(0.0, _floor(agreement)), 1, 25)),
    ]
    for mesh in meshes:
        mesh.set_clim(0, max(other.get_clim()[1] or 1.0 for other in meshes))
    left.set_yscale("log" if logarithmic else "linear")
    left.set_title("norm of a client's update (line: median)", fontsize=10)
    right.set_title("cosine of a client's update to the mean update", fontsize=10)
    right.axhline(0, color="grey", linewidth=0.6)
    bar = figure.colorbar(meshes[1], ax=[left, right], pad=0.01, aspect=24)
    bar.set_label("share of the round's clients (%)")
    bar.ax.yaxis.set_major_formatter(as_percent)
    bar.outline.set_visible(False)
    return figure


def draw_effective_step(steps: Mapping[str, ArrayLike]) -> Figure:
    """Draw the server's effective step in each layer over rounds: the median, and a band from 10 to 90 %.

    At most 16 layers are shown, evenly spaced.

    Args:
        steps: Rows (T, 4) of a round and its quantiles 10, 50 and 90 %, by layer.

    Examples:
        >>> len(draw_effective_step({"net.0": [[1, 0.5, 1.0, 2.0]], "net.2": [[1, 0.1, 0.2, 0.3]]}).axes)
        2
    """
    layers = list(steps)
    names = [layers[place] for place in evenly_spaced(len(layers), _MOST_PANELS)]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.6 * columns + 0.5, 2.0 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    known = np.concatenate([np.asarray(steps[name], dtype=np.float64)[:, 1:].ravel() for name in names])
    wide = bool(known.max() > 4 * known.min())
    for place, (axis, name) in enumerate(zip(axes.flat, names, strict=False)):
        number, low, middle, high = np.asarray(steps[name], dtype=np.float64).T
        axis.fill_between(number, low, high, color="#0072B2", alpha=0.25, linewidth=0)
        axis.plot(number, middle, color="#0072B2", linewidth=1.4, marker="o" if len(number) == 1 else None)
        axis.set_yscale("log" if wide else "linear")
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3, linewidth=0.5)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.tick_params(labelsize=8, labelbottom=place + columns >= len(names))
    for axis in list(axes.flat)[len(names) :]:
        axis.remove()
    shown = "" if len(names) == len(steps) else f" ({len(names)} of {len(steps)} layers)"
    figure.supxlabel("round", fontsize=9)
    figure.supylabel(r"$\eta \,/\, (\sqrt{v} + \tau)$", fontsize=10)
    figure.suptitle(f"effective server step: median and 10 to 90 %{shown}", fontsize=10)
    return figure


def draw_rounds(
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]],
    target: float | None = None,
    reached: int | None = None,
) -> Figure:
    """Draw curves over rounds, one panel for each quantity.

    Args:
        panels: Points (round, value) by curve by panel.
        target: Target of the first panel's curve.
        reached: Round that reached it.

    Examples:
        >>> len(draw_rounds({"accuracy": {"val/accuracy": [(1, 0.2), (2, 0.7)]}}, target=0.6).axes)
        1
    """
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        for place, (name, points) in enumerate(curves.items()):
            finite = [(number, value) for number, value in points if math.isfinite(value)]
            single = "o" if len(finite) == 1 else None
            colour = ("#0072B2", "#D55E00", "#009E73")[place % 3]
            axis.plot(*_columns(finite), label=name, linewidth=1.3, marker=single, markersize=4, color=colour)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("round")
        axis.grid(alpha=0.3, linewidth=0.5)
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    first = axes.flat[0]
    if target is not None:
        first.axhline(target, color="grey", linestyle="--", linewidth=1, label=f"target {target:g}")
        if reached is not None:
            first.axvline(
                reached, ymax=0.83, color="grey", linestyle=":", linewidth=1, label=f"reached in round {reached}"
            )
    for axis in list(axes.flat)[: len(panels)]:
        if len(axis.get_lines()) > 1:
            _legend_on_top(axis)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    return figure


def draw_client_evaluation(
    values: Mapping[str, ArrayLike], summaries: Mapping[str, Mapping[str, float]] | None = None
) -> Figure:
    """Draw a histogram over clients for each number that was evaluated.

    Args:
        values: The number of each client (N,), NaN where it is undefined, by name.
        summaries: Numbers to mark with lines, by their name by the histogram's: ``mean``, ``p10`` and ``worst``.

    Examples:
        >>> len(draw_client_evaluation({"val/accuracy": [0.5, 0.9, 1.0]}).axes)
        1
    """
    columns = min(3, len(values))
    rows = -(-len(values) // columns)
    figure = Figure(figsize=(3.8 * columns, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    styles = {"mean": ("#000000", "-"), "p10": ("#E69F00", "--"), "worst": ("#D55E00", ":")}
    for axis, (name, numbers) in zip(axes.flat, values.items(), strict=False):
        own = np.asarray(numbers, dtype=np.float64)
        finite = own[np.isfinite(own)]
        axis.hist(finite, bins=min(30, max(5, round(math.sqrt(len(own)) * 2))), color="#56B4E9", edgecolor="white")
        for kind, (colour, line) in styles.items():
            number = (summaries or {}).get(name, {}).get(kind, math.nan)
            if math.isfinite(number):
                axis.axvline(
                    number, ymax=0.83, color=colour, linestyle=line, linewidth=1.5, label=f"{kind} {number:.3g}"
                )
        clients = f"{len(own)} clients" if len(finite) == len(own) else f"{len(finite)} of {len(own)} clients"
        axis.set_title(f"{name}, {clients}", fontsize=10)
        axis.set_ylabel("clients")
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        if axis.get_lines():
            _legend_on_top(axis)
    for axis in list(axes.flat)[len(values) :]:
        axis.remove()
    return figure


def _heat_histogram(axis: Axes, rounds: NDArray[Any], values: Floats, bins: Floats) -> QuadMesh:
    """Draw a histogram for each round, or for some rounds together, as a column of shares."""
    known = np.isfinite(values)
    rounds, values = rounds[known], values[known]
    first, last = (int(rounds.min()), int(rounds.max())) if rounds.size else (1, 1)
    width = -(-(last - first + 1) // _MOST_COLUMNS)
    edges = np.arange(first, last + width + 1, width) - 0.5
    counts, _, _ = np.histogram2d(rounds, np.clip(values, bins[0], bins[-1]), bins=[edges, bins])
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    mesh = axis.pcolormesh(edges, bins, np.ma.masked_equal(share.T, 0), cmap="Blues", vmin=0, rasterized=True)
    columns = np.digitize(rounds, edges) - 1
    present = np.unique(columns)
    medians = [float(np.median(values[columns == column])) for column in present]
    middles = (edges[present] + edges[present + 1]) / 2
    axis.plot(
        middles, medians, color="#D55E00", linewidth=1.4, marker="." if len(present) < 3 else None, label="median"
    )
    axis.set_xlabel("round")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return mesh


def _legend_on_top(axis: Axes) -> None:
    """Put a legend of one row above all that is drawn."""
    low, high = axis.get_ylim()
    axis.set_ylim(low, low + 1.2 * (high - low))
    axis.legend(
        fontsize=7.5, ncols=3, loc="upper center", frameon=False, columnspacing=1.0, handlelength=1.6, borderaxespad=0.2
    )


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [number for number, _ in points], [value for _, value in points]


def _sparse(labels: Sequence[Any], most: int) -> tuple[list[int], list[str]]:
    """Return places and names of at most so many labels, in even steps."""
    step = -(-len(labels) // most)
    places = list(range(0, len(labels), step))
    return places, [str(labels[place]) for place in places]


def _floor(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return math.floor(10 * float(known.min())) / 10 if known.size else 0.0


def as_percent(value: float, place: float) -> str:
    """Write a tick's share in percent."""
    return f"{100 * value:.0f}"
