"""A tiny classifier over random tensors, with the shape that all methods' modules have, for tests of the command."""

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_iclr._imports import optional_import
from lightning_iclr.hyperparameters import save_hyperparameters


class ToyNet(nn.Module):
    def __init__(self, dim: int = 3, num_classes: int = 2) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be positive, got {dim}")
        self.dim, self.num_classes = dim, num_classes
        self.head = nn.Linear(dim, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs)


class NeedsExtra(ToyNet):
    def __init__(self) -> None:
        optional_import("no_such_package_at_all", "text")
        super().__init__()


class ToyClassifier(LightningModule):
    def __init__(
        self,
        net: nn.Module,
        smoothing: float = 0.0,
        sizes: tuple[int, int] = (1, 2),
        fail_in: str | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-2),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= smoothing < 1.0:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
        save_hyperparameters(self, live=("net", "optimizer", "lr_scheduler"))
        self.net = net
        self.smoothing, self.sizes, self.fail_in = smoothing, sizes, fail_in
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def setup(self, stage: str) -> None:
        if self.fail_in == "setup":
            raise ValueError("setup found no data")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.fail_in == "training_step":
            raise ValueError("the loss is not finite")
        loss = F.cross_entropy(self(batch[0]), batch[1], label_smoothing=self.smoothing)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/dim", float(self.net.dim))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        return [optimizer], [] if self.lr_scheduler is None else [self.lr_scheduler(optimizer)]


class FullDisk(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        raise OSError("no space left")


class ToyImages(LightningDataModule):
    def __init__(self, size: int = 8, dim: int = 3, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size
        inputs = torch.randn(size, dim, generator=torch.Generator().manual_seed(0))
        self.rows = TensorDataset(inputs, (inputs.sum(dim=1) > 0).long())

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader
