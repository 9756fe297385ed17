"""What happens around training besides pictures: few-shot accuracy."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_iclr.prediction import from_all_ranks
from lightning_iclr.sampling import ResumableLoader, SampleKey
from lightning_iclr.vit.callbacks import at_least_one, evaluating, evaluation_loader, vision_transformer
from lightning_iclr.vit.fewshot import FewShotLeastSquares, few_shot_rows
from lightning_iclr.vit.model import VisionTransformer
from lightning_iclr.vit.module import MaskedPatchPretraining


class FewShotEvaluation(Callback):
    """Log the accuracy of least squares on a few frozen features a class, ``fewshot/<n>_shot``, after validations.

    Features are what the head sees. The support images come from the training part and the accuracy is that on the
    validation part, both as evaluation shows them; see `FewShotLeastSquares`. Needs a data module with
    ``evaluation_loader``, such as those of this package.

    Args:
        shots: Support images a class.
        seeds: Draws of the support set to average over.
        every_n_validations: How often to evaluate.
        l2: Weight of the squared norm of the coefficients.

    Raises:
        ValueError: A number is below 1, or, when training starts, a class has too few training images.
    """

    def __init__(
        self, shots: Sequence[int] = (1, 5, 10, 25), seeds: int = 3, every_n_validations: int = 1, l2: float = 2.0**10
    ) -> None:
        if not shots:
            raise ValueError("shots must hold at least one number of images a class, got none")
        self.shots = [at_least_one("shots", number) for number in shots]
        self.seeds = at_least_one("seeds", seeds)
        self.every_n_validations = at_least_one("every_n_validations", every_n_validations)
        self.l2 = l2
        FewShotLeastSquares(l2)  # refuses a bad l2 before any training
        self.validations = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _targets(evaluation_loader(trainer, "val"))
        labels = _targets(evaluation_loader(trainer, "train"))
        few_shot_rows(labels, max(self.shots), int(labels.max()) + 1, seed=0)  # refuses too many shots

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self.validations += 1
        if self.validations % self.every_n_validations:
            return
        support, query = (evaluation_loader(trainer, split) for split in ("train", "val"))
        labels, truth = _targets(support), _targets(query)
        classes = int(labels.max()) + 1
        chosen = [few_shot_rows(labels, max(self.shots), classes, seed) for seed in range(self.seeds)]
        rows = torch.unique(torch.cat(chosen))
        with evaluating(pl_module), isolate_rng():
            features = self._features(trainer, pl_module, support, rows)
            tested = self._features(trainer, pl_module, query, torch.arange(len(truth)))
        for shots in self.shots:
            accuracies = []
            for table in chosen:  # (K, largest number of shots)
                own = table[:, :shots].reshape(-1)
                known = features[torch.searchsorted(rows, own.contiguous())]
                solver = FewShotLeastSquares(self.l2).fit(known, labels[own], classes)
                accuracies.append((solver.predict(tested) == truth).double().mean())
            pl_module.log(f"fewshot/{shots}_shot", torch.stack(accuracies).mean().float(), sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = state_dict["validations"]

    @staticmethod
    def _features(trainer: Trainer, module: LightningModule, loader: ResumableLoader, rows: Tensor) -> Tensor:
        """Return the features (n, D) of rows (n,); each rank computes every world-size-th and gets all."""
        world_size = trainer.world_size
        padded = torch.cat([rows, rows[:1].expand(-len(rows) % world_size)])
        own = _Rows(loader.dataset, padded[trainer.global_rank :: world_size].tolist())
        batches: DataLoader[Any] = DataLoader(
            own, batch_size=loader.batch_size, num_workers=loader.num_workers, collate_fn=loader.collate_fn
        )
        net = module.net if isinstance(module, MaskedPatchPretraining) else vision_transformer(module)
        dtype = next(module.parameters()).dtype
        parts = [_represent(module, net, batch[0].to(module.device, dtype)) for batch in batches]
        gathered = from_all_ranks(torch.cat(parts)).transpose(0, 1).flatten(0, 1)
        return gathered[: len(rows)].double().cpu()


class _Rows(Dataset[Any]):
    """Chosen rows of one of our datasets."""

    def __init__(self, dataset: Any, rows: list[int]) -> None:
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> Any:
        keys = [SampleKey(self.rows[i], 0, False) for i in indices]
        together = getattr(self.dataset, "__getitems__", None)
        return together(keys) if together is not None else [self.dataset[key] for key in keys]


def _represent(module: LightningModule, net: nn.Module, images: Tensor) -> Tensor:
    if isinstance(module, MaskedPatchPretraining):
        return cast(Tensor, module(images))
    return cast(VisionTransformer, net).represent(images)


def _targets(loader: ResumableLoader) -> Tensor:
    targets = getattr(loader.dataset, "targets", None)
    if not isinstance(targets, Tensor):
        raise ValueError("few-shot evaluation needs a dataset with its labels as `targets` (N,)")
    return targets
