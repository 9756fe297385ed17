"""What lies between the clients' updates and the server's step: compression, weights, clipping, the sum, and noise.

Who owns what in a round: `FedOptStrategy` has the clients trained and hands their updates over, the `Aggregator` makes
one mean of them, and the `Server` steps along it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_iclr.fedopt.client import ClientStore
from lightning_iclr.fedopt.compression import Compressor
from lightning_iclr.fedopt.loader import FederatedLoader
from lightning_iclr.fedopt.plan import ClientTask
from lightning_iclr.fedopt.privacy import epsilon, gaussian_noise
from lightning_iclr.fedopt.server import Server

Weighting = Literal["examples", "uniform"] | Callable[[ClientTask], float]

_RESIDUAL = "compression residual"  # not a name that a parameter can have


class Aggregator:
    """Make one mean of the updates of a round's clients, and let the server step along it.

    Each update is compressed, together with what its client could not send in earlier rounds, shown to the listeners,
    cut to a norm, weighed and added up. At the end of a round the processes agree on the sum, and it gets its noise.

    The arguments, and what is refused of them, are those of `FedOptStrategy`.

    Attributes:
        listeners: Called with each client's task and update (P + B,), as it is sent and before it is cut.
        norms: Norm of each client's update in the newest round by its place in the cohort (M,), before it was cut.
        mean_update: Weighted mean of the newest round's updates (P + B,), without noise.
    """

    norms: Tensor
    mean_update: Tensor

    def __init__(
        self,
        weighting: Weighting = "examples",
        clip_norm: float | None = None,
        noise_multiplier: float = 0.0,
        delta: float | None = None,
        compression: Compressor | None = None,
        aggregation_dtype: Literal["float32", "float64"] = "float64",
    ) -> None:
        _check(weighting, clip_norm, noise_multiplier, delta, aggregation_dtype)
        self.weighting, self.compression = weighting, compression
        self.clip_norm, self.noise_multiplier, self.delta = clip_norm, noise_multiplier, delta
        self.dtype: torch.dtype = getattr(torch, aggregation_dtype)
        self.listeners: list[Callable[[ClientTask, Tensor], None]] = []

    def check_server(self, server: Server) -> None:
        """Refuse a server of whose round a part would stay without noise.

        Raises:
            ValueError: There is noise, and the server averages float buffers.
        """
        if self.noise_multiplier and server.averaged:
            raise ValueError(
                "noise_multiplier protects parameters only, and the module has float buffers, whose mean would leak; "
                f"pass buffers='keep', or leave out {', '.join(server.averaged)}"
            )

    def start(
        self, server: Server, loader: FederatedLoader, store: ClientStore, device: torch.device | str = "cpu"
    ) -> None:
        """Get ready for training.

        Args:
            server: What steps along the mean of each round.
            loader: Tells the seed, and the size of a cohort and of the federation.
            store: Keeps what clients could not send yet; the caller exchanges it at the end of a round.
            device: Where updates are added up.
        """
        self.server, self.loader, self.store = server, loader, store
        cohort = loader.clients_per_round
        self.sum = UpdateSum(server.num_parameters, server.size, cohort, self.dtype, device, self.clip_norm)

    def begin_round(self) -> None:
        """Clear the sums."""
        self.sum.reset()

    def add(self, tasks: Sequence[ClientTask], updates: Tensor, losses: Tensor) -> None:
        """Compress, weigh and add the updates (C, P + B), which are changed in place, and losses (C,) of clients."""
        for task, update in zip(tasks, updates, strict=True):
            if self.compression is not None:
                self._compress(self.compression, task, update[: self.server.num_parameters])
            for listener in self.listeners:
                listener(task, update)
        examples, positions = [task.num_examples for task in tasks], [task.position for task in tasks]
        self.sum.add(updates, [self._weigh(task) for task in tasks], examples, losses.detach(), positions)

    def finish_round(self) -> dict[str, Tensor]:
        """Agree with all processes on the sum of updates, step the server along their mean, and sum the round up.

        Returns:
            Scalars: ``train_loss``, ``clients``, ``examples``, ``nonfinite_clients``, ``clipped_clients``,
            ``skipped_rounds``, the norms ``delta_norm`` of the mean update, ``client_delta_norm`` of one client's on
            average and ``step_norm`` of the server's step, the mean cosine ``client_drift`` of the clients' updates to
            their mean, ``server_lr``, and where there is a ``delta`` the ``epsilon`` that is spent.

        Raises:
            ValueError: Clients count, and ``weighting`` gives 0 for all of them.
        """
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.sum.vector)
        server, total = self.server, self.sum.read()
        self._check_weight(total)
        self.norms, self.mean_update = total.norms.clone(), total.delta / total.weight
        mean = self.mean_update
        if self.noise_multiplier:
            mean = self._add_noise(mean, total.weight)
        rate = server.optimizer.param_groups[0]["lr"]
        step = server.finish_round(mean)
        parameters = mean[: server.num_parameters]
        norm = torch.linalg.vector_norm(parameters)
        metrics = {
            "train_loss": total.loss / total.weight,
            "clients": total.clients,
            "examples": total.examples,
            "nonfinite_clients": total.nonfinite,
            "clipped_clients": total.clipped,
            "skipped_rounds": torch.full_like(step, server.skipped_rounds),
            "delta_norm": norm,
            "client_delta_norm": total.norms.sum() / total.clients,
            "step_norm": step,
            "client_drift": total.direction.dot(parameters) / norm / total.clients,
            "server_lr": torch.full_like(step, float(rate)),
        }
        if self.delta is not None:
            metrics["epsilon"] = torch.full_like(step, self._epsilon(self.delta))
        return metrics

    def _compress(self, compression: Compressor, task: ClientTask, update: Tensor) -> None:
        """Replace an update (P,) by what its client sends; what is left over it adds the next time."""
        kept = self.store.read(task.client).get(_RESIDUAL, torch.zeros(())).to(update)
        wanted = update + kept
        sent = compression(wanted, [p.numel() for p in self.server.parameters])
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

    def _check_weight(self, total: Total) -> None:
        # The names of weightings give none of 0, and only a function is worth the wait for the device.
        if callable(self.weighting) and bool((total.weight == 0.0) & (total.clients > 0)):
            raise ValueError(
                "weighting must give a client of each round more than 0, got 0 for all "
                f"{int(total.clients)} that count in round {self.server.round}"
            )

    def _add_noise(self, mean: Tensor, weight: Tensor) -> Tensor:
        """Return the mean (P + B,) as it is after noise on the parameters' weighted sum."""
        assert self.clip_norm is not None
        size, std = self.server.num_parameters, self.noise_multiplier * self.clip_norm
        noise = gaussian_noise(size, std, self.loader.seed, self.server.round)
        mean = mean.clone()
        mean[:size] += noise.to(mean) / weight
        return mean

    def _epsilon(self, delta: float) -> float:
        """Return the privacy spent so far."""
        rate = self.loader.clients_per_round / self.loader.num_clients
        return epsilon(self.noise_multiplier, rate, self.server.round - self.server.skipped_rounds, delta)


