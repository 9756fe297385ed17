"""Learning-rate schedules of the papers: a linear warm-up, then constant, linear, cosine or inverse-square-root decay.

Each is a torch scheduler to be stepped after every optimizer step. With w = ``warmup_steps``, T = ``total_steps`` and
each group's own learning rate as its base, step s has

    lr(s) = decay(s) min(1, s / w),    without the second factor where w = 0.

So step 0 has learning rate 0 if there is a warm-up, and step w is the first at the full rate. The clock of a decay
that comes to an end starts after the warm-up: p(s) = (s - w) / (T - w), kept between 0 and 1, so that nothing changes
after step T. A checkpoint holds the steps done and the base rates as plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def _check(warmup_steps: int, total_steps: int | None = None) -> None:
    for name, value in (("warmup_steps", warmup_steps), ("total_steps", total_steps)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} must be an integer, got {value!r}")
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must not be negative, got {warmup_steps}")
    if total_steps is not None and total_steps <= warmup_steps:
        raise ValueError(f"total_steps must exceed warmup_steps, got {total_steps} and {warmup_steps}")


def _warmup(step: int, warmup_steps: int) -> float:
    return step / warmup_steps if step < warmup_steps else 1.0


def _progress(step: int, warmup_steps: int, total_steps: int) -> float:
    return min(1.0, max(0.0, (step - warmup_steps) / (total_steps - warmup_steps)))


# The factors are plain functions, not objects: LambdaLR leaves those out of its state.


class WarmupConstant(LambdaLR):
    """Warm up, then keep the base rate: decay(s) = base.

    Args:
        optimizer: Optimizer whose groups hold the base rates.
        warmup_steps: Steps until the full rate; 0 for none.

    Raises:
        TypeError: ``warmup_steps`` is not an integer.
        ValueError: ``warmup_steps`` is negative.

    Examples:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.8)
        >>> schedule = WarmupConstant(optimizer, warmup_steps=4)
        >>> optimizer.step(); schedule.step()
        >>> schedule.get_last_lr()
        [0.2]
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int = 0) -> None:
        _check(warmup_steps)
        super().__init__(optimizer, lambda step: _warmup(step, warmup_steps))


class WarmupLinear(LambdaLR):
    """Warm up, then go straight down to one rate: decay(s) = base + p(s) (end - base).

    ``end`` is a learning rate and not a fraction, as in the Vision Transformer's code: groups with different bases
    end together, and one whose base is below ``end`` rises to it. A group with base 0 is frozen and stays at 0.

    Args:
        optimizer: Optimizer whose groups hold the base rates.
        warmup_steps: Steps until the full rate; 0 for none.
        total_steps: Step at which ``end`` is reached, warm-up included.
        end: Learning rate from ``total_steps`` on.

    Raises:
        TypeError: ``warmup_steps`` or ``total_steps`` is not an integer.
        ValueError: ``warmup_steps`` or ``end`` is negative, or ``total_steps`` does not exceed ``warmup_steps``.

    Examples:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
        >>> schedule = WarmupLinear(optimizer, warmup_steps=0, total_steps=2, end=0.1)
        >>> optimizer.step(); schedule.step()
        >>> schedule.get_last_lr()
        [0.3]
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, total_steps: int, end: float = 1e-5) -> None:
        _check(warmup_steps, total_steps)
        if end < 0:
            raise ValueError(f"end must not be negative, got {end}")

        def factor(group: int) -> Callable[[int], float]:
            def of_step(step: int) -> float:
                base = float(self.base_lrs[group])  # the checkpoint's on resume
                progress = _progress(step, warmup_steps, total_steps)
                decay = 1 - progress + progress * end / base if base else 1.0
                return decay * _warmup(step, warmup_steps)

            return of_step

        super().__init__(optimizer, [factor(group) for group in range(len(optimizer.param_groups))])


class WarmupCosine(LambdaLR):
    """Warm up, then follow half a cosine down to 0: decay(s) = base (1 + cos(pi p(s))) / 2.

    Args:
        optimizer: Optimizer whose groups hold the base rates.
        warmup_steps: Steps until the full rate; 0 for none.
        total_steps: Step at which 0 is reached, warm-up included.

    Raises:
        TypeError: ``warmup_steps`` or ``total_steps`` is not an integer.
        ValueError: ``warmup_steps`` is negative, or ``total_steps`` does not exceed it.

    Examples:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.8)
        >>> schedule = WarmupCosine(optimizer, warmup_steps=0, total_steps=2)
        >>> optimizer.step(); schedule.step()
        >>> schedule.get_last_lr()
        [0.4]
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, total_steps: int) -> None:
        _check(warmup_steps, total_steps)

        def factor(step: int) -> float:
            decay = (1 + math.cos(math.pi * _progress(step, warmup_steps, total_steps))) / 2
            return decay * _warmup(step, warmup_steps)

        super().__init__(optimizer, factor)


class WarmupRsqrt(LambdaLR):
    """Warm up, then decay with the inverse square root of the step: decay(s) = base sqrt(w / max(s, w)).

    The shape of "Attention Is All You Need" (section 5.3), lr(s) = base min(sqrt(w / s), s / w), with its peak, at
    step w, given directly as the base in place of d_model^-0.5 w^-0.5. The decay goes by the step counted from 0, the
    warm-up included. Without a warm-up, w counts as 1 in the decay.

    Args:
        optimizer: Optimizer whose groups hold the base rates.
        warmup_steps: Steps until the full rate, from which it decays.

    Raises:
        TypeError: ``warmup_steps`` is not an integer.
        ValueError: ``warmup_steps`` is negative.

    Examples:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.8)
        >>> schedule = WarmupRsqrt(optimizer, warmup_steps=1)
        >>> for _ in range(4):
        ...     optimizer.step(); schedule.step()
        >>> schedule.get_last_lr()
        [0.4]
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int) -> None:
        _check(warmup_steps)
        start = max(1, warmup_steps)
        super().__init__(optimizer, lambda step: math.sqrt(start / max(step, start)) * _warmup(step, warmup_steps))
