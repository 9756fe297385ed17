"""Draw what a masking vocabulary holds and what maskings do; each function returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_PLAIN = "#222222"


@dataclass(frozen=True)
class MaskedText:
    """A text as one masking sees it.

    Attributes:
        pieces: What each token spells, with a space before it where a word begins.
        units: Number of each token's unit; -1 for none.
        chosen: Whether each token is predicted.
    """

    pieces: Sequence[str]
    units: Sequence[int]
    chosen: Sequence[bool]


def draw_masked_paragraph(texts: Mapping[str, MaskedText], width: int = 88) -> Figure:
    """Draw the same text under several maskings: a chosen unit in colour, units of several tokens underlined.

    Args:
        texts: By the masking's name.
        width: Characters of a line.

    Examples:
        >>> text = MaskedText([" new", " york", " is", " big"], [0, 0, 1, 2], [True, True, False, False])
        >>> len(draw_masked_paragraph({"PMI": text}).axes)
        1
    """
    lines = {name: _wrapped(text, width) for name, text in texts.items()}
    height = sum(len(own) + 1.6 for own in lines.values()) * 0.22 + 0.2
    figure = Figure(figsize=(10, height))
    axis = figure.add_axes((0.02, 0.0, 0.96, 1.0))
    axis.set(xlim=(0, width), ylim=(height / 0.22, 0))
    axis.axis("off")
    row = 1.0
    for name, own in lines.items():
        text = texts[name]
        axis.text(0, row, name, fontsize=10, fontweight="bold", va="center", color=_PLAIN)
        row += 1.1
        for line in own:
            _draw_line(axis, text, line, row)
            row += 1.0
        row += 0.5
    return figure


def draw_loss_by_unit(steps: ArrayLike, losses: Mapping[str, ArrayLike]) -> Figure:
    """Draw the training loss of units of each length over steps.

    Args:
        steps: Optimizer steps (T,).
        losses: Nats a token (T,), by the length of the unit in tokens; undefined where none was chosen.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for colour, (name, values) in zip(COLOURS, losses.items(), strict=False):
        axis.plot(np.asarray(steps), np.asarray(values), color=colour, label=name.replace("_", " "), linewidth=1.4)
    axis.set(xlabel="step", ylabel="training loss (nats a token)")
    axis.legend(title="tokens of the unit", frameon=False)
    axis.grid(alpha=0.25, linewidth=0.5)
    return figure


def draw_ranks(scores: Mapping[int, ArrayLike], words: Mapping[int, Sequence[str]], examples: int = 5) -> Figure:
    """Draw the score of each n-gram by its rank, a panel a length, with n-grams at even quantiles named.

    Args:
        scores: Of all n-grams of each length, the best first.
        words: The n-grams, likewise.
        examples: N-grams to name in a panel.
    """
    figure = Figure(figsize=(4.6 * len(scores), 3.8), layout="constrained")
    for axis, (n, own) in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores.items(), strict=True):
        values = np.asarray(own)
        axis.plot(np.arange(1, len(values) + 1), values, color=COLOURS[0], linewidth=1.4)
        for place in np.unique(np.linspace(0, len(values) - 1, examples).astype(int)):
            late = place > len(values) / 2
            axis.annotate(
                words[n][place], (place + 1, values[place]), xytext=(-6, -10) if late else (6, 4), fontsize=8,
                textcoords="offset points", ha="right" if late else "left", color=_PLAIN,
            )  # fmt: skip
        axis.set(title=f"{n} words", xlabel="rank", ylabel="score (nats)")
        axis.grid(alpha=0.25, linewidth=0.5)
    return figure


def draw_coverage(sizes: ArrayLike, shares: Mapping[str, ArrayLike]) -> Figure:
    """Draw which share of a text's words lies in n-grams of a vocabulary, by its size, for each ranking.

    Args:
        sizes: N-grams (S,).
        shares: In [0, 1] (S,), by the ranking's name.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for colour, (name, own) in zip(COLOURS, shares.items(), strict=False):
        axis.plot(np.asarray(sizes), 100 * np.asarray(own), marker="o", markersize=3, color=colour, label=name)
    axis.set(xlabel="n-grams in the vocabulary", ylabel="words in listed n-grams (%)", xscale="log", ylim=(0, None))
    axis.legend(frameon=False)
    axis.grid(alpha=0.25, linewidth=0.5)
    return figure


def draw_unit_lengths(units: Mapping[str, tuple[ArrayLike, ArrayLike]], probability: float) -> Figure:
    """Draw which share of all units has 1, 2, ... tokens, and which share of those is chosen, for each masking.

    Args:
        units: Of each length in tokens, the last with all longer ones, how many there are and how many are chosen, each
            (L,); by the masking's name.
        probability: Share of tokens that is chosen.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    lengths, rates = figure.subplots(1, 2)
    width = 0.8 / len(units)
    for number, (name, counts) in enumerate(units.items()):
        there, chosen = (np.asarray(own, np.float64) for own in counts)
        place = np.arange(1, len(there) + 1) + (number - (len(units) - 1) / 2) * width
        colour = COLOURS[number % len(COLOURS)]
        lengths.bar(place, 100 * there / there.sum(), width, color=colour, label=name)
        some = there > 0
        bars = rates.bar(place[some], 100 * chosen[some] / there[some], width, color=colour, label=name)
        rates.bar_label(bars, fmt="%.1f", fontsize=7, rotation=90, padding=2)
    rates.axhline(100 * probability, color="#999999", linewidth=0.8)
    lengths.set(ylabel="units (%)", yscale="log")
    rates.set(ylabel="chosen (%)")
    rates.margins(y=0.15)
    for axis in (lengths, rates):
        axis.set_xticks(np.arange(1, len(there) + 1))
        axis.set_xlabel(f"tokens of the unit (the last: {len(there)} or more)")
    lengths.legend(frameon=False)
    return figure


