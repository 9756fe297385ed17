"""What happens to weights: a Trainer strategy under which any LightningModule trains federated.

A round is an epoch of Lightning's. In it the strategy lets each client of the cohort start from the server's weights,
leaves its training to the module and the Trainer, and collects what it changed; after the last client it steps the
server optimizer along the mean, before validation and before any other callback.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy, Strategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_iclr.fedopt.client import ClientOptimizers, ClientStore
from lightning_iclr.fedopt.compression import Compressor
from lightning_iclr.fedopt.hooks import RoundHooks, at_end_of_round, check_trainer
from lightning_iclr.fedopt.loader import FederatedLoader
from lightning_iclr.fedopt.optim import FedAvg
from lightning_iclr.fedopt.plan import ClientChunk, ClientTask, Place, Slot, StackedBatch
from lightning_iclr.fedopt.privacy import epsilon, gaussian_noise
from lightning_iclr.fedopt.server import Buffers, Server, UpdateSum
from lightning_iclr.fedopt.vectorized import VectorizedClients
from lightning_iclr.sampling import leave_finished_epoch, seed_step

_RESIDUAL = "compression residual"  # not a name that a parameter can have


class FedOptStrategy(DDPStrategy):
    """Train a module federated: FedOpt, Algorithm 1, with any torch optimizer on the server.

    The module's own optimizer is ClientOpt; it starts afresh for every client. Train on a `FederatedLoader`, which owns
    who takes part and the seed. One process simulates the clients one after the other; several share the cohort and
    agree by one all-reduce a round. The result does not depend on their number.

    Args:
        server_optimizer: Builds the server optimizer: `FedAvg`, `FedAvgM`, `FedAdagrad`, `FedAdam`, `FedYogi`, or any
            other.
        server_lr_scheduler: Builds the server's schedule, stepped after every round.
        weighting: Weight of a client's update in the mean: the number of its examples, the same for all, or a function
            of its `ClientTask`.
        buffers: Whether float buffers become the clients' weighted mean or stay the server's, as in the original code.
        proximal: Weight mu of FedProx's term mu/2 ||x - x_t||^2 in each client's loss; 0 for none.
        clip_norm: Largest norm of a client's update; longer ones are shortened to it.
        noise_multiplier: Standard deviation z of the Gaussian noise on the sum of updates, in units of ``clip_norm``.
        delta: Chance of failure at which the privacy spent, ``fedopt/epsilon``, is reported; needs the extra
            ``privacy``.
        compression: Compresses each client's update before it is sent, such as `TopK` or `EightBit`.
        personal: Regular expressions; parameters and buffers whose whole name matches stay with each client.
        vectorize_clients: Clients that a process trains at once by ``torch.func``; ``None`` for one after the other.
        aggregation_dtype: Precision in which updates are added up.
        kwargs: Further arguments of Lightning's ``DDPStrategy`` that start processes: ``start_method``, ``timeout``,
            ``process_group_backend``, ``cluster_environment``, ``checkpoint_io``, ...

    Raises:
        ValueError: A number is outside its range, or arguments exclude each other.

    Examples:
        >>> from lightning_iclr.fedopt import FedOptStrategy, FedYogi
        >>> strategy = FedOptStrategy(server_optimizer=lambda params: FedYogi(params, lr=0.03))
        >>> trainer = Trainer(strategy=strategy, max_epochs=70, accelerator="cpu", logger=False)
    """

    strategy_name = "fedopt"

    def __init__(
        self,
        server_optimizer: OptimizerCallable = FedAvg,
        server_lr_scheduler: LRSchedulerCallable | None = None,
        weighting: Literal["examples", "uniform"] | Callable[[ClientTask], float] = "examples",
        buffers: Buffers = "mean",
        proximal: float = 0.0,
        clip_norm: float | None = None,
        noise_multiplier: float = 0.0,
        delta: float | None = None,
        compression: Compressor | None = None,
        personal: Sequence[str] = (),
        vectorize_clients: int | None = None,
        aggregation_dtype: Literal["float32", "float64"] = "float64",
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        timeout: timedelta | None = None,
        **kwargs: Any,
    ) -> None:
        _check(weighting, proximal, clip_norm, noise_multiplier, delta, vectorize_clients, buffers, aggregation_dtype)
        if timeout is not None:
            kwargs["timeout"] = timeout
        super().__init__(start_method=start_method, **kwargs)
        self.server_optimizer, self.server_lr_scheduler = server_optimizer, server_lr_scheduler
        self.weighting, self.buffers, self.proximal = weighting, buffers, proximal
        self.clip_norm, self.noise_multiplier, self.delta = clip_norm, noise_multiplier, delta
        self.compression, self.personal = compression, tuple(personal)
        self.vectorize_clients = vectorize_clients or 1
        self.aggregation_dtype = getattr(torch, aggregation_dtype)
        self.server: Server | None = None
        self.loader: FederatedLoader | None = None
        self.store = ClientStore()
        self.update_listeners: list[Callable[[ClientTask, Tensor], None]] = []
        self.in_round = False
        self.round_start: dict[str, Any] = {}
        self._in_client_step = False

    @property
    def server_round(self) -> int:
        """Rounds that are done."""
        return 0 if self.server is None else self.server.round

    # One process needs neither a launcher nor a process group, and so runs in notebooks.

    @property
    def _is_single(self) -> bool:
        return self.num_processes * self.num_nodes == 1

    def _configure_launcher(self) -> None:
        if not self._is_single:
            super()._configure_launcher()

    def setup_distributed(self) -> None:
        """Join the process group, unless there is one process."""
        if self._is_single:
            self.set_world_ranks()
        else:
            super().setup_distributed()

    def setup(self, trainer: Trainer) -> None:
        """Move the module to its device and build all optimizers, without wrapping the module."""
        if self._layer_sync is not None:
            raise ValueError(
                "sync_batchnorm mixes the statistics of different clients; leave it out under FedOptStrategy"
            )
        Strategy.setup(self, trainer)

    def _setup_model(self, model: nn.Module) -> nn.Module:  # type: ignore[override]
        if dist.is_available() and dist.is_initialized():
            _sync_module_states(model)
        return model

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Build the module's optimizers and the server, and enter the rounds' hooks before all other callbacks."""
        check_trainer(trainer)
        super().setup_optimizers(trainer)
        module = self._module
        intervals = {config.interval for config in self.lr_scheduler_configs}
        if len(intervals) > 1:
            raise ValueError(
                "a module's schedules must all be stepped within a client (interval 'step') or all once a round "
                "(interval 'epoch'), got both"
            )
        if self.vectorize_clients > 1 and self.personal:
            raise ValueError("vectorize_clients trains no personal parameters; leave out one of the two")
        self.server = Server(
            module,
            self.server_optimizer,
            self.server_lr_scheduler,
            self.buffers,
            self.personal,
            self.aggregation_dtype,
        )
        if self.noise_multiplier and self.server.averaged:
            raise ValueError(
                "noise_multiplier protects parameters only, and the module has float buffers, whose mean would leak; "
                f"pass buffers='keep', or leave out {', '.join(self.server.averaged)}"
            )
        self.vectorized = None
        if self.vectorize_clients > 1:
            names, local = self.server.names, "step" in intervals
            self.vectorized = VectorizedClients(module, self.optimizers, local, trainer, names)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        callbacks[:] = [RoundHooks(self), *(c for c in callbacks if not isinstance(c, RoundHooks))]

    def process_dataloader(self, dataloader: object) -> object:
        """Connect the federated loader; refuse any other for training."""
        trainer = self._module.trainer
        if not trainer.training:
            return dataloader
        if not isinstance(dataloader, FederatedLoader):
            raise ValueError(
                f"FedOptStrategy trains on one FederatedLoader, got {type(dataloader).__name__}; pass "
                "FederatedLoader(dataset, partition, clients_per_round=..., batch_size=...)"
            )
        dataloader.connect(
            Place(
                self.global_rank,
                self.world_size,
                trainer.accumulate_grad_batches,
                self.vectorize_clients,
                lambda: self.server_round,
            )
        )
        self.loader = dataloader
        return dataloader

    # The Trainer's own hooks.

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed what the module draws by (seed, round, client, batch), after its own hooks have run."""
        if self.vectorized is None:
            slot = self.slots[batch_idx]
            seed_step(self._loader.seed, self.server_round, slot.batch, slot.task.client)
        else:
            tasks: tuple[ClientTask, ...] = batch.tasks
            seed_step(self._loader.seed, self.server_round, -1, tasks[0].client)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move a batch, or all batches of a chunk of clients."""
        if isinstance(batch, ClientChunk):
            to_device = super().batch_to_device
            steps = [[StackedBatch(s.places, to_device(s.batch, device)) for s in step] for step in batch.steps]
            return ClientChunk(batch.tasks, steps)
        return super().batch_to_device(batch, device, dataloader_idx)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's training step for one client, or all steps of a chunk of clients."""
        if self.vectorized is not None:
            return self._train_chunk(args[0])
        self._in_client_step = True
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self._in_client_step = False

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Run the backward pass; a chunk of clients has had its own."""
        if self.vectorized is not None:
            return closure_loss
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step the client's optimizer; a chunk of clients has had its own steps."""
        if self.vectorized is not None:
            return closure()
        return super().optimizer_step(optimizer, closure, model, **kwargs)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over processes, but not within a step: at the same time they train different clients."""
        return tensor if self._in_client_step else super().reduce(tensor, group, reduce_op)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the server's model, also while the module holds a client's."""
        return super().lightning_module_state_dict() if self.server is None else self.server.weights(self._module)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint of the newest finished round; in the middle of a round, of the round's start."""
        if self.server is not None and "optimizer_states" in checkpoint:
            state = self.round_start if self.in_round else self.progress()
            checkpoint.update({key: value for key, value in state.items() if key != "fit_loop"})
            checkpoint["loops"]["fit_loop"] = state["fit_loop"]
            checkpoint["fedopt"] = {**self.server.state_dict(), "clients": self.store.state_dict()}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore clients' and server's optimizers; Lightning has restored the module and its loops."""
        if "fedopt" not in checkpoint:
            raise ValueError(
                "ckpt_path is the checkpoint of a run without FedOptStrategy, which holds no server; to start from its "
                "weights, build the module by load_from_checkpoint"
            )
        super().load_optimizer_state_dict(checkpoint)
        assert self.server is not None
        self.server.load_state_dict(checkpoint["fedopt"])
        self.store.load_state_dict(checkpoint["fedopt"]["clients"])
        leave_finished_epoch(self._module.trainer)

    def on_train_start(self) -> None:
        """Remember what every client starts from, now that a checkpoint has been restored."""
        local = [config.scheduler for config in self.lr_scheduler_configs if config.interval == "step"]
        self.clients = ClientOptimizers(self.optimizers, local, len(local) < len(self.lr_scheduler_configs))
        self.sum = UpdateSum(
            self._server.num_parameters,
            self._server.size,
            self._loader.clients_per_round,
            self.aggregation_dtype,
            self.root_device,
            self.clip_norm,
        )
        # The slots that align accumulation with clients are empty on purpose.
        self._module.trainer.fit_loop.epoch_loop._warning_cache.add(
            "train_dataloader yielded None. If this was on purpose, ignore this warning..."
        )

    def on_exception(self, exception: BaseException) -> None:
        """Leave the server's weights in the module where training is interrupted."""
        if self.server is not None:
            self.server.load_into_module()

    # A round.

    def begin_round(self) -> None:
        """Make the round's plan and clear its sums."""
        loader, server = self._loader, self._server
        self.round_start = self.progress()
        self.in_round = True
        if self.vectorized is None:
            self.slots: list[Slot] = loader.slots(server.round)
        self.clients.begin_round()
        self.store.forget_changes()
        server.load_into_module()
        self.start = server.flatten_module()
        self.start_parameters = [part.clone() for part in server.of_module] if self.proximal else []
        self.sum.reset()

    def begin_client(self, task: ClientTask) -> None:
        """Give the module the server's weights, or the client's own, and fresh optimizers."""
        self.losses: list[Tensor] = []
        self._server.load_into_module()
        kept = self.store.read(task.client)
        for name, tensor in self._server.personal.items():
            if name in kept:
                tensor.copy_(kept[name])
        self.clients.restore()

    def end_client(self, task: ClientTask) -> None:
        """Collect what a client changed."""
        if not task.counted:
            return
        update = self._server.flatten_module().sub_(self.start)
        loss = torch.stack(self.losses).mean() if self.losses else torch.full((), torch.nan, device=update.device)
        self.collect([task], update[None], loss[None])
        self.store.write(task.client, self._server.personal)

    def collect(self, tasks: Sequence[ClientTask], updates: Tensor, losses: Tensor) -> None:
        """Compress, weigh and add the updates (C, P + B) and losses (C,) of clients."""
        for task, update in zip(tasks, updates, strict=True):
            if self.compression is not None:
                self._compress(self.compression, task, update[: self._server.num_parameters])
            for listener in self.update_listeners:
                listener(task, update)
        examples, positions = [task.num_examples for task in tasks], [task.position for task in tasks]
        self.sum.add(updates, [self._weigh(task) for task in tasks], examples, losses.detach(), positions)

    def _compress(self, compression: Compressor, task: ClientTask, update: Tensor) -> None:
        """Replace an update (P,) by what its client sends; what is left over it adds the next time."""
        kept = self.store.read(task.client).get(_RESIDUAL, torch.zeros(())).to(update)
        wanted = update + kept
        sent = compression(wanted, [p.numel() for p in self._server.parameters])
        sound = torch.isfinite(wanted).all()  # else the server leaves the client out, and so does its memory
        self.store.write(task.client, {_RESIDUAL: torch.where(sound, wanted - sent, kept)})
        update.copy_(torch.where(sound, sent, wanted))

    def _weigh(self, task: ClientTask) -> float:
        if not callable(self.weighting):
            return float(task.num_examples) if self.weighting == "examples" else 1.0
        weight = self.weighting(task)
        if not weight >= 0.0:
            raise ValueError(f"weighting must give a number of 0 or more, got {weight} for client {task.client}")
        return weight

    def end_round(self) -> None:
        """Agree on the sum of updates and step the server optimizer."""
        server = self._server
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.sum.vector)
        if self.compression is not None or self.personal:
            self.store.exchange()
        noise = None
        if self.noise_multiplier:
            assert self.clip_norm is not None
            std, place = self.noise_multiplier * self.clip_norm, (self._loader.seed, server.round)
            noise = lambda size: gaussian_noise(size, std, *place)  # noqa: E731
        skipped = server.skipped_rounds
        self.round_metrics = server.finish_round(self.sum.read(), noise)
        if server.skipped_rounds > skipped:
            rank_zero_warn(
                f"round {server.round - 1} leaves the server as it was: no client's update counted, or their mean is "
                "not finite"
            )
        if self.delta is not None:
            rate = self._loader.clients_per_round / self._loader.num_clients
            spent = epsilon(self.noise_multiplier, rate, server.round - server.skipped_rounds, self.delta)
            self.round_metrics["epsilon"] = torch.tensor(spent, dtype=self.aggregation_dtype)
        total = self.sum.read()
        self.round_norms, self.mean_update = total.norms.clone(), total.delta / total.weight
        server.load_into_module()
        self.clients.end_round()
        self.in_round = False

    def abandon_round(self) -> None:
        """Go back to the server's weights, where training ends in mid-round."""
        self._server.load_into_module()
        self.clients.restore()
        self.store.forget_changes()

    def add_proximal_gradient(self, optimizer: Optimizer) -> None:
        """Add the gradient mu (x - x_t) of FedProx's term for the parameters of one optimizer.

        Li et al., "Federated Optimization in Heterogeneous Networks" (MLSys 2020), equation 2.
        """
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        pairs = [
            (parameter.grad, parameter.detach() - start)
            for parameter, start in zip(self._server.module_parameters, self.start_parameters, strict=True)
            if parameter.grad is not None and id(parameter) in own
        ]
        if pairs:
            gradients, moved = map(list, zip(*pairs, strict=True))
            torch._foreach_add_(gradients, moved, alpha=self.proximal)

    def progress(self) -> dict[str, Any]:
        """Return how far training has come, as a checkpoint states it at the end of a round."""
        trainer = self._module.trainer
        return {
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "fit_loop": at_end_of_round(trainer),
            "lr_schedulers": [config.scheduler.state_dict() for config in self.lr_scheduler_configs],
            "optimizer_states": [self.optimizer_state(optimizer) for optimizer in self.optimizers],
        }

    def _train_chunk(self, chunk: ClientChunk) -> Tensor:
        assert self.vectorized is not None
        means = []
        batch_idx = self._module.trainer.fit_loop.batch_idx
        for tasks, parameters, losses in self.vectorized.train(chunk, batch_idx, self.proximal):
            means.append(losses)
            if tasks[0].counted:  # as then are all; what does not count is in a chunk alone
                updates = self.start.new_zeros(len(tasks), self._server.size)
                updates[:, : self._server.num_parameters] = parameters - self.start[: self._server.num_parameters]
                self.collect(tasks, updates, losses)
        return torch.cat(means).mean()

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _server(self) -> Server:
        assert self.server is not None
        return self.server

    @property
    def _loader(self) -> FederatedLoader:
        assert self.loader is not None
        return self.loader


