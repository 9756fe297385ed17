"""Train many clients at once: one vectorised forward pass for all, by ``torch.func``.

The clients' parameters lie in one tensor with a leading dimension C for each of the module's. One client's loss does
not depend on another's parameters, so the gradient of the sum of all losses holds each client's own, and the client
optimizer steps them together, which is exact for every optimizer that treats the elements of a tensor alike.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torchmetrics import Metric

from lightning_iclr.fedopt.client_log import reduction
from lightning_iclr.fedopt.plan import ClientChunk, ClientTask, StackedBatch

_Logs = dict[str, list[tuple[Tensor, int]]]  # values of clients (n,), and the size of the batch that each is of
_LOG = inspect.signature(LightningModule.log)
_ELEMENTWISE = (SGD, Adam, AdamW, Adagrad, RMSprop)
_HOOKS = (
    "backward",
    "configure_gradient_clipping",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "optimizer_step",
    "optimizer_zero_grad",
)


class VectorizedClients:
    """Run a module's training step for many clients at once, each with weights of its own.

    A chunk of clients draws its random numbers together. What one draws, such as its dropout masks, is independent of
    what the others draw, but depends on who is in the chunk: on ``vectorize_clients`` and on the number of processes.

    What the step logs becomes one value a chunk, reduced over its clients and local steps as Lightning reduces batches,
    so that an epoch's value is that of clients trained one after the other. On several processes copies of clients that
    only keep a process busy log as well, either way.

    Args:
        module: The module; its training step must run under ``torch.func.vmap``: no decision on values, no change of
            buffers.
        optimizers: Its optimizers.
        local_schedule: Whether a schedule is stepped within a client.
        trainer: Its Trainer, whose gradient clipping and precision hold for each client.
        names: Names of the parameters that are trained.

    Raises:
        ValueError: The module cannot be trained this way; the error says why.
    """

    def __init__(
        self,
        module: LightningModule,
        optimizers: Sequence[Optimizer],
        local_schedule: bool,
        trainer: Trainer,
        names: Sequence[str],
    ) -> None:
        self.module, self.trainer = module, trainer
        reason = _ineligible(module, optimizers, local_schedule, trainer)
        if reason is not None:
            raise ValueError(f"vectorize_clients cannot train {type(module).__name__}: {reason}; leave it out")
        self.optimizer = optimizers[0]
        self.takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        self._step = _TrainingStep(module)
        everything = dict(module.named_parameters())
        self.parameters = {name: everything[name] for name in names}
        known = {id(parameter): name for name, parameter in self.parameters.items()}
        held = [(place, known.get(id(parameter))) for place, parameter in self._step.places("named_parameters")]
        self._places = {place: name for place, name in held if name is not None}
        self._stacks: dict[int, tuple[dict[str, Tensor], Optimizer]] = {}

    def train(
        self, chunk: ClientChunk, batch_idx: int, proximal: float
    ) -> Iterator[tuple[list[ClientTask], Tensor, Tensor]]:
        """Train a chunk of clients from the module's present weights.

        Args:
            chunk: The clients and their batches.
            batch_idx: The Trainer's index of the chunk.
            proximal: Weight of FedProx's term.

        Yields:
            Clients that are done, their parameters (n, P) and their mean training losses (n,).
        """
        tasks, steps = chunk
        stack, optimizer = self._start(len(tasks))
        begin = {name: parameter.detach() for name, parameter in self.parameters.items()}
        losses = torch.zeros(len(tasks), device=self.module.device)
        logs: _Logs = defaultdict(list)
        for step, batches in enumerate(steps):
            optimizer.zero_grad()
            for stacked in batches:
                self._add_gradients(stack, stacked, batch_idx, losses, logs)
            if proximal:
                for name, tensor in stack.items():
                    if tensor.grad is not None:
                        tensor.grad.add_(tensor.detach() - begin[name], alpha=proximal)
            self._clip(stack)
            optimizer.step()
            self.optimizer._opt_called = True  # type: ignore[attr-defined]  # else its schedule warns that it was not
            done = [place for place, task in enumerate(tasks) if task.steps == step + 1]
            if done:
                rows = self._rows(done, len(tasks))
                flat = torch.cat([tensor.detach()[rows].flatten(1) for tensor in stack.values()], dim=1)
                yield [tasks[place] for place in done], flat, losses[rows] / (step + 1)
        self._step.log(logs)

    def _start(self, clients: int) -> tuple[dict[str, Tensor], Optimizer]:
        """Return one copy of the parameters a client, and an optimizer like the module's over them."""
        if clients not in self._stacks:
            copies = {name: p.detach().expand(clients, *p.shape).clone() for name, p in self.parameters.items()}
            stack = {name: tensor.requires_grad_() for name, tensor in copies.items()}
            by_parameter = {id(p): tensor for p, tensor in zip(self.parameters.values(), stack.values(), strict=True)}
            groups = []
            for group in self.optimizer.param_groups:
                own = [by_parameter[id(p)] for p in group["params"] if id(p) in by_parameter]
                groups.append({**group, "params": own})
            build: Callable[[list[dict[str, Any]]], Optimizer] = type(self.optimizer)
            self._stacks[clients] = stack, build([group for group in groups if group["params"]])
        stack, optimizer = self._stacks[clients]
        for name, parameter in self.parameters.items():
            stack[name].detach().copy_(parameter.detach().expand_as(stack[name]))
        groups = [g for g in self.optimizer.param_groups if any(id(p) in self._ids for p in g["params"])]
        for into, group in zip(optimizer.param_groups, groups, strict=True):
            into.update({key: value for key, value in group.items() if key != "params"})
        optimizer.state.clear()
        if isinstance(optimizer, Adagrad):  # it has a state before its first step
            for group in optimizer.param_groups:
                for tensor in group["params"]:
                    initial = torch.full_like(tensor, group["initial_accumulator_value"])
                    optimizer.state[tensor] = {"step": torch.tensor(0.0), "sum": initial}
        return stack, optimizer

    @property
    def _ids(self) -> set[int]:
        return {id(parameter) for parameter in self.parameters.values()}

    def _add_gradients(
        self,
        stack: dict[str, Tensor],
        stacked: StackedBatch,
        batch_idx: int,
        losses: Tensor,
        logs: _Logs,
    ) -> None:
        """Add the gradients of clients whose batches have the same shape."""
        places, batch = stacked
        rows = self._rows(places, len(losses))
        weights = stack if isinstance(rows, slice) else {name: tensor[rows] for name, tensor in stack.items()}
        context = self.trainer.precision_plugin.train_step_context
        with self._step.recording(), context(), _attention(self.module.device):
            function = vmap(self._loss, in_dims=(0, 0, None), randomness="different")
            try:
                loss, logged = function(weights, batch, batch_idx)
            except RuntimeError as error:
                raise ValueError(
                    f"vectorize_clients cannot train {type(self.module).__name__}: its training step does not run "
                    f"under torch.func.vmap ({error}); leave it out"
                ) from error
        if loss.ndim != 1:
            raise ValueError(f"training_step must return a scalar loss, got shape {tuple(loss.shape[1:])}")
        torch.autograd.backward(loss.sum())
        losses[rows] += loss.detach()
        for name, value in logged.items():
            logs[name].append((value.detach().flatten(), self._step.batch_sizes[name]))

    def _rows(self, places: list[int], clients: int) -> slice | Tensor:
        if len(places) == clients:
            return slice(None)
        return torch.tensor(places).to(self.module.device, non_blocking=True)

    def _loss(self, weights: Mapping[str, Tensor], batch: Any, batch_idx: int) -> tuple[Tensor, dict[str, Tensor]]:
        arguments = (batch, batch_idx) if self.takes_index else (batch,)
        buffers = dict(self._step.places("named_buffers"))
        versions = [buffer._version for buffer in buffers.values()]
        # In this functional_call tells what the step has replaced. Its own tying loses weights of shared submodules.
        state = {place: weights[name] for place, name in self._places.items()} | buffers
        out = functional_call(self._step, state, arguments, tie_weights=False)
        for (place, buffer), version in zip(buffers.items(), versions, strict=True):
            if state[place] is not buffer or buffer._version != version:
                raise RuntimeError(f"it changes the buffer {place.removeprefix('module.')!r}, which all clients share")
        loss: Tensor = out["loss"] if isinstance(out, Mapping) else out
        return loss, dict(self._step.logged)

    def _clip(self, stack: Mapping[str, Tensor]) -> None:
        limit = self.trainer.gradient_clip_val
        if not limit:
            return
        gradients = [tensor.grad for tensor in stack.values() if tensor.grad is not None]
        if self.trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
            torch._foreach_clamp_min_(gradients, -limit)
            torch._foreach_clamp_max_(gradients, limit)
            return
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        scale = (limit / (norms + 1e-6)).clamp_max(1.0)  # as torch.nn.utils.clip_grad_norm_
        for gradient in gradients:
            gradient.mul_(scale.view(-1, *([1] * (gradient.ndim - 1))))


