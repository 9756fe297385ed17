"""Few numbers for many: rounds to a target, the spread over clients, and which of many to look at."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


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


def summarize_clients(values: ArrayLike, lower_is_better: bool = False) -> dict[str, float]:
    """Summarize one number of each client.

    Args:
        values: The number of each client (N,); NaN where it is undefined, which is left out.
        lower_is_better: Whether the worst are the highest.

    Returns:
        ``mean``, ``std`` (over these clients, divided by N), ``p10`` and ``worst``. A tenth of the clients fare worse
        than ``p10``: it is the 10th percentile, or the 90th where lower is better.

    Examples:
        >>> {name: round(value, 2) for name, value in summarize_clients([0.5, 0.7, 0.9]).items()}
        {'mean': 0.7, 'std': 0.16, 'p10': 0.54, 'worst': 0.5}
    """
    defined = np.asarray(values, dtype=np.float64)
    defined = defined[~np.isnan(defined)]
    if not defined.size:
        return dict.fromkeys(("mean", "std", "p10", "worst"), math.nan)
    with np.errstate(invalid="ignore"):  # infinite losses have no deviation
        return {
            "mean": float(defined.mean()),
            "std": float(defined.std()),
            "p10": float(np.percentile(defined, 90 if lower_is_better else 10)),
            "worst": float(defined.max() if lower_is_better else defined.min()),
        }


def evenly_spaced(count: int, most: int | None) -> list[int]:
    """Return at most so many of the numbers from 0 to ``count - 1``, evenly spaced.

    Examples:
        >>> evenly_spaced(10, most=4)
        [0, 3, 6, 9]
    """
    if most is None or count <= most:
        return list(range(count))
    return [round(number * (count - 1) / max(most - 1, 1)) for number in range(most)]
