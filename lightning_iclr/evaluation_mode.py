"""Run a network as evaluation does, in the middle of its training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch a module to evaluation without gradients, and each of its parts back to the mode that it was in.

    Args:
        module: The module, switched in place.

    Examples:
        >>> net = nn.Sequential(nn.Dropout(), nn.Linear(2, 2).eval())
        >>> with evaluating(net):
        ...     net[0].training
        False
        >>> [part.training for part in net]
        [True, False]
    """
    training = {part for part in module.modules() if part.training}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in module.modules():
            part.training = part in training
