"""What `FedOptStrategy` refuses, since it would go wrong without a word: of the Trainer, the module and the data."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_iclr.fedopt.loader import FederatedLoader

_CALLBACKS = {
    GradientAccumulationScheduler: "a round is laid out for one accumulate_grad_batches; set that of the Trainer",
    StochasticWeightAveraging: (
        "it replaces the module's schedule, and weights that are the server's; average these by "
        "EMAWeightAveraging(update_every_n_steps=0, update_starting_at_epoch=...)"
    ),
}


def check_trainer(trainer: Trainer) -> None:
    """Refuse settings and callbacks of the Trainer that would cut a round or change how its clients train.

    Raises:
        ValueError: There is one; the error names it.
    """
    for name, wanted in (
        ("fast_dev_run", False),
        ("max_steps", -1),
        ("overfit_batches", 0.0),
        ("limit_train_batches", 1.0),
        ("val_check_interval", 1.0),
    ):
        value = getattr(trainer, name, "a time")  # Lightning leaves out an interval that is one
        counts_batches = wanted == 1.0 and isinstance(value, int)  # 1.0 means all batches, and 1 a single one
        if value != wanted or counts_batches:
            raise ValueError(
                f"under FedOptStrategy {name} must be {wanted}, got {value}: a round is an epoch and cannot be cut; "
                "set max_epochs to the number of rounds, check_val_every_n_epoch, and the loader's max_local_steps"
            )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector
        for kind, reason in _CALLBACKS.items():
            if isinstance(callback, kind):
                raise ValueError(f"FedOptStrategy does not train with {type(callback).__name__}: {reason}")


def check_schedules(configs: Sequence[LRSchedulerConfig]) -> None:
    """Refuse schedules that Lightning would step at the wrong times.

    Raises:
        ValueError: Some are stepped within a client and some once a round, or one within a client waits for a measured
            value.
    """
    if len({config.interval for config in configs}) > 1:
        raise ValueError(
            "a module's schedules must all be stepped within a client (interval 'step') or all once a round "
            "(interval 'epoch'), got both"
        )
    if any(config.reduce_on_plateau and config.interval == "step" for config in configs):
        raise ValueError(
            "ReduceLROnPlateau looks at a value of the server's model, which is measured once a round: its interval "
            "must be 'epoch', got 'step'"
        )


def check_initialised(module: nn.Module) -> None:
    """Refuse a module that has no weights yet.

    Raises:
        ValueError: A parameter or buffer waits for a first batch; the error names it.
    """
    lazy = [name for held in (module.named_parameters(), module.named_buffers()) for name, t in held if is_lazy(t)]
    if lazy:
        raise ValueError(
            f"FedOptStrategy needs all weights before training starts, and lazy layers have none yet: {_some(lazy)}; "
            "run a batch through the module first"
        )


def trainable(module: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that require a gradient."""
    return frozenset(name for name, parameter in module.named_parameters() if parameter.requires_grad)


def check_trainable(module: nn.Module, names: frozenset[str]) -> None:
    """Refuse a module of which other parameters require a gradient than when the server was made.

    Raises:
        ValueError: Some were frozen or unfrozen, as by ``BackboneFinetuning``; the error names them.
    """
    changed = sorted(names ^ trainable(module))
    if changed:
        raise ValueError(
            f"what the server trains is fixed when training starts, and since then {_some(changed)} were frozen or "
            "unfrozen, or are new; do so before fit, and in a fit of its own for each part of training"
        )


def check_loader(loader: object) -> FederatedLoader:
    """Return a federated loader, and refuse anything else.

    Raises:
        ValueError: It is something else, such as a list of them.
    """
    if not isinstance(loader, FederatedLoader):
        raise ValueError(
            f"FedOptStrategy trains on one FederatedLoader, got {type(loader).__name__}; pass "
            "FederatedLoader(dataset, partition, clients_per_round=..., batch_size=...)"
        )
    return loader


def _some(names: Sequence[str]) -> str:
    more = len(names) - 5
    return ", ".join(names[:5]) + (f" and {more} more" if more > 0 else "")
