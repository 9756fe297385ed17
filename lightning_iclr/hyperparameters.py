"""What a checkpoint keeps of a module's arguments."""

import inspect
from collections.abc import Sequence

from lightning.pytorch import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities.parsing import collect_init_args


def save_hyperparameters(module: LightningModule, live: Sequence[str]) -> None:
    """Keep the constructor's arguments in the checkpoint as plain values; call this in a module's ``__init__``.

    Built by a recipe, a module is described by the recipe's model section, networks and optimizers included (as class
    paths with arguments), and ``load_from_checkpoint(path)`` needs no other argument. Built in Python, its live
    arguments are objects that no checkpoint should pickle: they are left out, with all that can be called among a
    subclass's further arguments, and the caller passes ``net=`` again.

    Args:
        module: The module, whose ``__init__`` is running.
        live: Names of the arguments that are objects: the network, and callables.
    """
    from_recipe = _given_hyperparameters.get() is not None
    caller = inspect.currentframe()
    frame = caller.f_back if caller is not None else None
    ignored: set[str] = set()
    if not from_recipe and frame is not None:
        # A subclass, whose constructor calls this one's, may have added networks and functions of its own.
        given = collect_init_args(frame, [], classes=(LightningModule,))
        ignored = {*live, *(name for own in given for name, value in own.items() if callable(value))}
    module.save_hyperparameters(ignore=sorted(ignored), frame=frame)
