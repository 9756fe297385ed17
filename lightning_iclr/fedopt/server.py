"""The server's side of Algorithms 1 and 2: its weights, its optimizer, and what a round's updates add up to.

Plain torch, without Lightning: `FedOptStrategy` and the Flower bridge both run on it. All of a model's communicated
numbers lie in one flat vector, the P trainable parameters first, then the B elements of float buffers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Buffers = Literal["mean", "keep"]


class Server:
    """Hold the server's weights x_t of a module, and change them by pseudo-gradients.

    What takes part is what requires a gradient when the server is made. Its parameters are kept in float32 at least,
    whatever the module's precision; the module itself holds a client's weights while one trains.

    Args:
        module: The module whose weights start the training; its parameters and buffers are read and written in place.
        optimizer: Builds the server optimizer from parameters.
        lr_scheduler: Builds the server's schedule from its optimizer; stepped after every round.
        buffers: Whether float buffers, such as statistics of batch normalisation, become the clients' weighted mean or
            stay as they are, as in the original code. Integer buffers stay.
        personal: Regular expressions; parameters and buffers whose whole name matches stay with the clients.
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
        if buffers not in ("mean", "keep"):
            raise ValueError(f"buffers must be 'mean' or 'keep', got {buffers!r}")
        own = _matching(module, personal)
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

    def finish_round(self, total: Total, noise: Callable[[int], Tensor] | None = None) -> dict[str, Tensor]:
        """Step along the mean of a round's updates, and return the round's numbers.

        Where no client counted, or the mean is not finite, weights and optimizer stay as they are, and
        ``skipped_rounds`` grows.

        Args:
            total: What the updates add up to.
            noise: Maps P to noise (P,) that is added to the weighted sum.

        Returns:
            Scalars: ``train_loss``, ``clients``, ``examples``, ``nonfinite_clients``, ``clipped_clients``, the norms
            ``delta_norm`` of the mean update, ``client_delta_norm`` of one client's on average and ``step_norm`` of
            the server's step, the mean cosine ``client_drift`` of the clients' updates to their mean, ``server_lr``.
        """
        mean = total.delta / total.weight
        if noise is not None:
            mean[: self.num_parameters] += noise(self.num_parameters).to(mean) / total.weight
        step = torch.zeros((), dtype=mean.dtype, device=mean.device)
        rate = self.optimizer.param_groups[0]["lr"]
        if bool(torch.isfinite(mean).all()):  # the one place of a round that waits for the device
            step = self.step(mean).to(mean.dtype)
        else:
            self.skipped_rounds += 1
        self.round += 1
        norm = torch.linalg.vector_norm(mean[: self.num_parameters])
        return {
            "train_loss": total.loss / total.weight,
            "clients": total.clients,
            "examples": total.examples,
            "nonfinite_clients": total.nonfinite,
            "clipped_clients": total.clipped,
            "skipped_rounds": torch.full_like(step, self.skipped_rounds),
            "delta_norm": norm,
            "client_delta_norm": total.norms.sum() / total.clients,
            "step_norm": step,
            "client_drift": total.direction.dot(mean[: self.num_parameters]) / norm / total.clients,
            "server_lr": torch.full_like(step, float(rate)),
        }

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the module's state dict with the server's weights and buffers in it."""
        state: dict[str, Tensor] = module.state_dict()
        held = dict(zip(self.names, self.parameters, strict=True)) | self.buffers | self.personal_start
        for name, value in held.items():
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


@dataclass
class Total:
    """What a round's updates come to, on every process.

    Attributes:
        delta: Weighted sum of the counted updates (P + B,).
        direction: Sum of the counted updates' directions, each of norm 1 (P,).
        weight: Sum of the weights.
        clients: Counted clients.
        examples: Their examples.
        loss: Weighted sum of their training losses.
        nonfinite: Clients left out because their update was not finite.
        clipped: Clients whose update was shortened.
        norms: Norm of each client's update by its place in the cohort (M,), before clipping; 0 where none came.
    """

    delta: Tensor
    direction: Tensor
    weight: Tensor
    clients: Tensor
    examples: Tensor
    loss: Tensor
    nonfinite: Tensor
    clipped: Tensor
    norms: Tensor


class UpdateSum:
    """Add up the updates of a round's clients in one vector, which is all that processes exchange.

    An update with an infinite or undefined number counts neither in the sum nor in the weight, and is counted itself,
    as in ``tensorflow_federated``. Nothing here waits for the device.

    Args:
        num_parameters: Trainable parameters P.
        size: Numbers in an update, P + B.
        cohort_size: Clients drawn in a round, M.
        dtype: Precision of the sums.
        device: Where they are kept.
        clip_norm: Largest norm of an update's parameters; ``None`` for any.

    Examples:
        >>> total = UpdateSum(num_parameters=2, size=2, cohort_size=2)
        >>> updates = torch.tensor([[3.0, 4.0], [torch.nan, 0.0]], dtype=torch.float64)
        >>> total.add(updates, weights=[2.0, 1.0], examples=[2, 1], losses=torch.ones(2), positions=[0, 1])
        >>> total.read().delta.tolist(), float(total.read().nonfinite)
        ([6.0, 8.0], 1.0)
    """

    _SCALARS = ("weight", "clients", "examples", "loss", "nonfinite", "clipped")

    def __init__(
        self,
        num_parameters: int,
        size: int,
        cohort_size: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        clip_norm: float | None = None,
    ) -> None:
        self.num_parameters, self.size, self.clip_norm = num_parameters, size, clip_norm
        self.vector = torch.zeros(size + num_parameters + len(self._SCALARS) + cohort_size, dtype=dtype, device=device)
        lengths = [size, num_parameters, len(self._SCALARS), cohort_size]
        self._delta, self._direction, self._numbers, self._norms = torch.split(self.vector, lengths)

    def reset(self) -> None:
        """Begin another round."""
        self.vector.zero_()

    def add(
        self,
        updates: Tensor,
        weights: Sequence[float],
        examples: Sequence[int],
        losses: Tensor,
        positions: Sequence[int],
    ) -> None:
        """Add the updates of C clients.

        Args:
            updates: Their updates (C, P + B) in the precision of the sums, which are changed in place.
            weights: Their weights in the mean.
            examples: Examples that each trained on.
            losses: Their mean training losses (C,).
            positions: Their places in the cohort, from 0.
        """
        device, dtype = updates.device, updates.dtype
        numbers = torch.tensor([weights, examples], dtype=dtype).to(device, non_blocking=True)
        places = torch.tensor(positions).to(device, non_blocking=True)
        finite = torch.isfinite(torch.linalg.vector_norm(updates, dim=1))  # as every number then is
        if not (updates.is_cpu and bool(finite.all())):  # on a device a look would wait, and a pass does not
            updates.masked_fill_(~finite[:, None], 0.0)
        parameters = updates[:, : self.num_parameters]
        norms = torch.linalg.vector_norm(parameters, dim=1)
        inverse = norms.clamp_min(torch.finfo(dtype).tiny).reciprocal()
        self._direction.addmv_(parameters.T, inverse)
        clipped = torch.zeros_like(norms)
        if self.clip_norm is not None:
            parameters.mul_((self.clip_norm * inverse).clamp_max(1.0)[:, None])
            clipped = (norms > self.clip_norm).to(dtype)
        counts = finite.to(dtype)
        own, seen = numbers * counts
        self._delta.addmv_(updates.T, own)
        losses = torch.where(finite, losses.to(dtype), 0.0)
        self._numbers += torch.stack([own, counts, seen, losses * own, 1 - counts, clipped * counts]).sum(1)
        self._norms.index_add_(0, places, norms)

    def read(self) -> Total:
        """Return the sums; call this when all processes' vectors have been added."""
        numbers = dict(zip(self._SCALARS, self._numbers, strict=True))
        return Total(self._delta, self._direction, norms=self._norms, **numbers)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p.data) for name, p in module.named_parameters()] + list(module.named_buffers())


def _matching(module: nn.Module, patterns: Sequence[str]) -> set[str]:
    names = [name for name, _ in _tensors(module)]
    found = set()
    for pattern in patterns:
        hits = {name for name in names if re.fullmatch(pattern, name)}
        if not hits:
            raise ValueError(f"personal names no parameter or buffer with {pattern!r}; there are {', '.join(names)}")
        found |= hits
    return found


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
