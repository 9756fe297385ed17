"""Central differential privacy: noise on a round's sum, and what the rounds have spent.

"Learning Differentially Private Recurrent Language Models" (McMahan et al., ICLR 2018): each client's update is cut to
norm S and weighs the same, and the sum of a cohort gets Gaussian noise of standard deviation z S. The accountant is
that of Opacus for the subsampled Gaussian mechanism. It supposes that each client joins a round on its own with the
same chance (Poisson sampling); a cohort of fixed size, as here, is the usual approximation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_iclr._imports import optional_import
from lightning_iclr.sampling import sample_generator


def gaussian_noise(size: int, std: float, seed: int, round_index: int) -> Tensor:
    """Return the noise of one round, the same on every process.

    It is drawn from a pseudo-random generator with a known seed, for experiments. Whoever knows the seed can take the
    noise off again: in a real deployment keep it secret.

    Args:
        size: Numbers to draw.
        std: Standard deviation.
        seed: Seed of the federation.
        round_index: Number of the round, from 0.

    Returns:
        Noise (size,) in float64, on the CPU.

    Examples:
        >>> torch.equal(gaussian_noise(3, 1.0, seed=0, round_index=5), gaussian_noise(3, 1.0, seed=0, round_index=5))
        True
    """
    generator = sample_generator(seed, round_index, -1)
    return torch.randn(size, generator=generator, dtype=torch.float64) * std


def epsilon(noise_multiplier: float, sample_rate: float, rounds: int, delta: float) -> float:
    """Return the epsilon of (epsilon, delta)-privacy for a client that the rounds so far have spent.

    Args:
        noise_multiplier: Standard deviation of the noise in units of the clipping norm.
        sample_rate: Share of all clients in a cohort.
        rounds: Rounds that changed the server.
        delta: Chance that the guarantee fails.

    Raises:
        ModuleNotFoundError: Opacus is not installed.
    """
    if rounds == 0:
        return 0.0
    accountant = optional_import("opacus.accountants", "privacy").RDPAccountant()
    accountant.history = [(noise_multiplier, sample_rate, rounds)]
    return float(accountant.get_epsilon(delta))
