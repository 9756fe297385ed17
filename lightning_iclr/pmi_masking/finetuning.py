"""What fine-tuning on any task shares: a pretrained network under a new head, BERT's optimization, exact evaluation."""

from __future__ import annotations

import inspect
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_iclr._imports import optional_import
from lightning_iclr.hyperparameters import save_hyperparameters
from lightning_iclr.pmi_masking.model import param_groups, repeated_layers
from lightning_iclr.pmi_masking.module import MaskedLM
from lightning_iclr.sampling import estimated_steps, seed_step
from lightning_iclr.schedules import WarmupLinear
from lightning_iclr.sharding import shard_blocks

Split = Literal["val", "test"]


class LabelledBatch(NamedTuple):
    """Rows of a task that has one label a row.

    Attributes:
        inputs: What the network takes, by name, each with the rows first.
        labels: Classes, or numbers, (B,).
        groups: Which part of the data a row belongs to (B,), -1 for none.
        rows: Which row of the data it is (B,), -1 for one that only fills up a process's share.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    groups: Tensor
    rows: Tensor


class Gathered(Metric):
    """The rows (N, D) of all processes' tables, one below the other."""

    tables: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("tables", default=[], dist_reduce_fx="cat")

    def update(self, table: Tensor) -> None:
        """Keep a table (B, D)."""
        self.tables.append(table)

    def compute(self) -> Tensor:
        """Return all of them."""
        return dim_zero_cat(self.tables)


