import copy
import itertools

import numpy as np
import pytest
import torch
from datasets import Dataset
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall

from lightning_iclr.fedopt.data import FederatedDataModule
from lightning_iclr.fedopt.encoders import ImageEncoder
from lightning_iclr.fedopt.evaluation import ClientEvaluation
from lightning_iclr.fedopt.model import DigitsConvNet
from lightning_iclr.fedopt.module import Classifier
from lightning_iclr.fedopt.optim import FedYogi
from lightning_iclr.fedopt.strategy import FedOptStrategy
from lightning_iclr.fedopt.summaries import evenly_spaced, summarize_clients
from tests.fedopt.federation import Module, loader, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '(train|val|test)_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

HELD = [9, 4, 0, 1, 6, 2]  # held-out rows of each client; the third has none


def yogi(params):
    return FedYogi(params, lr=0.05)


def held_out():
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(sum(HELD), 4, generator=generator)
    return TensorDataset(inputs, torch.randint(3, (sum(HELD),), generator=generator))


def own_rows():
    starts = np.cumsum([0, *HELD])
    return [np.arange(start, end) for start, end in itertools.pairwise(starts)]


def evaluation(**options):
    return ClientEvaluation(**{"batch_size": 4, "dataset": held_out(), "partition": own_rows(), **options})


