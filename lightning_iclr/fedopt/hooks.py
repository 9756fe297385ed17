"""Where rounds meet Lightning's loops: the callback that drives the strategy, and how loops are saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning_iclr.fedopt.strategy import FedOptStrategy


class RoundHooks(Callback):
    """Call the strategy where Lightning has hooks for callbacks only; always the first of a Trainer's callbacks."""

    def __init__(self, strategy: FedOptStrategy) -> None:
        self.strategy = strategy

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.strategy.begin_round()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.strategy.vectorized is not None:
            return
        slot = self.strategy.slots[batch_idx]
        if slot.first:
            self.strategy.begin_client(slot.task)
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

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.strategy.in_round:  # training was stopped in mid-round
            self.strategy.abandon_round()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.strategy.in_round:
            self.strategy.abandon_round()
            return
        names, values = zip(*self.strategy.round_metrics.items(), strict=True)
        numbers = torch.stack([value.float().cpu() for value in values])
        metrics = {f"fedopt/{name}": number for name, number in zip(names, numbers, strict=True)}
        # Not by self.log, which takes a millisecond each: the processes have agreed on these already.
        trainer.callback_metrics.update(metrics)
        scalars = {name: float(number) for name, number in metrics.items()}
        for logger in trainer.loggers:
            logger.log_metrics({**scalars, "epoch": trainer.current_epoch}, step=trainer.global_step)


def at_end_of_round(trainer: Trainer) -> dict[str, Any]:
    """Return the state of the Trainer's loops as it is between the newest finished round and the next."""
    state = trainer.fit_loop.state_dict()
    epochs, batches = state["epoch_progress"], state["epoch_loop.batch_progress"]
    for part in ("total", "current"):
        epochs[part] = dict.fromkeys(epochs[part], epochs[part]["started"])
        batches[part] = dict.fromkeys(batches[part], batches[part]["ready"])
    stepped = batches["total"]["ready"] // trainer.accumulate_grad_batches
    state["epoch_loop.state_dict"]["_batches_that_stepped"] = stepped
    return state


def check_trainer(trainer: Trainer) -> None:
    """Refuse settings of the Trainer that would end or validate in the middle of a round.

    Raises:
        ValueError: There is one; the error names it.
    """
    for name, value, wanted in (
        ("fast_dev_run", trainer.fast_dev_run, False),  # type: ignore[attr-defined]
        ("max_steps", trainer.max_steps, -1),
        ("limit_train_batches", trainer.limit_train_batches, 1.0),
        ("val_check_interval", trainer.val_check_interval, 1.0),
    ):
        if value != wanted:
            raise ValueError(
                f"under FedOptStrategy {name} must be {wanted}, got {value}: a round is an epoch and cannot be cut; "
                "set max_epochs to the number of rounds, check_val_every_n_epoch, and the loader's max_local_steps"
            )
