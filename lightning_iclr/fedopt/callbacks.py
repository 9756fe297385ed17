"""What happens around federated training: pictures of the clients, of their updates and of the server's steps.

A round's numbers are taken as soon as the server has stepped, so that a checkpoint written later in the round has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_iclr.fedopt.loader import FederatedLoader
from lightning_iclr.fedopt.optim import FedAdagrad, FedAdam, FedYogi
from lightning_iclr.fedopt.partition import label_matrix
from lightning_iclr.fedopt.pictures import (
    draw_client_updates,
    draw_effective_step,
    draw_label_matrix,
    draw_rounds,
)
from lightning_iclr.fedopt.plan import ClientTask
from lightning_iclr.fedopt.server import Server
from lightning_iclr.fedopt.strategy import FedOptStrategy
from lightning_iclr.fedopt.summaries import evenly_spaced, rounds_to_target
from lightning_iclr.figures import show
from lightning_iclr.sampling import SampleKey

_QUANTILES = (0.1, 0.5, 0.9)
_MOST_ENTRIES = 2**20  # of a layer; torch.quantile takes 2**24 at most, and a sample tells as much
_ROUND_PANELS = {
    "loss": {"fedopt/train_loss": "clients in training", "val/loss": "validation"},
    "norms": {
        "fedopt/client_delta_norm": "one client's update",
        "fedopt/delta_norm": "mean update",
        "fedopt/step_norm": "server step",
    },
    "mean cosine of clients' updates to the mean": {"fedopt/client_drift": "cosine"},
}


class LabelMatrix(Callback):
    """Draw which classes each client trains on, when training starts: ``label_matrix.png``.

    The area of a dot is the number of a client's examples of a class. Labels are ``targets`` or, without these, what
    the training data serve: ``label_column`` of an example that is a dictionary, otherwise its second element. Only
    the examples of the clients that are shown are read.

    Args:
        label_column: Name of the class in an example that is a dictionary.
        targets: Class of each row of the dataset (N,), where its examples do not tell.
        num_classes: Classes; ``None`` for one more than the highest label that is shown.
        max_clients: Show so many clients at most, evenly spaced.

    Attributes:
        counts: Examples (clients, classes) of the clients that are shown.
        clients: Their numbers.

    Raises:
        ValueError: ``max_clients`` or ``num_classes`` is below 1 or, when training starts, an example has no class.
    """

    def __init__(
        self,
        label_column: str | None = None,
        targets: Any = None,
        num_classes: int | None = None,
        max_clients: int = 100,
    ) -> None:
        for name, number in (("num_classes", num_classes), ("max_clients", max_clients)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.label_column, self.targets = label_column, targets
        self.num_classes, self.max_clients = num_classes, max_clients
        self.counts = np.zeros((0, 0), dtype=np.int64)
        self.clients: list[int] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader = _strategy(trainer, self).loader
        assert loader is not None
        self.clients = evenly_spaced(loader.num_clients, self.max_clients)
        rows = np.concatenate([loader.partition[client] for client in self.clients])
        labels = self._labels(loader, rows)
        ends = np.cumsum([len(loader.partition[client]) for client in self.clients])
        places = np.split(np.arange(len(rows)), ends[:-1])
        self.counts = label_matrix(places, labels, self.num_classes or int(labels.max()) + 1)
        show(draw_label_matrix(self.counts, self.clients), "label_matrix", trainer)

    def _labels(self, loader: FederatedLoader, rows: np.ndarray) -> np.ndarray:
        """Return the class of each of these rows."""
        if self.targets is not None:
            return np.asarray(np.asarray(self.targets)[rows], dtype=np.int64)
        keyed = getattr(loader.dataset, "takes_sample_keys", False)
        with isolate_rng():  # a dataset may draw from the global generators
            labels = [self._label(loader.dataset[SampleKey(row, 0, False) if keyed else row]) for row in rows.tolist()]
        return np.asarray(labels, dtype=np.int64)

    def _label(self, example: Any) -> int:
        if isinstance(example, Mapping):
            if self.label_column not in example:
                raise ValueError(f"label_column must be one of {', '.join(example)}, got {self.label_column!r}")
            label = example[self.label_column]
        elif isinstance(example, Sequence) and len(example) > 1:
            label = example[1]
        else:
            raise ValueError(f"examples have no class as second element, got {type(example).__name__}; pass targets")
        if np.asarray(label).size != 1 or isinstance(label, str):
            raise ValueError(f"an example must have one class, got {label!r}; pass targets")
        return int(label)


class ClientUpdates(Callback):
    """Draw how long the clients' updates are and how well they agree, over rounds: ``client_updates.png``.

    For each client of a round: the norm of its update of the parameters, as it is sent and before ``clip_norm``, and
    its cosine to the round's mean update. A client whose update is not finite is left out. Until the end of the round
    each process keeps its clients' updates, in single precision on its device.

    Attributes:
        table: A row (round, norm, cosine) for each client of each round, in the order of the cohorts.
    """

    def __init__(self) -> None:
        self.table = torch.zeros(0, 3, dtype=torch.float64)
        self._updates: dict[int, Tensor] = {}
        self._num_parameters = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._num_parameters = _server(trainer, self).num_parameters
        _strategy(trainer, self).update_listeners.append(self._keep)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._updates.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = _strategy(trainer, self)
        if strategy.in_round:
            return
        mean = strategy.mean_update[: self._num_parameters].double()
        rows = []
        for position, update in self._updates.items():
            own = update.double()
            norm, cosine = own.norm(), torch.nn.functional.cosine_similarity(own, mean, dim=0, eps=1e-30)
            rows.append([float(position), float(norm), float(cosine)])
        self._updates.clear()
        everyone = [rows]
        if dist.is_available() and dist.is_initialized():
            everyone = [[] for _ in range(trainer.world_size)]
            dist.all_gather_object(everyone, rows)
        ordered = sorted(row for part in everyone for row in part if math.isfinite(row[1]))
        new = [[float(strategy.server_round), norm, cosine] for _, norm, cosine in ordered]
        self.table = torch.cat([self.table, torch.tensor(new, dtype=torch.float64).view(-1, 3)])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(trainer)
        if len(self.table):
            show(draw_client_updates(*self.table.T.numpy()), "client_updates", trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"table": self.table}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.table = state_dict["table"]

    def _keep(self, task: ClientTask, update: Tensor) -> None:
        self._updates[task.position] = update[: self._num_parameters].to(torch.float32, copy=True)

    def _stop(self, trainer: Trainer) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, FedOptStrategy) and self._keep in strategy.update_listeners:
            strategy.update_listeners.remove(self._keep)
        self._updates.clear()


class EffectiveStep(Callback):
    """Draw how far the adaptive server goes for a unit of m, in each layer over rounds: ``effective_step.png``.

    That is eta / (sqrt(v) + tau) of `FedAdagrad`, `FedAdam` or `FedYogi`, with eta as the round used it, times the bias
    correction where that is on. A layer is a module with parameters of its own; of one with more than a million numbers
    a million, evenly spaced, are looked at.

    Attributes:
        steps: Rows of a round and its quantiles 10, 50 and 90 %, by layer.

    Raises:
        TypeError: When training starts, the server optimizer has no v.
    """

    def __init__(self) -> None:
        self.steps: dict[str, list[list[float]]] = {}
        self._rates: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = _server(trainer, self).optimizer
        if not isinstance(optimizer, FedAdagrad | FedAdam | FedYogi):
            kind = type(optimizer).__name__
            raise TypeError(f"EffectiveStep draws the v of FedAdagrad, FedAdam or FedYogi, got {kind}; leave it out")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The server's schedule has moved on when the round has ended.
        self._rates = [float(group["lr"]) for group in _server(trainer, self).optimizer.param_groups]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if _strategy(trainer, self).in_round:
            return
        server = _server(trainer, self)
        for layer, steps in self._effective_steps(server).items():
            entries = torch.cat(steps)
            entries = entries[:: -(-len(entries) // _MOST_ENTRIES)].double()
            quantiles = torch.quantile(entries, entries.new_tensor(_QUANTILES)).tolist()
            self.steps.setdefault(layer, []).append([float(server.round), *quantiles])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.steps:
            show(draw_effective_step(self.steps), "effective_step", trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": {layer: [list(row) for row in rows] for layer, rows in self.steps.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = {layer: [list(row) for row in rows] for layer, rows in state_dict["steps"].items()}

    def _effective_steps(self, server: Server) -> dict[str, list[Tensor]]:
        """Return the effective steps of each parameter, flat, by layer."""
        optimizer: Any = server.optimizer
        layers = {
            id(parameter): name.rpartition(".")[0] or name
            for name, parameter in zip(server.names, server.parameters, strict=True)
        }
        steps: dict[str, list[Tensor]] = {}
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            for parameter in group["params"]:
                state = optimizer.state.get(parameter)
                if not state:  # no round has counted yet
                    continue
                scale = rate
                if group.get("bias_correction"):
                    beta1, beta2 = group["betas"]
                    scale *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
                v = state[optimizer.state_names[-1]]
                steps.setdefault(layers[id(parameter)], []).append((scale / (v.sqrt() + group["tau"])).flatten())
        return steps


class RoundCurves(Callback):
    """Draw a run's curves over rounds: ``rounds.png``.

    They are the validation metric and ``val/loss`` where these are logged, the clients' training loss, the norms of one
    client's update on average, of the mean update and of the server's step, and the mean cosine of the clients' updates
    to the mean. With a target it also logs ``rounds_to_target`` once the metric's mean over the newest three
    validations reaches it.

    Args:
        metric: Name of the validation metric.
        target: Value for it to reach.
        mode: Whether it is to rise to the target (``"max"``) or to fall to it.

    Attributes:
        curves: Points (round, value) by name; rounds count from 1.

    Raises:
        ValueError: ``mode`` is unknown.
    """

    def __init__(
        self, metric: str = "val/accuracy", target: float | None = None, mode: Literal["max", "min"] = "max"
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', got {mode!r}")
        self.metric, self.target, self.mode = metric, target, mode
        self.curves: dict[str, list[tuple[int, float]]] = {}

    @property
    def rounds_to_target(self) -> int | None:
        """Round at which the target was reached, or ``None``."""
        points = self.curves.get(self.metric, [])
        if self.target is None or not points:
            return None
        rounds, values = zip(*points, strict=True)
        return rounds_to_target(values, self.target, rounds, lower_is_better=self.mode == "min")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _strategy(trainer, self)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = _strategy(trainer, self)
        if not strategy.in_round:
            for name in ("train_loss", "delta_norm", "client_delta_norm", "step_norm", "client_drift"):
                self._record(f"fedopt/{name}", strategy.server_round, strategy.round_metrics[name])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        strategy = _strategy(trainer, self)
        if strategy.in_round:  # training was stopped in mid-round
            return
        for name in dict.fromkeys((self.metric, "val/loss")):
            if name in trainer.callback_metrics:
                self._record(name, strategy.server_round, trainer.callback_metrics[name])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (reached := self.rounds_to_target) is not None:
            # All processes know the same number; the mean of three of them may be rounded to another.
            pl_module.log("rounds_to_target", float(reached), sync_dist=True, reduce_fx="max")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        panels = {self.metric: {self.metric: self.curves.get(self.metric, [])}}
        for title, names in _ROUND_PANELS.items():
            panels[title] = {label: self.curves[name] for name, label in names.items() if name in self.curves}
        panels = {title: curves for title, curves in panels.items() if any(curves.values())}
        if panels:
            target = self.target if self.metric in panels else None
            show(draw_rounds(panels, target, self.rounds_to_target), "rounds", trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"curves": {name: list(points) for name, points in self.curves.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curves = {name: [(r, value) for r, value in points] for name, points in state_dict["curves"].items()}

    def _record(self, name: str, number: int, value: Tensor | float) -> None:
        self.curves.setdefault(name, []).append((number, float(value)))


def _strategy(trainer: Trainer, callback: Callback) -> FedOptStrategy:
    strategy = trainer.strategy
    if not isinstance(strategy, FedOptStrategy):
        name, kind = type(callback).__name__, type(strategy).__name__
        raise TypeError(f"{name} looks at rounds and needs Trainer(strategy=FedOptStrategy(...)), got {kind}")
    return strategy


def _server(trainer: Trainer, callback: Callback) -> Server:
    server = _strategy(trainer, callback).server
    assert server is not None
    return server
