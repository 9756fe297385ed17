"""A classifier, a language model and an autoencoder around any network, for the paper's seven tasks and their like.

They are ordinary LightningModules and know nothing of clients: under `FedOptStrategy` their optimizer is the client's.
Their training steps neither branch on data nor keep any, so that many clients can be trained in one vectorised call.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_iclr.fedopt.examples import PADDING
from lightning_iclr.hyperparameters import save_hyperparameters

Batch = tuple[Tensor, Tensor]
TOP_K = 5  # tags that the recall looks at, as in the paper


class _NetModule(LightningModule):
    """What the three have in common: a network, its optimizer, and the schedule."""

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        lr_scheduler_interval: Literal["epoch", "step"],
    ) -> None:
        super().__init__()
        _check_choice("lr_scheduler_interval", lr_scheduler_interval, ("epoch", "step"))
        save_hyperparameters(self, live=("net", "optimizer", "lr_scheduler"))  # the arguments of subclasses as well
        self.net, self.optimizer = net, optimizer
        self.lr_scheduler, self.lr_scheduler_interval = lr_scheduler, lr_scheduler_interval

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": self.lr_scheduler_interval},
        }


class Classifier(_NetModule):
    """Classify with any network from inputs to logits, one class or several tags a row.

    The sigmoid loss of a row is the mean of its K binary cross-entropies. The paper's Stack Overflow LR sums these
    means over a batch (``reduction="sum"``, as its code does), and its client learning rate of 100 belongs to that:
    with the mean over a batch of 100 rows the same step needs a rate of 10,000. Whatever is minimised, the logged
    losses are means over rows.

    ``accuracy`` is the share of rows whose highest logit is the class, or one of the tags. The sigmoid loss also logs
    ``recall_at_5``: of all tags of all rows, the share found among their row's five highest logits.

    Args:
        net: Maps inputs (B, ...) to logits (B, K).
        num_classes: Classes K that the logits must have; ``None`` reads ``net.num_classes``, and asks for none where
            the network does not tell.
        loss: Cross-entropy over all classes, or one binary cross-entropy a class.
        reduction: Whether the mean or the sum over a batch's rows is minimised.
        optimizer: Builds the client's optimizer from the parameters.
        lr_scheduler: Builds the schedule from the optimizer.
        lr_scheduler_interval: Steps the schedule after each ``"epoch"``, which is a round under `FedOptStrategy`, or
            after each optimizer ``"step"``, which starts anew for each client there.

    Raises:
        ValueError: An unknown loss, reduction or interval, or too few classes.

    Examples:
        >>> from lightning_iclr.fedopt.model import DigitsConvNet
        >>> Classifier(DigitsConvNet())(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int | None = None,
        loss: Literal["softmax", "sigmoid"] = "softmax",
        reduction: Literal["mean", "sum"] = "mean",
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        num_classes = getattr(net, "num_classes", None) if num_classes is None else num_classes
        _check_choice("loss", loss, ("softmax", "sigmoid"))
        fewest = 2 if loss == "softmax" else 1
        if num_classes is not None and num_classes < fewest:
            raise ValueError(f"num_classes must be {fewest} or more with the {loss} loss, got {num_classes}")
        _check_choice("reduction", reduction, ("mean", "sum"))
        super().__init__(net, optimizer, lr_scheduler, lr_scheduler_interval)
        self.num_classes = num_classes
        self.loss_name, self.reduction = loss, reduction
        self.val_metrics, self.test_metrics = _Metrics(), _Metrics()

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (B, ...) to logits (B, K)."""
        logits: Tensor = self.net(inputs)
        return logits

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Map logits (B, K) and targets, classes (B,) or their weights (B, K), to each row's loss (B,).

        Tags are weights of 0 and 1. Rows of -100 give a loss of 0.
        """
        classes = logits.shape[-1]
        if self.num_classes is not None and classes != self.num_classes:
            raise ValueError(f"num_classes must be the network's number of logits, {classes}, got {self.num_classes}")
        if self.loss_name == "softmax" and targets.ndim == 1:
            return F.cross_entropy(logits, targets, reduction="none", ignore_index=PADDING)
        counted, tags = _counted(targets), _tags(targets, classes).to(logits.dtype)
        if self.loss_name == "softmax":
            losses = F.cross_entropy(logits, tags, reduction="none")
        else:
            losses = F.binary_cross_entropy_with_logits(logits, tags, reduction="none").mean(dim=-1)
        return losses.masked_fill(~counted, 0.0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, targets = batch
        losses = self.loss(self(inputs), targets)
        return _minimised(self, losses, _counted(targets), self.reduction)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_metrics)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Map a batch of inputs (B, ...) and anything else to probabilities (B, K)."""
        logits: Tensor = self(batch[0]).float()
        return logits.softmax(dim=-1) if self.loss_name == "softmax" else logits.sigmoid()

    def _evaluate(self, batch: Batch, split: str, metrics: "_Metrics") -> None:
        inputs, targets = batch
        logits = self(inputs)
        counted, tags = _counted(targets), _tags(targets, logits.shape[-1]) > 0
        metrics.loss.update(self.loss(logits, targets), counted)
        metrics.accuracy.update(tags.gather(1, logits.argmax(dim=-1, keepdim=True)), counted)
        self.log(f"{split}/loss", metrics.loss)
        self.log(f"{split}/accuracy", metrics.accuracy, prog_bar=True)
        if self.loss_name == "sigmoid":
            highest = logits.topk(min(TOP_K, logits.shape[-1]), dim=-1).indices
            metrics.recall.update(tags.gather(1, highest), tags)
            self.log(f"{split}/recall_at_{TOP_K}", metrics.recall, prog_bar=True)


class LanguageModel(_NetModule):
    """Predict each next token with any network from tokens to logits.

    Loss and accuracy are means over tokens. Left out of both are targets of -100 and of ``padding_index``; the
    accuracy leaves out ``ignored_indices`` as well. The paper's accuracy on Stack Overflow leaves out padding (0), out
    of vocabulary (10,001), begin (10,002) and end (10,003), on Shakespeare only padding (0).

    The code of the paper's runs left padding out of the accuracy and the clients' weights, but not out of the loss.
    ``padding_index=None`` and ``ignored_indices=[0, ...]`` do the same.

    Args:
        net: Maps tokens (B, T) to logits (B, T, V).
        padding_index: Token that only fills up a row; ``None`` where there is none.
        ignored_indices: Further tokens whose prediction the accuracy does not count.
        optimizer: Builds the client's optimizer from the parameters.
        lr_scheduler: Builds the schedule from the optimizer.
        lr_scheduler_interval: Steps the schedule after each ``"epoch"``, which is a round under `FedOptStrategy`, or
            after each optimizer ``"step"``, which starts anew for each client there.

    Raises:
        ValueError: An unknown interval, or a token below 0.

    Examples:
        >>> from lightning_iclr.fedopt.model import CharacterLSTM
        >>> LanguageModel(CharacterLSTM(), padding_index=0)(torch.ones(2, 80, dtype=torch.long)).shape
        torch.Size([2, 80, 90])
    """

    def __init__(
        self,
        net: nn.Module,
        padding_index: int | None = None,
        ignored_indices: Sequence[int] = (),
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        if padding_index is not None and padding_index < 0:
            raise ValueError(f"padding_index must be a token, 0 or more, or None, got {padding_index}")
        if any(index < 0 for index in ignored_indices):
            raise ValueError(f"ignored_indices must be tokens, 0 or more, got {list(ignored_indices)}")
        super().__init__(net, optimizer, lr_scheduler, lr_scheduler_interval)
        self.padding_index, self.ignored_indices = padding_index, tuple(ignored_indices)
        self.val_metrics, self.test_metrics = _Metrics(), _Metrics()

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, T) to logits (B, T, V) of the tokens that follow them."""
        logits: Tensor = self.net(tokens)
        return logits

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Map logits (B, T, V) and the tokens that follow (B, T) to each token's loss (B, T), 0 for padding."""
        targets = targets.masked_fill(~self.counted(targets), PADDING)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=PADDING)
        return losses.view(targets.shape)

    def counted(self, targets: Tensor) -> Tensor:
        """Map tokens (B, T) to whether they are no padding (B, T)."""
        counted = targets != PADDING
        return counted if self.padding_index is None else counted & (targets != self.padding_index)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        tokens, targets = batch
        losses = self.loss(self(tokens), targets)
        return _minimised(self, losses, self.counted(targets))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_metrics)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Map a batch of tokens (B, T) and anything else to the most likely next token at each place (B, T)."""
        logits: Tensor = self(batch[0])
        return logits.argmax(dim=-1)

    def _evaluate(self, batch: Batch, split: str, metrics: "_Metrics") -> None:
        tokens, targets = batch
        logits = self(tokens)
        counted = self.counted(targets)
        metrics.loss.update(self.loss(logits, targets), counted)
        for index in self.ignored_indices:
            counted = counted & (targets != index)
        metrics.accuracy.update((logits.argmax(dim=-1) == targets) & counted, counted)
        self.log(f"{split}/loss", metrics.loss)
        self.log(f"{split}/accuracy", metrics.accuracy, prog_bar=True)


class Autoencoder(_NetModule):
    """Reconstruct inputs with any network from inputs to inputs.

    A batch is the inputs, alone or followed by anything; labels (B,) of -100 mark rows that do not count. A row's loss
    is the mean of its squared errors. The paper's EMNIST AE sums these means over a batch (``reduction="sum"``, as its
    code does), and its client learning rates belong to that. Whatever is minimised, the logged numbers are means over
    rows.

    Args:
        net: Maps inputs (B, ...) to reconstructions of the same shape.
        reduction: Whether the mean or the sum over a batch's rows is minimised.
        optimizer: Builds the client's optimizer from the parameters.
        lr_scheduler: Builds the schedule from the optimizer.
        lr_scheduler_interval: Steps the schedule after each ``"epoch"``, which is a round under `FedOptStrategy`, or
            after each optimizer ``"step"``, which starts anew for each client there.

    Raises:
        ValueError: An unknown reduction or interval.

    Examples:
        >>> from lightning_iclr.fedopt.model import EMNISTAutoencoder
        >>> Autoencoder(EMNISTAutoencoder())(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        net: nn.Module,
        reduction: Literal["mean", "sum"] = "mean",
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        _check_choice("reduction", reduction, ("mean", "sum"))
        super().__init__(net, optimizer, lr_scheduler, lr_scheduler_interval)
        self.reduction = reduction
        self.val_mse, self.test_mse = _Share(), _Share()

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs (B, ...) to reconstructions of the same shape."""
        reconstructions: Tensor = self.net(inputs)
        return reconstructions

    def loss(self, reconstructions: Tensor, inputs: Tensor) -> Tensor:
        """Map reconstructions and inputs (B, ...) to each row's mean squared error (B,)."""
        return (reconstructions - inputs).square().flatten(1).mean(dim=1)

    def training_step(self, batch: Tensor | Sequence[Tensor], batch_idx: int) -> Tensor:
        inputs, counted = _split_inputs(batch)
        losses = self.loss(self(inputs), inputs).masked_fill(~counted, 0.0)
        return _minimised(self, losses, counted, self.reduction)

    def validation_step(self, batch: Tensor | Sequence[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_mse)

    def test_step(self, batch: Tensor | Sequence[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_mse)

    def predict_step(self, batch: Tensor | Sequence[Tensor], batch_idx: int) -> Tensor:
        """Map a batch of inputs (B, ...) and anything else to reconstructions."""
        reconstructions: Tensor = self(_split_inputs(batch)[0])
        return reconstructions

    def _evaluate(self, batch: Tensor | Sequence[Tensor], split: str, mse: "_Share") -> None:
        inputs, counted = _split_inputs(batch)
        mse.update(self.loss(self(inputs), inputs).masked_fill(~counted, 0.0), counted)
        self.log(f"{split}/mse", mse, prog_bar=True)


class _Share(Metric):
    """Divide the sum of all parts by the sum of all wholes, over all batches and processes.

    Examples:
        >>> share = _Share()
        >>> share.update(torch.tensor([2.0, 1.0]), torch.tensor([4, 2]))
        >>> share.update(torch.tensor([3.0]), torch.tensor([4]))
        >>> share.compute()
        tensor(0.6000)
    """

    full_state_update = False
    part: Tensor
    whole: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("part", torch.tensor(0.0), dist_reduce_fx="sum")
        # An integer: single precision stops counting tokens at 2^24, and not every device has a double one.
        self.add_state("whole", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, parts: Tensor, wholes: Tensor) -> None:
        self.part += parts.to(self.part.dtype).sum()
        self.whole += wholes.sum()

    def compute(self) -> Tensor:
        return self.part / self.whole


class _Metrics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loss, self.accuracy, self.recall = _Share(), _Share(), _Share()


def _counted(targets: Tensor) -> Tensor:
    """Map classes (B,) or tags (B, K) to whether their rows count (B,)."""
    counted = targets != PADDING
    return counted if targets.ndim == 1 else counted.all(dim=-1)


def _tags(targets: Tensor, num_classes: int) -> Tensor:
    """Map classes (B,) to tags (B, K), and leave tags as they are."""
    if targets.ndim > 1:
        return targets
    return (targets.unsqueeze(-1) == torch.arange(num_classes, device=targets.device)).long()


def _split_inputs(batch: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return a batch's inputs (B, ...) and whether its rows count (B,), told by labels if there are any."""
    if isinstance(batch, Tensor):
        batch = [batch]
    inputs = batch[0]
    if len(batch) > 1 and batch[1].ndim == 1:
        return inputs, batch[1] != PADDING
    return inputs, inputs.new_ones(len(inputs), dtype=torch.bool)


def _minimised(module: LightningModule, losses: Tensor, counted: Tensor, reduction: str = "mean") -> Tensor:
    """Log the mean of the losses that count, and return it or their sum."""
    total = losses.sum()
    mean = total / counted.sum().clamp(min=1)
    module.log("train/loss", mean, prog_bar=True)
    return total if reduction == "sum" else mean


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
