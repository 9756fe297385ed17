import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import chi2

from lightning_iclr.fedopt.loader import FederatedLoader, Stragglers
from lightning_iclr.fedopt.plan import Place
from tests.fedopt.federation import SIZES, loader, partition, rows

pytestmark = pytest.mark.filterwarnings("ignore:a cohort of . on . processes leaves")


def connected(data, rank=0, world_size=1, accumulate=1, vectorize=1, index=0):
    data.connect(Place(rank, world_size, accumulate, vectorize, lambda: index))
    return data


def test_a_cohort_is_drawn_uniformly_and_without_replacement():
    data = loader(clients_per_round=2)
    cohorts = [data.plan(index).cohort for index in range(3000)]
    assert all(len(set(cohort)) == 2 for cohort in cohorts)
    pairs = np.zeros((6, 6))
    for first, second in cohorts:
        pairs[first, second] += 1
    expected = 3000 / 30
    statistic = ((pairs[~np.eye(6, dtype=bool)] - expected) ** 2 / expected).sum()
    assert statistic < chi2.ppf(1 - 1e-4, df=29)


def test_a_share_of_the_clients_is_a_cohort_too():
    assert loader(clients_per_round=0.5).clients_per_round == 3
    assert loader(clients_per_round=0.01).clients_per_round == 1


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_client_trains_on_all_of_its_rows_once_a_pass(shuffle):
    data = FederatedLoader(
        torch.arange(sum(SIZES)), partition(), clients_per_round=4, batch_size=3, local_epochs=2, shuffle=shuffle
    )
    connected(data, index=7)
    batches = list(data)
    for slot in (slots := data.slots(7)):
        assert set(batches[slots.index(slot)].tolist()) <= set(data.partition[slot.task.client])
    by_client = {}
    for slot, batch in zip(slots, batches, strict=True):
        by_client.setdefault(slot.task.client, []).extend(batch.tolist())
    assert set(by_client) == set(data.plan(7).cohort)
    for client, seen in by_client.items():
        own = data.partition[client].tolist()
        first, second = seen[: len(own)], seen[len(own) :]
        assert sorted(first) == sorted(second) == own
        assert (first == own) is (not shuffle or len(own) == 1)
        assert (first == second) is not shuffle


def test_what_a_client_sees_depends_on_neither_processes_nor_accumulation():
    def seen(world_size, accumulate):
        found = {}
        for rank in range(world_size):
            data = connected(loader(local_epochs=2), rank, world_size, accumulate, index=3)
            for slot, batch in zip(data.slots(3), data, strict=True):
                assert slot.empty is (batch is None)
                if batch is not None and slot.task.counted:
                    found.setdefault(slot.task.client, []).append(batch[0])
        return {client: torch.cat(batches) for client, batches in found.items()}

    one = seen(1, 1)
    assert len(one) == 3
    for world_size, accumulate in ((1, 3), (2, 1), (3, 2), (4, 1)):
        other = seen(world_size, accumulate)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[client], other[client]) for client in one)


@pytest.mark.parametrize(
    ("world_size", "accumulate", "vectorize"), [(2, 1, 1), (3, 3, 1), (5, 2, 1), (2, 1, 2), (4, 1, 2)]
)
def test_all_processes_take_equally_many_steps_and_the_cohort_is_counted_once(world_size, accumulate, vectorize):
    data = loader(local_epochs=2)
    for index in range(5):
        plan = data.plan(index, world_size, accumulate, vectorize)
        counted = [task.client for own in plan.tasks for task in own if task.counted]
        assert sorted(counted) == sorted(plan.cohort)
        lengths = set()
        for rank in range(world_size):
            connected(data, rank, world_size, accumulate, vectorize, index)
            lengths.add(len(list(data)))
        assert len(lengths) == 1
        if vectorize == 1:
            assert len({sum(task.steps for task in own) for own in plan.tasks}) == 1
            assert lengths.pop() == accumulate * sum(task.steps for task in plan.tasks[0])


def test_the_load_is_balanced_the_longest_first():
    data = FederatedLoader(
        torch.arange(12), [[0, 1, 2, 3], [4, 5, 6], [7, 8], [9, 10], [11]], clients_per_round=5, batch_size=1
    )
    plan = data.plan(0, world_size=2)
    assert sorted(sum(task.steps for task in own if task.counted) for own in plan.tasks) == [6, 6]


def test_a_steps_batches_end_where_a_clients_own_trainer_would_step():
    data = connected(FederatedLoader(torch.arange(7), [range(7)], clients_per_round=1, batch_size=2), accumulate=3)
    # four batches: a step of three, and one of the last alone
    assert [(slot.empty, slot.first, slot.last, slot.opens_step) for slot in data.slots(0)] == [
        (False, True, False, True),
        (False, False, False, False),
        (False, False, False, False),
        (True, False, False, False),
        (True, False, False, False),
        (False, False, True, True),
    ]


def test_examples_count_as_far_as_they_are_used():
    def examples(**options):
        data = FederatedLoader(torch.arange(10), [range(10)], clients_per_round=1, batch_size=4, **options)
        return data.plan(0).tasks[0][0].num_examples, data.plan(0).tasks[0][0].steps

    assert examples() == (10, 3)
    assert examples(local_epochs=3) == (10, 9)
    assert examples(max_local_steps=2) == (8, 2)
    assert examples(local_epochs=3, max_local_steps=5) == (10, 5)
    assert examples(drop_last=True) == (8, 2)


