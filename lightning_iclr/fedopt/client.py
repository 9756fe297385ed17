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

    ClientOpt has no memory between rounds (section 2 of the paper): states, hyper-parameters and schedules that are
    stepped within a client are those of the start of training again. A schedule that is stepped once a round keeps its
    place, and what it set holds for all clients of the round.

    Args:
        optimizers: The module's optimizers.
        local_schedules: Schedules that are stepped within a client.
        round_schedules: Whether there are schedules that are stepped once a round.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], local_schedules: Sequence[Any], round_schedules: bool = False
    ) -> None:
        self.optimizers, self.local_schedules = optimizers, local_schedules
        self.round_schedules = round_schedules
        self.remember()

    def remember(self) -> None:
        """Make the present values those that clients start from."""
        self._states = [_copy_state(optimizer.state) for optimizer in self.optimizers]
        self._schedules = [copy.deepcopy(schedule.state_dict()) for schedule in self.local_schedules]
        self._remember_hyperparameters()

    def begin_round(self) -> None:
        """Take what a schedule has set for the round as what its clients start from."""
        if self.round_schedules:
            self._remember_hyperparameters()

    def restore(self) -> None:
        """Bring everything back, for the next client."""
        self._restore_states()
        self._restore_hyperparameters()

    def end_round(self) -> None:
        """Bring everything back but what a schedule has just set for the next round."""
        self._restore_states()
        if not self.round_schedules:
            self._restore_hyperparameters()

    def _remember_hyperparameters(self) -> None:
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


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.copy(value)


def _copy_state(state: Mapping[Any, Any]) -> dict[Any, Any]:
    # Some optimizers, such as torch's Adagrad, have a state before their first step.
    with torch.no_grad():
        return {
            key: {name: _copy(part) for name, part in value.items()} if isinstance(value, dict) else _copy(value)
            for key, value in state.items()
        }
