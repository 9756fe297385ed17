import copy
import csv
import dataclasses
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_iclr.fedopt.loader import FederatedLoader
from lightning_iclr.fedopt.optim import FedAvg, FedAvgM, FedYogi
from lightning_iclr.fedopt.strategy import FedOptStrategy
from lightning_iclr.vit import VisionTransformer, ViTClassifier
from tests.fedopt.federation import SIZES, Module, Validated, loader, partition, plain_loop, rows, trainer

pytestmark = pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers")


def yogi(params):
    return FedYogi(params, lr=0.05)


def assert_equal(left, right, atol=1e-6):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("server_optimizer", [FedAvg, FedAvgM, yogi], ids=["FedAvg", "FedAvgM", "FedYogi"])
@pytest.mark.parametrize("schedule", ["epoch", "step", None])
def test_the_strategy_equals_a_plain_loop(server_optimizer, schedule):
    module, data = Module(schedule), loader(shuffle=False, local_epochs=2)
    expected = plain_loop(module, data, server_optimizer, rounds=4)
    trainer(FedOptStrategy(server_optimizer)).fit(module, data)
    assert_equal(module.state_dict(), expected)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    ("module_options", "loader_options", "trainer_options"),
    [
        ({}, {"local_epochs": 2}, {"accumulate_grad_batches": 3}),
        ({"schedule": "step"}, {"max_local_steps": 2}, {"gradient_clip_val": 0.3}),
        ({}, {"clients_per_round": 1}, {}),
    ],
    ids=["accumulation", "clipping-and-a-cap", "cohort-of-one"],
)
@pytest.mark.filterwarnings("ignore:a cohort of 1 on 2 processes")
def test_any_number_of_processes_equals_a_plain_loop(devices, module_options, loader_options, trainer_options):
    module, data = Module(**module_options), loader(shuffle=False, **loader_options)
    accumulate = trainer_options.get("accumulate_grad_batches", 1)
    clip = trainer_options.get("gradient_clip_val")
    expected = plain_loop(module, data, yogi, rounds=3, accumulate=accumulate, clip=clip)
    trainer(FedOptStrategy(yogi, start_method="fork"), rounds=3, devices=devices, **trainer_options).fit(module, data)
    assert_equal(module.state_dict(), expected)


@pytest.mark.parametrize(
    ("options", "twin"),
    [
        ({"weighting": "uniform"}, {"weighting": "uniform"}),
        ({"buffers": "keep"}, {"buffers": "keep"}),
        ({"proximal": 0.7}, {"mu": 0.7}),
    ],
    ids=["uniform", "buffers kept", "FedProx"],
)
def test_options_equal_the_plain_loops(options, twin):
    module, data = Module(), loader(shuffle=False, local_epochs=2)
    expected = plain_loop(module, data, yogi, rounds=3, **twin)
    trainer(FedOptStrategy(yogi, **options), rounds=3).fit(module, data)
    assert_equal(module.state_dict(), expected)


@pytest.mark.parametrize("optimizer", [torch.optim.Adagrad, torch.optim.Adam, torch.optim.RMSprop])
def test_a_client_optimizer_with_a_state_starts_afresh_for_each_client(optimizer):
    module = Module(optimizer=lambda params: optimizer(params, lr=0.01))
    data = loader(shuffle=False)
    expected = plain_loop(module, data, FedAvg, rounds=3)
    trainer(FedOptStrategy(), rounds=3).fit(module, data)
    assert_equal(module.state_dict(), expected)


def test_a_function_may_weigh_clients():
    module, other = Module(), Module()
    trainer(FedOptStrategy(weighting=lambda task: 2.5 * task.num_examples), rounds=2).fit(module, loader())
    trainer(FedOptStrategy(weighting="examples"), rounds=2).fit(other, loader())
    assert_equal(module.state_dict(), other.state_dict())
    with pytest.raises(ValueError, match="weighting must give a number of 0 or more, got -1.0 for client"):
        trainer(FedOptStrategy(weighting=lambda task: -1.0), rounds=1).fit(Module(), loader())


