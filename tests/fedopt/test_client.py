import copy

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_iclr.fedopt.client import ClientOptimizers, ClientStore
from lightning_iclr.fedopt.compression import TopK
from lightning_iclr.fedopt.loader import FederatedLoader
from lightning_iclr.fedopt.optim import FedAvg
from lightning_iclr.fedopt.strategy import FedOptStrategy
from tests.distributed import run_distributed
from tests.fedopt.federation import SIZES, Module, Validated, loader, partition, plain_loop, rows, trainer

pytestmark = pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers")


@pytest.mark.parametrize("devices", [1, 2])
def test_personal_parameters_stay_with_their_clients(devices):
    module, data = Module(norm=False, dropout=0.0, schedule=None), loader(shuffle=False)
    server, heads = copy.deepcopy(module), {}
    for number in range(5):
        optimizer = FedAvg(server.net[0].parameters())
        cohort = data.plan(number).cohort
        body = list(server.net[0].parameters())
        for parameter in body:
            parameter.grad = torch.zeros_like(parameter)
        for client in cohort:
            local, own = copy.deepcopy(server), data.partition[client].tolist()
            if client in heads:
                local.net[3].load_state_dict(heads[client])
            steps = local.client_optimizer()
            for start in range(0, len(own), 3):
                inputs, labels = data.dataset[own[start : start + 3]]
                steps.zero_grad()
                F.cross_entropy(local.net(inputs), labels).backward()
                steps.step()
            heads[client] = copy.deepcopy(local.net[3].state_dict())
            share = SIZES[client] / sum(SIZES[other] for other in cohort)
            for parameter, new in zip(body, local.net[0].parameters(), strict=True):
                parameter.grad -= share * (new.detach() - parameter.detach())
        optimizer.step()
    strategy = FedOptStrategy(personal=[r"net\.3\..*"], start_method="fork")
    trained = copy.deepcopy(module)
    trainer(strategy, rounds=5, devices=devices).fit(trained, data)
    torch.testing.assert_close(dict(trained.state_dict()), dict(server.state_dict()), rtol=0, atol=1e-6)
    if devices == 1:
        kept = {client: {name.removeprefix("net.3."): value for name, value in own.items()}
                for client, own in strategy.store.state_dict().items()}  # fmt: skip
        assert kept.keys() == heads.keys()
        for client in kept:
            torch.testing.assert_close(kept[client], dict(heads[client]), rtol=0, atol=1e-6)


