"""From simulation to a real federation: clients and server of Flower around any LightningModule.

Flower moves messages between machines. What a client does with its rows and what the server does with updates is what
`FedOptStrategy` does in simulation: the clients' side runs under it, one client and one round at a time, and the
server's side is its `Server` with its sums, options and checkpoints. Flower is imported where it is used.

A message to a client holds the record ``arrays`` with the trained parameters, ``buffers`` with the float buffers that
are averaged, ``constants`` with other buffers, and ``config``. The reply holds the first two again, and ``metrics``.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_iclr._imports import optional_import
from lightning_iclr.fedopt.loader import FederatedLoader
from lightning_iclr.fedopt.plan import ClientTask
from lightning_iclr.fedopt.remote import (
    QUIET,
    ClientLoader,
    ClientStrategy,
    count_round,
    trainer_between_rounds,
    without_advice,
)
from lightning_iclr.fedopt.strategy import FedOptStrategy

_log = logging.getLogger("flwr")
_SENT_BACK = ("arrays", "buffers")
_STORE = "lightning-iclr"


def lightning_client_app(
    module_fn: Callable[[Any], LightningModule],
    data_fn: Callable[[Any], FederatedLoader],
    trainer_kwargs: Mapping[str, Any] | None = None,
    val_data_fn: Callable[[Any], DataLoader[Any]] | None = None,
) -> Any:
    """Build the ``flwr.clientapp.ClientApp`` that trains any LightningModule on a client's own rows.

    For each message to train it builds one module, gives it the server's weights and runs one ``Trainer.fit`` over one
    round, with the module's own optimizer. Rows of each batch, and what the module draws, are those that the client of
    this number has in a simulation of the same seed. The number is the node's ``partition-id``, or one that the server
    gave out.

    Args:
        module_fn: Builds the module from Flower's ``Context``. What the server does not send, such as frozen
            parameters, must come out the same on all machines.
        data_fn: Builds the client's loader from the ``Context``: of its own rows as the only client, or of the whole
            federation where all rows are at hand. Batches, local epochs and caps are read from it, and who takes part
            is not.
        trainer_kwargs: Further arguments of the Trainer, such as ``precision`` and ``gradient_clip_val``.
        val_data_fn: Builds from the ``Context`` the data on which the client evaluates the server's model.

    Raises:
        ModuleNotFoundError: Flower is not installed.
        ValueError: ``trainer_kwargs`` sets the strategy or several devices.
    """
    options = {**QUIET, **(trainer_kwargs or {})}
    if "strategy" in options or options["devices"] not in (1, "1"):
        raise ValueError(
            "trainer_kwargs must leave out strategy, and devices must be 1: a client trains in one process; got "
            f"{trainer_kwargs}"
        )
    flwr = optional_import("flwr.app", "flower")
    app = optional_import("flwr.clientapp", "flower").ClientApp()

    @app.query()  # type: ignore[untyped-decorator]
    def query(message: Any, context: Any) -> Any:
        own = context.node_config.get("partition-id")
        config = flwr.ConfigRecord({} if own is None else {"client": int(own)})
        return flwr.Message(flwr.RecordDict({"config": config}), reply_to=message)

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Any, context: Any) -> Any:
        records, config = _split(message.content)
        client = int(config.get("client", context.node_config.get("partition-id", 0)))
        # A server of Flower's own counts rounds from 1, and sends nothing but that.
        index = int(config.get("round", config.get("server-round", 1) - 1))
        module = _load(module_fn(context), records)
        strategy = ClientStrategy(index, config.get("proximal", 0.0), config.get("personal", ()))
        kept = context.state.get(_STORE, {})
        strategy.store.load_state_dict({client: {name: _tensor(array) for name, array in kept.items()}})
        with without_advice():
            trainer = Trainer(**{"max_epochs": index + 1, **options, "limit_val_batches": 0, "strategy": strategy})
            trainer.fit(module, ClientLoader(data_fn(context), client))
        if strategy.personal:
            context.state[_STORE] = _record(flwr, strategy.store.read(client))
        task, loss, trained = strategy.result
        numbers = {
            "num-examples": task.num_examples,
            "train_loss": float(loss),
            "steps": trainer.global_step,
            "batches": len(strategy.slots),
        }
        content = {"metrics": flwr.MetricRecord(numbers)}
        for key in _SENT_BACK:
            if key in records:
                content[key] = _record(flwr, {name: trained[name] for name in records[key]})
        return flwr.Message(flwr.RecordDict(content), reply_to=message)

    if val_data_fn is not None:

        @app.evaluate()  # type: ignore[untyped-decorator]
        def evaluate(message: Any, context: Any) -> Any:
            records, _ = _split(message.content)
            own = {"kept": context.state[_STORE]} if _STORE in context.state else {}
            module, data = _load(module_fn(context), {**records, **own}), val_data_fn(context)
            with without_advice():
                (numbers,) = Trainer(**options).validate(module, data, verbose=False)
            numbers = {**numbers, "num-examples": len(data.dataset)}  # type: ignore[arg-type]
            return flwr.Message(flwr.RecordDict({"metrics": flwr.MetricRecord(numbers)}), reply_to=message)

    return app


class FedOptFlower:
    """A Flower ``Strategy`` whose server is that of `FedOptStrategy`.

    Each round's cohort is the one that a simulation draws, where the nodes' ``partition-id`` tell which client is
    which; clients of it that are not there are left out. Where some node has none, Flower samples among the nodes. A
    client whose reply is an error, late or not finite is left out of the mean.

    Args:
        module: The module to train, with the weights to start from.
        strategy: What happens to weights; all options but ``compression`` and ``vectorize_clients``.
        num_clients: Clients of the federation.
        clients_per_round: Size of a cohort, or its share of all clients where it is a float.
        client_dropout: Chance of a drawn client not to be asked, in [0, 1).
        seed: Seed of cohorts and dropout, and of noise for privacy, which nobody else may know then.
        ckpt_path: A checkpoint to continue from, of a simulation or of an earlier federation.
        dirpath: Folder in which each round leaves its checkpoint ``last.ckpt``; ``None`` to keep none.
        fraction_evaluate: Share of the nodes that evaluate the server's model after each round, in [0, 1].
        patience: Seconds to wait for clients of a cohort that are not there, while others of it are.

    Raises:
        ModuleNotFoundError: Flower is not installed.
        ValueError: A number is outside its range, or an option of the strategy is not for a real federation.
    """

    def __init__(
        self,
        module: LightningModule,
        strategy: FedOptStrategy,
        *,
        num_clients: int,
        clients_per_round: int | float,
        client_dropout: float = 0.0,
        seed: int = 0,
        ckpt_path: str | Path | None = None,
        dirpath: str | Path | None = None,
        fraction_evaluate: float = 0.0,
        patience: float = 60.0,
    ) -> None:
        if strategy.aggregator.compression is not None or strategy.vectorize_clients > 1:
            raise ValueError("compression and vectorize_clients are of the simulation only; leave them out here")
        if not 0.0 <= fraction_evaluate <= 1.0:
            raise ValueError(f"fraction_evaluate must be in [0, 1], got {fraction_evaluate}")
        self._flwr = optional_import("flwr.app", "flower")
        self._base: Any = optional_import("flwr.serverapp.strategy", "flower")
        self._base.Strategy.register(type(self))
        # Only who takes part is read from this loader, so each client has one row that nobody looks at.
        self.loader = FederatedLoader(
            range(num_clients),  # type: ignore[arg-type]  # has a length and items
            [[client] for client in range(num_clients)],
            clients_per_round=clients_per_round,
            batch_size=1,
            client_dropout=client_dropout,
            seed=seed,
        )
        self.module, self.strategy = module, strategy
        self.dirpath, self.fraction_evaluate, self.patience = dirpath, fraction_evaluate, patience
        self.trainer = trainer_between_rounds(module, strategy, self.loader, ckpt_path)
        self._numbers: dict[int, int | None] = {}  # client number of each node, None where it has none
        self._asked: dict[int, tuple[int, int]] = {}  # client and place in the cohort of each node asked in this round

    @property
    def server(self) -> Any:
        """The server: weights, optimizer and round."""
        return self.strategy.server

    def arrays(self) -> Any:
        """Return the server's trained parameters as an ``ArrayRecord``."""
        return _record(self._flwr, dict(zip(self.server.names, self.server.parameters, strict=True)))

    def start(self, grid: Any, initial_arrays: Any = None, num_rounds: int = 3, **options: Any) -> Any:
        """Run rounds, as Flower's ``Strategy.start`` does.

        Args:
            grid: Flower's ``Grid``, which reaches the nodes.
            initial_arrays: Left alone; the server has its weights.
            num_rounds: Rounds to run, on top of those of a checkpoint.
            options: Further arguments of ``Strategy.start``, such as ``timeout`` and ``evaluate_fn``.

        Returns:
            Flower's ``Result``.
        """
        return self._base.Strategy.start(self, grid, self.arrays(), num_rounds, **options)

    def summary(self) -> None:
        """Log what the strategy does."""
        _log.info("\t├──> %s after round %d", type(self.server.optimizer).__name__, self.server.round)
        _log.info("\t└──> Cohorts of %d of %d clients", self.loader.clients_per_round, self.loader.num_clients)

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Iterable[Any]:
        """Draw the round's cohort, and write a message to each of its clients."""
        strategy, server = self.strategy, self.server
        strategy.begin_round()
        buffers = {name: server.buffers[name] for name in server.averaged}
        constants = {name: buffer for name, buffer in server.buffers.items() if name not in buffers}
        shared = {"arrays": self.arrays()}
        for key, tensors in (("buffers", buffers), ("constants", constants)):
            if tensors:
                shared[key] = _record(self._flwr, tensors)
        told = {**config, "round": server.round, "proximal": float(strategy.proximal)}
        if strategy.personal:
            told["personal"] = list(strategy.personal)
        self._asked = self._cohort(grid)
        messages = []
        for node, (client, _) in self._asked.items():
            own = self._flwr.ConfigRecord({**told, "client": client})
            content = self._flwr.RecordDict({**shared, "config": own})
            messages.append(self._flwr.Message(content, node, "train", group_id=str(server_round)))
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> tuple[Any, Any]:
        """Add up the updates, step the server's optimizer and write a checkpoint."""
        strategy, trainer = self.strategy, self.trainer
        place = {node: position for node, (_, position) in self._asked.items()}
        answers = sorted(_sound(replies), key=lambda reply: place[reply.metadata.src_node_id])
        steps = batches = 0
        for reply in answers:
            client, position = self._asked[reply.metadata.src_node_id]
            try:
                update = self._read(reply.content)
            except ValueError as error:
                _log.warning("Client %d is left out: %s", client, error)
                continue
            numbers = reply.content["metrics"]
            task = ClientTask(client, position, int(numbers["steps"]), int(numbers["num-examples"]))
            loss = torch.tensor([float(numbers["train_loss"])], dtype=torch.float64)
            strategy.collect([task], update[None], loss)
            steps, batches = steps + task.steps, batches + int(numbers["batches"])
        strategy.end_round()
        count_round(trainer, steps, batches)
        if self.dirpath is not None:
            trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt", weights_only=False)
        metrics = {name: float(value) for name, value in strategy.round_metrics.items()}
        return self.arrays(), self._flwr.MetricRecord(metrics)

    def configure_evaluate(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Iterable[Any]:
        """Write a message to a share of the nodes to evaluate the server's model."""
        nodes = list(grid.get_node_ids())
        share = random.sample(nodes, min(len(nodes), round(self.fraction_evaluate * len(nodes))))
        content = {"arrays": self.arrays(), "config": config}
        if self.server.buffers:
            content["buffers"] = _record(self._flwr, self.server.buffers)
        record = self._flwr.RecordDict(content)
        return [self._flwr.Message(record, node, "evaluate", group_id=str(server_round)) for node in share]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Any]) -> Any:
        """Return the mean of what the clients measured, weighted by their examples."""
        contents = [reply.content for reply in _sound(replies)]
        utilities = optional_import("flwr.serverapp.strategy.strategy_utils", "flower")
        return utilities.aggregate_metricrecords(contents, "num-examples") if contents else None

    def _cohort(self, grid: Any) -> dict[int, tuple[int, int]]:
        cohort = self.loader.plan(self.server.round).cohort
        deadline, told = time.monotonic() + self.patience, False
        while True:
            nodes = self._nodes(grid)
            if nodes and None in nodes.values():
                return self._sample(grid)
            of_client = {client: node for node, client in nodes.items()}
            here = [client for client in cohort if client in of_client]
            if len(here) == len(cohort) or (here and time.monotonic() > deadline):
                return {of_client[client]: (client, cohort.index(client)) for client in here}
            if not told:
                _log.info("Waiting for clients %s", [client for client in cohort if client not in of_client])
                told = True
            time.sleep(min(1.0, 0.01 + self.patience / 10))

    def _sample(self, grid: Any) -> dict[int, tuple[int, int]]:
        size = self.loader.clients_per_round
        utilities = optional_import("flwr.serverapp.strategy.strategy_utils", "flower")
        nodes, _ = utilities.sample_nodes(grid, size, size)
        known = list(dict.fromkeys([*self._numbers, *nodes]))  # in the order in which they came
        return {node: (known.index(node), position) for position, node in enumerate(nodes)}

    def _nodes(self, grid: Any) -> dict[int, int | None]:
        """Return the nodes that are there, and which client each is."""
        nodes = list(grid.get_node_ids())
        new = [node for node in nodes if node not in self._numbers]
        if new:
            questions = [self._flwr.Message(self._flwr.RecordDict(), node, "query") for node in new]
            for reply in _sound(grid.send_and_receive(questions, timeout=max(60.0, self.patience))):
                self._numbers[reply.metadata.src_node_id] = reply.content["config"].get("client")
        return {node: self._numbers[node] for node in nodes if node in self._numbers}

    def _read(self, content: Any) -> Tensor:
        """Return a client's update (P + B,)."""
        given = {name: array for key in _SENT_BACK if key in content for name, array in content[key].items()}
        parts = []
        names = [*self.server.names, *self.server.averaged]
        for name, start in zip(names, self.server.split(self.strategy.start), strict=True):
            if name not in given or tuple(given[name].shape) != tuple(start.shape):
                shape = tuple(given[name].shape) if name in given else None
                raise ValueError(f"{name} must have shape {tuple(start.shape)}, got {shape}")
            parts.append(_tensor(given[name]).reshape(-1).to(self.strategy.start))
        return torch.cat(parts).sub_(self.strategy.start)


