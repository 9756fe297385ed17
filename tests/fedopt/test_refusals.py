import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, GradientAccumulationScheduler, StochasticWeightAveraging
from torch import nn
from torch.multiprocessing import ProcessRaisedException
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_iclr.fedopt.strategy import FedOptStrategy
from tests.fedopt.federation import Module, loader, rows, trainer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 5}, "max_steps must be -1, got 5"),
        ({"limit_train_batches": 3}, "limit_train_batches must be 1.0, got 3"),
        ({"limit_train_batches": 1}, "limit_train_batches must be 1.0, got 1"),
        ({"limit_train_batches": 0.5}, "limit_train_batches must be 1.0, got 0.5"),
        ({"overfit_batches": 2}, "overfit_batches must be 0.0, got 2"),
        ({"overfit_batches": 1}, "overfit_batches must be 0.0, got 1"),
        ({"overfit_batches": 1.0}, "overfit_batches must be 0.0, got 1.0"),
        ({"val_check_interval": 2}, "val_check_interval must be 1.0, got 2"),
        ({"val_check_interval": 1}, "val_check_interval must be 1.0, got 1"),
        ({"val_check_interval": "00:00:15:00"}, "val_check_interval must be 1.0, got a time"),
        ({"fast_dev_run": 1}, "fast_dev_run must be False, got True"),
        ({"sync_batchnorm": True}, "sync_batchnorm mixes the statistics of different clients"),
    ],
)
def test_a_trainer_that_would_cut_a_round_is_refused(options, message):
    with pytest.raises(ValueError, match=rf"{message}\b"):
        trainer(FedOptStrategy(), **options).fit(Module(), loader())


def test_a_trainer_that_cuts_nothing_trains():
    strategy = FedOptStrategy()
    trainer(strategy, 1, limit_train_batches=1.0, overfit_batches=0, val_check_interval=1.0).fit(Module(), loader())
    assert strategy.server_round == 1


@pytest.mark.parametrize(
    ("callback", "reason"),
    [
        (
            GradientAccumulationScheduler({1: 2}),
            "GradientAccumulationScheduler: a round is laid out for one accumulate",
        ),
        (StochasticWeightAveraging(0.1), "StochasticWeightAveraging: it replaces the module's schedule, and weights"),
    ],
)
def test_a_callback_that_changes_how_clients_train_is_refused(callback, reason):
    with pytest.raises(ValueError, match=f"FedOptStrategy does not train with {reason}"):
        trainer(FedOptStrategy(), callbacks=[callback]).fit(Module(), loader())


def test_schedules_of_both_kinds_at_once_are_refused():
    class Both(Module):
        def configure_optimizers(self):
            optimizer = self.client_optimizer()
            one, two = (torch.optim.lr_scheduler.ConstantLR(optimizer) for _ in range(2))
            return [optimizer], [{"scheduler": one, "interval": "step"}, {"scheduler": two, "interval": "epoch"}]

    with pytest.raises(ValueError, match="must all be stepped within a client"):
        trainer(FedOptStrategy(), 1).fit(Both(), loader())


def test_a_plateau_within_a_client_is_refused():
    class Plateau(Module):
        def configure_optimizers(self):
            optimizer = self.client_optimizer()
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return [optimizer], [{"scheduler": plateau, "interval": "step", "monitor": "train/loss"}]

    with pytest.raises(ValueError, match="ReduceLROnPlateau .* interval must be 'epoch', got 'step'"):
        trainer(FedOptStrategy(), 1).fit(Plateau(), loader())


class Backbone(Module):
    """A network in two parts, as ``BackboneFinetuning`` wants it."""

    def __init__(self):
        super().__init__(schedule=None, norm=False, dropout=0.0)
        self.backbone, self.head = self.net[0], self.net[3]

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Freeze(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            pl_module.head.bias.requires_grad_(False)


class Grow(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            pl_module.adapters = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))


@pytest.mark.parametrize(
    ("callback", "names"),
    [
        (BackboneFinetuning(unfreeze_backbone_at_epoch=2), "net.0.bias, net.0.weight"),
        (Freeze(), "net.3.bias"),
        (Grow(), "adapters.0.bias, adapters.0.weight, adapters.1.bias, adapters.1.weight, adapters.2.bias and 1 more"),
    ],
    ids=["unfrozen", "frozen", "new"],
)
@pytest.mark.parametrize("vectorize", [None, 2])
def test_parameters_whose_training_begins_or_ends_later_are_named(callback, names, vectorize):
    strategy = FedOptStrategy(vectorize_clients=vectorize)
    with pytest.raises(ValueError, match=f"fixed when training starts, and since then {names} were frozen or unfrozen"):
        trainer(strategy, 4, callbacks=[callback]).fit(Backbone(), loader())
    assert strategy.server_round == 2


def test_parameters_that_are_frozen_from_the_start_stay_as_they_are():
    module = Backbone()
    before = module.backbone.weight.detach().clone(), module.head.weight.detach().clone()
    trainer(FedOptStrategy(), 2, callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=9)]).fit(module, loader())
    assert torch.equal(module.backbone.weight, before[0])
    assert not torch.equal(module.head.weight, before[1])


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_module_without_weights_is_refused_by_the_names_of_its_layers(devices):
    class Lazy(Module):
        def __init__(self):
            super().__init__(norm=False)
            self.net = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Linear(8, 3))

    waiting = "net.0.weight, net.0.bias, net.1.weight, net.1.bias, net.1.running_mean and 1 more"
    with pytest.raises(
        (ValueError, ProcessRaisedException), match=f"lazy layers have none yet: {waiting}; run a batch through"
    ):
        trainer(FedOptStrategy(start_method="fork"), 1, devices=devices).fit(Lazy(), loader())
    module = Lazy()
    module.net(rows()[:2][0])
    trainer(FedOptStrategy(), 1).fit(module, loader())


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (lambda: DataLoader(rows(), batch_size=4), "DataLoader"),
        (lambda: [loader(), loader()], "list"),
        (lambda: [loader()], "list"),
        (lambda: {"a": loader(), "b": loader()}, "dict"),
        (lambda: {"a": loader(), "b": DataLoader(rows(), batch_size=4)}, "DataLoader"),
    ],
)
def test_anything_but_one_federated_loader_is_refused(data, kind):
    with pytest.raises(ValueError, match=f"FedOptStrategy trains on one FederatedLoader, got {kind}; pass Federated"):
        trainer(FedOptStrategy(), 1).fit(Module(), data())


@pytest.mark.parametrize("vectorize", [None, 3])
def test_weights_of_zero_for_all_clients_are_refused(vectorize):
    def late(task):
        return float(strategy.server_round < 2)

    strategy = FedOptStrategy(weighting=late, vectorize_clients=vectorize)
    with pytest.raises(ValueError, match="weighting must give .* more than 0, got 0 for all 3 that count in round 2"):
        trainer(strategy, 4).fit(Module(norm=False), loader())


@pytest.mark.parametrize("data", [loader(client_dropout=0.9999), loader()], ids=["nobody reports", "all are poisoned"])
def test_a_round_without_anybody_to_weigh_goes_on(data):
    class Poisoned(Module):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self.net(batch[0]), torch.tensor(torch.nan).expand(len(batch[0]), 3))

    strategy = FedOptStrategy(weighting=lambda task: 2.0)
    with pytest.warns(UserWarning, match="round . leaves the server as it was: no client's update counted"):
        trainer(strategy, 2).fit(Poisoned(norm=False), data)
    assert strategy.server_round == strategy.server.skipped_rounds == 2
