import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset as Table
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_iclr.fedopt import callbacks as module_of_callbacks
from lightning_iclr.fedopt.callbacks import ClientUpdates, EffectiveStep, LabelMatrix, RoundCurves
from lightning_iclr.fedopt.compression import TopK
from lightning_iclr.fedopt.loader import FederatedLoader
from lightning_iclr.fedopt.optim import FedAdagrad, FedAdam, FedAvg, FedYogi
from lightning_iclr.fedopt.strategy import FedOptStrategy
from tests.fedopt.federation import SIZES, Module, Validated, loader, partition, plain_loop, rows, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def yogi(params):
    return FedYogi(params, lr=0.05)


def validation():
    return DataLoader(rows(), batch_size=16)


@pytest.fixture
def figures(monkeypatch):
    """What is shown, by name."""
    shown = {}
    monkeypatch.setattr(module_of_callbacks, "show", lambda figure, name, trainer: shown.update({name: figure}))
    return shown


# The label matrix


def by_counting(labels):
    return [[Counter(int(labels[row]) for row in own)[label] for label in range(3)] for own in partition()]


class Keyed(Dataset):
    takes_sample_keys = True

    def __len__(self):
        return sum(SIZES)

    def __getitem__(self, key):
        torch.rand(1)  # as augmentation may
        return rows()[key.index]


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        (rows(), {}),
        (Keyed(), {}),
        (Table.from_dict({"x": [0.0] * sum(SIZES), "y": rows().tensors[1].tolist()}), {"label_column": "y"}),
        (TensorDataset(rows().tensors[0]), {"targets": rows().tensors[1]}),
        (TensorDataset(rows().tensors[0]), {"targets": rows().tensors[1].tolist(), "num_classes": 3}),
    ],
    ids=["tensors", "keys", "table", "targets", "list"],
)
def test_the_label_matrix_counts_each_clients_classes(figures, dataset, options):
    callback = LabelMatrix(**options)
    run = trainer(FedOptStrategy(), 1, callbacks=[callback])
    run.strategy.loader = FederatedLoader(dataset, partition(), clients_per_round=2, batch_size=4)
    module = Module()
    torch.manual_seed(0)
    callback.on_train_start(run, module)
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(0))
    expected = by_counting(rows().tensors[1])
    assert callback.counts.tolist() == expected
    dots = figures["label_matrix"].axes[0].collections[0]
    sizes = {(int(x), int(y)): size for (x, y), size in zip(dots.get_offsets(), dots.get_sizes(), strict=True)}
    present = {(c, k): n for c, own in enumerate(expected) for k, n in enumerate(own) if n}
    assert sizes.keys() == present.keys()
    areas = [sizes[place] / present[place] for place in present]  # the area of an example
    assert areas == pytest.approx([areas[0]] * len(areas))


def test_the_label_matrix_shows_some_of_many_clients_and_comes_before_training(figures):
    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert "label_matrix" in figures

    callback = LabelMatrix(max_clients=3)
    trainer(FedOptStrategy(), 1, callbacks=[callback, Look()]).fit(Module(), loader())
    assert callback.clients == [0, 2, 5]
    expected = by_counting(rows().tensors[1])
    assert callback.counts.tolist() == [expected[client] for client in (0, 2, 5)]
    assert [label.get_text() for label in figures["label_matrix"].axes[0].get_xticklabels()] == ["0", "2", "5"]


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (TensorDataset(torch.zeros(39)), {}, "examples have no class as second element, got tuple; pass targets"),
        (TensorDataset(torch.zeros(39), torch.zeros(39, 2)), {}, "an example must have one class, got tensor"),
        (Table.from_dict({"x": [0] * 39, "y": [0] * 39}), {}, "label_column must be one of x, y, got None"),
        (Table.from_dict({"x": ["a"] * 39}), {"label_column": "x"}, "an example must have one class, got 'a'"),
    ],
)
def test_examples_without_a_class_are_refused(dataset, options, message):
    callback = LabelMatrix(**options)
    run = trainer(FedOptStrategy(), 1, callbacks=[callback])
    run.strategy.loader = FederatedLoader(dataset, partition(), clients_per_round=2, batch_size=4)
    with pytest.raises(ValueError, match=message):
        callback.on_train_start(run, Module())