def test_clients_drop_out_at_the_rate_asked_for():
    data = loader(client_dropout=0.3)
    plans = [data.plan(index) for index in range(1000)]
    dropped = sum(len(plan.dropped) for plan in plans)
    assert all(len(plan.cohort) + len(plan.dropped) == 3 for plan in plans)
    assert abs(dropped - 900) < 4 * (3000 * 0.3 * 0.7) ** 0.5
    assert all(any(own) for plan in plans for own in plan.tasks)


def test_a_round_without_clients_still_runs_one_that_does_not_count():
    data = loader(client_dropout=0.99)
    plan = next(plan for plan in map(data.plan, range(100)) if not plan.cohort)
    assert [(task.counted, task.steps) for task in plan.tasks[0]] == [(False, 1)]


def test_stragglers_are_cut_short_at_their_rate():
    data = loader(max_local_steps=Stragglers(probability=0.4, local_steps=1), local_epochs=4)
    steps = [task.steps for index in range(500) for task in data.plan(index).tasks[0]]
    late = sum(step == 1 for step in steps)
    assert abs(late - 600) < 4 * (1500 * 0.4 * 0.6) ** 0.5


def test_the_loaders_seed_says_who_is_late():
    def late(seed):
        data = loader(max_local_steps=Stragglers(0.4), seed=seed, clients_per_round=6, local_epochs=4)
        plans = [sorted(data.plan(index).tasks[0], key=lambda task: task.client) for index in range(500)]
        return np.array([[task.steps == 1 for task in tasks] for tasks in plans])

    one, other = late(1), late(2)
    assert (late(1) == one).all()
    # Two independent draws agree with probability 0.4 ** 2 + 0.6 ** 2: of two seeds, two rounds, two clients.
    for first, second in ((one, other), (one[1:], one[:-1]), (one[:, 1:], one[:, :-1])):
        assert abs((first == second).sum() - 0.52 * first.size) < 4 * (first.size * 0.52 * 0.48) ** 0.5


def test_a_function_of_round_and_client_may_cap_steps():
    data = loader(
        max_local_steps=lambda index, client: None if client == 1 else 1 + (index + client) % 2, local_epochs=9
    )
    for index in range(10):
        for task in data.plan(index).tasks[0]:
            own = 9 * -(-SIZES[task.client] // 3)
            assert task.steps == (own if task.client == 1 else 1 + (index + task.client) % 2)


def test_a_dataset_of_sample_keys_gets_a_number_for_each_pass():
    class Keyed(torch.utils.data.Dataset):
        takes_sample_keys = True

        def __len__(self):
            return 4

        def __getitem__(self, key):
            return key.index, key.epoch

    data = connected(FederatedLoader(Keyed(), [range(4)], clients_per_round=1, batch_size=4, local_epochs=2), index=5)
    assert [epochs.unique().tolist() for _, epochs in data] == [[10], [11]]


def test_workers_and_hugging_face_datasets_serve_the_same():
    table = Dataset.from_dict({"x": list(range(sum(SIZES)))}).with_format("torch")
    options = {"clients_per_round": 3, "batch_size": 3, "seed": 5}
    expected = [batch[0].sum() for batch in connected(loader())]
    for workers in (0, 2):
        served = connected(FederatedLoader(table, partition(), num_workers=workers, **options))
        for _ in range(2):
            assert len(list(served)) == len(expected)
        rows_of_slot = [int(batch["x"][0]) for batch in served]
        if workers == 0:
            first = rows_of_slot
    assert rows_of_slot == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients_per_round": 7}, "clients_per_round must lie between 1 and the 6 clients of the partition, got 7"),
        ({"clients_per_round": 1.5}, r"clients_per_round must be a number or a share in \(0, 1\], got 1.5"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"local_epochs": 0}, "local_epochs must be at least 1, got 0"),
        ({"max_local_steps": 0}, "max_local_steps must be at least 1, got 0"),
        ({"client_dropout": 1.0}, r"client_dropout must be in \[0, 1\), got 1.0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"drop_last": True, "batch_size": 4}, "client 2 has 3 examples, less than a batch_size of 4"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        loader(**options)


@pytest.mark.filterwarnings("default:a cohort of")
def test_a_cohort_smaller_than_the_world_is_told_once():
    data = loader(clients_per_round=1)
    with pytest.warns(UserWarning, match="a cohort of 1 on 2 processes leaves 1 of them without a client"):
        connected(data, world_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        connected(data, world_size=2)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ([[0, 1], []], r"client 1 must hold a flat array of one row or more, got shape \(0,\)"),
        ([[0, 0]], "client 0 must hold each example once, got row 0 twice"),
        ([[0, 99]], "client 0 must hold rows from 0 to 38, got 99"),
    ],
)
def test_a_bad_partition_is_refused(own, message):
    with pytest.raises(ValueError, match=message):
        FederatedLoader(rows(), own, clients_per_round=1, batch_size=2)


def test_a_loader_without_a_strategy_says_what_it_needs():
    with pytest.raises(RuntimeError, match="FederatedLoader serves FedOptStrategy only"):
        next(iter(loader()))