def draw_naive_against_pmi(naive: ArrayLike, pmi: ArrayLike, words: Sequence[str], n: int, outliers: int = 8) -> Figure:
    """Draw Naive-PMI against PMI of n-grams of one length, those with the greatest difference named.

    They hold a strong collocation and a word that is weakly bound to it: Naive-PMI lists them, PMI does not.

    Args:
        naive: Naive-PMI (M,).
        pmi: PMI (M,).
        words: The n-grams.
        n: Their length in words.
        outliers: N-grams to name.
    """
    across, up = np.asarray(naive), np.asarray(pmi)
    figure = Figure(figsize=(6.5, 5.5), layout="constrained")
    axis = figure.subplots()
    axis.scatter(across, up, s=5, alpha=0.35, color=COLOURS[0], linewidths=0, rasterized=True)
    axis.axline((float(up.min()), float(up.min())), slope=1, color="#999999", linewidth=0.8)
    for place in _apart(across, up, np.argsort(up - across), outliers):
        late = across[place] > (across.min() + across.max()) / 2
        axis.annotate(
            words[place], (across[place], up[place]), xytext=(-4 if late else 4, -8), textcoords="offset points",
            fontsize=8, ha="right" if late else "left",
        )  # fmt: skip
    axis.set(xlabel="Naive-PMI (nats)", ylabel="PMI (nats)", title=f"{n} words")
    return figure


def draw_cross_evaluation(losses: ArrayLike, trained: Sequence[str], evaluated: Sequence[str]) -> Figure:
    """Draw the held-out loss of each network (row) under each masking (column).

    Args:
        losses: Nats a token (R, C).
        trained: Masking that each row was trained with.
        evaluated: Masking of each column.
    """
    table = np.asarray(losses)
    figure = Figure(figsize=(1.1 * len(evaluated) + 2, 0.6 * len(trained) + 1.4), layout="constrained")
    axis = figure.subplots()
    axis.imshow(table - table.min(axis=0), cmap="cividis_r", aspect="auto")
    for row, column in np.ndindex(*table.shape):
        best = table[row, column] == table[:, column].min()
        axis.text(
            column, row, f"{table[row, column]:.2f}", ha="center", va="center", fontsize=9,
            fontweight="bold" if best else "normal", bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0},
        )  # fmt: skip
    axis.set_xticks(range(len(evaluated)), evaluated, rotation=30, ha="right")
    axis.set_yticks(range(len(trained)), trained)
    axis.set(xlabel="evaluated with", ylabel="trained with")
    return figure


def _apart(across: np.ndarray, up: np.ndarray, order: np.ndarray, number: int) -> list[int]:
    """Return the first places of an order whose names do not lie over those of the ones before."""
    wide, high = max(float(np.ptp(across)), 1e-9), max(float(np.ptp(up)), 1e-9)
    taken: list[int] = []
    for place in order.tolist():
        if len(taken) == number:
            break
        beside = (abs(across[place] - across[other]) < 0.3 * wide for other in taken)
        level = (abs(up[place] - up[other]) < 0.03 * high for other in taken)
        if not any(x and y for x, y in zip(beside, level, strict=True)):
            taken.append(place)
    return taken


def _wrapped(text: MaskedText, width: int) -> list[list[tuple[int, int]]]:
    """Return for each line its tokens and the column at which each begins; a word is not broken."""
    lines: list[list[tuple[int, int]]] = [[]]
    column = 0
    place = 0
    while place < len(text.pieces):
        stop = place + 1
        while stop < len(text.pieces) and not text.pieces[stop].startswith(" "):
            stop += 1
        length = sum(len(piece) for piece in text.pieces[place:stop])
        if column and column + length > width:
            lines.append([])
            column = 0
        for token in range(place, stop):
            piece = text.pieces[token] if column else text.pieces[token].lstrip()
            lines[-1].append((token, column))
            column += len(piece)
        place = stop
    return lines


def _draw_line(axis: Axes, text: MaskedText, line: list[tuple[int, int]], row: float) -> None:
    sizes = np.bincount(np.maximum(np.asarray(text.units), 0))
    for token, column in line:
        piece, unit = text.pieces[token], text.units[token]
        spelt = piece.lstrip()
        start = column + (len(piece) - len(spelt) if column else 0)
        stop = start + len(spelt)
        chosen = text.chosen[token]
        colour = COLOURS[unit % len(COLOURS)] if chosen else _PLAIN
        weight = "bold" if chosen else "normal"
        for place, character in enumerate(spelt):  # one by one, so that columns hold in any font
            axis.text(
                start + place + 0.5, row, character, ha="center", va="center",
                color=colour, fontsize=9, family="monospace", fontweight=weight,
            )  # fmt: skip
        if chosen:
            axis.fill_between([start, stop], row - 0.42, row + 0.42, color=colour, alpha=0.16, linewidth=0)
        if unit >= 0 and sizes[unit] > 1:
            goes_on = column > 0 and text.units[token - 1] == unit
            axis.plot([column if goes_on else start, stop], [row + 0.44] * 2, color=colour, linewidth=0.9)
