"""How well the server's model serves each single client: federated evaluation, with the module's own steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_iclr.evaluation_mode import evaluating
from lightning_iclr.fedopt.client_log import Log, own_metrics, recording
from lightning_iclr.fedopt.examples import FederatedExamples, whole_batch
from lightning_iclr.fedopt.pictures import draw_client_evaluation
from lightning_iclr.fedopt.plan import ClientTask, balance
from lightning_iclr.fedopt.strategy import FedOptStrategy
from lightning_iclr.fedopt.summaries import evenly_spaced, summarize_clients
from lightning_iclr.figures import show
from lightning_iclr.sampling import SampleKey, seed_step

_LOWER_IS_BETTER = ("loss", "mse", "error", "perplexity")
_Rows = Sequence[np.ndarray]


class ClientEvaluation(Callback):
    """Evaluate the server's model on each client's own held-out rows, after validation or test.

    Runs ``validation_step`` (``test_step`` for the test split) on one client's batches after another's, with the
    client's personal parameters where it has some, and takes from ``self.log`` and ``self.log_dict`` what Lightning
    would: means of numbers weighted by the batch size, and torchmetrics computed over the client's rows alone. For
    every name that is logged there it logs four numbers over the clients: ``client/<name>/mean``,
    ``client/<name>/std``, ``client/<name>/p10`` and ``client/<name>/worst``. A tenth of the clients fare worse than
    ``p10``, so it is the 10th percentile, but the 90th of a loss. A client whose number is undefined (NaN), such as
    the recall of one without tags, is left out of that name's four.

    The last evaluation is kept as ``table`` and drawn when the run ends, as histograms: ``client_evaluation.png``, or
    ``client_evaluation_test.png``. The running validation, the weights, the module's metrics and the random generators
    are left as they were; what a step does besides logging it does for every client. The clients are shared out over
    the processes, and the result does not depend on their number.

    A client's rows come from ``dataset`` and ``partition`` or, without these, from the data module's
    ``client_datasets(split)``. Clients have the numbers that they have in training; one without rows is left out.

    Args:
        split: The ``"val"`` part, evaluated at the end of validation, or ``"test"``.
        every_n_rounds: How often to evaluate during training, in rounds.
        num_clients: Evaluate so many clients at most, evenly spaced among all with rows.
        batch_size: Rows that one process takes at a step.
        lower_is_better: Parts of names whose highest values are the worst.
        dataset: What the clients' rows are rows of.
        partition: Rows of each client.
        collate_fn: Makes a batch of examples; torch's default where ``None``, if ``dataset`` does not do it itself.

    Attributes:
        table: What was logged, by name and client; of the last evaluation.

    Raises:
        ValueError: A number is below 1, the split is unknown, only one of ``dataset`` and ``partition`` is given or,
            when the Trainer starts, there are no rows or no validation.

    Examples:
        >>> evaluation = ClientEvaluation(every_n_rounds=10, num_clients=100)
        >>> trainer = Trainer(callbacks=[evaluation], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        split: Literal["val", "test"] = "val",
        every_n_rounds: int = 1,
        num_clients: int | None = None,
        batch_size: int = 64,
        lower_is_better: Sequence[str] = _LOWER_IS_BETTER,
        dataset: Any = None,
        partition: Any = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        if split not in ("val", "test"):
            raise ValueError(f"split must be 'val' or 'test', got {split!r}")
        for name, number in (
            ("every_n_rounds", every_n_rounds),
            ("num_clients", num_clients),
            ("batch_size", batch_size),
        ):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if (dataset is None) != (partition is None):
            missing = "dataset" if dataset is None else "partition"
            raise ValueError(f"dataset and partition must be given together, and {missing} is missing")
        self.split, self.every_n_rounds = split, every_n_rounds
        self.num_clients, self.batch_size = num_clients, batch_size
        self.lower_is_better = tuple(lower_is_better)
        self.dataset, self.partition, self.collate_fn = dataset, partition, collate_fn
        self.table: dict[str, dict[int, float]] = {}
        self._checkpoint: Mapping[int, Mapping[str, Tensor]] | None = None

    @property
    def state_key(self) -> str:
        """Name in a checkpoint, which lets both splits be evaluated in one run."""
        return self._generate_state_key(split=self.split)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._checkpoint = None
        if stage not in (("fit", "validate") if self.split == "val" else ("test",)):
            return
        if stage == "fit" and not trainer.enable_validation:
            raise ValueError(
                "ClientEvaluation runs at the end of validation, and this Trainer does not validate: give it "
                "validation data, or leave the callback out"
            )
        self._clients(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:  # in training the strategy restores what clients keep
            self._checkpoint = checkpoint.get("fedopt", {}).get("clients")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.split != "val" or trainer.sanity_checking:
            return
        fitting = trainer.state.fn == TrainerFn.FITTING
        if not fitting or (trainer.current_epoch + 1) % self.every_n_rounds == 0:
            self._evaluate(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.split == "test":
            self._evaluate(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.split == "val" and trainer.state.fn == TrainerFn.VALIDATING:
            self._draw(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.split == "val":
            self._draw(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.split == "test":
            self._draw(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"table": {name: dict(values) for name, values in self.table.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.table = {name: dict(values) for name, values in state_dict["table"].items()}

    def _evaluate(self, trainer: Trainer, module: LightningModule) -> None:
        dataset, clients = self._clients(trainer)
        held = [client for client, rows in enumerate(clients) if len(rows)]
        batches = {}
        for place in evenly_spaced(len(held), self.num_clients):
            rows = clients[held[place]]
            cuts = range(0, len(rows), self.batch_size)
            batches[held[place]] = [rows[start : start + self.batch_size] for start in cuts]
        results = self._evaluate_share(trainer, module, dataset, batches)
        self.table = {name: {} for _, values in sorted(results.items()) for name in values}
        for client, values in sorted(results.items()):
            for name, value in values.items():
                self.table[name][client] = value
        for name, by_client in self.table.items():
            for kind, value in summarize_clients(list(by_client.values()), self._falls(name)).items():
                # All processes know the same number; the mean of three of them may be rounded to another.
                module.log(f"client/{name}/{kind}", value, sync_dist=True, reduce_fx="max")

    def _evaluate_share(
        self,
        trainer: Trainer,
        module: LightningModule,
        dataset: Dataset[Any],
        batches: Mapping[int, _Rows],
    ) -> dict[int, dict[str, float]]:
        """Evaluate this process's clients, and return what was logged of all processes' clients."""
        tasks = [ClientTask(client, 0, steps=len(own), num_examples=0) for client, own in batches.items()]
        shares = balance(tasks, trainer.world_size)
        own = [task.client for task in shares[trainer.global_rank]]
        rows = [part for client in own for part in batches[client]]
        # Where weights are sharded, or buffers are broadcast, every step is a meeting of all processes.
        most = max(sum(task.steps for task in share) for share in shares)
        spare = next(iter(batches.values()))[0]
        loader = self._loader(dataset, [*rows, *([spare] * (most - len(rows)))])
        results = {}
        with isolate_rng(), evaluating(module), own_metrics(module) as metrics, recording(module) as log:
            served = iter(loader)
            with self._personal(trainer, module) as begin_client:
                for client in own:
                    begin_client(client)
                    log.clear()
                    for number in range(len(batches[client])):
                        seed_step(0, epoch=0, batch_idx=number, rank=client)  # the same draws on any process
                        self._step(trainer, module, next(served), number, log)
                    results[client] = log.values()
                    for metric in metrics:
                        metric.reset()
            for batch in served:
                self._step(trainer, module, batch, 0, log)
        if not (dist.is_available() and dist.is_initialized()):
            return results
        gathered: list[dict[int, dict[str, float]]] = [{} for _ in range(trainer.world_size)]
        dist.all_gather_object(gathered, results)
        return {client: values for part in gathered for client, values in part.items()}

    def _step(self, trainer: Trainer, module: LightningModule, batch: Any, number: int, log: Log) -> None:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        log.batch = batch
        own = module.validation_step if self.split == "val" else module.test_step
        arguments = [batch]
        if is_param_in_hook_signature(own, "batch_idx", min_args=2):
            arguments.append(number)
        if is_param_in_hook_signature(own, "dataloader_idx", explicit=True):
            arguments.append(0)
        step = trainer.strategy.validation_step if self.split == "val" else trainer.strategy.test_step
        step(*arguments)

    @contextmanager
    def _personal(self, trainer: Trainer, module: LightningModule) -> Iterator[Callable[[int], None]]:
        """Yield a function that gives the module a client's personal parameters; take them away at the end."""
        strategy = trainer.strategy
        kept: Mapping[int, Mapping[str, Tensor]] = self._checkpoint or {}
        if self._checkpoint is None and isinstance(strategy, FedOptStrategy):
            kept = strategy.store.state_dict()
        tensors = {name: p.data for name, p in module.named_parameters()} | dict(module.named_buffers())
        names = {name for values in kept.values() for name in values if name in tensors}
        servers = {name: tensors[name].clone() for name in names}

        def begin_client(client: int) -> None:
            for name, value in servers.items():
                tensors[name].copy_(kept.get(client, {}).get(name, value))

        try:
            yield begin_client
        finally:
            for name, value in servers.items():
                tensors[name].copy_(value)

    def _loader(self, dataset: Dataset[Any], rows: _Rows) -> DataLoader[Any]:
        keys: list[list[Any]] = [part.tolist() for part in rows]
        if getattr(dataset, "takes_sample_keys", False):
            keys = [[SampleKey(row, 0, False) for row in part] for part in keys]
        collate = whole_batch if isinstance(dataset, FederatedExamples) else default_collate
        return DataLoader(
            dataset,
            batch_sampler=keys,
            collate_fn=self.collate_fn or collate,
            pin_memory=torch.cuda.is_available(),
        )

    def _clients(self, trainer: Trainer) -> tuple[Any, list[np.ndarray]]:
        """Return the dataset and each client's rows of it."""
        dataset, partition = self.dataset, self.partition
        if dataset is None:
            datamodule: Any = getattr(trainer, "datamodule", None)
            if not hasattr(datamodule, "client_datasets"):
                raise ValueError(
                    "ClientEvaluation needs held-out rows of each client: pass dataset and partition, or use a data "
                    "module with client_datasets(split), such as FederatedDataModule"
                )
            dataset, partition = datamodule.client_datasets(self.split)
        clients = [np.asarray(rows, dtype=np.int64) for rows in partition]
        if not any(len(rows) for rows in clients):
            raise ValueError(f"ClientEvaluation needs a client with rows in {self.split!r}, got none")
        return dataset, clients

    def _falls(self, name: str) -> bool:
        return any(part in name for part in self.lower_is_better)

    def _draw(self, trainer: Trainer) -> None:
        if self.table:
            values = {name: np.array(list(by_client.values())) for name, by_client in self.table.items()}
            summaries = {name: summarize_clients(own, self._falls(name)) for name, own in values.items()}
            name = "client_evaluation" if self.split == "val" else "client_evaluation_test"
            show(draw_client_evaluation(values, summaries), name, trainer)