@dataclass
class Total:
    """What a round's updates come to, on every process.

    Attributes:
        delta: Weighted sum of the counted updates (P + B,).
        direction: Sum of the counted updates' directions, each of norm 1 (P,).
        weight: Sum of the weights.
        clients: Counted clients.
        examples: Their examples.
        loss: Weighted sum of their training losses.
        nonfinite: Clients left out because their update was not finite.
        clipped: Clients whose update was shortened.
        norms: Norm of each client's update by its place in the cohort (M,), before clipping; 0 where none came.
    """

    delta: Tensor
    direction: Tensor
    weight: Tensor
    clients: Tensor
    examples: Tensor
    loss: Tensor
    nonfinite: Tensor
    clipped: Tensor
    norms: Tensor


class UpdateSum:
    """Add up the updates of a round's clients in one vector, which is all that processes exchange.

    An update with an infinite or undefined number counts neither in the sum nor in the weight, and is counted itself,
    as in ``tensorflow_federated``. Nothing here waits for the device.

    Args:
        num_parameters: Trainable parameters P.
        size: Numbers in an update, P + B.
        cohort_size: Clients drawn in a round, M.
        dtype: Precision of the sums.
        device: Where they are kept.
        clip_norm: Largest norm of an update's parameters; ``None`` for any.

    Examples:
        >>> total = UpdateSum(num_parameters=2, size=2, cohort_size=2)
        >>> updates = torch.tensor([[3.0, 4.0], [torch.nan, 0.0]], dtype=torch.float64)
        >>> total.add(updates, weights=[2.0, 1.0], examples=[2, 1], losses=torch.ones(2), positions=[0, 1])
        >>> total.read().delta.tolist(), float(total.read().nonfinite)
        ([6.0, 8.0], 1.0)
    """

    _SCALARS = ("weight", "clients", "examples", "loss", "nonfinite", "clipped")

    def __init__(
        self,
        num_parameters: int,
        size: int,
        cohort_size: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        clip_norm: float | None = None,
    ) -> None:
        self.num_parameters, self.size, self.clip_norm = num_parameters, size, clip_norm
        self.vector = torch.zeros(size + num_parameters + len(self._SCALARS) + cohort_size, dtype=dtype, device=device)
        lengths = [size, num_parameters, len(self._SCALARS), cohort_size]
        self._delta, self._direction, self._numbers, self._norms = torch.split(self.vector, lengths)

    def reset(self) -> None:
        """Begin another round."""
        self.vector.zero_()

    def add(
        self,
        updates: Tensor,
        weights: Sequence[float],
        examples: Sequence[int],
        losses: Tensor,
        positions: Sequence[int],
    ) -> None:
        """Add the updates of C clients.

        Args:
            updates: Their updates (C, P + B) in the precision of the sums, which are changed in place.
            weights: Their weights in the mean.
            examples: Examples that each trained on.
            losses: Their mean training losses (C,).
            positions: Their places in the cohort, from 0.
        """
        device, dtype = updates.device, updates.dtype
        numbers = torch.tensor([weights, examples], dtype=dtype).to(device, non_blocking=True)
        places = torch.tensor(positions).to(device, non_blocking=True)
        finite = torch.isfinite(torch.linalg.vector_norm(updates, dim=1))  # as every number then is
        if not (updates.is_cpu and bool(finite.all())):  # on a device a look would wait, and a pass does not
            updates.masked_fill_(~finite[:, None], 0.0)
        parameters = updates[:, : self.num_parameters]
        norms = torch.linalg.vector_norm(parameters, dim=1)
        inverse = norms.clamp_min(torch.finfo(dtype).tiny).reciprocal()
        self._direction.addmv_(parameters.T, inverse)
        clipped = torch.zeros_like(norms)
        if self.clip_norm is not None:
            parameters.mul_((self.clip_norm * inverse).clamp_max(1.0)[:, None])
            clipped = (norms > self.clip_norm).to(dtype)
        counts = finite.to(dtype)
        own, seen = numbers * counts
        self._delta.addmv_(updates.T, own)
        losses = torch.where(finite, losses.to(dtype), 0.0)
        self._numbers += torch.stack([own, counts, seen, losses * own, 1 - counts, clipped * counts]).sum(1)
        self._norms.index_add_(0, places, norms)

    def read(self) -> Total:
        """Return the sums; call this when all processes' vectors have been added."""
        numbers = dict(zip(self._SCALARS, self._numbers, strict=True))
        return Total(self._delta, self._direction, norms=self._norms, **numbers)


def _check(
    weighting: object,
    clip_norm: float | None,
    noise_multiplier: float,
    delta: float | None,
    aggregation_dtype: str,
) -> None:
    if weighting not in ("examples", "uniform") and not callable(weighting):
        raise ValueError(f"weighting must be 'examples', 'uniform' or a function of a ClientTask, got {weighting!r}")
    if aggregation_dtype not in ("float32", "float64"):
        raise ValueError(f"aggregation_dtype must be 'float32' or 'float64', got {aggregation_dtype!r}")
    if clip_norm is not None and not clip_norm > 0.0:
        raise ValueError(f"clip_norm must be positive, or None for no clipping, got {clip_norm}")
    if not noise_multiplier >= 0.0:
        raise ValueError(f"noise_multiplier must not be negative, got {noise_multiplier}")
    if noise_multiplier and (clip_norm is None or weighting != "uniform"):
        raise ValueError(
            "noise_multiplier needs clip_norm and weighting='uniform', which bound one client's part in the sum; got "
            f"{clip_norm} and {weighting!r}"
        )
    if delta is not None and not (0.0 < delta < 1.0 and noise_multiplier):
        raise ValueError(f"delta must be in (0, 1) and needs a noise_multiplier, got {delta} and {noise_multiplier}")
