"""Where rounds meet Lightning's loops: the callback that drives the strategy, and how loops are saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_iclr.fedopt.refusals import check_loader, check_trainable, trainable

if TYPE_CHECKING:
    from lightning_iclr.fedopt.strategy import FedOptStrategy


class RoundHooks(Callback):
    """Call the strategy where Lightning has hooks for callbacks only; always the first of a Trainer's callbacks."""

    def __init__(self, strategy: FedOptStrategy, module: LightningModule) -> None:
        self.strategy = strategy
        self.due: dict[int, Tensor] = {}  # what a checkpoint's schedules have yet to be stepped with, by their number
        self._stepped: list[int | None] = []
        self._trainable = trainable(module)
        self._warned = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_loader(trainer.train_dataloader)  # until here each of a list of loaders came alone
        for number, value in self.due.items():
            pl_module.lr_scheduler_step(self.strategy.lr_scheduler_configs[number].scheduler, value)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.strategy.begin_round()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        strategy = self.strategy
        if not strategy.clients.begun:  # callbacks and the module have had their say on the round
            check_trainable(pl_module, self._trainable)
        if strategy.vectorized is not None:
            strategy.clients.begin_client()
            return
        slot = strategy.slots[batch_idx]
        if slot.first:
            strategy.begin_client(slot.task)
        elif slot.opens_step:  # Lightning clears gradients at multiples of accumulate_grad_batches, empty slots or not
            for optimizer in trainer.optimizers:
                optimizer.zero_grad()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.strategy.proximal:
            self.strategy.add_proximal_gradient(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        strategy = self.strategy
        if strategy.vectorized is None:
            slot = strategy.slots[batch_idx]
            if isinstance(outputs, Mapping) and isinstance(outputs.get("loss"), Tensor):
                # Lightning has divided it by the batches that are accumulated.
                strategy.losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)
            if slot.last:
                strategy.end_client(slot.task)
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            strategy.end_round()
            self._stepped = _plateau_steps(trainer)
            self._publish(trainer)
        elif strategy.vectorized is None and not self._warned:
            self._warn_of_averages(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.strategy.in_round:  # training was stopped in mid-round
            self.strategy.abandon_round()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.strategy.in_round:
            self.strategy.abandon_round()
            return
        scalars = {name: float(number) for name, number in self._metrics.items()}
        for logger in trainer.loggers:
            logger.log_metrics({**scalars, "epoch": trainer.current_epoch}, step=trainer.global_step)

    def due_values(self, trainer: Trainer) -> dict[int, Tensor]:
        """Return what Lightning has yet to step schedules with; it does so after the hooks that write checkpoints.

        Returns:
            The values monitored by schedules, by number of the schedule; none in mid-round.
        """
        due: dict[int, Tensor] = {}
        before, now = ([] if self.strategy.in_round else self._stepped), _plateau_steps(trainer)
        for number, steps in enumerate(before):
            config = self.strategy.lr_scheduler_configs[number]
            value = trainer.callback_metrics.get(str(config.monitor))
            its_turn = (trainer.current_epoch + 1) % config.frequency == 0
            if its_turn and value is not None and steps is not None and steps == now[number]:
                due[number] = value.detach().cpu()
        return due

    def _publish(self, trainer: Trainer) -> None:
        metrics = self.strategy.round_metrics
        numbers = torch.stack(list(metrics.values())).float().cpu()  # a device is waited for once, and not for each
        self._metrics = {f"fedopt/{name}": number for name, number in zip(metrics, numbers, strict=True)}
        # Without a client the means are undefined, which must not end the training where a callback monitors one.
        empty = bool(self._metrics.get("fedopt/clients") == 0)
        # Not by self.log, which takes a millisecond each: the processes have agreed on these already.
        trainer.callback_metrics.update(
            {name: number for name, number in self._metrics.items() if not (empty and number.isnan())}
        )

    def _warn_of_averages(self, trainer: Trainer) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
            if isinstance(callback, WeightAveraging) and callback.should_update(step_idx=trainer.global_step - 1):
                self._warned = True
                rank_zero_warn(
                    f"{type(callback).__name__} averages the weights of single clients, since it updates after steps; "
                    "to average the server's, let it update after rounds: EMAWeightAveraging(update_every_n_steps=0, "
                    "update_starting_at_epoch=0), or a subclass of WeightAveraging whose should_update(step_idx, "
                    "epoch_idx) returns epoch_idx is not None"
                )


def progress(trainer: Trainer) -> dict[str, Any]:
    """Return how far training has come, as a checkpoint states it at the end of a round."""
    strategy = trainer.strategy
    return {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "fit_loop": _at_end_of_round(trainer),
        "lr_schedulers": [config.scheduler.state_dict() for config in strategy.lr_scheduler_configs],
        "optimizer_states": [strategy.optimizer_state(optimizer) for optimizer in strategy.optimizers],
    }


def _plateau_steps(trainer: Trainer) -> list[int | None]:
    """Return how often each schedule that Lightning steps with a measured value has been; ``None`` for others."""
    automatic = trainer.lightning_module.automatic_optimization
    return [
        getattr(config.scheduler, "last_epoch", None) if automatic and config.reduce_on_plateau else None
        for config in trainer.strategy.lr_scheduler_configs
    ]


def _at_end_of_round(trainer: Trainer) -> dict[str, Any]:
    """Return the state of the Trainer's loops as it is between the newest finished round and the next."""
    state = trainer.fit_loop.state_dict()
    epochs, batches = state["epoch_progress"], state["epoch_loop.batch_progress"]
    for part in ("total", "current"):
        epochs[part] = dict.fromkeys(epochs[part], epochs[part]["started"])
        batches[part] = dict.fromkeys(batches[part], batches[part]["ready"])
    stepped = batches["total"]["ready"] // trainer.accumulate_grad_batches
    state["epoch_loop.state_dict"]["_batches_that_stepped"] = stepped
    return state
