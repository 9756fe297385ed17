"""The two ends of a federation whose clients train elsewhere: one client's round, and the server's place in training.

Nothing here knows how messages travel; the Flower bridge is built on it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_iclr.fedopt.loader import FederatedLoader
from lightning_iclr.fedopt.plan import ClientTask, Round
from lightning_iclr.fedopt.strategy import FedOptStrategy

# One process, and nothing that is written or shown: these Trainers are parts of something larger.
QUIET: dict[str, Any] = {
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class ClientStrategy(FedOptStrategy):
    """Train one client in one round, as `FedOptStrategy` would among others, and keep what came out.

    The module holds the server's weights before ``fit``, which ends with the round.

    Args:
        index: Number of the round, from 0.
        proximal: Weight of FedProx's term.
        personal: Regular expressions of parameters and buffers that stay with the client; ``store`` holds them before
            and after.

    Attributes:
        result: The task, its mean training loss, and copies of all parameters and buffers by name.
    """

    result: tuple[ClientTask, Tensor, dict[str, Tensor]]

    def __init__(self, index: int, proximal: float = 0.0, personal: Sequence[str] = ()) -> None:
        super().__init__(proximal=proximal, personal=personal)
        self.index = index

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Bring schedules and counters to the round."""
        super().setup_optimizers(trainer)
        self._server.round = self.index
        epochs: Any = trainer.fit_loop.epoch_progress.current
        while epochs.processed < self.index:
            _step_schedules(trainer)
            epochs.processed += 1

    def collect(self, tasks: Sequence[ClientTask], updates: Tensor, losses: Tensor) -> None:
        """Keep what the module holds, which is the client's."""
        held = dict(self._module.named_parameters()) | dict(self._module.named_buffers())
        self.result = tasks[0], losses[0], {name: tensor.detach().clone() for name, tensor in held.items()}

    def end_round(self) -> None:
        """Stop: the server is elsewhere."""
        self.store.exchange()
        self.round_metrics = {"train_loss": self.result[1]}
        self.in_round = False
        self._module.trainer.should_stop = True


class ClientLoader(FederatedLoader):
    """A loader's rounds with one client in them.

    Args:
        loader: Loader of the whole federation, or of this client's rows as its only client.
        client: Number of the client, from 0.

    Raises:
        ValueError: The loader has several clients, and not this one.
    """

    def __init__(self, loader: FederatedLoader, client: int) -> None:
        self.__dict__.update(loader.__dict__)
        self.client = client
        own = 0 if loader.num_clients == 1 else client
        if not 0 <= own < loader.num_clients:
            raise ValueError(f"data_fn must serve client {client}, got a loader of {loader.num_clients} clients")
        self.partition = {client: loader.partition[own]}  # type: ignore[assignment]  # is only asked for this client

    def plan(
        self, index: int, world_size: int = 1, accumulate_grad_batches: int = 1, vectorize_clients: int = 1
    ) -> Round:
        """Return a round of this client alone."""
        return Round(index, (self.client,), (), ((self._task(index, self.client, 0, accumulate_grad_batches),),))


class _Inherited(Callback):
    """Hand on what a checkpoint holds besides the training itself: callbacks' states, settings of the data."""

    def __init__(self) -> None:
        self.rest: dict[str, Any] = {}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        large = ("state_dict", "optimizer_states", "fedopt")
        self.rest = {key: value for key, value in checkpoint.items() if key not in large}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["callbacks"] = {**self.rest.get("callbacks", {}), **checkpoint["callbacks"]}
        for key, value in self.rest.items():
            checkpoint.setdefault(key, value)


def trainer_between_rounds(
    module: LightningModule, strategy: FedOptStrategy, loader: FederatedLoader, ckpt_path: str | Path | None
) -> Trainer:
    """Return a Trainer that stands between two rounds, with everything that it restores and saves.

    Args:
        module: The module, which holds the weights to start from.
        strategy: What happens to weights; ``begin_round``, ``collect`` and ``end_round`` are then for the caller.
        loader: Tells who takes part; its rows are not read.
        ckpt_path: A checkpoint to continue from.

    Raises:
        ValueError: The module has a schedule that waits for a measured value.
    """
    rounds = 0
    if ckpt_path is not None:
        loops = torch.load(ckpt_path, map_location="cpu", mmap=True, weights_only=True)["loops"]
        rounds = loops["fit_loop"]["epoch_progress"]["current"]["processed"]
    with without_advice():
        trainer = Trainer(
            strategy=strategy,
            accelerator="cpu",
            max_epochs=rounds,  # nothing is left to train
            limit_val_batches=0,
            callbacks=[_Inherited()],
            **QUIET,
        )
        trainer.fit(module, loader, ckpt_path=None if ckpt_path is None else str(ckpt_path))
    if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
        raise ValueError("ReduceLROnPlateau needs a measured value each round, which clients do not have; use another")
    strategy.on_train_start()
    return trainer


def count_round(trainer: Trainer, steps: int, batches: int) -> None:
    """Count a round as the Trainer would have, had it trained the clients itself.

    Args:
        trainer: The Trainer.
        steps: Local optimizer steps of all clients.
        batches: Their iterations, which are more where gradients are accumulated.
    """
    _step_schedules(trainer)
    loop = trainer.fit_loop
    epochs, seen = loop.epoch_progress, loop.epoch_loop.batch_progress
    if trainer.lightning_module.automatic_optimization:
        optimizer = loop.epoch_loop.automatic_optimization.optim_progress.optimizer
        stepped: list[Any] = [optimizer.step, optimizer.zero_grad]
    else:
        stepped = [loop.epoch_loop.manual_optimization.optim_step_progress]
    for progress, number in ((seen, batches), *((each, steps) for each in stepped)):
        progress.current.reset()  # counts from the start of the epoch
        _add(progress.current, number)
        _add(progress.total, number)
    seen.is_last_batch = True
    _add(epochs.current, 1)
    _add(epochs.total, 1)


def _add(tracker: Any, number: int) -> None:
    for name in vars(tracker):
        setattr(tracker, name, getattr(tracker, name) + number)


def _step_schedules(trainer: Trainer) -> None:
    # Clients' steps are elsewhere, so torch believes that a schedule is stepped too early.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler.step\(\)` before", UserWarning)
        trainer.fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)


@contextmanager
def without_advice() -> Iterator[None]:
    """Keep back what Lightning says at every start, and what is on purpose here: to train a round, or not at all."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in ("Be aware that when using `ckpt_path`", "You defined a `validation_step` but have no"):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        logger.setLevel(level)
