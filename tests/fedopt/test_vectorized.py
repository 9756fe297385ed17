import copy

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_iclr.fedopt import replace_batch_norm
from lightning_iclr.fedopt.loader import FederatedLoader
from lightning_iclr.fedopt.optim import FedAvg, FedYogi
from lightning_iclr.fedopt.strategy import FedOptStrategy
from lightning_iclr.vit import VisionTransformer, ViTClassifier
from tests.fedopt.federation import SIZES, Module, Tied, loader, partition, rows, trainer


def fit(module, data, rounds=3, **options):
    """Return the weights and what was logged, but for values of single steps of the Trainer, which differ."""
    strategy, extra = {}, {}
    for key, value in options.items():
        own = key in ("gradient_clip_val", "gradient_clip_algorithm", "precision", "devices")
        (extra if own else strategy)[key] = value
    strategy = FedOptStrategy(lambda params: FedYogi(params, lr=0.05), start_method="fork", **strategy)
    federated = trainer(strategy, rounds, **extra)
    federated.fit(module, data)
    logged = {name: float(value) for name, value in federated.callback_metrics.items()}
    return module.state_dict(), {k: v for k, v in logged.items() if k.startswith("fedopt/") or k.endswith("_epoch")}


@pytest.mark.parametrize(
    ("module", "options"),
    [
        ({}, {}),
        ({"momentum": 0.0}, {"gradient_clip_val": 0.2}),
        ({}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "proximal": 0.5}),
        ({"optimizer": lambda params: torch.optim.Adam(params, lr=0.01)}, {"weighting": "uniform"}),
        ({"optimizer": lambda params: torch.optim.Adagrad(params, lr=0.01, initial_accumulator_value=0.1)}, {}),
        ({}, {"precision": "bf16-mixed"}),
    ],
    ids=["momentum", "clip-norm", "clip-value-and-fedprox", "adam", "adagrad", "bf16"],
)
def test_clients_trained_at_once_equal_clients_trained_in_turn(module, options):
    module = {"norm": False, "dropout": 0.0, **module}
    loop, loop_metrics = fit(Module(**module), loader(local_epochs=2), **options)
    for size in (2, 5):
        once, metrics = fit(Module(**module), loader(local_epochs=2), vectorize_clients=size, **options)
        torch.testing.assert_close(once, loop, rtol=0, atol=1e-5 if "precision" not in options else 2e-2)
        assert metrics == pytest.approx(loop_metrics, rel=1e-4 if "precision" not in options else 0.1)


def images(**options):
    generator = torch.Generator().manual_seed(1)
    pictures = TensorDataset(
        torch.randn(sum(SIZES), 1, 8, 8, generator=generator), torch.randint(3, (sum(SIZES),), generator=generator)
    )
    return FederatedLoader(pictures, partition(), **{"clients_per_round": 3, "batch_size": 3, "seed": 5, **options})


def vision_transformer(optimizer):
    torch.manual_seed(3)
    net = VisionTransformer(image_size=8, patch_size=4, in_channels=1, num_classes=3, dim=8, depth=2, num_heads=2)
    nn.init.normal_(net.head.weight, std=0.1)  # a head of zeros would pass no gradient on in the first step
    return ViTClassifier(net, optimizer=optimizer, label_smoothing=0.1)


def group_norms(optimizer):
    module = Module(optimizer=optimizer)
    convolutions = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    module.net = replace_batch_norm(nn.Sequential(convolutions, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)))
    return module


def with_momentum(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)


def adamw(params):
    # Attention does not depend on its keys' biases: with a small eps Adam would blow rounding errors up to a step.
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, eps=1e-3)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize("optimizer", [with_momentum, adamw])
@pytest.mark.parametrize("build", [vision_transformer, group_norms])
def test_attention_and_group_norms_are_trained_at_once_as_in_turn(build, optimizer):
    started = build(optimizer)
    loop, loop_metrics = fit(copy.deepcopy(started), images(local_epochs=2))
    assert all(not torch.equal(loop[name], weight) for name, weight in started.named_parameters())
    for size in (2, 5):
        once, metrics = fit(copy.deepcopy(started), images(local_epochs=2), vectorize_clients=size)
        torch.testing.assert_close(once, loop, rtol=0, atol=1e-5)
        assert metrics == pytest.approx(loop_metrics, rel=1e-4)


class Unused(Module):
    """Has parameters that the loss does not use, which have no gradient and so are not decayed either."""

    def __init__(self, optimizer):
        super().__init__(norm=False, dropout=0.0, optimizer=optimizer)
        self.alone = nn.Parameter(torch.ones(5))
        self.last = nn.Linear(3, 2)


