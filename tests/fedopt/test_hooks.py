import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_iclr.fedopt.optim import FedYogi
from lightning_iclr.fedopt.strategy import FedOptStrategy
from tests.fedopt.federation import SIZES, Module, Validated, loader, plain_loop, rows, trainer
from tests.resume import BatchReporter, assert_resume_equals_uninterrupted

pytestmark = pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers")


def yogi(params):
    return FedYogi(params, lr=0.05)


def validation():
    return DataLoader(rows(), batch_size=39)


def assert_holds(module, expected):
    torch.testing.assert_close(dict(module.state_dict()), dict(expected), rtol=0, atol=1e-6)


class Decay(Callback):
    """Sets the rate of each round where Lightning's documentation says to."""

    def on_train_epoch_start(self, trainer, pl_module):
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * 0.7**trainer.current_epoch


class Decaying(Module):
    """Does so itself."""

    on_train_epoch_start = lambda self: Decay.on_train_epoch_start(None, self.trainer, self)  # noqa: E731


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("own", [True, False], ids=["module", "callback"])
@pytest.mark.parametrize("vectorize", [None, 2], ids=["in turn", "at once"])
def test_a_rate_that_is_set_when_a_round_starts_holds_for_all_of_its_clients(devices, own, vectorize):
    options = {"norm": vectorize is None, "dropout": 0.0}
    expected = plain_loop(Module("epoch", **options), loader(shuffle=False), yogi, rounds=4)
    module = (Decaying if own else Module)(schedule=None, **options)
    strategy = FedOptStrategy(yogi, vectorize_clients=vectorize, start_method="fork")
    callbacks = [] if own else [Decay()]
    trainer(strategy, rounds=4, devices=devices, callbacks=callbacks).fit(module, loader(shuffle=False))
    torch.testing.assert_close(dict(module.state_dict()), dict(expected), rtol=0, atol=1e-5 if vectorize else 1e-6)


class Stop(Callback):
    """Stops training in the middle of the second round, and keeps what the module holds afterwards."""

    def __init__(self, error=None):
        self.error, self.validated = error, None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 2):
            trainer.should_stop = True
            if self.error is not None:
                raise self.error

    def on_validation_epoch_start(self, trainer, pl_module):
        self.validated = {name: value.clone() for name, value in pl_module.state_dict().items()}


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_round_that_is_stopped_leaves_the_weights_of_its_start(devices, validated):
    data = loader(shuffle=False, local_epochs=2)
    expected = plain_loop(Module(), data, yogi, rounds=1)
    module, stop = (Validated if validated else Module)(), Stop()
    federated = trainer(FedOptStrategy(yogi, start_method="fork"), 4, devices=devices, callbacks=[stop])
    federated.fit(module, data, validation() if validated else None)
    assert_holds(module, expected)
    if devices == 1:
        assert (stop.validated is not None) is validated
        assert federated.strategy.server_round == 1
        assert not federated.optimizers[0].state
        if validated:
            torch.testing.assert_close(stop.validated, dict(expected), rtol=0, atol=1e-6)


def test_an_error_in_mid_round_leaves_the_weights_of_its_start():
    module = Module()
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(FedOptStrategy(yogi), 4, callbacks=[Stop(RuntimeError("out of memory"))]).fit(
            module, loader(shuffle=False)
        )
    assert_holds(module, plain_loop(Module(), loader(shuffle=False), yogi, rounds=1))


class Look(Callback):
    """Keeps the metrics that callbacks see in each hook."""

    def __init__(self):
        self.seen = {"batch": [], "validation": [], "epoch": []}

    def keep(self, hook, trainer):
        metrics = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("fedopt/")}
        self.seen[hook].append(metrics)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self.keep("batch", trainer)

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.keep("validation", trainer)

    def on_train_epoch_end(self, trainer, pl_module):
        self.keep("epoch", trainer)


def test_the_validation_of_a_round_sees_that_rounds_metrics():
    look, strategy = Look(), FedOptStrategy(yogi, weighting="uniform", clip_norm=1.0, noise_multiplier=1.0, delta=1e-5)
    trainer(strategy, 3, callbacks=[look]).fit(Validated(norm=False), loader(), validation())
    assert look.seen["batch"] == look.seen["validation"] == look.seen["epoch"]
    rounds = look.seen["validation"]
    assert len(rounds) == 3
    assert len({metrics["fedopt/train_loss"] for metrics in rounds}) == 3
    assert rounds[0]["fedopt/epsilon"] < rounds[1]["fedopt/epsilon"] < rounds[2]["fedopt/epsilon"]
    assert rounds[-1] == pytest.approx({f"fedopt/{k}": float(v) for k, v in strategy.round_metrics.items()}, rel=1e-6)


@pytest.mark.filterwarnings("ignore:round . leaves the server as it was")
def test_a_round_that_nobody_joins_does_not_stop_early():
    data = loader(client_dropout=0.5, seed=147)
    assert [bool(data.plan(index).cohort) for index in range(4)] == [True, False, True, True]
    look, strategy = Look(), FedOptStrategy(yogi)
    stop = EarlyStopping("fedopt/train_loss", patience=3)
    federated = trainer(strategy, 4, callbacks=[look, stop])
    federated.fit(Module(), data)
    assert strategy.server_round == 4
    first, second = look.seen["epoch"][:2]
    assert second["fedopt/clients"] == 0
    assert second["fedopt/train_loss"] == first["fedopt/train_loss"]
    assert second["fedopt/step_norm"] == 0


