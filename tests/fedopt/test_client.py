import copy

import pytest
import torch
from torch.nn import functional as F

from lightning_iclr.fedopt.client import ClientOptimizers, ClientStore
from lightning_iclr.fedopt.optim import FedAvg
from lightning_iclr.fedopt.strategy import FedOptStrategy
from tests.distributed import run_distributed
from tests.fedopt.federation import SIZES, Module, loader, trainer


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
    expected = steps(weight, optimizer)
    schedule.step()
    optimizer.param_groups[0]["weight_decay"] = 7.0
    clients.restore()
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
    schedule.step()
    clients.end_round()
    assert optimizer.param_groups[0]["lr"] == 0.4
    clients.begin_round()
    optimizer.param_groups[0]["lr"] = 9.0
    clients.restore()
    assert optimizer.param_groups[0]["lr"] == 0.4