@pytest.mark.parametrize("proximal", [0.0, 0.5])
@pytest.mark.parametrize("optimizer", [with_momentum, adamw])
def test_a_parameter_that_the_loss_does_not_use_stays_as_it_is(optimizer, proximal):
    started = Unused(optimizer)
    loop, _ = fit(copy.deepcopy(started), loader(local_epochs=2), proximal=proximal)
    for size in (2, 5):
        once, _ = fit(copy.deepcopy(started), loader(local_epochs=2), vectorize_clients=size, proximal=proximal)
        torch.testing.assert_close(once, loop, rtol=0, atol=1e-5)
        for name in ("alone", "last.weight", "last.bias"):
            assert torch.equal(once[name], started.state_dict()[name])
    assert not torch.equal(loop["net.0.weight"], started.net[0].weight)


@pytest.mark.parametrize("size", [None, 6], ids=["in turn", "at once"])
def test_dropout_drops_its_share_of_each_client_independently_of_the_others(size):
    # The gradient of the sum of what is left is the mask / (1 - p), so a step of rate 1 of all clients and their mean
    # tell how many of them kept each entry: binomial, if the clients' masks are independent.
    entries, clients, p = 4000, len(SIZES), 0.25

    class Masked(Module):
        def __init__(self):
            super().__init__(norm=False, optimizer=lambda params: torch.optim.SGD(params, lr=1.0), schedule=None)
            self.net = nn.Dropout(p)
            self.weight = nn.Parameter(torch.zeros(entries))

        def training_step(self, batch, batch_idx):
            return self.net(self.weight).sum() + 0 * batch[0].sum()

    module = Masked()
    strategy = FedOptStrategy(FedAvg, weighting="uniform", vectorize_clients=size)
    trainer(strategy, 1).fit(module, loader(max_local_steps=1, clients_per_round=clients))
    counts = -module.weight.detach().double() * (1 - p) * clients
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-4)
    variance = clients * p * (1 - p)
    assert float(counts.mean()) == pytest.approx(clients * (1 - p), abs=5 * (variance / entries) ** 0.5)
    # With one mask for all, the variance would be six times as large.
    assert float(counts.var()) == pytest.approx(variance, rel=5 * (2 / entries) ** 0.5)


def test_each_client_has_its_own_dropout():
    class Dropped(Module):
        def training_step(self, batch, batch_idx):
            kept = nn.functional.dropout(torch.ones_like(batch[0][:, :1]).expand(-1, 64), 0.5, training=True)
            return self.net(batch[0]).mean() * 0 + self.net[0].weight.sum() * kept.mean()

    strategy = FedOptStrategy(vectorize_clients=4)
    data = loader(max_local_steps=1, clients_per_round=4, batch_size=2)
    trainer(strategy, 1).fit(Dropped(norm=False, schedule=None), data)
    # The gradient depends on the mask alone: with one mask for all, the four updates would have the same norm.
    assert len(set(strategy.round_norms.tolist())) == 4


def test_two_processes_train_clients_at_once_as_one_in_turn():
    plan = loader(clients_per_round=5).plan(1, world_size=2, vectorize_clients=2)
    assert not all(task.counted for own in plan.tasks for task in own)  # so one process has a chunk less to do
    loop, loop_metrics = fit(Module(norm=False, dropout=0.0), loader(clients_per_round=5))
    module = Module(norm=False, dropout=0.0)
    once, metrics = fit(module, loader(clients_per_round=5), vectorize_clients=2, devices=2)
    torch.testing.assert_close(once, loop, rtol=0, atol=1e-5)
    del metrics["train/loss_epoch"], loop_metrics["train/loss_epoch"]  # clients that do not count log it too
    assert metrics == pytest.approx(loop_metrics, rel=1e-4)


class Logging(Module):
    """Logs in all ways."""

    def __init__(self):
        super().__init__(norm=False, dropout=0.0)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        epoch = {"on_step": False, "on_epoch": True, "sync_dist": True}
        self.log("mean_epoch", loss, True, **epoch)
        self.log("avg_epoch", loss.to(torch.bfloat16), reduce_fx="avg", batch_size=2, **epoch)
        self.log("rows_epoch", float(len(batch[0])), reduce_fx="sum", **epoch)
        self.log_dict({"max_epoch": loss, "twice_epoch": 2 * loss}, reduce_fx=max, **epoch)
        self.log("min_epoch", loss, reduce_fx=torch.min, **epoch)
        self.log("step", loss)
        return loss