def _attention(device: torch.device) -> AbstractContextManager[None]:
    # On a CPU torch cannot vectorise its fused attention: it would call it in a loop, and warn.
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


class _TrainingStep(nn.Module):
    """A module whose forward is another's training step, and which keeps what that logs."""

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self.module = module
        self.logged: dict[str, Tensor] = {}
        self.log_options: dict[str, dict[str, Any]] = {}
        self.batch_sizes: dict[str, int] = {}

    def forward(self, batch: Any, *index: int) -> Any:
        self.logged, self.batch = {}, batch
        return self.module.training_step(batch, *index)

    def places(self, kind: Literal["named_parameters", "named_buffers"]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of one kind, one that is held in several places several times."""
        for path, part in self.named_modules():
            yield from getattr(part, kind)(path, recurse=False, remove_duplicate=False)

    @contextmanager
    def recording(self) -> Iterator[None]:
        own = vars(self.module)  # not by setattr, which searches a module's parameters and buffers first
        own["log"] = self._keep  # log_dict calls it too
        try:
            yield
        finally:
            del own["log"]

    def log(self, logs: _Logs) -> None:
        """Log what all steps of a chunk have logged."""
        for name, parts in logs.items():
            options = self.log_options[name]
            values = torch.cat([part for part, _ in parts])
            values = values.to(torch.promote_types(values.dtype, torch.float32))  # as Lightning adds them up
            sizes = torch.cat([torch.full_like(part, size, dtype=values.dtype) for part, size in parts])
            value = reduction(name, options["reduce_fx"])(values, sizes)
            self.module.log(name, value, batch_size=sum(len(part) * size for part, size in parts), **options)

    def _keep(self, *args: Any, **kwargs: Any) -> None:
        call = _LOG.bind(self.module, *args, **kwargs)
        call.apply_defaults()
        _, name, value, *_ = call.args
        if isinstance(value, Metric):
            raise RuntimeError(f"it logs the metric {name!r}, whose state would mix the clients")
        self.logged[name] = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float32).detach()
        options = {key: option for key, option in call.arguments.items() if key not in ("self", "name", "value")}
        size = options.pop("batch_size")
        self.batch_sizes[name] = extract_batch_size(self.batch) if size is None else size
        self.log_options[name] = options


def _ineligible(
    module: LightningModule, optimizers: Sequence[Optimizer], local_schedule: bool, trainer: Trainer
) -> str | None:
    hooks: Callable[[str], bool] = lambda hook: is_overridden(hook, module)  # noqa: E731
    normalised = [name for name, part in module.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    return next(
        (
            reason
            for applies, reason in (
                (not module.automatic_optimization, "it optimizes manually"),
                (len(optimizers) != 1, f"it has {len(optimizers)} optimizers, and one is needed"),
                (
                    not all(type(optimizer) in _ELEMENTWISE for optimizer in optimizers),
                    f"its optimizer is none of {', '.join(kind.__name__ for kind in _ELEMENTWISE)}",
                ),
                (local_schedule, "its schedule is stepped within a client"),
                (bool(normalised), f"batch normalisation ({normalised[:1]}) changes buffers; see replace_batch_norm"),
                (trainer.accumulate_grad_batches != 1, "gradients are accumulated over batches"),
                (trainer.precision == "16-mixed", "precision 16-mixed scales losses"),
                (any(map(hooks, _HOOKS)), f"it overrides {', '.join(filter(hooks, _HOOKS))}"),
            )
            if applies
        ),
        None,
    )
