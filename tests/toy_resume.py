"""A module and data that are small enough to train in milliseconds, for tests of loaders, resume and processes."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from lightning_iclr.sampling import ResumableLoader, SampleKey, sample_generator
from lightning_iclr.schedules import WarmupCosine


class ToyDataset(Dataset):
    """Rows of 3 numbers, noised anew in each epoch as by an augmentation, the row number, epoch and padding mark."""

    def __init__(self, size: int) -> None:
        self.inputs = torch.randn(size, 3, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, Tensor]:
        noise = torch.randn(3, generator=sample_generator(0, key.epoch, key.index))
        return self.inputs[key.index] + 0.1 * noise, torch.tensor([key.index, key.epoch, key.padding])


class ToyData(LightningDataModule):
    def __init__(self, size: int = 20, batch_size: int = 4, **loader: Any) -> None:
        super().__init__()
        self.size = size
        self.batch_size = batch_size
        self.loader = loader

    def train_dataloader(self) -> ResumableLoader:
        arguments = {"batch_size": self.batch_size, "shuffle": True, "seed": 5, "trainer": self.trainer, **self.loader}
        return ResumableLoader(ToyDataset(self.size), **arguments)

    def val_dataloader(self) -> ResumableLoader:
        return ResumableLoader(ToyDataset(7), batch_size=self.batch_size)

    predict_dataloader = test_dataloader = val_dataloader


class ToyModule(LightningModule):
    """Two layers, Adam and a schedule: an optimizer with a memory shows whether it was restored."""

    def __init__(self, validate: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        for parameter in self.net.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.validate = validate
        self.seen: list[list[list[int]]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, keys = batch
        self.seen.append(keys.tolist())
        return F.mse_loss(self.net(inputs), inputs.prod(dim=1, keepdim=True))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/padding", batch[1][:, 2].float().mean(), batch_size=len(batch[0]))

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return batch[1]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": WarmupCosine(optimizer, 3, 40), "interval": "step"},
        }