def test_the_numbers_of_an_epoch_are_logged_as_by_clients_in_turn():
    data = {"clients_per_round": 4, "batch_size": 2, "local_epochs": 2}
    _, loop = fit(Logging(), loader(**data), rounds=2)
    assert loop["rows_epoch"] == 2 * sum(task.num_examples for task in loader(**data).plan(1).tasks[0])
    assert loop["min_epoch"] < loop["mean_epoch"] < loop["max_epoch"]
    assert loop["mean_epoch"] != pytest.approx(loop["avg_epoch"], rel=1e-3)  # as last batches may be smaller
    for size in (2, 3, 4):
        _, once = fit(Logging(), loader(**data), rounds=2, vectorize_clients=size)
        assert once == pytest.approx(loop, rel=1e-4)


def test_two_processes_log_the_same_numbers_of_an_epoch_as_one():
    def clients():
        return FederatedLoader(rows(), partition([9] * 4), clients_per_round=4, batch_size=4)

    assert all(task.counted for own in clients().plan(0, world_size=2, vectorize_clients=2).tasks for task in own)
    _, loop = fit(Logging(), clients())
    _, once = fit(Logging(), clients(), vectorize_clients=2, devices=2)
    assert once == pytest.approx(loop, rel=1e-4)


def test_the_same_names_are_logged_at_once_and_in_turn():
    names = []
    for size in (None, 2):
        federated = trainer(FedOptStrategy(vectorize_clients=size), 1)
        federated.fit(Logging(), loader())
        names.append(set(federated.callback_metrics))
    assert names[0] == names[1] >= {"train/loss", "train/loss_step", "step"}


class Positional(Module):
    def training_step(self, b, i):
        return super().training_step(b, i)


class WithoutIndex(Module):
    def training_step(self, batch):
        return super().training_step(batch, 0)


@pytest.mark.parametrize("build", [Tied, Positional, WithoutIndex])
def test_modules_with_tied_weights_or_other_arguments_are_trained_at_once_as_in_turn(build):
    loop, loop_metrics = fit(build(norm=False, dropout=0.0), loader())
    once, metrics = fit(build(norm=False, dropout=0.0), loader(), vectorize_clients=2)
    torch.testing.assert_close(once, loop, rtol=0, atol=1e-5)
    assert metrics == pytest.approx(loop_metrics, rel=1e-4)


class Counting(Module):
    """Changes a buffer in some way, or only reads it."""

    def __init__(self, change):
        super().__init__(norm=False, dropout=0.0)
        self.change = change
        self.register_buffer("count", torch.ones(()))
        self.register_buffer("alias", self.count)

    def training_step(self, batch, batch_idx):
        self.change(self, batch[0])
        return super().training_step(batch, batch_idx) * self.count


def add_in_place(module, inputs):
    module.count += 1


def replace(module, inputs):
    module.count = module.count + 1


def replace_the_second_name(module, inputs):
    module.alias = module.alias + 1


def replace_by_what_the_batch_holds(module, inputs):
    module.count = inputs.mean()


@pytest.mark.parametrize(
    "change",
    [add_in_place, replace, replace_the_second_name, replace_by_what_the_batch_holds],
    ids=lambda change: change.__name__,
)
def test_a_step_that_changes_a_buffer_is_refused_and_leaves_it_as_it_was(change):
    module = Counting(change)
    name = "alias" if change is replace_the_second_name else "count"
    with pytest.raises(ValueError, match=f"cannot train Counting: .*it changes the buffer '{name}'.*; leave it out"):
        fit(module, loader(), vectorize_clients=2)
    assert torch.equal(module.count, torch.ones(()))
    assert module.alias is module.count


def test_a_step_that_reads_a_buffer_is_trained_at_once_as_in_turn():
    loop, _ = fit(Counting(lambda module, inputs: None), loader())
    once, _ = fit(Counting(lambda module, inputs: None), loader(), vectorize_clients=2)
    torch.testing.assert_close(once, loop, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"norm": True}, "batch normalisation"),
        ({"norm": False, "schedule": "step"}, "its schedule is stepped within a client"),
        ({"norm": False, "optimizer": lambda params: torch.optim.Rprop(params)}, "its optimizer is none of SGD"),
    ],
)
def test_what_cannot_be_vectorized_is_refused_with_the_reason(options, reason):
    with pytest.raises(ValueError, match=f"vectorize_clients cannot train Module: {reason}"):
        fit(Module(**options), loader(), vectorize_clients=2)


def test_a_step_that_decides_on_values_is_refused():
    class Deciding(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss if loss > 0 else -loss

    with pytest.raises(ValueError, match="does not run under torch.func.vmap"):
        fit(Deciding(norm=False), loader(), vectorize_clients=2)