# The clients' updates


def updates_by_hand(rounds, server_optimizer, **options):
    """Rows (round, norm, cosine) of a plain loop, one client after the other as they were drawn."""
    module, data = Module(**options), loader(shuffle=False)
    seen = []

    def keep(client, changes):
        seen.append((client, torch.cat([change.flatten() for change in changes])))
        return changes

    plain_loop(module, data, server_optimizer, rounds, on_update=keep)
    table = []
    for number in range(rounds):
        cohort = [seen.pop(0) for _ in data.plan(number).cohort]
        weight = sum(SIZES[client] for client, _ in cohort)
        mean = sum(SIZES[client] / weight * update for client, update in cohort)
        for _, update in cohort:
            table.append([number + 1, update.norm(), update.dot(mean) / update.norm() / mean.norm()])
    return torch.tensor(table, dtype=torch.float64)


class Keep(Callback):
    """Write a callback's table, each process its own."""

    def __init__(self, callback, folder):
        self.callback, self.folder = callback, folder

    def on_train_end(self, trainer, pl_module):
        torch.save(self.callback.table, self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


@pytest.mark.parametrize("devices", [1, 2])
def test_norms_and_cosines_are_those_of_a_plain_loop(tmp_path, devices):
    callback = ClientUpdates()
    strategy = FedOptStrategy(yogi, start_method="fork")
    run = trainer(strategy, 3, devices=devices, callbacks=[callback, Keep(callback, tmp_path)])
    run.fit(Module(), loader(shuffle=False))
    expected = updates_by_hand(3, yogi)
    for rank in range(devices):
        table = torch.load(tmp_path / f"{devices}-{rank}.pt")
        torch.testing.assert_close(table, expected, rtol=1e-4, atol=1e-6)


def test_the_mean_norm_and_cosine_are_the_strategys_own(figures):
    callback, strategy = ClientUpdates(), FedOptStrategy(yogi, vectorize_clients=2)
    trainer(strategy, 2, callbacks=[callback]).fit(Module(norm=False, schedule=None, dropout=0.0), loader())
    last = callback.table[callback.table[:, 0] == 2]
    assert len(last) == 3
    assert float(last[:, 1].mean()) == pytest.approx(float(strategy.round_metrics["client_delta_norm"]), rel=1e-5)
    assert float(last[:, 2].mean()) == pytest.approx(float(strategy.round_metrics["client_drift"]), rel=1e-4)


def test_updates_are_looked_at_as_they_are_sent():
    whole, top = ClientUpdates(), ClientUpdates()
    trainer(FedOptStrategy(yogi), 1, callbacks=[whole]).fit(Module(), loader())
    trainer(FedOptStrategy(yogi, compression=TopK(0.1)), 1, callbacks=[top]).fit(Module(), loader())
    assert (top.table[:, 1] < 0.95 * whole.table[:, 1]).all()
    clipped = ClientUpdates()
    trainer(FedOptStrategy(yogi, clip_norm=1e-3), 1, callbacks=[clipped]).fit(Module(), loader())
    torch.testing.assert_close(clipped.table[:, 1], whole.table[:, 1])


@pytest.mark.filterwarnings("ignore:round . leaves the server as it was")
def test_a_poisoned_client_has_no_norm(figures):
    inputs, labels = rows().tensors
    poisoned = inputs.clone()
    poisoned[partition()[1]] = torch.nan
    data = FederatedLoader(TensorDataset(poisoned, labels), partition(), clients_per_round=6, batch_size=3, seed=5)
    callback = ClientUpdates()
    trainer(FedOptStrategy(), 1, callbacks=[callback]).fit(Module(norm=False), data)
    assert len(callback.table) == 5
    assert torch.isfinite(callback.table).all()
    everyone = FederatedLoader(
        TensorDataset(inputs * torch.nan, labels), partition(), clients_per_round=2, batch_size=3
    )
    nobody = ClientUpdates()
    trainer(FedOptStrategy(), 1, callbacks=[nobody]).fit(Module(norm=False), everyone)
    assert nobody.table.shape == (0, 3)


def test_the_strategy_forgets_the_listener_when_training_ends():
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            raise KeyError("stop")

    for more in ([], [Stop()]):
        callback, strategy = ClientUpdates(), FedOptStrategy()
        run = trainer(strategy, 2, callbacks=[callback, *more])
        if more:
            with pytest.raises(KeyError):
                run.fit(Module(), loader())
        else:
            run.fit(Module(), loader())
            assert callback.table[:, 0].tolist() == [1, 1, 1, 2, 2, 2]
            run.fit_loop.max_epochs = 3
            run.fit(Module(), loader())  # of a new server
            assert callback.table[6:, 0].tolist() == [1, 1, 1]
        assert strategy.update_listeners == []


# The server's effective step


def means_by_hand(rounds, server_optimizer):
    """The mean update of each round, as a list of tensors like the parameters."""
    module, data, seen, means = Module(), loader(shuffle=False), [], []
    plain_loop(module, data, server_optimizer, rounds, on_update=lambda client, c: seen.append((client, c)) or c)
    for number in range(rounds):
        cohort = [seen.pop(0) for _ in data.plan(number).cohort]
        weight = sum(SIZES[client] for client, _ in cohort)
        means.append([sum(SIZES[c] / weight * parts[i] for c, parts in cohort) for i in range(len(cohort[0][1]))])
    return means


def adagrad(v, square, t):
    return v + square


def adam(v, square, t):
    return 0.99 * v + 0.01 * square


def yogi_v(v, square, t):
    return v - 0.01 * square * np.sign(v - square)


@pytest.mark.parametrize(
    ("server", "update", "correction"),
    [
        (lambda params: FedAdagrad(params, lr=0.1, tau=0.01), adagrad, False),
        (lambda params: FedAdam(params, lr=0.1, tau=0.01), adam, False),
        (lambda params: FedYogi(params, lr=0.1, tau=0.01), yogi_v, False),
        (lambda params: FedYogi(params, lr=0.1, tau=0.01, bias_correction=True), yogi_v, True),
    ],
    ids=["FedAdagrad", "FedAdam", "FedYogi", "corrected"],
)
def test_the_effective_step_is_eta_over_root_v_plus_tau(figures, server, update, correction):
    class Halved:
        """The server with its rate halved after each round, for the plain loop."""

        def __init__(self, params):
            self.optimizer = server(params)

        def step(self):
            self.optimizer.step()
            self.optimizer.param_groups[0]["lr"] /= 2

    rounds, callback = 3, EffectiveStep()

    def schedule(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    trainer(FedOptStrategy(server, schedule), rounds, callbacks=[callback]).fit(Module(), loader(shuffle=False))
    means = means_by_hand(rounds, Halved)
    names = [name for name, _ in Module().named_parameters()]
    v = [np.full(mean.shape, 0.01**2) for mean in means[0]]
    for t in range(rounds):
        v = [update(old, mean.numpy() ** 2, t) for old, mean in zip(v, means[t], strict=True)]
        rate = 0.1 * 0.5**t
        if correction:
            rate *= math.sqrt(1 - 0.99 ** (t + 1)) / (1 - 0.9 ** (t + 1))
        for layer in ("net.0", "net.1", "net.4"):
            own = [part.ravel() for name, part in zip(names, v, strict=True) if name.rpartition(".")[0] == layer]
            expected = np.quantile(rate / (np.sqrt(np.concatenate(own)) + 0.01), [0.1, 0.5, 0.9])
            assert callback.steps[layer][t] == pytest.approx([t + 1, *expected], rel=1e-4)
    assert list(callback.steps) == ["net.0", "net.1", "net.4"]
    middle = figures["effective_step"].axes[0].get_lines()[0]
    assert middle.get_xdata().tolist() == [1, 2, 3]
    assert middle.get_ydata().tolist() == [row[2] for row in callback.steps["net.0"]]


def test_a_large_layer_is_looked_at_evenly(figures, monkeypatch):
    monkeypatch.setattr(module_of_callbacks, "_MOST_ENTRIES", 20)
    callback, strategy = EffectiveStep(), FedOptStrategy(yogi)
    trainer(strategy, 1, callbacks=[callback]).fit(Module(), loader(shuffle=False))
    v = [strategy.server.optimizer.state[p]["exp_avg_sq"].flatten() for p in strategy.server.parameters]
    steps = 0.05 / (torch.cat(v[:2]).double().sqrt() + 1e-3)
    assert len(steps) == 40  # so every second is looked at
    expected = torch.quantile(steps[::2], torch.tensor([0.1, 0.5, 0.9]).double())
    assert callback.steps["net.0"][0] == pytest.approx([1, *expected.tolist()], rel=1e-5)


def test_a_server_without_v_is_refused():
    with pytest.raises(TypeError, match="the v of FedAdagrad, FedAdam or FedYogi, got FedAvg; leave it out"):
        trainer(FedOptStrategy(FedAvg), 1, callbacks=[EffectiveStep()]).fit(Module(), loader())


# Curves over rounds


class Scripted(Module):
    """Logs validation numbers that were written down before."""

    ACCURACY = (0.1, 0.6, 0.9, 0.6, 0.9, 0.9)

    def validation_step(self, batch, batch_idx):
        place = min(self.trainer.current_epoch, 5)
        self.log_dict({"val/accuracy": self.ACCURACY[place], "val/loss": 1 - self.ACCURACY[place]}, batch_size=1)


def test_curves_hold_a_rounds_own_numbers_and_the_round_that_reached_the_target(figures):
    class Look(Callback):
        def __init__(self):
            self.logged, self.reached = [], []

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch:
                self.logged.append(dict(trainer.callback_metrics))

        def on_train_end(self, trainer, pl_module):
            self.logged.append(dict(trainer.callback_metrics))

    curves, look = RoundCurves(target=0.75), Look()
    run = trainer(FedOptStrategy(yogi), 6, callbacks=[curves, look])
    run.fit(Scripted(), loader(), validation())
    assert curves.curves["val/accuracy"] == [(i + 1, pytest.approx(a)) for i, a in enumerate(Scripted.ACCURACY)]
    assert curves.curves["val/loss"] == [(i + 1, pytest.approx(1 - a)) for i, a in enumerate(Scripted.ACCURACY)]
    for name in ("train_loss", "delta_norm", "client_delta_norm", "step_norm", "client_drift"):
        logged = [float(metrics[f"fedopt/{name}"]) for metrics in look.logged]
        assert [number for number, _ in curves.curves[f"fedopt/{name}"]] == [1, 2, 3, 4, 5, 6]
        assert [value for _, value in curves.curves[f"fedopt/{name}"]] == pytest.approx(logged, rel=1e-6)
    # the means of three rounds are 0.53 after round 3, 0.7, 0.8, 0.8
    assert curves.rounds_to_target == 5
    assert ["rounds_to_target" in metrics for metrics in look.logged] == [False] * 4 + [True] * 2
    assert float(run.callback_metrics["rounds_to_target"]) == 5
    first, loss, norms, _ = figures["rounds"].axes
    assert first.get_lines()[0].get_ydata() == pytest.approx(Scripted.ACCURACY)
    assert first.get_lines()[1].get_ydata() == [0.75, 0.75]
    assert first.get_lines()[2].get_xdata() == [5, 5]
    assert [line.get_label() for line in loss.get_lines()] == ["clients in training", "validation"]
    assert len(norms.get_lines()) == 3


def test_a_metric_may_have_to_fall_and_validation_may_be_rare(figures):
    falling = RoundCurves("val/loss", target=0.4, mode="min")
    run = trainer(FedOptStrategy(yogi), 6, callbacks=[falling], check_val_every_n_epoch=2)
    run.fit(Scripted(), loader(), validation())
    assert falling.curves["val/loss"] == [(2, pytest.approx(0.4)), (4, pytest.approx(0.4)), (6, pytest.approx(0.1))]
    assert falling.rounds_to_target == 6
    falling.target = 0.2
    assert falling.rounds_to_target is None
    run.validate(Scripted(), validation(), verbose=False)
    assert len(falling.curves["val/loss"]) == 3


def test_a_run_without_validation_has_the_other_curves(figures):
    curves = RoundCurves(target=0.5)
    run = trainer(FedOptStrategy(yogi), 2, callbacks=[curves])
    run.fit(Module(), loader())
    assert curves.rounds_to_target is None
    assert [len(axis.get_lines()) for axis in figures["rounds"].axes] == [1, 3, 1]
    assert "rounds_to_target" not in run.callback_metrics


# All of them


def everything():
    return [LabelMatrix(), ClientUpdates(), EffectiveStep(), RoundCurves("val/loss", target=1.0, mode="min")]


class Noisy(TensorDataset):
    """Draws from the global generators, as augmentation may do."""

    def __getitem__(self, index):
        inputs, label = super().__getitem__(index)
        return inputs + 0.1 * torch.randn(inputs.shape), label


def test_callbacks_do_not_change_training():
    weights = []
    for callbacks in ([], everything()):
        module = Validated()
        torch.manual_seed(0)
        data = FederatedLoader(Noisy(*rows().tensors), partition(), clients_per_round=3, batch_size=3)
        trainer(FedOptStrategy(yogi), 3, callbacks=callbacks).fit(module, data, validation())
        weights.append((copy.deepcopy(module.state_dict()), torch.rand(3)))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_each_writes_its_picture_into_the_run_folder_and_on_two_processes(tmp_path):
    names = {"label_matrix", "client_updates", "effective_step", "rounds"}
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        strategy = FedOptStrategy(yogi, start_method="fork")
        run = trainer(strategy, 2, callbacks=everything(), devices=devices, default_root_dir=folder)
        run.fit(Validated(), loader(), validation())
        assert {path.stem for path in (folder / "figures").iterdir()} == names
        for path in (folder / "figures").iterdir():
            assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
            assert path.stat().st_size > 3000


STEPS = [sum(task.steps for task in loader().plan(index).tasks[0]) for index in range(4)]


class Die(Callback):
    def __init__(self, batches):
        self.left = batches

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.left -= 1
        if self.left < 0:
            raise KeyError("killed")


@pytest.mark.parametrize(
    ("every", "batches"),
    [
        ({"every_n_train_steps": 1}, sum(STEPS[:2]) + 2),  # in the middle of the third round
        ({"monitor": "val/loss", "save_top_k": -1}, sum(STEPS[:2])),  # written by the second round's validation
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, sum(STEPS[:2])),
    ],
    ids=["mid-round", "validation", "round"],
)
def test_a_resumed_run_has_the_curves_of_the_whole(tmp_path, every, batches):
    def fit(callbacks, *more, ckpt_path=None):
        run = trainer(FedOptStrategy(yogi), 4, callbacks=[*callbacks, *more], enable_checkpointing=bool(more))
        run.fit(Validated(), loader(), validation(), ckpt_path=ckpt_path, weights_only=True)

    whole, resumed = everything(), everything()
    fit(whole)
    with pytest.raises(KeyError, match="killed"):
        fit(everything(), ModelCheckpoint(dirpath=tmp_path, save_last=True, **every), Die(batches))
    fit(resumed, ckpt_path=tmp_path / "last.ckpt")
    torch.testing.assert_close(resumed[1].table, whole[1].table, rtol=0, atol=0)
    assert resumed[2].steps == whole[2].steps
    assert resumed[3].curves == whole[3].curves
    assert {round_index for round_index, _ in whole[3].curves["val/loss"]} == {1, 2, 3, 4}
    assert resumed[3].rounds_to_target == whole[3].rounds_to_target


@pytest.mark.parametrize("kind", [LabelMatrix, ClientUpdates, EffectiveStep, RoundCurves])
def test_a_strategy_without_rounds_is_refused(kind):
    with pytest.raises(TypeError, match=f"{kind.__name__} looks at rounds and needs Trainer.*got SingleDeviceStrategy"):
        trainer("auto", 1, callbacks=[kind()]).fit(Module(), DataLoader(rows(), batch_size=10))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (LabelMatrix, {"max_clients": 0}, "max_clients must be at least 1, got 0"),
        (LabelMatrix, {"num_classes": 0}, "num_classes must be at least 1, got 0"),
        (RoundCurves, {"mode": "up"}, "mode must be 'max' or 'min', got 'up'"),
    ],
)
def test_bad_arguments_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)