def test_a_poisoned_client_keeps_the_personal_parameters_of_its_last_sound_round():
    inputs, labels = rows().tensors
    bad, everyone = 2, len(SIZES)
    data = FederatedLoader(TensorDataset(inputs, labels), partition(), clients_per_round=everyone, batch_size=3)
    strategy = FedOptStrategy(personal=[r"net\.3\..*"])
    module = Module(norm=False, dropout=0.0, schedule=None)

    class Poison(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if strategy.server_round == 1:
                before.update({name: value.clone() for name, value in strategy.store.read(bad).items()})
                inputs[partition()[bad]] = torch.nan

    before = {}
    trainer(strategy, rounds=2, callbacks=[Poison()]).fit(module, data)
    assert strategy.round_metrics["nonfinite_clients"] == 1
    assert before
    assert all(value.isfinite().all() for value in before.values())
    torch.testing.assert_close(strategy.store.read(bad), before, rtol=0, atol=0)


def _store_on_two_ranks():
    rank = torch.distributed.get_rank()
    store = ClientStore()
    store.write(rank, {"a": torch.tensor([float(rank)])})
    store.exchange()
    store.write(rank + 1, {"b": torch.tensor([10.0 + rank])})
    store.exchange()
    store.write(0, {"a": torch.tensor([99.0])})
    store.forget_changes()
    store.exchange()
    return store.state_dict()


def test_what_clients_keep_is_the_same_on_all_processes():
    expected = {0: {"a": [0.0]}, 1: {"a": [1.0], "b": [10.0]}, 2: {"b": [11.0]}}
    for kept in run_distributed(_store_on_two_ranks):
        assert {client: {name: v.tolist() for name, v in own.items()} for client, own in kept.items()} == expected


def test_a_second_fit_of_one_strategy_forgets_what_clients_kept_in_the_first():
    def fit(federated, rounds=3):
        module = Module(norm=False)
        federated.fit_loop.max_epochs = rounds
        federated.fit(module, loader())
        return module.state_dict(), federated.strategy.store.state_dict()

    one, other = (
        trainer(FedOptStrategy(personal=[r"net\.3\..*"], compression=TopK(0.3)), accelerator="cpu") for _ in range(2)
    )
    first, second, expected = fit(one), fit(one, rounds=6), fit(other)
    assert first[1].keys() == second[1].keys() == expected[1].keys() != set()
    for state, twin in zip(second, expected, strict=True):
        torch.testing.assert_close(dict(state), dict(twin), rtol=0, atol=0)


def test_a_fit_that_follows_one_that_died_in_mid_round_is_as_the_first(tmp_path):
    class Die(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 2):
                raise RuntimeError("out of memory")

    class Save(Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "start.ckpt")

    validation, module = DataLoader(rows(), batch_size=39), Validated()
    federated = trainer(FedOptStrategy(), rounds=3, callbacks=[Die()])
    with pytest.raises(RuntimeError, match="out of memory"):
        federated.fit(Validated(), loader(shuffle=False), validation)
    federated.fit_loop.epoch_progress.reset()
    federated.callbacks[:] = [callback for callback in federated.callbacks if not isinstance(callback, Die)] + [Save()]
    federated.fit(module, loader(shuffle=False), validation)  # which begins with a check of the validation
    expected = plain_loop(Module(), loader(shuffle=False), FedAvg, rounds=3)
    torch.testing.assert_close(dict(module.state_dict()), dict(expected), rtol=0, atol=1e-6)
    assert torch.load(tmp_path / "start.ckpt", weights_only=True)["epoch"] == 0


def test_a_poisoned_client_keeps_what_it_could_not_send_in_its_last_sound_round():
    inputs, labels = rows().tensors
    bad, everyone = 2, len(SIZES)
    data = FederatedLoader(TensorDataset(inputs, labels), partition(), clients_per_round=everyone, batch_size=3)
    strategy, left = FedOptStrategy(compression=TopK(0.3)), {}

    class Poison(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if strategy.server_round == 1:
                left.update({client: copy.deepcopy(strategy.store.read(client)) for client in range(everyone)})
                inputs[partition()[bad]] = torch.nan

    trainer(strategy, rounds=2, callbacks=[Poison()]).fit(Module(norm=False, dropout=0.0, schedule=None), data)
    assert strategy.round_metrics["nonfinite_clients"] == 1
    for client in range(everyone):
        (before,), (after,) = (kept.values() for kept in (left[client], strategy.store.read(client)))
        assert before.isfinite().all()
        assert before.count_nonzero() == pytest.approx(0.7 * before.numel(), abs=1)
        assert torch.equal(before, after) is (client == bad)


@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.Adam, torch.optim.SGD])
def test_optimizers_go_back_to_their_beginning(kind):
    def fresh():
        weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        return weight, kind([weight], lr=0.1, weight_decay=0.1)

    def steps(weight, optimizer):
        for _ in range(3):
            weight.grad = weight.detach().clone()
            optimizer.step()
        return weight.detach().clone()

    weight, optimizer = fresh()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    clients = ClientOptimizers([optimizer], [schedule])
    clients.begin_round()
    clients.begin_client()
    expected = steps(weight, optimizer)
    schedule.step()
    optimizer.param_groups[0]["weight_decay"] = 7.0
    clients.begin_client()
    assert (schedule.last_epoch, optimizer.param_groups[0]["lr"], weight.grad) == (0, 0.1, None)
    with torch.no_grad():
        weight.copy_(torch.tensor([1.0, 2.0]))
    assert torch.equal(steps(weight, optimizer), expected)


def test_a_schedule_of_rounds_sets_what_the_next_clients_start_from():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.8)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    clients = ClientOptimizers([optimizer], [], round_schedules=True)
    clients.begin_round()
    clients.begin_client()
    schedule.step()
    clients.end_round()
    assert optimizer.param_groups[0]["lr"] == 0.4
    clients.begin_round()
    clients.begin_client()
    optimizer.param_groups[0]["lr"] = 9.0
    clients.begin_client()
    assert optimizer.param_groups[0]["lr"] == 0.4
    optimizer.param_groups[0]["lr"] = 9.0
    clients.restore()
    assert optimizer.param_groups[0]["lr"] == 0.4


def test_a_rate_that_is_set_between_rounds_stays_and_one_that_a_client_sets_does_not():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.8)
    clients = ClientOptimizers([optimizer], [])
    for rate in (0.5, 0.25):
        clients.begin_round()
        optimizer.param_groups[0]["lr"] = rate
        for _ in range(2):
            clients.begin_client()
            assert optimizer.param_groups[0]["lr"] == rate
            optimizer.param_groups[0]["lr"] = 9.0
        clients.end_round()
        assert optimizer.param_groups[0]["lr"] == rate
    clients.begin_round()
    optimizer.param_groups[0]["lr"] = 0.1
    clients.end_round()  # as where the clients train elsewhere
    assert optimizer.param_groups[0]["lr"] == 0.1