def test_any_torch_optimizer_serves_with_a_schedule_of_its_own():
    def nadam(params):
        return torch.optim.NAdam(params, lr=0.05)

    def schedule(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    class Scheduled(torch.optim.NAdam):
        def __init__(self, params):
            super().__init__(params, lr=0.05)

        def step(self, closure=None):
            super().step(closure)
            self.param_groups[0]["lr"] *= 0.5

    module, data = Module(), loader(shuffle=False)
    expected = plain_loop(module, data, Scheduled, rounds=3)
    strategy = FedOptStrategy(nadam, schedule)
    trainer(strategy, rounds=3).fit(module, data)
    assert_equal(module.state_dict(), expected)
    assert float(strategy.round_metrics["server_lr"]) == 0.05 * 0.25


class Manual(Module):
    """Two optimizers, stepped by hand."""

    def __init__(self):
        super().__init__(schedule=None)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss

    def configure_optimizers(self):
        first, *rest = self.net.children()
        rest = [p for part in rest for p in part.parameters()]
        return [
            torch.optim.SGD(first.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
            torch.optim.SGD(rest, lr=0.1, momentum=0.9, weight_decay=0.01),
        ]


@pytest.mark.parametrize(("devices", "mu"), [(1, 0.0), (2, 0.0), (1, 0.7)])
def test_manual_optimization_with_several_optimizers_equals_one(devices, mu):
    module, data = Manual(), loader(shuffle=False)
    expected = plain_loop(Module(schedule=None), data, yogi, rounds=3, mu=mu)
    strategy = FedOptStrategy(yogi, proximal=mu, start_method="fork")
    trainer(strategy, rounds=3, devices=devices).fit(module, data)
    assert_equal(module.state_dict(), expected)


class ManualSchedule(Module):
    """Steps a schedule by hand, within clients or after rounds; Lightning then does not look at its interval."""

    def __init__(self, steps, interval):
        super().__init__(schedule=interval)
        self.automatic_optimization = False
        self.steps = steps

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        optimizer.step()
        if self.steps == "step":
            self.lr_schedulers().step()

    def on_train_epoch_end(self):
        if self.steps == "epoch":
            self.lr_schedulers().step()


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("steps", ["step", "epoch"])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_schedule_that_is_stepped_by_hand_is_each_clients_own_or_the_rounds(devices, steps, interval):
    module, data = ManualSchedule(steps, interval), loader(shuffle=False)
    expected = plain_loop(Module(schedule=steps), data, yogi, rounds=4)
    trainer(FedOptStrategy(yogi, start_method="fork"), rounds=4, devices=devices).fit(module, data)
    assert_equal(module.state_dict(), expected)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("devices", [1, 2])
def test_a_vision_transformer_trains_federated_as_it_is(devices):
    def module():
        torch.manual_seed(0)
        net = VisionTransformer(image_size=4, patch_size=2, in_channels=1, num_classes=3, dim=8, depth=1, num_heads=2)
        return ViTClassifier(net, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))

    images = torch.randn(sum(SIZES), 1, 4, 4)
    labels = torch.randint(3, (sum(SIZES),))
    data = FederatedLoader(TensorDataset(images, labels), partition(), clients_per_round=3, batch_size=4, shuffle=False)
    server = copy.deepcopy(module())
    optimizer = torch.optim.SGD(server.parameters(), lr=1.0)
    for number in range(2):
        cohort = data.plan(number).cohort
        examples = sum(SIZES[client] for client in cohort)
        for parameter in server.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for client in cohort:
            local, rows = copy.deepcopy(server), partition()[client]
            steps = torch.optim.SGD(local.parameters(), lr=0.1)
            for start in range(0, len(rows), 4):
                batch = rows[start : start + 4]
                steps.zero_grad()
                F.cross_entropy(local.net(images[batch]), labels[batch]).backward()
                steps.step()
            for parameter, new in zip(server.parameters(), local.parameters(), strict=True):
                parameter.grad -= len(rows) / examples * (new.detach() - parameter.detach())
        optimizer.step()
    trained = module()
    trainer(FedOptStrategy(start_method="fork"), rounds=2, devices=devices).fit(trained, data)
    assert_equal(trained.state_dict(), server.state_dict())


def test_clients_run_under_bf16_and_the_server_keeps_float32():
    module, other = Module(norm=False, dropout=0.0), Module(norm=False, dropout=0.0)
    trainer(FedOptStrategy(yogi), rounds=3, precision="bf16-mixed").fit(module, loader())
    trainer(FedOptStrategy(yogi), rounds=3).fit(other, loader())
    assert all(value.dtype == torch.float32 for value in module.state_dict().values())
    assert not torch.equal(module.net[0].weight, other.net[0].weight)
    assert_equal(module.state_dict(), other.state_dict(), atol=0.02)


def test_true_bf16_clients_change_float32_weights_by_what_they_learned():
    module = Module(norm=False, dropout=0.0)
    strategy = FedOptStrategy()
    trainer(strategy, rounds=3, precision="bf16-true").fit(module, loader())
    assert module.net[0].weight.dtype == torch.bfloat16
    master = strategy.server.parameters[0]
    assert master.dtype == torch.float32
    assert torch.equal(master.to(torch.bfloat16), module.net[0].weight)
    assert not torch.equal(master, module.net[0].weight.float())


@pytest.mark.parametrize("vectorize", [None, 3])
def test_a_poisoned_client_counts_neither_in_the_mean_nor_in_the_weight(vectorize):
    inputs, labels = rows().tensors
    poisoned = inputs.clone()
    bad = partition()[1]
    poisoned[bad] = torch.nan
    cohort = loader(clients_per_round=6).plan(0).cohort
    assert 1 in cohort
    data = FederatedLoader(TensorDataset(poisoned, labels), partition(), clients_per_round=6, batch_size=3, seed=5)
    strategy = FedOptStrategy(weighting=lambda task: float(task.num_examples), vectorize_clients=vectorize)
    module = Module(norm=False, schedule=None, dropout=0.0)
    trainer(strategy, rounds=1).fit(module, data)
    healthy = FedOptStrategy(weighting=lambda task: float(task.num_examples) * (task.client != 1))
    twin = Module(norm=False, schedule=None, dropout=0.0)
    trainer(healthy, rounds=1).fit(twin, loader(clients_per_round=6))
    assert_equal(module.state_dict(), twin.state_dict())
    metrics = {name: float(value) for name, value in strategy.round_metrics.items()}
    assert (metrics["clients"], metrics["nonfinite_clients"]) == (5, 1)
    assert metrics["examples"] == sum(SIZES) - SIZES[1]


def test_a_round_that_nobody_finishes_leaves_the_server_and_its_optimizer_alone():
    inputs, labels = rows().tensors
    data = FederatedLoader(TensorDataset(inputs * torch.nan, labels), partition(), clients_per_round=3, batch_size=3)
    module, strategy = Module(norm=False), FedOptStrategy(yogi)
    before = copy.deepcopy(module.state_dict())
    with pytest.warns(UserWarning, match="round 0 leaves the server as it was: no client's update counted"):
        trainer(strategy, rounds=1).fit(module, data)
    assert_equal(module.state_dict(), before, atol=0)
    assert not strategy.server.optimizer.state
    assert float(strategy.round_metrics["skipped_rounds"]) == 1


@pytest.mark.parametrize("clients", [1, 3])  # of one the sum is infinite, of several it may be undefined
def test_a_mean_that_overflows_leaves_the_server_and_its_optimizer_alone(clients):
    def weighting(task):
        return 1e30 if strategy.server_round == 1 else 1.0

    module, data = Module(norm=False, schedule=None, lr=1e10), {"max_local_steps": 1, "clients_per_round": clients}
    expected = plain_loop(module, loader(shuffle=False, **data), yogi, rounds=1, weighting="uniform")
    strategy = FedOptStrategy(yogi, weighting=weighting, aggregation_dtype="float32")
    with pytest.warns(UserWarning, match="round 1 leaves the server as it was: .* their mean is not finite"):
        trainer(strategy, rounds=2).fit(module, loader(shuffle=False, **data))
    assert strategy.round_norms.isfinite().all()
    metrics = {name: float(value) for name, value in strategy.round_metrics.items()}
    assert (metrics["clients"], metrics["nonfinite_clients"], metrics["skipped_rounds"]) == (clients, 0, 1)
    assert_equal(module.state_dict(), expected)
    assert all(value.isfinite().all() for own in strategy.server.optimizer.state.values() for value in own.values())


class Apart(Module):
    """Starts from other weights and buffers on each process."""

    def configure_model(self):
        with torch.no_grad():
            for tensor in (*self.parameters(), *(b for b in self.buffers() if b.is_floating_point())):
                tensor.add_(self.global_rank)


def test_all_processes_start_from_the_weights_of_the_first():
    module, data = Apart(), loader(shuffle=False)
    expected = plain_loop(Module(), data, yogi, rounds=2)
    trainer(FedOptStrategy(yogi, start_method="fork"), rounds=2, devices=2).fit(module, data)
    assert_equal(module.state_dict(), expected)


def test_the_order_of_clients_in_a_cohort_does_not_matter():
    module, other = Module(dropout=0.0), Module(dropout=0.0)
    data, permuted = loader(clients_per_round=6), loader(clients_per_round=6)
    plan = permuted.plan
    permuted.plan = lambda index, *place: dataclasses.replace(
        plan(index, *place), tasks=tuple(tuple(reversed(own)) for own in plan(index, *place).tasks)
    )
    trainer(FedOptStrategy(yogi), rounds=3).fit(module, data)
    trainer(FedOptStrategy(yogi), rounds=3).fit(other, permuted)
    assert_equal(module.state_dict(), other.state_dict())


def test_one_step_of_all_equal_clients_is_one_step_on_all_data():
    inputs, labels = rows().tensors
    shares = [list(range(start, start + 13)) for start in range(0, 39, 13)]
    data = FederatedLoader(TensorDataset(inputs, labels), shares, clients_per_round=3, batch_size=13)
    options = {"schedule": None, "norm": False, "dropout": 0.0, "momentum": 0.0}
    module, central = Module(**options), Module(**options)
    trainer(FedOptStrategy(), rounds=1).fit(module, data)
    step = central.client_optimizer()
    F.cross_entropy(central.net(inputs), labels).backward()
    step.step()
    assert_equal(module.state_dict(), central.state_dict())


def test_every_callback_and_the_validation_see_the_servers_model_at_the_end_of_a_round():
    seen = {}

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
                seen["batch end"] = pl_module.net[0].weight.detach().clone()

        def on_validation_start(self, trainer, pl_module):
            seen["validation"] = pl_module.net[0].weight.detach().clone()

        def on_train_epoch_end(self, trainer, pl_module):
            seen["epoch end"] = pl_module.net[0].weight.detach().clone()
            assert not trainer.optimizers[0].state

    module = Validated()
    strategy = FedOptStrategy(yogi)
    validation = DataLoader(rows(), batch_size=39)
    federated = trainer(strategy, rounds=2, callbacks=[Watch()])
    federated.fit(module, loader(), validation)
    assert len(seen) == 3
    assert all(torch.equal(weight, strategy.server.parameters[0]) for weight in seen.values())
    module.eval()
    inputs, labels = rows().tensors
    expected = F.cross_entropy(module.net(inputs), labels)
    torch.testing.assert_close(federated.callback_metrics["val/loss"], expected.detach())


def fit_and_read(devices, folder):
    strategy = FedOptStrategy(yogi, start_method="fork")
    logger = CSVLogger(folder, name="", version=str(devices))
    federated = trainer(strategy, rounds=3, devices=devices, logger=logger, log_every_n_steps=1)
    federated.fit(Module(), loader(shuffle=False))
    with (Path(folder) / str(devices) / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["fedopt/train_loss"]]


def test_a_rounds_numbers_are_logged_and_do_not_depend_on_the_number_of_processes(tmp_path):
    one, two = fit_and_read(1, tmp_path), fit_and_read(2, tmp_path)
    assert len(one) == len(two) == 3
    names = {name for name in one[0] if name.startswith("fedopt/")}
    wanted = [
        "train_loss",
        "clients",
        "examples",
        "delta_norm",
        "step_norm",
        "client_drift",
        "nonfinite_clients",
        "server_lr",
    ]
    assert {f"fedopt/{name}" for name in wanted} <= names
    for left, right in zip(one, two, strict=True):
        for name in names:
            assert float(left[name]) == pytest.approx(float(right[name]), rel=1e-5)


def test_the_numbers_of_a_round_are_what_they_say():
    updates, module = {}, Module(norm=False)
    data = loader(shuffle=False)

    def keep(client, changes):
        updates[client] = torch.cat([change.flatten() for change in changes])
        return changes

    expected = plain_loop(module, data, FedAvg, rounds=1, on_update=keep)
    strategy = FedOptStrategy()
    trainer(strategy, rounds=1).fit(module, data)
    weights = {client: SIZES[client] for client in updates}
    mean = sum(weights[client] * update for client, update in updates.items()) / sum(weights.values())
    cosines = [F.cosine_similarity(update, mean, dim=0) for update in updates.values()]
    metrics = strategy.round_metrics
    assert_equal(module.state_dict(), expected)
    torch.testing.assert_close(metrics["delta_norm"], mean.norm(), rtol=1e-5, atol=0)
    torch.testing.assert_close(metrics["step_norm"], mean.norm(), rtol=1e-5, atol=0)
    torch.testing.assert_close(metrics["client_drift"], torch.stack(cosines).mean(), rtol=1e-5, atol=0)
    norms = torch.stack([updates[client].norm() for client in data.plan(0).cohort])
    torch.testing.assert_close(strategy.round_norms, norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(metrics["client_delta_norm"], norms.mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "size"}, "weighting must be 'examples', 'uniform' or a function"),
        ({"buffers": "sum"}, "buffers must be 'mean' or 'keep', got 'sum'"),
        ({"proximal": -1.0}, "proximal must not be negative, got -1.0"),
        ({"clip_norm": 0.0}, "clip_norm must be positive, or None"),
        ({"noise_multiplier": 1.0}, "noise_multiplier needs clip_norm and weighting='uniform'"),
        ({"noise_multiplier": 1.0, "clip_norm": 1.0}, "noise_multiplier needs clip_norm and weighting='uniform'"),
        ({"delta": 1e-5}, r"delta must be in \(0, 1\) and needs a noise_multiplier"),
        ({"vectorize_clients": 0}, "vectorize_clients must be at least 1"),
        ({"aggregation_dtype": "float16"}, "aggregation_dtype must be 'float32' or 'float64', got 'float16'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FedOptStrategy(**options)


def test_a_personal_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="personal names no parameter or buffer with 'head'"):
        trainer(FedOptStrategy(personal=["head"]), 1).fit(Module(), loader())


def test_the_strategy_goes_by_its_name_and_needs_no_process_group_for_one_process():
    module = Module()
    federated = trainer("fedopt", 1)
    federated.fit(module, loader())
    assert isinstance(federated.strategy, FedOptStrategy)
    assert federated.strategy.launcher is None
    assert not torch.distributed.is_initialized()
