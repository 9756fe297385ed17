"""What happens around training: pictures of what a network learns.

Every callback runs the network on all ranks, since a sharded one computes together, and writes on rank zero. A network
without what a callback draws trains without that picture, and a warning says so.
"""

import math
import time
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_iclr.evaluation_mode import evaluating as evaluating
from lightning_iclr.figures import show
from lightning_iclr.prediction import class_names
from lightning_iclr.vit.analysis import (
    attention_distance,
    attention_maps,
    fused_attentions,
    patch_filters,
    position_similarity,
    rollout,
)
from lightning_iclr.vit.model import VisionTransformer
from lightning_iclr.vit.module import MaskedPatchPretraining
from lightning_iclr.vit.pictures import (
    draw_attention_distance,
    draw_curves,
    draw_masked_patches,
    draw_patch_filters,
    draw_position_similarity,
    draw_rollout,
)


class AttentionDistance(Callback):
    """Draw how far each head looks before, in the middle of and after training: ``attention_distance.png``.

    Also logs ``attention_distance/range``, the spread of a block's heads averaged over blocks, at each of these.

    Args:
        num_images: Validation images to average over; 128 as in the paper.
        renormalize: Share attention to the class token out over the patches.

    Raises:
        ValueError: ``num_images`` is below 1.
    """

    def __init__(self, num_images: int = 128, renormalize: bool = False) -> None:
        self.num_images = at_least_one("num_images", num_images)
        self.renormalize = renormalize
        self.distances: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _warn_without_picture(self, stage, _no_attention(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._measure(trainer, pl_module, "before training")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if "half-way" in self.distances:
            return
        if 2 * trainer.global_step >= trainer.estimated_stepping_batches > 2 * (trainer.global_step - 1):
            self._measure(trainer, pl_module, "half-way")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _no_attention(pl_module):
            return
        self._measure(trainer, pl_module, "after training")
        net = vision_transformer(pl_module)
        tokens = net.num_prefix_tokens + math.prod(self._grid)
        even = torch.full((1, 1, tokens, tokens), 1 / tokens)
        uniform = float(attention_distance([even], self._grid, net.patch_size, self.renormalize))
        show(draw_attention_distance(self.distances, uniform), "attention_distance", trainer)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.distances)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.distances = dict(state_dict)

    def _measure(self, trainer: Trainer, module: LightningModule, moment: str) -> None:
        if _no_attention(module):
            return
        net = vision_transformer(module)
        images, _ = _validation_images(trainer, module, self.num_images)
        with evaluating(module):
            maps = [part.float() for part in attention_maps(module, images)]
        self._grid = _grid(net, images)
        distance = attention_distance(maps, self._grid, net.patch_size, self.renormalize).cpu()
        self.distances[moment] = distance
        spread = (distance.amax(dim=1) - distance.amin(dim=1)).mean()
        for logger in trainer.loggers:
            logger.log_metrics({"attention_distance/range": float(spread)}, step=trainer.global_step)


class RolloutOverlay(Callback):
    """Draw what the trained network attends to on validation images: ``rollout.png``.

    The class token's row of the rollout is shown or, without one, the mean of all rows.

    Args:
        num_images: Images to show.

    Raises:
        ValueError: ``num_images`` is below 1.
    """

    def __init__(self, num_images: int = 16) -> None:
        self.num_images = at_least_one("num_images", num_images)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _warn_without_picture(self, stage, _no_attention(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _no_attention(pl_module):
            return
        net = vision_transformer(pl_module)
        images, labels = _validation_images(trainer, pl_module, self.num_images)
        with evaluating(pl_module):
            flow = rollout([part.float() for part in attention_maps(pl_module, images)])
            outputs = pl_module(images).float().cpu()
        rows = flow[:, :1] if net.num_prefix_tokens else flow
        heat = rows.mean(dim=1)[:, net.num_prefix_tokens :].view(-1, *_grid(net, images)).cpu()
        titles = [""] * len(images)
        if not isinstance(pl_module, MaskedPatchPretraining):
            names = class_names(trainer, net.num_classes)
            guesses = outputs.argmax(dim=1).tolist()
            titles = [
                names[guess] if guess == label or label < 0 else f"{names[guess]}, not {names[label]}"
                for guess, label in zip(guesses, labels.tolist(), strict=True)
            ]
        show(draw_rollout(_to_unit_range(images), heat, titles), "rollout", trainer)


class PositionSimilarity(Callback):
    """Draw the cosines of the position embeddings after training: ``position_similarity.png``."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        reason = "the network has position='none'" if vision_transformer(pl_module).pos_embed is None else None
        _warn_without_picture(self, stage, reason)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        net = vision_transformer(pl_module)
        if net.pos_embed is None:
            return
        positions = _whole(net.pos_embed).detach().float().cpu()
        show(draw_position_similarity(position_similarity(positions, net.grid)), "position_similarity", trainer)


class PatchFilters(Callback):
    """Draw the principal components of the patch embedding after training: ``patch_filters.png``.

    Args:
        n: Components to draw; 28 as in the paper.

    Raises:
        ValueError: ``n`` is below 1.
    """

    def __init__(self, n: int = 28) -> None:
        self.n = at_least_one("n", n)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        is_hybrid = hasattr(vision_transformer(pl_module).patch_embed, "backbone")
        reason = "it draws filters on pixels, and a hybrid's patches are features" if is_hybrid else None
        _warn_without_picture(self, stage, reason)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        patch_embed = vision_transformer(pl_module).patch_embed
        if hasattr(patch_embed, "backbone"):
            return
        weight = _whole(patch_embed.proj.weight).detach().float().cpu()
        show(draw_patch_filters(patch_filters(weight, self.n)), "patch_filters", trainer)


class MaskedPatchReconstruction(Callback):
    """Draw masked images, the predicted and the wanted patches after pre-training: ``masked_patches.png``.

    Works with `MaskedPatchPretraining`. Every corrupted patch is grey in the input, whatever replaced it.

    Args:
        num_images: Images to show.

    Raises:
        ValueError: ``num_images`` is below 1.
    """

    def __init__(self, num_images: int = 8) -> None:
        self.num_images = at_least_one("num_images", num_images)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, MaskedPatchPretraining):
            kind = type(pl_module).__name__
            raise TypeError(f"MaskedPatchReconstruction works with MaskedPatchPretraining, got {kind}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(MaskedPatchPretraining, pl_module)
        images, _ = _validation_images(trainer, module, self.num_images)
        with evaluating(module):
            out = module.corrupt_and_predict(images, -1, 0)
        pretext = module.pretext
        # Square tiles of one colour, of 4 x 4 colours, or of pixels; enlarged to a patch where they are smaller.
        values = out.predictions if pretext.target == "pixels" else out.predictions.argmax(dim=-1)
        grey = torch.full_like(pretext.as_patches(out.targets), 0.5)
        tiles = {"input": grey, "predicted": pretext.as_patches(values), "target": pretext.as_patches(out.targets)}
        unit = images.float() * pretext.image_std + pretext.image_mean
        show(
            draw_masked_patches({name: pretext.paste(unit, tile, out.corrupted).cpu() for name, tile in tiles.items()}),
            "masked_patches",
            trainer,
        )


class TrainingCurves(Callback):
    """Log the gradient's norm and the images a second, and draw all curves at the end: ``training_curves.png``.

    Both are taken at logging steps only: ``train/gradient_norm`` before clipping, and ``train/images_per_second`` over
    all ranks since the last logging step, without validation.
    """

    def __init__(self) -> None:
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self._images = 0
        self._seconds = 0.0
        self._begin = 0.0  # of the time that is running; 0 while it stands still
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._images, self._seconds, self._begin = 0, 0.0, 0.0
        self._last_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._begin == 0.0:
            self._begin = time.perf_counter()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if _is_logging_step(trainer, trainer.global_step + 1):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            norm = _whole(torch.nn.utils.get_total_norm(gradients))
            pl_module.log("train/gradient_norm", norm)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += len(batch[0]) * trainer.world_size
        # With accumulated gradients several batches end at the same step.
        if trainer.global_step == self._last_step or not _is_logging_step(trainer, trainer.global_step):
            return
        self._last_step = trainer.global_step
        # The loss is fetched for the logger here anyway, so nothing is left in the device's queue.
        loss = float(trainer.callback_metrics.get("train/loss", math.nan))
        now = time.perf_counter()
        self._seconds += now - self._begin
        speed = self._images / max(self._seconds, 1e-9)
        pl_module.log("train/images_per_second", speed)
        self._record("train/loss", trainer.global_step, loss)
        self._record("learning rate", trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"])
        self._record("images a second", trainer.global_step, speed)
        norm = trainer.callback_metrics.get("train/gradient_norm", math.nan)
        self._record("gradient norm", trainer.global_step, float(norm))
        self._images, self._seconds, self._begin = 0, 0.0, now

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._begin:
            self._seconds += time.perf_counter() - self._begin
            self._begin = 0.0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        for name, value in trainer.callback_metrics.items():
            if name in ("val/loss", "val/accuracy", "val/masked_accuracy"):
                self._record(name, trainer.global_step, float(value))
            elif name.startswith("fewshot/"):
                self._record(f"{name.removeprefix('fewshot/')}/few-shot accuracy", trainer.global_step, float(value))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
        for name, points in self.curves.items():
            split, _, quantity = name.rpartition("/")
            panels.setdefault(quantity.replace("_", " "), {})[split] = points
        if panels:
            show(draw_curves(panels), "training_curves", trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"curves": {name: list(points) for name, points in self.curves.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curves = {name: [(step, value) for step, value in points] for name, points in state_dict["curves"].items()}

    def _record(self, name: str, step: int, value: float) -> None:
        self.curves.setdefault(name, []).append((step, value))


def vision_transformer(module: LightningModule) -> VisionTransformer:
    """Return a module's network.

    Raises:
        TypeError: It is another one than ours.
    """
    net = module.net
    if not isinstance(net, VisionTransformer):
        raise TypeError(f"the module's net must be a VisionTransformer, got {type(net).__name__}")
    return net


def _warn_without_picture(callback: Callback, stage: str, reason: str | None) -> None:
    if stage == "fit" and reason is not None:
        rank_zero_warn(f"{type(callback).__name__} is left out: {reason}")


def _no_attention(module: LightningModule) -> str | None:
    """Say why a network's attention cannot be shown, if so."""
    try:
        fused_attentions(vision_transformer(module))
    except ValueError as error:
        return str(error)
    return None


def _validation_images(trainer: Trainer, module: LightningModule, count: int) -> tuple[Tensor, Tensor]:
    """Return this rank's first validation images and labels, on the module's device."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    with isolate_rng():  # every pass over a DataLoader draws a seed for its workers
        for batch in evaluation_loader(trainer, "val"):
            images.append(batch[0])
            labels.append(batch[1])
            if sum(map(len, labels)) >= count:
                break
    dtype = next(module.parameters()).dtype
    return torch.cat(images)[:count].to(module.device, dtype), torch.cat(labels)[:count]


def evaluation_loader(trainer: Trainer, split: str) -> Any:
    """Return a loader of a split as evaluation sees it, the user's own for the validation split.

    Raises:
        ValueError: There is none.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None and hasattr(datamodule, "evaluation_loader"):
        return datamodule.evaluation_loader(split)
    loaders = trainer.val_dataloaders if split == "val" else None
    if loaders is None:
        raise ValueError(f"there are no images of the {split} split: use a data module with evaluation_loader(split)")
    return loaders[0] if isinstance(loaders, list) else loaders


def _to_unit_range(images: Tensor) -> Tensor:
    """Stretch images to [0, 1], each batch as a whole: the module does not know how they were standardised."""
    images = images.float().cpu()
    low, high = images.amin(), images.amax()
    return (images - low) / (high - low).clamp(min=1e-12)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _grid(net: VisionTransformer, images: Tensor) -> tuple[int, int]:
    """Return the patches of these images, which ``dynamic_size`` lets differ from those of training."""
    return images.shape[-2] // net.patch_size[0], images.shape[-1] // net.patch_size[1]


def _is_logging_step(trainer: Trainer, step: int) -> bool:
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning sets it outside the class
    return every > 0 and step % every == 0


def at_least_one(name: str, number: int) -> int:
    """Return a number.

    Raises:
        ValueError: It is below 1.
    """
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number