def flower_server_app(
    strategy_fn: Callable[[Any], FedOptFlower], num_rounds: int | None = None, timeout: float = 3600.0
) -> Any:
    """Build the ``flwr.serverapp.ServerApp`` that runs a `FedOptFlower`.

    Args:
        strategy_fn: Builds it from Flower's ``Context``.
        num_rounds: Rounds to run; ``None`` for ``num-server-rounds`` of the run's configuration.
        timeout: Seconds to wait for the replies of a round.

    Raises:
        ModuleNotFoundError: Flower is not installed.
    """
    app = optional_import("flwr.serverapp", "flower").ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Any, context: Any) -> None:
        rounds = int(context.run_config["num-server-rounds"]) if num_rounds is None else num_rounds
        strategy_fn(context).start(grid, num_rounds=rounds, timeout=timeout)

    return app


def _sound(replies: Iterable[Any]) -> list[Any]:
    sound = []
    for reply in replies:
        if reply.has_error():
            _log.warning("Node %d failed: %s", reply.metadata.src_node_id, reply.error.reason)
        else:
            sound.append(reply)
    return sound


def _split(content: Any) -> tuple[dict[str, Any], Mapping[str, Any]]:
    return dict(content.array_records.items()), content.get("config", {})


def _load(module: LightningModule, records: Mapping[str, Mapping[str, Any]]) -> LightningModule:
    module.configure_model()
    held = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for arrays in records.values():
            for name, array in arrays.items():
                if name not in held or tuple(held[name].shape) != tuple(array.shape):
                    own = tuple(held[name].shape) if name in held else None
                    raise ValueError(f"module_fn must build a {name} of shape {tuple(array.shape)}, got {own}")
                held[name].copy_(_tensor(array))
    return module


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array.numpy()))  # a copy that can be written to, also of what has no dimension


def _record(flwr: ModuleType, tensors: Mapping[str, Tensor]) -> Any:
    return flwr.ArrayRecord({name: flwr.Array(_numpy(tensor)) for name, tensor in tensors.items()})


def _numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return tensor.float().numpy() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.numpy()
