"""The clients' side of a round: each starts from a fresh optimizer, and keeps what is its own between rounds."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer


class ClientOptimizers:
    """Bring a module's optimizers and schedules back to where every client starts.

    ClientOpt has no memory between rounds (section 2 of the paper): states are those of the start of training again.
    Hyper-parameters, and schedules that are stepped within a client, are those that the round's first client found.
    What changes them between two rounds holds for all clients of the next, and what changes them while a client trains
    is undone. A schedule that Lightning steps once a round keeps its place.

    Args:
        optimizers: The module's optimizers.
        local_schedules: Schedules that are stepped within a client, or by the module itself.
        round_schedules: Whether there are schedules that Lightning steps once a round.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], local_schedules: Sequence[Any], round_schedules: bool = False
    ) -> None:
        self.optimizers, self.local_schedules = optimizers, local_schedules
        self.round_schedules = round_schedules
        self._states = [_copy_state(optimizer.state) for optimizer in optimizers]
        self.begun = False

    def begin_round(self) -> None:
        """Wait for the round's first client, until which a callback or the module may still set a rate."""
        self.begun = False

    def begin_client(self) -> None:
        """Bring everything back, for the next client."""
        if not self.begun:
            self._remember()
        self.begun = True
        self.restore()

    def restore(self) -> None:
        """Bring everything back, where a client has begun."""
        if self.begun:
            self._restore_states()
            self._restore_hyperparameters()

    def end_round(self) -> None:
        """Bring everything back but what a schedule has just set for the next round."""
        if self.begun:
            self._restore_states()
            if not self.round_schedules:
                self._restore_hyperparameters()

    def _remember(self) -> None:
        self._schedules = [copy.deepcopy(schedule.state_dict()) for schedule in self.local_schedules]
        self._groups = [
            [{key: _copy(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
            for optimizer in self.optimizers
        ]

    def _restore_states(self) -> None:
        for optimizer, state in zip(self.optimizers, self._states, strict=True):
            optimizer.state.clear()
            optimizer.state.update(_copy_state(state))
            optimizer.zero_grad()
        for schedule, saved in zip(self.local_schedules, self._schedules, strict=True):
            schedule.load_state_dict(copy.deepcopy(saved))

    def _restore_hyperparameters(self) -> None:
        for optimizer, groups in zip(self.optimizers, self._groups, strict=True):
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                group.update({key: _copy(value) for key, value in values.items()})


class ClientStore:
    """Keep tensors of single clients between rounds, the same on every process.

    Clients move between processes from round to round, so what one keeps is handed to all at the end of a round.
    """

    def __init__(self) -> None:
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._changed: dict[int, dict[str, Tensor]] = {}

    def read(self, client: int) -> dict[str, Tensor]:
        """Return what a client kept, by name; empty before its first round."""
        return self._kept.get(client, {})

    def write(self, client: int, values: Mapping[str, Tensor]) -> None:
        """Keep copies of a client's tensors from the end of this round on."""
        own = self._changed.setdefault(client, {})
        own.update({name: value.detach().to("cpu", copy=True) for name, value in values.items()})

    def exchange(self) -> None:
        """Hand what changed in this round to all processes."""
        changes = [self._changed]
        if dist.is_available() and dist.is_initialized():
            changes = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(changes, self._changed)
        for change in changes:
            for client, values in change.items():
                self._kept[client] = {**self._kept.get(client, {}), **values}
        self._changed = {}

    def forget_changes(self) -> None:
        """Drop what was written in a round that did not end."""
        self._changed = {}

    def state_dict(self) -> dict[int, dict[str, Tensor]]:
        """Return everything kept, by client and name."""
        return self._kept

    def load_state_dict(self, state: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Replace everything kept."""
        self._kept = {client: dict(values) for client, values in state.items()}
        self._changed = {}


def add_proximal_gradient(
    optimizer: Optimizer, parameters: Sequence[Tensor], start: Sequence[Tensor], proximal: float
) -> None:
    """Add the gradient mu (x - x_t) of FedProx's term mu/2 ||x - x_t||^2.

    Li et al., "Federated Optimization in Heterogeneous Networks" (MLSys 2020), equation 2.

    Args:
        optimizer: One of the client's optimizers; only its parameters get it, and only those with a gradient.
        parameters: Parameters x that are trained.
        start: Their values x_t at the start of the round.
        proximal: Weight mu of the term.
    """
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    pairs = [
        (parameter.grad, parameter.detach() - begin)
        for parameter, begin in zip(parameters, start, strict=True)
        if parameter.grad is not None and id(parameter) in own
    ]
    if pairs:
        gradients, moved = map(list, zip(*pairs, strict=True))
        torch._foreach_add_(gradients, moved, alpha=proximal)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.copy(value)


def _copy_state(state: Mapping[Any, Any]) -> dict[Any, Any]:
    # Some optimizers, such as torch's Adagrad, have a state before their first step.
    with torch.no_grad():
        return {
            key: {name: _copy(part) for name, part in value.items()} if isinstance(value, dict) else _copy(value)
            for key, value in state.items()
        }
