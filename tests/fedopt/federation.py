"""A small federation, a module with everything that can go wrong in it, and federated averaging as a plain loop."""

import copy

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_iclr.fedopt.loader import FederatedLoader
from lightning_iclr.sampling import seed_step

SIZES = [8, 12, 3, 9, 5, 2]  # examples of each client


def rows(dim=4, classes=3):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(sum(SIZES), dim, generator=generator)
    return TensorDataset(inputs, torch.randint(classes, (sum(SIZES),), generator=generator))


def partition(sizes=SIZES):
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


def loader(**options):
    return FederatedLoader(rows(), partition(), **{"clients_per_round": 3, "batch_size": 3, "seed": 5, **options})


class Net(nn.Sequential):
    def __init__(self, norm=True, dropout=0.25):
        middle = [nn.BatchNorm1d(8)] if norm else []
        super().__init__(nn.Linear(4, 8), *middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


class Module(LightningModule):
    """Client momentum and weight decay, dropout, batch normalisation, and a learning-rate schedule."""

    def __init__(self, schedule="epoch", norm=True, dropout=0.25, momentum=0.9, lr=0.1, optimizer=None, log=True):
        super().__init__()
        torch.manual_seed(3)
        self.net = Net(norm, dropout)
        self.schedule, self.momentum, self.lr, self.optimizer, self.writes = schedule, momentum, lr, optimizer, log

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        if self.writes:
            self.log("train/loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def client_optimizer(self):
        if self.optimizer is not None:
            return self.optimizer(self.parameters())
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=0.01)

    def configure_optimizers(self):
        optimizer = self.client_optimizer()
        if self.schedule is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": self.schedule}}


class Validated(Module):
    """The same, with a validation step."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)


class Tied(Module):
    """The same, with second names for all parameters and buffers, and a third for one."""

    def __init__(self, **options):
        super().__init__(**options)
        self.alias = self.net
        self.first = self.net[0].weight


def plain_loop(module, loader, server_optimizer, rounds, accumulate=1, clip=None, weighting="examples", buffers="mean",
               mu=0.0, on_update=None):  # fmt: skip
    """Algorithm 1 by deep copies: no Lightning, and nothing of the strategy's."""
    server = copy.deepcopy(module)
    server.train()
    trained = list(server.parameters())
    optimizer = server_optimizer(trained)
    dataset, batch_size = loader.dataset, loader.batch_size
    for number in range(rounds):
        updates, means, total = [torch.zeros_like(p, dtype=torch.float64) for p in trained], {}, 0.0
        for client in loader.plan(number, accumulate_grad_batches=accumulate).cohort:
            local = copy.deepcopy(server)
            local.optimizer = module.optimizer
            client_optimizer = local.client_optimizer()
            rate = [group["lr"] for group in client_optimizer.param_groups]
            own, place, steps, used = loader.partition[client].tolist(), 0, 0, set()
            cap = loader.max_local_steps(number, client) if callable(loader.max_local_steps) else loader.max_local_steps
            for _ in range(loader.local_epochs):
                batches = [own[i : i + batch_size] for i in range(0, len(own), batch_size)]
                groups = [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]
                for group in groups:
                    if cap is not None and steps == cap:
                        break
                    decay = {"epoch": number, "step": steps, None: 0}[module.schedule]
                    for index, base in enumerate(rate):
                        client_optimizer.param_groups[index]["lr"] = base * 0.7**decay
                    client_optimizer.zero_grad()
                    for batch in group:
                        used |= set(batch)
                        seed_step(loader.seed, number, place, client)
                        place += 1
                        loss = F.cross_entropy(local.net(dataset[batch][0]), dataset[batch][1])
                        (loss / accumulate).backward()
                    for parameter, start in zip(local.parameters(), trained, strict=True):
                        parameter.grad += mu * (parameter.detach() - start.detach())
                    if clip:
                        nn.utils.clip_grad_norm_(local.parameters(), clip)
                    client_optimizer.step()
                    steps += 1
            weight = len(used) if weighting == "examples" else 1
            total += weight
            changes = [
                new.detach().double() - old.detach().double()
                for new, old in zip(local.parameters(), trained, strict=True)
            ]
            if on_update is not None:
                changes = on_update(client, changes)
            for update, change in zip(updates, changes, strict=True):
                update += weight * change
            for name, value in local.named_buffers():
                means[name] = means.get(name, 0.0) + weight * value.double()
        if not total:  # nobody takes part
            continue
        for parameter, update in zip(trained, updates, strict=True):
            parameter.grad = (-update / total).to(parameter.dtype)
        optimizer.step()
        for name, value in server.named_buffers():
            if buffers == "mean" and value.is_floating_point():
                value.copy_((means[name] / total).to(value.dtype))
    return server.state_dict()


def trainer(strategy, rounds=4, **options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(strategy=strategy, max_epochs=rounds, **{"accelerator": "cpu", "devices": 1, **quiet, **options})
