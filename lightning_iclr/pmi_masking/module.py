"""Train masked language models under Lightning."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_iclr.hyperparameters import save_hyperparameters
from lightning_iclr.pmi_masking.model import (
    Masked,
    is_encoder_decoder,
    make_network,
    param_groups,
    repeated_layers,
    run_at,
)
from lightning_iclr.sampling import seed_step
from lightning_iclr.sharding import shard_blocks

LONGEST_UNIT = 6  # tokens; losses of longer units are logged together


class MaskedLM(LightningModule):
    """Pre-train a network on whatever a collator has masked (section 4.1 of the paper).

    Batches are those of `SpanMaskingCollator`: ``input_ids``, ``labels``, ``attention_mask``, with ``document_ids``
    where texts are packed, and ``unit_ids``, by which losses are logged for each length of unit in tokens.

    Args:
        net: A masked language model of ``transformers``, or any network that returns ``logits``; the settings of a
            model that starts from scratch, with ``model_type``; or the name or folder of a pretrained one. A model with
            a decoder, such as T5, learns from batches of sentinels.
        optimizer: Builds the optimizer from parameter groups; weight decay does not reach biases and norms, as in BERT.
        lr_scheduler: Builds the schedule from the optimizer; stepped after every optimizer step.
        seed: Seed of dropout.
        sparse_head: Whether to compute logits where something is predicted only.
        compile: Compile the network in place with ``torch.compile``.

    Raises:
        ValueError: ``net`` lacks ``model_type``.

    Examples:
        >>> small = {"model_type": "bert", "vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 1}
        >>> module = MaskedLM({**small, "num_attention_heads": 2, "intermediate_size": 16})
        >>> module(torch.ones(2, 5, dtype=torch.long)).shape
        torch.Size([2, 5, 30])
    """

    def __init__(
        self,
        net: nn.Module | dict[str, Any] | str,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4, weight_decay=0.01),
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        sparse_head: bool = True,
        compile: bool = False,
    ) -> None:
        super().__init__()
        live = ("net", "optimizer", "lr_scheduler") if isinstance(net, nn.Module) else ("optimizer", "lr_scheduler")
        save_hyperparameters(self, live=live)
        self.net = make_network(net)
        self.optimizer, self.lr_scheduler, self.seed = optimizer, lr_scheduler, seed
        self.sparse_head, self.compile_net, self.is_configured = sparse_head, compile, False
        self.val_metrics, self.test_metrics = _Evaluation(), _Evaluation()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Tensor) -> Tensor:
        """Map tokens (B, L) to logits (B, L, V)."""
        logits: Tensor = self.net(input_ids=input_ids, attention_mask=attention_mask, **more).logits
        return logits

    def predict_masked(self, batch: Mapping[str, Tensor]) -> Masked:
        """Return the logits (S, V), labels (S,) and unit lengths in tokens (S,) of what is predicted in a batch."""
        return run_at(self.net, batch, self.sparse_head)

    def on_train_batch_start(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        seed_step(self.seed, self.current_epoch, batch_idx, self.global_rank)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        masked = self.predict_masked(batch)
        losses = F.cross_entropy(masked.logits.float(), masked.labels, reduction="none")
        count = torch.tensor(float(len(losses)), device=losses.device)
        # A token weighs the same in whichever process: Lightning averages the processes' gradients.
        loss = losses.sum() / self.trainer.strategy.reduce(count, reduce_op="mean")
        self.log("train/loss", loss, prog_bar=True, batch_size=len(masked.labels))
        if masked.lengths is not None and self._logs_now():
            self._log_by_length(losses.detach(), masked.lengths)
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_metrics)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the tokens (B, L) with the likeliest in place of what is predicted; of a decoder its target."""
        masked, labels = self.predict_masked(batch), batch["labels"]
        tokens = batch["input_ids"].clone()
        if is_encoder_decoder(self.net):
            tokens = torch.full_like(labels, self.net.config.pad_token_id)  # type: ignore[union-attr, arg-type]
        tokens[labels != -100] = masked.logits.argmax(dim=-1)
        return tokens

    def save_pretrained(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Write a folder that ``AutoModelForMaskedLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` load.

        Args:
            folder: Where to.
            tokenizer: What made the tokens; ``None`` takes the data module's.

        Raises:
            TypeError: The network is not one of ``transformers``.
        """
        save: Any = getattr(self.net, "save_pretrained", None)
        if save is None:
            raise TypeError(f"net must be a model of transformers to be saved as one, got {type(self.net).__name__}")
        save(folder)
        if tokenizer is None and self._trainer is not None:
            tokenizer = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def configure_model(self) -> None:
        if self.is_configured:
            return
        self.is_configured = True
        if self.device_mesh is not None:  # what a head returns is a view, which nothing here changes in place
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        shard_blocks(self.net, repeated_layers(self.net), self.device_mesh)
        if self.compile_net:
            self.net.compile()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer(param_groups(self.net))
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _evaluate(self, batch: Mapping[str, Tensor], split: str, evaluation: _Evaluation) -> None:
        masked = self.predict_masked(batch)
        losses = F.cross_entropy(masked.logits.float(), masked.labels, reduction="none")
        evaluation.loss.update(losses)
        evaluation.accuracy.update((masked.logits.argmax(dim=-1) == masked.labels).float())
        self.log(f"{split}/loss", evaluation.loss, prog_bar=True)
        self.log(f"{split}/accuracy", evaluation.accuracy, prog_bar=True)

    def _logs_now(self) -> bool:
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        return bool(every) and (self.global_step + 1) % every == 0

    def _log_by_length(self, losses: Tensor, lengths: Tensor) -> None:
        kinds = lengths.clamp_max(LONGEST_UNIT)
        sums = torch.zeros(LONGEST_UNIT + 1, device=losses.device).index_add_(0, kinds, losses)
        counts = torch.bincount(kinds, minlength=LONGEST_UNIT + 1)
        means = sums / counts  # undefined where no unit of this length was chosen
        names = [*map(str, range(1, LONGEST_UNIT)), f"{LONGEST_UNIT}_or_more"]
        self.log_dict({f"train/loss_unit_{name}": mean for name, mean in zip(names, means[1:], strict=True)})


class _Evaluation(nn.Module):
    """Loss and accuracy over all predicted tokens of an evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = MeanMetric(nan_strategy="error")
        self.accuracy = MeanMetric(nan_strategy="error")