def _check(
    weighting: Any,
    proximal: float,
    clip_norm: float | None,
    noise_multiplier: float,
    delta: float | None,
    vectorize_clients: int | None,
    buffers: str,
    aggregation_dtype: str,
) -> None:
    if weighting not in ("examples", "uniform") and not callable(weighting):
        raise ValueError(f"weighting must be 'examples', 'uniform' or a function of a ClientTask, got {weighting!r}")
    if buffers not in ("mean", "keep"):
        raise ValueError(f"buffers must be 'mean' or 'keep', got {buffers!r}")
    if aggregation_dtype not in ("float32", "float64"):
        raise ValueError(f"aggregation_dtype must be 'float32' or 'float64', got {aggregation_dtype!r}")
    for name, value in (("proximal", proximal), ("noise_multiplier", noise_multiplier)):
        if not value >= 0.0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if clip_norm is not None and not clip_norm > 0.0:
        raise ValueError(f"clip_norm must be positive, or None for no clipping, got {clip_norm}")
    if noise_multiplier and (clip_norm is None or weighting != "uniform"):
        raise ValueError(
            "noise_multiplier needs clip_norm and weighting='uniform', which bound one client's part in the sum; got "
            f"{clip_norm} and {weighting!r}"
        )
    if delta is not None and not (0.0 < delta < 1.0 and noise_multiplier):
        raise ValueError(f"delta must be in (0, 1) and needs a noise_multiplier, got {delta} and {noise_multiplier}")
    if vectorize_clients is not None and vectorize_clients < 1:
        raise ValueError(f"vectorize_clients must be at least 1, or None, got {vectorize_clients}")


StrategyRegistry.register(
    FedOptStrategy.strategy_name, FedOptStrategy, "Federated training: FedOpt, Algorithm 1", override=True
)
