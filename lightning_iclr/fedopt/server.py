"""The server's side of Algorithms 1 and 2: its weights and its optimizer.

Plain torch, without Lightning: `FedOptStrategy` and the Flower bridge both run on it. All of a model's communicated
numbers lie in one flat vector, the P trainable parameters first, then the B elements of float buffers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Buffers = Literal["mean", "keep"]


class Server:
    """Hold the server's weights x_t of a module, and change them by pseudo-gradients.

    What takes part is what requires a gradient when the server is made. Its parameters are kept in float32 at least,
    whatever the module's precision; the module itself holds a client's weights while one trains. What a module holds
    under several names, such as tied weights, is one tensor here too, known by the first of its names.

    Args:
        module: The module whose weights start the training; its parameters and buffers are read and written in place.
        optimizer: Builds the server optimizer from parameters.
        lr_scheduler: Builds the server's schedule from its optimizer; stepped after every round.
        buffers: Whether float buffers, such as statistics of batch normalisation, become the clients' weighted mean or
            stay as they are, as in the original code. Integer buffers stay.
        personal: Regular expressions; parameters and buffers of which a whole name matches stay with the clients.
        dtype: Precision in which updates are added up.

    Raises:
        ValueError: ``buffers`` is unknown, a pattern matches nothing, or no parameter is left to train.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Callable[[Any], Optimizer],
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        buffers: Buffers = "mean",
        personal: Sequence[str] = (),
        dtype: torch.dtype = torch.float64,
    ) -> None:
        check_buffers(buffers)
        self._names = _all_names(module)
        own = _matching(self._names, personal)
        self.personal = {name: t for name, t in _tensors(module) if name in own}
        self.personal_start = {name: tensor.clone() for name, tensor in self.personal.items()}
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad and name not in own}
        if not trained:
            raise ValueError("the module has no parameter that requires a gradient and is not personal")
        self.names = list(trained)
        self.module_parameters = list(trained.values())
        self.of_module = [parameter.data for parameter in trained.values()]
        self.parameters = [nn.Parameter(p.detach().to(_at_least_float32(p.dtype), copy=True)) for p in trained.values()]
        self.module_buffers = {name: b for name, b in module.named_buffers() if name not in own}
        self.buffers = {name: buffer.clone() for name, buffer in self.module_buffers.items()}
        self.averaged = [name for name, b in self.buffers.items() if buffers == "mean" and b.is_floating_point()]
        self.optimizer = optimizer(self.parameters)
        self.lr_scheduler = None if lr_scheduler is None else lr_scheduler(self.optimizer)
        self.dtype = dtype
        self.num_parameters = sum(p.numel() for p in self.parameters)
        self.size = self.num_parameters + sum(self.buffers[name].numel() for name in self.averaged)
        self.round = 0
        self.skipped_rounds = 0

    def load_into_module(self) -> None:
        """Give the module the server's weights and buffers; what is personal becomes what it was at the start."""
        torch._foreach_copy_(self.of_module, [p.data for p in self.parameters])
        for name, buffer in self.module_buffers.items():
            buffer.copy_(self.buffers[name])
        for name, tensor in self.personal.items():
            tensor.copy_(self.personal_start[name])

    def flatten_module(self) -> Tensor:
        """Return what the module holds, as a new vector (P + B,)."""
        parts = [*self.of_module, *(self.module_buffers[name] for name in self.averaged)]
        vector = torch.empty(self.size, dtype=self.dtype, device=parts[0].device)
        torch._foreach_copy_(self.split(vector), parts)
        return vector

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return views of a vector (P + B,) in the shapes of the parameters, then of the averaged buffers."""
        shapes = [p.shape for p in self.parameters] + [self.buffers[name].shape for name in self.averaged]
        parts = torch.split(vector, [shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def step(self, delta: Tensor) -> Tensor:
        """Take one step of ServerOpt along the mean update: x_{t+1} = ServerOpt(x_t, -delta).

        Args:
            delta: The weighted mean of the clients' updates (P + B,); that of buffers is added as it is.

        Returns:
            Norm of the step x_{t+1} - x_t, a scalar.
        """
        parts = self.split(delta)
        before = [p.detach().clone() for p in self.parameters]
        for parameter, part in zip(self.parameters, parts, strict=False):
            parameter.grad = part.neg().to(parameter.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, part in zip(self.averaged, parts[len(self.parameters) :], strict=True):
            self.buffers[name].add_(part.to(self.buffers[name].dtype))
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        moved = torch._foreach_sub([p.data for p in self.parameters], before)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(moved)))
        return norm

    def finish_round(self, mean: Tensor) -> Tensor:
        """Step along the mean of a round's updates, and count the round.

        Where the mean is not finite, as when no client counted, weights and optimizer stay as they are, and
        ``skipped_rounds`` grows.

        Args:
            mean: The weighted mean of the clients' updates (P + B,).

        Returns:
            Norm of the step x_{t+1} - x_t, a scalar in the precision of the mean.
        """
        norm = torch.zeros((), dtype=mean.dtype, device=mean.device)
        if bool(torch.isfinite(mean).all()):  # the one place of a round that waits for the device
            norm = self.step(mean).to(mean.dtype)
        else:
            self.skipped_rounds += 1
        self.round += 1
        return norm

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the module's state dict with the server's weights and buffers in it."""
        state: dict[str, Tensor] = module.state_dict()
        held = dict(zip(self.names, self.parameters, strict=True)) | self.buffers | self.personal_start
        for first, value in held.items():
            for name in self._names[first]:
                if name in state:  # a buffer may be left out of it
                    state[name] = value.detach().to(state[name].dtype)
        return state

    def state_dict(self) -> dict[str, Any]:
        """Return what a round starts from besides the weights: tensors, numbers, strings and collections of them."""
        return {
            "round": self.round,
            "skipped_rounds": self.skipped_rounds,
            "parameters": {name: p.detach().clone() for name, p in zip(self.names, self.parameters, strict=True)},
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; the module must hold the saved weights already.

        Raises:
            ValueError: The state is of a server with other trainable parameters.
        """
        if list(state["parameters"]) != self.names:
            missing = sorted(set(state["parameters"]) ^ set(self.names))
            raise ValueError(f"the saved server trains other parameters than this module's; they differ in {missing}")
        self.round, self.skipped_rounds = state["round"], state["skipped_rounds"]
        with torch.no_grad():
            for name, parameter in zip(self.names, self.parameters, strict=True):
                parameter.copy_(state["parameters"][name])
        self.buffers = {name: buffer.clone() for name, buffer in self.module_buffers.items()}
        self.personal_start = {name: tensor.clone() for name, tensor in self.personal.items()}
        self.optimizer.load_state_dict(state["optimizer"])
        if self.lr_scheduler is not None and state["lr_scheduler"] is not None:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])


def check_buffers(buffers: str) -> None:
    """Refuse an unknown way with buffers."""
    if buffers not in ("mean", "keep"):
        raise ValueError(f"buffers must be 'mean' or 'keep', got {buffers!r}")


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p.data) for name, p in module.named_parameters()] + list(module.named_buffers())


def _all_names(module: nn.Module) -> dict[str, list[str]]:
    """Return all names of each parameter and buffer by its first."""
    names: dict[int, list[str]] = {}
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(id(tensor), []).append(name)
    return {own[0]: own for own in names.values()}


def _matching(names: Mapping[str, Sequence[str]], patterns: Sequence[str]) -> set[str]:
    """Return the first names of what the patterns match under any of its names."""
    found = set()
    for pattern in patterns:
        hits = {first for first, own in names.items() if any(re.fullmatch(pattern, name) for name in own)}
        if not hits:
            every = ", ".join(name for own in names.values() for name in own)
            raise ValueError(f"personal names no parameter or buffer with {pattern!r}; there are {every}")
        found |= hits
    return found


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