def test_the_training_loss_is_that_of_whole_batches_where_gradients_are_accumulated():
    module, data = Module(norm=False, dropout=0.0, schedule=None, lr=0.0), loader(shuffle=False)
    strategy = FedOptStrategy()
    trainer(strategy, 1, accumulate_grad_batches=3).fit(module, data)
    total = 0.0
    for client in data.plan(0).cohort:
        own = data.partition[client].tolist()
        batches = [data.dataset[own[start : start + 3]] for start in range(0, len(own), 3)]
        losses = [F.cross_entropy(module.net(inputs), labels).detach() for inputs, labels in batches]
        total += SIZES[client] * float(torch.stack(losses).mean())
    expected = total / sum(SIZES[client] for client in data.plan(0).cohort)
    assert float(strategy.round_metrics["train_loss"]) == pytest.approx(expected, rel=1e-6)


class Rounds(WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return epoch_idx is not None


@pytest.mark.parametrize(
    ("average", "weights"),
    [
        (Rounds, [1 / 4] * 4),
        # The first update copies, and each later one keeps a half.
        (
            lambda: EMAWeightAveraging(decay=0.5, update_every_n_steps=0, update_starting_at_epoch=0),
            [1 / 8, 1 / 8, 1 / 4, 1 / 2],
        ),
    ],
)
def test_averages_over_rounds_are_of_the_servers_weights(average, weights):
    data, module = loader(shuffle=False), Module(norm=False)
    servers = [plain_loop(Module(norm=False), data, yogi, rounds=number) for number in (1, 2, 3, 4)]
    trainer(FedOptStrategy(yogi), 4, callbacks=[average()]).fit(module, data)
    assert_holds(
        module, {name: sum(w * s[name] for w, s in zip(weights, servers, strict=True)) for name in module.state_dict()}
    )


class LateSteps(WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return step_idx is not None and step_idx >= 12


@pytest.mark.parametrize("average", [WeightAveraging, EMAWeightAveraging, LateSteps])
def test_an_average_over_clients_is_told_once(average):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(FedOptStrategy(yogi), 3, callbacks=[average()]).fit(Module(norm=False), loader())
    told = [str(warning.message) for warning in caught if "averages the weights of single" in str(warning.message)]
    assert len(told) == 1
    assert told[0].startswith(average.__name__)
    assert "EMAWeightAveraging(update_every_n_steps=0, update_starting_at_epoch=0)" in told[0]
    assert "returns epoch_idx is not None" in told[0]


class Plateau(Validated):
    """Lowers its rate after each round whose value is not above the best, by what each of two monitors says."""

    def __init__(self, monitor, frequency=1):
        super().__init__()
        self.monitor, self.frequency = monitor, frequency

    def configure_optimizers(self):
        optimizer = self.client_optimizer()
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.7, patience=0)
        return [optimizer], [{"scheduler": plateau, "monitor": self.monitor, "frequency": self.frequency}]


BATCHES = [sum(task.steps for task in loader().plan(index).tasks[0]) for index in range(5)]


@pytest.mark.parametrize(
    ("monitor", "frequency", "every"),
    [
        ("val/loss", 1, {}),
        ("fedopt/train_loss", 1, {}),
        ("train/loss_epoch", 1, {}),
        ("val/loss", 2, {}),
        ("val/loss", 1, {"save_on_train_epoch_end": False}),
        ("val/loss", 2, {"every_n_train_steps": 1, "every_n_epochs": 0}),
    ],
    ids=["validation", "round", "epoch", "every second round", "saved by the validation", "inside"],
)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_whose_rate_falls_on_plateaus_resumes_exactly(tmp_path, monitor, frequency, every):
    rates = []

    def train(folder, ckpt_path, on_batch):
        module = Plateau(monitor, frequency)
        callbacks = [ModelCheckpoint(folder, save_top_k=-1, **every), BatchReporter(on_batch)]
        federated = trainer(FedOptStrategy(yogi), 5, enable_checkpointing=True, callbacks=callbacks)
        federated.fit(module, loader(), validation(), ckpt_path=ckpt_path)
        rates.append(federated.optimizers[0].param_groups[0]["lr"])
        return {**module.state_dict(), "rate": torch.tensor(rates[-1])}

    inside = "every_n_train_steps" in every
    kill_at = sum(BATCHES[:3]) + (4 if inside else 1)
    assert assert_resume_equals_uninterrupted(train, tmp_path, kill_at, atol=0) == sum(BATCHES[:3])
    train(tmp_path / "here", None, lambda samples: None)
    assert rates[-1] < 0.1


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_plateau_is_not_stepped_twice_for_the_last_round_of_a_run(tmp_path):
    def fit(rounds, ckpt_path=None):
        federated, module = trainer(FedOptStrategy(yogi), rounds), Plateau("val/loss")
        federated.fit(module, loader(), validation(), ckpt_path=ckpt_path)
        return federated, module.state_dict()

    half, _ = fit(2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    for ckpt_path in (None, tmp_path / "half.ckpt"):
        federated, state = fit(4, ckpt_path)
        found = dict(state), federated.optimizers[0].param_groups[0]["lr"]
        if ckpt_path is None:
            expected = found
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