class FineTuning(LightningModule):
    """Fine-tune a network under a task's head; the base of the paper's three evaluations.

    A subclass names the head in ``head`` and writes `loss`, `results` and `scores`. What the rows of an evaluation give
    is gathered from all processes before it is scored, so that scores are those of the whole data, each row counted
    once. ``val/score`` is the number that the task is judged by.

    Args:
        net: A network of ``transformers`` with the task's head, or any that returns what such a one does; the settings
            of one from scratch, with ``model_type``; the name or folder of a pretrained one, such as
            `MaskedLM.save_pretrained` writes; or a checkpoint (``.ckpt``) of a `MaskedLM` that a recipe trained.
        optimizer: Builds the optimizer from parameter groups; weight decay does not reach biases and norms, as in BERT.
        lr_scheduler: Builds the schedule from the optimizer; stepped after every optimizer step. ``None`` takes BERT's,
            from 0 up to the full rate and down to 0 in a straight line, whatever the number of steps.
        warmup: Share of the steps on the way up, without an ``lr_scheduler``.
        seed: Seed of dropout.
        compile: Compile the network in place with ``torch.compile``.
        settings: The head's, such as ``num_labels``; without effect on a network that is passed as such.

    Raises:
        ValueError: ``warmup`` is not a share, ``net`` lacks ``model_type``, or ``net`` is a checkpoint that does not
            describe its network.
    """

    head: ClassVar[str]

    def __init__(
        self,
        net: nn.Module | dict[str, Any] | str,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-5, weight_decay=0.01),
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup: float = 0.1,
        seed: int = 0,
        compile: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup must be a share from 0 to below 1, got {warmup}")
        live = ("net", "optimizer", "lr_scheduler") if isinstance(net, nn.Module) else ("optimizer", "lr_scheduler")
        save_hyperparameters(self, live=live)
        self.net = make_task_network(net, self.head, **settings)
        self.optimizer, self.lr_scheduler, self.warmup = optimizer, lr_scheduler, warmup
        self.seed, self.compile_net, self.is_configured = seed, compile, False
        self.gathered = nn.ModuleDict({split: Gathered() for split in ("val", "test")})

    def forward(self, **inputs: Tensor) -> Tensor:
        """Map tokens to the head's logits; types of tokens are left out where the network knows none."""
        logits: Tensor = self.run_net(inputs).logits
        return logits

    def loss(self, logits: Tensor, batch: Any) -> Tensor:
        """Return the loss of each row (B,)."""
        raise NotImplementedError

    def results(self, logits: Tensor, batch: Any) -> Tensor:
        """Return numbers of each row (B, D), first of all its number or -1, of which `scores` can be computed."""
        raise NotImplementedError

    def scores(self, results: Tensor, split: Split) -> dict[str, float]:
        """Return the scores of all rows' results (N, D) by name, ``score`` among them."""
        raise NotImplementedError

    def run_net(self, inputs: Mapping[str, Tensor]) -> Any:
        """Return the network's output for a batch's inputs."""
        return self.net(**{name: value for name, value in inputs.items() if name in self._taken(inputs)})

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_step(self.seed, self.current_epoch, batch_idx, self.global_rank)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(self(**batch.inputs), batch).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.rows))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._gather(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._gather(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Write a folder that the head's class of ``transformers`` and ``AutoTokenizer`` load.

        Args:
            folder: Where to.
            tokenizer: What made the tokens; ``None`` takes the data module's.

        Raises:
            TypeError: The network is not one of ``transformers``.
        """
        MaskedLM.save_pretrained(self, folder, tokenizer)  # type: ignore[arg-type]  # reads nothing but net and trainer

    def configure_model(self) -> None:
        if self.is_configured:
            return
        self.is_configured = True
        shard_blocks(self.net, repeated_layers(self.net), self.device_mesh)
        if self.compile_net:
            self.net.compile()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer(param_groups(self.net))
        if self.lr_scheduler is not None:
            scheduler = self.lr_scheduler(optimizer)
        else:
            steps = estimated_steps(self.trainer)
            if math.isinf(steps):
                raise ValueError("trainer.max_epochs or max_steps must be set, or else lr_scheduler, got none of them")
            scheduler = WarmupLinear(optimizer, int(self.warmup * steps), int(steps), end=0.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _gather(self, batch: Any, split: Split) -> None:
        logits = self(**batch.inputs)
        found = self.results(logits, batch)
        losses = self.loss(logits, batch).to(found.dtype)
        metric: Any = self.gathered[split]
        # Rows that only fill up are taken along and left out below: no process may come with empty hands.
        metric.update(torch.cat([found, losses[:, None]], dim=1))

    def _report(self, split: Split) -> None:
        metric: Any = self.gathered[split]
        table = metric.compute()
        metric.reset()
        table = table[table[:, 0] >= 0]
        found = {"loss": table[:, -1].mean().item(), **self.scores(table[:, :-1], split)}
        for name, value in found.items():  # equal on all processes: their mean is the value
            self.log(f"{split}/{name}", value, prog_bar=name in ("loss", "score"), sync_dist=True)

    def _taken(self, inputs: Mapping[str, Tensor]) -> set[str]:
        parameters = inspect.signature(self.net.forward).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            taken = set(inputs)
        else:
            taken = set(inputs) & set(parameters)
        types = getattr(getattr(self.net, "config", None), "type_vocab_size", None)
        absent = "token_type_ids" not in parameters if types is None else types < 2
        return taken - {"token_type_ids"} if absent else taken


class Classification(FineTuning):
    """Fine-tune on tasks with one label a row; a subclass writes `measure`.

    Attributes:
        groups: Parts of the data that are scored by themselves, too, by their number in `LabelledBatch.groups`.
    """

    groups: ClassVar[tuple[str, ...]] = ()

    def loss(self, logits: Tensor, batch: LabelledBatch) -> Tensor:
        return F.cross_entropy(logits.float(), batch.labels, reduction="none")

    def results(self, logits: Tensor, batch: LabelledBatch) -> Tensor:
        known = [batch.rows, batch.groups, batch.labels]
        return torch.cat([torch.stack(known, dim=1).float(), self.predictions(logits).float()], dim=1)

    def predictions(self, logits: Tensor) -> Tensor:
        """Return what is predicted of each row, (B, D)."""
        return logits.float().softmax(dim=-1)

    def measure(self, predictions: Tensor, labels: Tensor) -> dict[str, float]:
        """Return the scores of predictions (N, D) by name, ``score`` among them."""
        raise NotImplementedError

    def scores(self, results: Tensor, split: Split) -> dict[str, float]:
        groups, labels, predictions = results[:, 1], results[:, 2], results[:, 3:]
        found = self.measure(predictions, labels)
        for number, name in enumerate(self.groups):
            own = groups == number
            if own.any():
                parts = self.measure(predictions[own], labels[own])
                found |= {f"{kind}_{name}": value for kind, value in parts.items() if kind != "score"}
        return found

    def predict_step(self, batch: LabelledBatch, batch_idx: int) -> Tensor:
        """Return what is predicted of each row: probabilities (B, K), or numbers (B,)."""
        found = self.predictions(self(**batch.inputs))
        return found[:, 0] if found.shape[1] == 1 else found


def make_task_network(net: nn.Module | Mapping[str, Any] | str, head: str, **settings: Any) -> nn.Module:
    """Return a network with a task's head: itself, one from scratch, or a pretrained one under a new head.

    Args:
        net: As in `FineTuning`.
        head: A class of ``transformers`` that makes networks, such as ``AutoModelForMultipleChoice``.
        settings: The head's, such as ``num_labels``.

    Raises:
        ValueError: The settings lack ``model_type``, or a checkpoint does not describe its network.
    """
    if isinstance(net, nn.Module):
        return net
    transformers = optional_import("transformers", "text")
    auto = getattr(transformers, head)
    if isinstance(net, str) and net.endswith(".ckpt"):
        with tempfile.TemporaryDirectory() as folder:
            _load_masked_lm(net).save_pretrained(folder)
            return make_task_network(folder, head, **settings)
    if isinstance(net, str):
        loaded: nn.Module = auto.from_pretrained(net, **settings)
        return loaded.train()  # else it stays in evaluation mode, and its dropout does nothing
    own = {**net, **settings}
    if "model_type" not in own:
        raise ValueError(f"net must have a model_type, such as bert, got {', '.join(own)}")
    made: nn.Module = auto.from_config(transformers.AutoConfig.for_model(own.pop("model_type"), **own))
    return made


def _load_masked_lm(path: str) -> MaskedLM:
    try:
        return MaskedLM.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"net must be a checkpoint of a MaskedLM that a recipe trained, and {path} does not describe one; write a "
            f"folder with MaskedLM.save_pretrained instead ({error})"
        ) from error
