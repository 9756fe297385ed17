"""What happens to weights: a Trainer strategy under which any LightningModule trains federated.

A round is an epoch of Lightning's. In it the strategy lets each client of the cohort start from the server's weights,
leaves its training to the module and the Trainer, and collects what it changed; after the last client it steps the
server optimizer along the mean, before validation and before any other callback. What becomes of the updates on the way
to that mean is the `Aggregator`'s, and the weights between rounds are the `Server`'s.
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

from lightning_iclr.fedopt.aggregation import Aggregator, Weighting
from lightning_iclr.fedopt.client import ClientOptimizers, ClientStore, add_proximal_gradient
from lightning_iclr.fedopt.compression import Compressor
from lightning_iclr.fedopt.hooks import RoundHooks, progress
from lightning_iclr.fedopt.loader import FederatedLoader
from lightning_iclr.fedopt.optim import FedAvg
from lightning_iclr.fedopt.plan import ClientChunk, ClientTask, Place, Slot, StackedBatch
from lightning_iclr.fedopt.refusals import check_initialised, check_loader, check_schedules, check_trainer
from lightning_iclr.fedopt.server import Buffers, Server, check_buffers
from lightning_iclr.fedopt.vectorized import VectorizedClients
from lightning_iclr.sampling import leave_finished_epoch, seed_step


class FedOptStrategy(DDPStrategy):
    """Train a module federated: FedOpt, Algorithm 1, with any torch optimizer on the server.

    The module's own optimizer is ClientOpt; it starts afresh for every client. Train on a `FederatedLoader`, which owns
    who takes part and the seed. One process simulates the clients one after the other; several share the cohort and
    agree by one all-reduce a round. The result does not depend on their number.

    All clients of a round start from the hyper-parameters and schedules that its first one finds: a rate set in
    ``on_train_epoch_start`` holds for the round, and what changes while a client trains is undone. Under manual
    optimization a module therefore steps a schedule of rounds in ``on_train_epoch_end``, and any other where it likes.
    ReduceLROnPlateau is stepped after each round. A run with it resumes exactly from a checkpoint that is written in
    ``on_train_epoch_end``, or by a validation that logs what it monitors, and not from one of a round's last batch.

    What is trained is fixed when training starts; to freeze or unfreeze parameters later is an error. Weight averaging
    has to update after rounds: ``EMAWeightAveraging(update_every_n_steps=0, update_starting_at_epoch=0)``, or a
    ``WeightAveraging`` whose ``should_update`` returns ``epoch_idx is not None``. Callbacks have a round's metrics from
    its end on, before validation; where no client counts, they keep the last value of those that are then undefined.

    Args:
        server_optimizer: Builds the server optimizer: `FedAvg`, `FedAvgM`, `FedAdagrad`, `FedAdam`, `FedYogi`, or any
            other.
        server_lr_scheduler: Builds the server's schedule, stepped after every round.
        weighting: Weight of a client's update in the mean: the number of its examples, the same for all, or a function
            of its `ClientTask`, which must not be 0 for all clients of a round.
        buffers: Whether float buffers become the clients' weighted mean or stay the server's, as in the original code.
        proximal: Weight mu of FedProx's term mu/2 ||x - x_t||^2 in each client's loss; 0 for none.
        clip_norm: Largest norm of a client's update; longer ones are shortened to it.
        noise_multiplier: Standard deviation z of the Gaussian noise on the sum of updates, in units of ``clip_norm``.
        delta: Chance of failure at which the privacy spent, ``fedopt/epsilon``, is reported; needs the extra
            ``privacy``.
        compression: Compresses each client's update before it is sent, such as `TopK` or `EightBit`.
        personal: Regular expressions; parameters and buffers whose whole name matches stay with each client.
        vectorize_clients: Clients that a process trains at once by ``torch.func``; ``None`` for one after the other. A
            chunk draws its random numbers together, so with dropout the draws depend on this number and on the number
            of processes.
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
        weighting: Weighting = "examples",
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
        check_buffers(buffers)
        if not proximal >= 0.0:
            raise ValueError(f"proximal must not be negative, got {proximal}")
        if vectorize_clients is not None and vectorize_clients < 1:
            raise ValueError(f"vectorize_clients must be at least 1, or None, got {vectorize_clients}")
        if timeout is not None:
            kwargs["timeout"] = timeout
        super().__init__(start_method=start_method, **kwargs)
        self.server_optimizer, self.server_lr_scheduler = server_optimizer, server_lr_scheduler
        self.aggregator = Aggregator(weighting, clip_norm, noise_multiplier, delta, compression, aggregation_dtype)
        self.buffers, self.proximal, self.personal = buffers, proximal, tuple(personal)
        self.vectorize_clients = vectorize_clients or 1
        self.server: Server | None = None
        self.loader: FederatedLoader | None = None
        self.store = ClientStore()
        self.update_listeners = self.aggregator.listeners  # a callback adds itself before training starts
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
        if trainer.training:
            check_initialised(self._module)
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
        if module.automatic_optimization:
            check_schedules(self.lr_scheduler_configs)
        if self.vectorize_clients > 1 and self.personal:
            raise ValueError("vectorize_clients trains no personal parameters; leave out one of the two")
        if self.server is not None:  # of an earlier fit
            self.store, self.in_round = ClientStore(), False
        self.server = Server(
            module, self.server_optimizer, self.server_lr_scheduler, self.buffers, self.personal, self.aggregator.dtype
        )
        self.aggregator.check_server(self.server)
        self.vectorized = None
        if self.vectorize_clients > 1:
            names, local = self.server.names, self._local_schedules
            self.vectorized = VectorizedClients(module, self.optimizers, bool(local), trainer, names)
        self.hooks = RoundHooks(self, module)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        callbacks[:] = [self.hooks, *(c for c in callbacks if not isinstance(c, RoundHooks))]

    def process_dataloader(self, dataloader: object) -> object:
        """Connect the federated loader; refuse any other for training."""
        trainer = self._module.trainer
        if not trainer.training:
            return dataloader
        self.loader = loader = check_loader(dataloader)
        accumulate, current_round = trainer.accumulate_grad_batches, lambda: self.server_round
        loader.connect(Place(self.global_rank, self.world_size, accumulate, self.vectorize_clients, current_round))
        return loader

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
            state = self.round_start if self.in_round else progress(self._module.trainer)
            checkpoint.update({key: value for key, value in state.items() if key != "fit_loop"})
            checkpoint["loops"]["fit_loop"] = state["fit_loop"]
            due = self.hooks.due_values(self._module.trainer)
            checkpoint["fedopt"] = {**self.server.state_dict(), "clients": self.store.state_dict(), "due": due}
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
        self.hooks.due = checkpoint["fedopt"].get("due", {})
        leave_finished_epoch(self._module.trainer)

    def on_train_start(self) -> None:
        """Get ready for rounds, now that a checkpoint has been restored."""
        local = self._local_schedules
        self.clients = ClientOptimizers(self.optimizers, local, len(local) < len(self.lr_scheduler_configs))
        self.aggregator.start(self._server, self._loader, self.store, self.root_device)
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
        self.round_start = progress(self._module.trainer)
        self.in_round = True
        if self.vectorized is None:
            self.slots: list[Slot] = loader.slots(server.round)
        self.clients.begin_round()
        self.store.forget_changes()
        server.load_into_module()
        self.start = server.flatten_module()
        self.start_parameters = [part.clone() for part in server.of_module] if self.proximal else []
        self.aggregator.begin_round()

    def begin_client(self, task: ClientTask) -> None:
        """Give the module the server's weights, or the client's own, and fresh optimizers."""
        self.losses: list[Tensor] = []
        self._server.load_into_module()
        kept = self.store.read(task.client)
        for name, tensor in self._server.personal.items():
            if name in kept:
                tensor.copy_(kept[name])
        self.clients.begin_client()

    def end_client(self, task: ClientTask) -> None:
        """Collect what a client changed."""
        if not task.counted:
            return
        update = self._server.flatten_module().sub_(self.start)
        loss = torch.stack(self.losses).mean() if self.losses else torch.full((), torch.nan, device=update.device)
        self._keep_personal(task, update)
        self.collect([task], update[None], loss[None])

    def _keep_personal(self, task: ClientTask, update: Tensor) -> None:
        own = self._server.personal
        if not own:
            return
        sound = torch.isfinite(update).all()  # else the server leaves the client out, and so does its memory
        for tensor in own.values():
            sound &= torch.isfinite(tensor).all()
        before = {**self._server.personal_start, **self.store.read(task.client)}
        self.store.write(task.client, {name: torch.where(sound, t, before[name].to(t)) for name, t in own.items()})

    def collect(self, tasks: Sequence[ClientTask], updates: Tensor, losses: Tensor) -> None:
        """Hand over the updates (C, P + B) and losses (C,) of clients, which are trained."""
        self.aggregator.add(tasks, updates, losses)

    def end_round(self) -> None:
        """Step the server along the mean of all processes' updates."""
        server, aggregator = self._server, self.aggregator
        if aggregator.compression is not None or self.personal:  # else nobody has written to the store
            self.store.exchange()
        skipped = server.skipped_rounds
        self.round_metrics = aggregator.finish_round()
        self.round_norms, self.mean_update = aggregator.norms, aggregator.mean_update
        if server.skipped_rounds > skipped:
            rank_zero_warn(
                f"round {server.round - 1} leaves the server as it was: no client's update counted, or their mean is "
                "not finite"
            )
        server.load_into_module()
        self.clients.end_round()
        self.in_round = False

    def abandon_round(self) -> None:
        """Go back to the server's weights, where training ends in mid-round."""
        self._server.load_into_module()
        self.clients.restore()
        self.store.forget_changes()

    def add_proximal_gradient(self, optimizer: Optimizer) -> None:
        """Add the gradient of FedProx's term for the parameters of one of the client's optimizers."""
        add_proximal_gradient(optimizer, self._server.module_parameters, self.start_parameters, self.proximal)

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
    def _local_schedules(self) -> list[Any]:
        manual = not self._module.automatic_optimization  # the module then steps its schedules, whatever the interval
        return [config.scheduler for config in self.lr_scheduler_configs if manual or config.interval == "step"]

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


StrategyRegistry.register(
    FedOptStrategy.strategy_name, FedOptStrategy, "Federated training: FedOpt, Algorithm 1", override=True
)
