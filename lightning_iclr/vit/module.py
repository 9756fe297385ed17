"""Train and fine-tune Vision Transformers, and pre-train them on masked patches, under Lightning."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_iclr.hyperparameters import save_hyperparameters
from lightning_iclr.prediction import class_names
from lightning_iclr.sampling import seed_step, step_generator
from lightning_iclr.sharding import shard_blocks
from lightning_iclr.vit.checkpoint import load_pretrained
from lightning_iclr.vit.images import PADDING
from lightning_iclr.vit.mixing import cutmix, mixup
from lightning_iclr.vit.optim import param_groups, scale_learning_rates
from lightning_iclr.vit.pretext import MaskedPatchPrediction, PretextOutput, Target

Batch = tuple[Tensor, Tensor]


class ViTClassifier(LightningModule):
    """Classify images with a Vision Transformer, or any network from images to logits.

    Weight decay reaches kernels only, as in the official code; see `param_groups`. Fine-tuning at a higher resolution
    is a ``net`` with the new ``image_size`` and ``num_classes``, ``pretrained`` and ``reset_head``.

    Args:
        net: Maps images (B, C, H, W) to logits (B, K).
        num_classes: Classes K; ``None`` reads ``net.num_classes``.
        loss: Cross-entropy over all classes, or one sigmoid a class, summed over classes as in ``big_vision``.
        label_smoothing: Mass that the softmax loss spreads over all classes.
        mixup: Parameter p of mixup's Beta(p, p), one draw a batch; 0 for none.
        cutmix: The same for CutMix; with both, each batch takes one of them at even odds.
        layer_decay: Factor on the learning rate from each block to the one below; 1 for none.
        pretrained: Checkpoint to start a fit from: official ``.npz``, timm, Hugging Face, or one of ours.
        reset_head: Keep the new, zero head instead of the checkpoint's.
        optimizer: Builds the optimizer from parameter groups.
        lr_scheduler: Builds the schedule from the optimizer; stepped after every optimizer step.
        seed: Seed of mixup, CutMix, dropout and stochastic depth.
        compile: Compile ``net`` in place with ``torch.compile``.

    Raises:
        ValueError: A number outside its range, an unknown loss, or a network that does not tell its classes.

    Examples:
        >>> from lightning_iclr.vit import ViTClassifier, VisionTransformer
        >>> net = VisionTransformer(image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, num_heads=2)
        >>> ViTClassifier(net)(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int | None = None,
        loss: Literal["softmax", "sigmoid"] = "softmax",
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        layer_decay: float = 1.0,
        pretrained: str | None = None,
        reset_head: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1),
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        num_classes = getattr(net, "num_classes", None) if num_classes is None else num_classes
        if not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(f"num_classes must be 2 or more, or an attribute of net; got {num_classes}")
        if loss not in ("softmax", "sigmoid"):
            raise ValueError(f"loss must be 'softmax' or 'sigmoid', got {loss!r}")
        if not 0.0 <= label_smoothing < 1.0 or (label_smoothing and loss == "sigmoid"):
            raise ValueError(f"label_smoothing must be in [0, 1), and 0 for the sigmoid loss; got {label_smoothing}")
        for name, value in (("mixup", mixup), ("cutmix", cutmix)):
            if value < 0.0:
                raise ValueError(f"{name} must be 0 (none) or the positive parameter of a Beta, got {value}")
        if not 0.0 < layer_decay <= 1.0:
            raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay}")
        save_hyperparameters(self, live=("net", "optimizer", "lr_scheduler"))
        self.net = net
        self.num_classes = num_classes
        self.loss_name, self.label_smoothing = loss, label_smoothing
        self.mixup, self.cutmix, self.seed = mixup, cutmix, seed
        self.layer_decay = layer_decay
        self.pretrained, self.reset_head = pretrained, reset_head
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.compile_net, self.is_configured = compile, False
        self.is_started = False
        self.val_metrics, self.test_metrics = _Evaluation(num_classes), _Evaluation(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to class logits (B, K)."""
        logits: Tensor = self.net(images)
        return logits

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Map logits (B, K) and targets, classes (B,) or their weights (B, K), to each image's loss (B,).

        Classes of -100 give a loss of 0.
        """
        if self.loss_name == "softmax":
            return F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing)
        valid = torch.ones_like(logits[:, 0])
        if targets.ndim == 1:
            valid = (targets != PADDING).to(logits.dtype)
            targets = self.one_hot(targets)
        losses = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
        total: Tensor = losses.sum(dim=-1) * valid
        return total

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        seed_step(self.seed, self.current_epoch, batch_idx, self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        if self.mixup or self.cutmix:
            images, targets = self._mix(images, self.one_hot(targets), batch_idx)
        loss = self.loss(self(images), targets).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_before_backward(self, loss: Tensor) -> None:
        _check_finite(self, loss)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_metrics)

    def on_validation_epoch_end(self) -> None:
        self._log_per_class("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        self._log_per_class("test", self.test_metrics)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Map a batch of images (B, C, H, W) and rows (B,) to class probabilities (B, K)."""
        logits: Tensor = self(batch[0]).float()
        return logits.softmax(dim=-1) if self.loss_name == "softmax" else logits.sigmoid()

    def setup(self, stage: str) -> None:
        _check_batches(self)
        classes = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
        if stage != "predict" and isinstance(classes, int) and classes > self.num_classes:
            raise ValueError(f"num_classes must be at least the data module's {classes}, got {self.num_classes}")
        if stage != "fit" or self.is_started:
            return
        self.is_started = True
        if self.pretrained is not None and self.trainer.ckpt_path is None:
            load_pretrained(self.net, self.pretrained, reset_head=self.reset_head)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.is_started = True  # a fit that goes on from these weights must not put the pre-trained ones back

    def configure_model(self) -> None:
        _configure(self, self.net, self.net)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return _optimizers(self, self.layer_decay)

    def one_hot(self, labels: Tensor) -> Tensor:
        """Map classes (B,) to weights (B, K); a padded row's are all zero."""
        return (labels.unsqueeze(-1) == torch.arange(self.num_classes, device=labels.device)).float()

    def _mix(self, images: Tensor, targets: Tensor, batch_idx: int) -> Batch:
        # The same draw on all processes, and the same again in a resumed run.
        generator = step_generator(self.seed, self.current_epoch, batch_idx)
        both = self.mixup > 0 and self.cutmix > 0
        use_cutmix = self.cutmix > 0 and (not both or bool(torch.rand((), generator=generator) < 0.5))
        if use_cutmix:
            return cutmix(images, targets, self.cutmix, generator)
        return mixup(images, targets, self.mixup, generator)

    def _evaluate(self, batch: Batch, split: str, evaluation: "_Evaluation") -> None:
        images, labels = batch
        logits = self(images)
        evaluation(logits, labels, self.loss(logits, labels))
        self.log(f"{split}/loss", evaluation.loss)
        self.log(f"{split}/accuracy", evaluation.accuracy, prog_bar=True)

    def _log_per_class(self, split: str, evaluation: "_Evaluation") -> None:
        names = class_names(self.trainer, self.num_classes)
        scores = evaluation.per_class.compute()
        evaluation.per_class.reset()
        # The metric has already been summed over the processes; sync_dist only tells Lightning so.
        self.log(f"{split}/accuracy_worst_class", scores.min(), sync_dist=True)
        if split == "test":
            per_name = {f"test/accuracy/{name}": score for name, score in zip(names, scores, strict=True)}
            self.log_dict(per_name, sync_dist=True)


class MaskedPatchPretraining(LightningModule):
    """Pre-train a Vision Transformer without labels by predicting masked patches (appendix B.1.2).

    The arguments from ``corruption`` to ``target`` are those of `MaskedPatchPrediction`.

    Args:
        net: Encoder with ``embed`` and ``encode``, such as a `VisionTransformer` with ``num_classes=0``.
        corruption: Share of patches to corrupt and predict, in (0, 1].
        probabilities: Chances of a corrupted patch to become the mask token, another patch, or to stay.
        bits: Bits a colour channel is quantised to.
        target: What is predicted.
        image_mean: What the images had subtracted, for targets in [0, 1].
        image_std: What the images were divided by.
        optimizer: Builds the optimizer from parameter groups.
        lr_scheduler: Builds the schedule from the optimizer; stepped after every optimizer step.
        seed: Seed of the corruption, dropout and stochastic depth.
        compile: Compile the network in place with ``torch.compile``.

    Raises:
        ValueError: A number outside its range, or an unknown target.
    """

    def __init__(
        self,
        net: nn.Module,
        corruption: float = 0.5,
        probabilities: Sequence[float] = (0.8, 0.1, 0.1),
        bits: int = 3,
        target: Target = "mean_colour",
        image_mean: float | Sequence[float] = 0.5,
        image_std: float | Sequence[float] = 0.5,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=2e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        super().__init__()
        save_hyperparameters(self, live=("net", "optimizer", "lr_scheduler"))
        self.pretext = MaskedPatchPrediction(
            net,
            corruption=corruption,
            probabilities=probabilities,
            bits=bits,
            target=target,
            image_mean=image_mean,
            image_std=image_std,
        )
        self.seed = seed
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.compile_net, self.is_configured = compile, False
        self.val_metrics, self.test_metrics = _PretextEvaluation(), _PretextEvaluation()

    @property
    def net(self) -> nn.Module:
        """The encoder that is pre-trained."""
        return self.pretext.encoder

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to the encoder's representation (B, D)."""
        return self.pretext.represent(images)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        seed_step(self.seed, self.current_epoch, batch_idx, self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        out = self.corrupt_and_predict(batch[0], self.current_epoch, batch_idx)
        self.log("train/loss", out.loss, prog_bar=True)
        loss: Tensor = out.loss
        return loss

    def on_before_backward(self, loss: Tensor) -> None:
        _check_finite(self, loss)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "val", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "test", self.test_metrics)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Map a batch of images (B, C, H, W) and rows (B,) to representations (B, D)."""
        features: Tensor = self(batch[0])
        return features

    def corrupt_and_predict(self, images: Tensor, epoch: int, batch_idx: int) -> PretextOutput:
        """Run masked patch prediction with the draws of one step of an epoch, the same on any number of processes."""
        generator = step_generator(self.seed, epoch, batch_idx)
        out: PretextOutput = self.pretext(images, generator, (self.global_rank, self.trainer.world_size))
        return out

    def setup(self, stage: str) -> None:
        _check_batches(self)

    def configure_model(self) -> None:
        _configure(self, self.pretext, self.net)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return _optimizers(self)

    def _evaluate(self, batch: Batch, batch_idx: int, split: str, evaluation: "_PretextEvaluation") -> None:
        images, labels = batch
        # The corruption of an evaluation is the same in every epoch, so that its curve shows the network alone.
        out = self.corrupt_and_predict(images, -1, batch_idx)
        evaluation(out, labels)
        self.log(f"{split}/loss", evaluation.loss, prog_bar=True)
        if self.pretext.target != "pixels":
            self.log(f"{split}/masked_accuracy", evaluation.accuracy, prog_bar=True)


class _Evaluation(nn.Module):
    """Loss and accuracy over a whole evaluation; padded rows do not count."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.loss = MeanMetric(nan_strategy="error")  # "disable" would drop the weights (torchmetrics 1.9)
        self.accuracy = _accuracy(num_classes, "micro")
        self.per_class = _accuracy(num_classes, "none")

    def forward(self, logits: Tensor, labels: Tensor, losses: Tensor) -> None:
        self.loss.update(losses, weight=(labels != PADDING).to(losses.dtype))
        self.accuracy.update(logits, labels)
        self.per_class.update(logits, labels)


class _PretextEvaluation(nn.Module):
    """Loss and accuracy on corrupted patches over a whole evaluation; padded rows do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = MeanMetric(nan_strategy="error")
        self.accuracy = MeanMetric(nan_strategy="error")

    def forward(self, out: PretextOutput, labels: Tensor) -> None:
        weight = (labels != PADDING).to(out.losses.dtype)
        self.loss.update(out.losses, weight=weight)
        if not out.targets.is_floating_point():
            correct = (out.predictions.argmax(dim=-1) == out.targets).flatten(1).to(weight.dtype).mean(dim=1)
            self.accuracy.update(correct, weight=weight)


def _accuracy(num_classes: int, average: Literal["micro", "none"]) -> Metric:
    return MulticlassAccuracy(num_classes, average=average, ignore_index=PADDING, validate_args=False)


def _configure(module: ViTClassifier | MaskedPatchPretraining, root: nn.Module, net: nn.Module) -> None:
    """Shard and compile what a step calls, ``root``, once, however many loops the Trainer runs."""
    if module.is_configured:
        return
    module.is_configured = True
    blocks = getattr(net, "blocks", None)
    methods = ["represent"] if hasattr(root, "represent") else []
    shard_blocks(root, blocks if isinstance(blocks, nn.ModuleList) else [], module.device_mesh, methods)
    if module.compile_net:
        root.compile()


def _optimizers(module: ViTClassifier | MaskedPatchPretraining, layer_decay: float = 1.0) -> OptimizerLRScheduler:
    optimizer = module.optimizer(param_groups(module, layer_decay))
    scale_learning_rates(optimizer.param_groups)
    if module.lr_scheduler is None:
        return optimizer
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": module.lr_scheduler(optimizer), "interval": "step"}}


def _check_batches(module: LightningModule) -> None:
    """Refuse a data module whose batches are made for another library's models."""
    batch_format = getattr(getattr(module.trainer, "datamodule", None), "batch_format", "tuple")
    if batch_format != "tuple":
        raise ValueError(f"batch_format must be 'tuple' for {type(module).__name__}, got {batch_format!r}")


def _check_finite(module: LightningModule, loss: Tensor) -> None:
    """Stop on a NaN or infinite loss; on an accelerator only at logging steps, when the loss is fetched anyway."""
    every = module.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
    if module.device.type != "cpu" and (every == 0 or (module.global_step + 1) % every):
        return
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss.detach()} at step {module.global_step}; try a lower learning rate")