class Evaluated(Module):
    """Logs a number, a metric and a collection of metrics that share their state."""

    def __init__(self, **options):
        super().__init__(**options)
        self.accuracy = MulticlassAccuracy(3, average="micro")
        collection = {"precision": MulticlassPrecision(3), "recall": MulticlassRecall(3)}
        self.scores = MetricCollection(collection, prefix="val/")
        self.train_mean = MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.train_mean(loss)  # keeps the loss with its graph
        self.log("train/mean", self.train_mean, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        logits = self.net(batch[0])
        self.accuracy(logits, batch[1])
        self.scores.update(logits, batch[1])
        self.log_dict({"val/loss": F.cross_entropy(logits, batch[1]), "val/accuracy": self.accuracy}, sync_dist=True)
        self.log_dict(self.scores)

    def test_step(self, batch, batch_idx):
        self.log("test/loss", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)


def validation():
    return DataLoader(held_out(), batch_size=8)


def by_hand(module, clients=None):
    """What the clients' rows say of a module, all of a client's rows in one batch."""
    net, (inputs, labels) = copy.deepcopy(module.net).eval(), held_out().tensors
    table = {"val/loss": {}, "val/accuracy": {}}
    for client, rows in enumerate(own_rows()):
        if not len(rows) or (clients is not None and client not in clients):
            continue
        with torch.no_grad():
            logits = net(inputs[rows])
        table["val/loss"][client] = F.cross_entropy(logits, labels[rows]).item()
        table["val/accuracy"][client] = (logits.argmax(dim=1) == labels[rows]).float().mean().item()
    return table


def assert_tables_equal(left, right, abs=1e-6):
    for name, expected in right.items():
        assert left[name].keys() == expected.keys()
        assert list(left[name].values()) == pytest.approx(list(expected.values()), abs=abs)


def test_each_client_gets_the_numbers_of_its_own_rows():
    module, callback = Evaluated(), evaluation()
    run = trainer(FedOptStrategy(yogi), rounds=2, callbacks=[callback])
    run.fit(module, loader(), validation())
    expected = by_hand(module)
    assert_tables_equal(callback.table, expected)
    assert list(callback.table["val/loss"]) == [0, 1, 3, 4, 5]
    for name, worst, rank in (("val/loss", max, 90), ("val/accuracy", min, 10)):
        values = list(expected[name].values())
        summary = {
            "mean": sum(values) / 5,
            "std": (sum((value - sum(values) / 5) ** 2 for value in values) / 5) ** 0.5,
            "worst": worst(values),
            # the 90th or 10th percentile of five lies at 0.4 of the way from the second worst to the worst
            "p10": np.interp(rank / 25, range(5), sorted(values)),
        }
        for kind, value in summary.items():
            assert float(run.callback_metrics[f"client/{name}/{kind}"]) == pytest.approx(value, abs=1e-6)


def test_metrics_of_a_collection_are_those_of_each_client():
    module, callback = Evaluated(), evaluation()
    trainer(FedOptStrategy(yogi), rounds=1, callbacks=[callback]).fit(module, loader(), validation())
    inputs, labels = held_out().tensors
    net = copy.deepcopy(module.net).eval()
    for client, rows in enumerate(own_rows()):
        if len(rows):
            guesses = net(inputs[rows]).argmax(dim=1)
            for name, metric in (("precision", MulticlassPrecision(3)), ("recall", MulticlassRecall(3))):
                assert callback.table[f"val/{name}"][client] == pytest.approx(float(metric(guesses, labels[rows])))


class Watch(Callback):
    """Note what the other callback left behind; comes after it."""

    def on_validation_epoch_end(self, trainer, pl_module):
        assert not any(part.training for part in pl_module.modules())
        assert "log" not in vars(pl_module)
        self.metrics = [part for part in pl_module.modules() if isinstance(part, Metric)]
        self.correct = float(pl_module.accuracy.tp)


def test_the_running_validation_and_the_training_are_as_without_it():
    seen = []
    for callbacks in ([Watch()], [evaluation(num_clients=2), Watch()]):
        module = Evaluated()
        metrics = [part for part in module.modules() if isinstance(part, Metric)]
        run = trainer(FedOptStrategy(yogi), rounds=3, callbacks=callbacks)
        run.fit(module, loader(), validation())
        assert all(now is then for now, then in zip(callbacks[-1].metrics, metrics, strict=True))
        assert all(part.training for part in module.net.modules())
        numbers = {n: float(v) for n, v in run.callback_metrics.items() if not n.startswith("client/")}
        numbers["correct"] = callbacks[-1].correct
        seen.append((numbers, {name: value.clone() for name, value in module.state_dict().items()}, torch.rand(3)))
    assert seen[0][0] == seen[1][0]
    assert {"val/loss", "val/accuracy", "val/recall", "train/mean"} <= set(seen[0][0])
    torch.testing.assert_close(seen[0][1:], seen[1][1:], rtol=0, atol=0)


def test_parts_that_validation_leaves_in_training_mode_are_evaluated_and_go_back():
    class Stubborn(Evaluated):
        def on_validation_model_eval(self):
            self.net.eval()
            self.net[3].train()  # dropout

    class After(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            assert [part.training for part in pl_module.net] == [False, False, False, True, False]

    module, callback = Stubborn(), evaluation()
    trainer(FedOptStrategy(yogi), rounds=1, callbacks=[callback, After()]).fit(module, loader(), validation())
    assert_tables_equal(callback.table, by_hand(module))


class Noisy(Evaluated):
    """Draws random numbers in its validation step, and counts the steps that clients take."""

    steps = 0

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.steps += "log" in vars(self)
        self.log("val/noise", torch.rand(()), sync_dist=True)


class Keep(Callback):
    """Write each process's table to a file."""

    def __init__(self, evaluation, folder):
        self.evaluation, self.folder = evaluation, folder

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            seen = self.evaluation.table, getattr(pl_module, "steps", 0)
            torch.save(seen, self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


@pytest.mark.parametrize("clients", [None, 1], ids=["all", "fewer than processes"])
@pytest.mark.parametrize("personal", [[], ["net.4.*"]], ids=["shared", "personal"])
def test_two_processes_find_exactly_what_one_finds(tmp_path, clients, personal):
    logged = []
    for devices in (1, 2):
        callback = evaluation(num_clients=clients)
        # one round: the server's weights of two rounds may differ in their last digit
        strategy = FedOptStrategy(yogi, personal=personal, start_method="fork")
        run = trainer(strategy, rounds=1, devices=devices, callbacks=[callback, Keep(callback, tmp_path)])
        run.fit(Noisy(), loader(shuffle=False, clients_per_round=2), validation())
        logged.append({n: float(v) for n, v in run.callback_metrics.items() if n.startswith("client/")})
    one, *two = [torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1")]
    assert one[0] == two[0][0] == two[1][0]
    assert logged[0] == logged[1]
    assert len(one[0]["val/noise"]) == (clients or 5)
    # Eight batches of four rows, or one client's three; no process may take a step less, should steps be collective.
    assert (one[1], two[0][1], two[1][1]) == ((3, 3, 3) if clients else (8, 4, 4))
    assert len(logged[0]) == 4 * 5


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders")
@pytest.mark.parametrize("devices", [1, 2])
def test_it_runs_under_a_strategy_that_knows_no_clients(tmp_path, devices):
    module, callback = Evaluated(), evaluation()
    strategy = DDPStrategy(start_method="fork") if devices == 2 else "auto"
    run = trainer(strategy, devices=devices, callbacks=[callback, Keep(callback, tmp_path)])
    run.validate(module, validation(), verbose=False)
    assert_tables_equal(torch.load(tmp_path / f"{devices}-0.pt")[0], by_hand(module))
    assert (tmp_path / "figures" / "client_evaluation.png").stat().st_size > 2000


def test_clients_are_evaluated_with_their_personal_parameters_and_the_servers_come_back():
    class After(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}

    module, callback, after = Evaluated(norm=False), evaluation(), After()
    strategy = FedOptStrategy(yogi, personal=["net.3.*"])
    trainer(strategy, rounds=3, callbacks=[callback, after]).fit(module, loader(), validation())
    server = strategy.server.weights(module)
    for name, value in server.items():
        assert torch.equal(after.weights[name], value)
        assert torch.equal(module.state_dict()[name], value)
    kept = strategy.store.state_dict()
    assert 1 < len(kept) < 6
    for client in callback.table["val/loss"]:
        own = copy.deepcopy(module)
        own.load_state_dict({**server, **kept.get(client, {})})
        expected = {name: values[client] for name, values in by_hand(own, [client]).items()}
        assert {name: callback.table[name][client] for name in expected} == pytest.approx(expected, abs=1e-6)
    shared = by_hand(module)["val/loss"]
    moved = [client for client in shared if abs(shared[client] - callback.table["val/loss"][client]) > 1e-4]
    assert sorted(moved) == sorted(set(kept) & set(shared))


def test_the_test_split_runs_the_test_step_with_what_a_checkpoint_kept(tmp_path):
    module = Evaluated(norm=False)
    strategy = FedOptStrategy(yogi, personal=["net.3.*"])
    save = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    unused = evaluation(split="test")
    trainer(strategy, rounds=2, callbacks=[save, unused, evaluation()], enable_checkpointing=True).fit(
        module, loader(), validation()
    )
    assert not unused.table
    kept, server = strategy.store.state_dict(), strategy.server.weights(module)
    for fresh in (FedOptStrategy(yogi, personal=["net.3.*"]), "auto"):
        callback = evaluation(split="test")
        other = Evaluated(norm=False)
        run = trainer(fresh, callbacks=[callback])
        results = run.test(other, validation(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
        for client, loss in callback.table["test/loss"].items():
            own = copy.deepcopy(module)
            own.load_state_dict({**server, **kept.get(client, {})})
            assert loss == pytest.approx(by_hand(own, [client])["val/loss"][client], abs=1e-6)
        assert (tmp_path / "figures" / "client_evaluation_test.png").exists()
        assert results[0]["client/test/loss/worst"] == pytest.approx(max(callback.table["test/loss"].values()))
        assert all(torch.equal(value, server[name]) for name, value in other.state_dict().items())


def test_a_checkpoint_keeps_the_table_as_plain_numbers(tmp_path):
    callback = evaluation(every_n_rounds=2)
    save = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    options = {"callbacks": [callback, save], "enable_checkpointing": True}
    trainer(FedOptStrategy(yogi), rounds=3, **options).fit(Evaluated(), loader(), validation())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    again = evaluation()
    again.load_state_dict(saved["callbacks"][callback.state_key])
    assert again.table == callback.table
    assert again.table["val/loss"]


def test_it_runs_every_n_rounds_on_evenly_spaced_clients():
    rounds = []

    class Count(ClientEvaluation):
        def _evaluate(self, trainer, module):
            super()._evaluate(trainer, module)
            rounds.append((trainer.current_epoch, list(self.table["val/loss"])))

    callback = Count(every_n_rounds=2, num_clients=3, dataset=held_out(), partition=own_rows())
    trainer(FedOptStrategy(yogi), rounds=5, callbacks=[callback]).fit(Evaluated(), loader(), validation())
    assert rounds == [(1, [0, 3, 5]), (3, [0, 3, 5])]
    assert evenly_spaced(3, None) == evenly_spaced(3, 5) == [0, 1, 2]
    assert evenly_spaced(100, 1) == [0]


class Reductions(Module):
    """Logs a row's first number reduced in every way."""

    def validation_step(self, batch):
        first = batch[0][:, 0]
        self.log("sum", first.sum(), reduce_fx="sum")
        self.log("least", first.min(), reduce_fx=torch.min)
        self.log("most", first.max(), False, None, False, True, "max")
        self.log("weighted", first.mean(), batch_size=1)
        self.log("plain", float(first.mean()))


def test_numbers_are_reduced_as_lightning_reduces_them():
    callback = evaluation()
    run = trainer("auto", callbacks=[callback])
    run.validate(Reductions(), validation(), verbose=False)
    whole = ClientEvaluation(dataset=held_out(), partition=[range(sum(HELD))], batch_size=8)
    other = trainer("auto", callbacks=[whole])
    other.validate(Reductions(), validation(), verbose=False)
    inputs = held_out().tensors[0][:9, 0]
    table = {name: values[0] for name, values in callback.table.items()}
    assert table["sum"] == pytest.approx(float(inputs.sum()))
    assert (table["least"], table["most"]) == pytest.approx((float(inputs.min()), float(inputs.max())))
    assert table["weighted"] == pytest.approx(np.mean([float(part.mean()) for part in inputs.split(4)]))
    assert table["plain"] == pytest.approx(float(inputs.mean()))
    for name, values in whole.table.items():  # one client that has all rows
        assert values[0] == pytest.approx(float(other.callback_metrics[name]), rel=1e-5)


def test_a_reduction_that_lightning_refuses_is_refused():
    class Odd(Module):
        def validation_step(self, batch, batch_idx):
            if "log" in vars(self):
                self.log("val/odd", 1.0, reduce_fx="median")

    with pytest.raises(ValueError, match="val/odd must be logged with reduce_fx mean, sum, min, max, got median"):
        trainer("auto", callbacks=[evaluation()]).validate(Odd(), validation(), verbose=False)


def test_a_data_module_serves_each_clients_rows():
    generator = np.random.default_rng(0)
    labels = generator.integers(3, size=40).tolist()
    table = Dataset.from_dict({"image": generator.integers(256, size=(40, 8, 8), dtype=np.uint8), "label": labels})
    data = FederatedDataModule(
        table,
        encode=ImageEncoder(),
        partition=lambda rows: [np.arange(start, 40, 4) for start in range(4)],
        clients_per_round=2,
        client_split=(0.3, 0.2),
    )
    module, callback = Classifier(DigitsConvNet()), ClientEvaluation(batch_size=2)
    trainer(FedOptStrategy(yogi), rounds=1, callbacks=[callback]).fit(module, datamodule=data)
    dataset, clients = data.client_datasets("val")
    assert [len(rows) for rows in clients] == [3] * 4
    module.eval()
    for client, rows in enumerate(clients):
        images, targets = dataset.__getitems__(rows.tolist())
        expected = F.cross_entropy(module(images), targets).item()
        assert callback.table["val/loss"][client] == pytest.approx(expected, rel=1e-5)


def test_clients_without_a_number_are_left_out_of_its_summary():
    assert summarize_clients([1.0, np.nan, 3.0]) == {"mean": 2.0, "std": 1.0, "p10": pytest.approx(1.2), "worst": 1.0}
    assert summarize_clients([1.0, 3.0], lower_is_better=True)["worst"] == 3.0
    assert summarize_clients([np.inf, 3.0], lower_is_better=True)["worst"] == np.inf
    assert all(np.isnan(value) for value in summarize_clients([np.nan]).values())


def test_what_is_lower_when_better_goes_by_name():
    callback = evaluation(lower_is_better=("noise",))
    (logged,) = trainer("auto", callbacks=[callback]).validate(Noisy(), validation(), verbose=False)
    for name, worst in (("val/noise", max), ("val/loss", min)):
        values = callback.table[name].values()
        assert len(set(values)) == 5
        assert logged[f"client/{name}/worst"] == pytest.approx(worst(values))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "train"}, "split must be 'val' or 'test', got 'train'"),
        ({"every_n_rounds": 0}, "every_n_rounds must be at least 1, got 0"),
        ({"num_clients": 0}, "num_clients must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"partition": None}, "must be given together, and partition is missing"),
        ({"dataset": None}, "must be given together, and dataset is missing"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        evaluation(**options)


def test_a_run_that_cannot_be_evaluated_is_refused_before_training():
    def fit(callback, *loaders):
        trainer(FedOptStrategy(yogi), 1, callbacks=[callback]).fit(Evaluated(), loader(), *loaders)

    with pytest.raises(ValueError, match="pass dataset and partition, or use a data module with client_datasets"):
        fit(ClientEvaluation(), validation())
    with pytest.raises(ValueError, match="this Trainer does not validate"):
        fit(evaluation())
    with pytest.raises(ValueError, match="needs a client with rows in 'val', got none"):
        fit(evaluation(partition=[[], []]), validation())
