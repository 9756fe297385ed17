"""Keep what a module's steps log for one client, apart from the evaluation that Lightning is running."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

Reduction = Callable[[Tensor, Tensor], Tensor]

_REDUCTIONS: dict[str, Reduction] = {
    "mean": lambda values, sizes: (values * sizes).sum() / sizes.sum(),
    "sum": lambda values, sizes: values.sum(),
    "min": lambda values, sizes: values.min(),
    "max": lambda values, sizes: values.max(),
}


class Log:
    """Stands in for a module's ``log``, and reduces what one client logs as Lightning does at an epoch's end."""

    def __init__(self) -> None:
        self.batch: Any = None
        self.clear()

    def clear(self) -> None:
        """Forget all that was logged."""
        self._metrics: dict[str, Metric] = {}
        self._numbers: dict[str, list[Tensor]] = defaultdict(list)
        self._sizes: dict[str, list[int]] = defaultdict(list)
        self._reductions: dict[str, Reduction] = {}

    def __call__(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[[Any], Any] = "mean",
        *further: Any,
        batch_size: int | None = None,
        **options: Any,
    ) -> None:
        """Keep a value; the arguments are those of ``LightningModule.log``."""
        if isinstance(value, Metric):
            self._metrics[name] = value
            return
        self._reductions[name] = reduction(name, reduce_fx)
        self._numbers[name].append(torch.as_tensor(value).detach())
        self._sizes[name].append(extract_batch_size(self.batch) if batch_size is None else batch_size)

    def values(self) -> dict[str, float]:
        """Return what was logged, by name."""
        result = {name: float(metric.compute()) for name, metric in self._metrics.items()}
        for name, numbers in self._numbers.items():
            values, sizes = torch.stack(numbers).cpu().double().flatten(), torch.tensor(self._sizes[name]).double()
            result[name] = float(self._reductions[name](values, sizes))
        return result


def reduction(name: str, reduce_fx: str | Callable[[Any], Any]) -> Reduction:
    """Return how Lightning reduces what is logged, as a function of its values (N,) and their batches' sizes (N,).

    Raises:
        ValueError: Lightning knows no such reduction.
    """
    kind = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", str(reduce_fx))
    kind = "mean" if kind == "avg" else kind
    if kind not in _REDUCTIONS:
        raise ValueError(f"{name} must be logged with reduce_fx {', '.join(_REDUCTIONS)}, got {kind}")
    return _REDUCTIONS[kind]


@contextmanager
def recording(module: LightningModule) -> Iterator[Log]:
    """Yield what a module logs in place of where Lightning would log it."""
    log = Log()
    module.log = log  # type: ignore[method-assign]  # log_dict calls it too
    try:
        yield log
    finally:
        del module.log


@contextmanager
def own_metrics(module: nn.Module) -> Iterator[list[Metric | MetricCollection]]:
    """Put empty metrics of this process's own in place of all of a module's."""
    places = list(_metric_places(module))
    memo: dict[int, Any] = {}
    for _, _, metric in places:
        for part in metric.modules():
            for value in vars(part).values():
                # What was accumulated is not worth a copy, and what hangs in a graph could not be copied.
                for tensor in value if isinstance(value, list) else [value]:
                    if isinstance(tensor, Tensor):
                        memo[id(tensor)] = tensor.detach()
    fresh = [copy.deepcopy(metric, memo) for _, _, metric in places]
    for metric in fresh:
        for part in metric.modules():
            if isinstance(part, Metric):
                part.distributed_available_fn = _alone
        metric.reset()
    try:
        for (parent, name, _), metric in zip(places, fresh, strict=True):
            parent._modules[name] = metric
        yield fresh
    finally:
        for parent, name, metric in places:
            parent._modules[name] = metric


def _metric_places(module: nn.Module) -> Iterator[tuple[nn.Module, str, Metric | MetricCollection]]:
    """Yield where a module's metrics are; the parts of a metric belong to it."""
    for parent in _outside_of_metrics(module):
        for name, child in parent._modules.items():
            if isinstance(child, Metric | MetricCollection):
                yield parent, name, child


def _outside_of_metrics(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    for child in module.children():
        if not isinstance(child, Metric | MetricCollection):
            yield from _outside_of_metrics(child)


def _alone() -> bool:
    return False
