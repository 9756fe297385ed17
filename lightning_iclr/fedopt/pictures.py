"""Draw what happens in federated training; each function takes plain arrays and returns a matplotlib figure.

Letters: N clients or client updates, K classes, T rounds, S seeds. Rounds count from 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# Okabe and Ito's colours, which colour-blind readers can tell apart. A method has its own in every picture.
_COLOURS = {
    "FedAvg": "#000000",
    "FedAvgM": "#999999",
    "FedAdagrad": "#009E73",
    "FedAdam": "#0072B2",
    "FedYogi": "#D55E00",
}
_OTHER_COLOURS = ("#CC79A7", "#56B4E9", "#E69F00", "#F0E442")
_MOST_COLUMNS = 60  # of a picture over rounds
_MOST_PANELS = 16


def rounds_to_target(
    values: ArrayLike, target: float, rounds: ArrayLike | None = None, window: int = 3, lower_is_better: bool = False
) -> int | None:
    """Return the first round at which the mean of the newest evaluations reaches a target.

    Args:
        values: One number an evaluation (T,).
        target: Number to reach.
        rounds: Round of each evaluation (T,); ``None`` for one after every round.
        window: Evaluations that are averaged.
        lower_is_better: Whether to reach means to fall to the target.

    Returns:
        The round, counted from 1, or ``None`` if it is not reached.

    Examples:
        >>> rounds_to_target([0.1, 0.8, 0.9, 0.7, 0.8, 0.9], target=0.8)
        4
    """
    curve = np.asarray(values, dtype=np.float64)
    numbers = np.arange(1, len(curve) + 1) if rounds is None else np.asarray(rounds)
    if len(curve) < window:
        return None
    means = np.lib.stride_tricks.sliding_window_view(curve, window).mean(axis=1)
    reached = means <= target + 1e-12 if lower_is_better else means >= target - 1e-12  # 0.8 as the mean of 0.8s
    return int(numbers[window - 1 :][reached][0]) if reached.any() else None


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
    bar.ax.yaxis.set_major_formatter(_percent)
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
    names = list(steps)
    if len(names) > _MOST_PANELS:
        names = [names[round(i * (len(names) - 1) / (_MOST_PANELS - 1))] for i in range(_MOST_PANELS)]
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
        bar.ax.yaxis.set_major_formatter(_percent)
    bar.outline.set_visible(False)
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


def _percent(value: float, place: float) -> str:
    return f"{100 * value:.0f}"


def _luminance(colour: Any) -> float:
    red, green, blue = to_rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue
