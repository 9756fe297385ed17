"""What a client sends in place of its update, where the uplink is narrow.

A compressor maps an update (P,) to what the server receives. The strategy keeps each client's error and adds it to the
client's next update, so that what is lost in one round is sent in a later one (error feedback; Karimireddy et al.,
"Error Feedback Fixes SignSGD", ICML 2019).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class Compressor(ABC):
    """What maps an update to what the server receives."""

    @abstractmethod
    def __call__(self, update: Tensor, sizes: Sequence[int]) -> Tensor:
        """Map an update (P,) of tensors of the given sizes to what the server receives (P,)."""


@dataclass(frozen=True)
class TopK(Compressor):
    """Send the largest numbers of an update, by magnitude, and zero in place of all others.

    Args:
        fraction: Share of the numbers that is sent, in (0, 1]; at least one number is.

    Raises:
        ValueError: ``fraction`` is outside its range.

    Examples:
        >>> TopK(fraction=0.5)(torch.tensor([1.0, -3.0, 0.5, 2.0]), [4]).tolist()
        [0.0, -3.0, 0.0, 2.0]
    """

    fraction: float

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction}")

    def __call__(self, update: Tensor, sizes: Sequence[int]) -> Tensor:
        """Map an update (P,) of tensors of the given sizes to what the server receives (P,)."""
        kept = update.abs().topk(math.ceil(self.fraction * len(update)), sorted=False).indices
        return torch.zeros_like(update).index_copy_(0, kept, update[kept])

    def num_bytes(self, sizes: Sequence[int]) -> int:
        """Return the bytes a client sends: a 32-bit number and a 32-bit index for each that is kept."""
        return 8 * math.ceil(self.fraction * sum(sizes))


@dataclass(frozen=True)
class EightBit(Compressor):
    """Send every number of an update as one of 255 levels, evenly spaced up to its tensor's largest magnitude.

    Examples:
        >>> EightBit()(torch.tensor([1.27, 0.014, -0.5]), [3])
        tensor([ 1.2700,  0.0100, -0.5000])
    """

    def __call__(self, update: Tensor, sizes: Sequence[int]) -> Tensor:
        """Map an update (P,) of tensors of the given sizes to what the server receives (P,)."""
        received = []
        for part in torch.split(update, list(sizes)):
            level = part.abs().amax() / 127
            received.append(torch.where(level > 0, (part / level).round() * level, part))
        return torch.cat(received)

    def num_bytes(self, sizes: Sequence[int]) -> int:
        """Return the bytes a client sends: one a number, and a 32-bit scale a tensor."""
        return sum(sizes) + 4 * len(sizes)
