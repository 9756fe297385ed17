"""Partitions: who gets what, how concentrated, and what happens when a class runs out."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from jsonargparse import ArgumentParser

from lightning_iclr.embedded import load_digits
from lightning_iclr.fedopt.allocation import by_key, dirichlet, iid, pachinko, pathological
from lightning_iclr.fedopt.partition import (
    DirichletPartitioner,
    IIDPartitioner,
    KeyPartitioner,
    PachinkoPartitioner,
    PathologicalPartitioner,
    check_partition,
    label_matrix,
)

LABELS = np.random.default_rng(0).integers(0, 10, 5000)
FINE = np.random.default_rng(1).integers(0, 100, 5000)

PARTITIONS = {
    "iid": (lambda seed: iid(5000, 37, seed), 5000),
    "dirichlet": (lambda seed: dirichlet(LABELS, 37, 0.1, seed), 37 * (5000 // 37)),
    "dirichlet-small": (lambda seed: dirichlet(LABELS, 37, 0.1, seed, examples_per_client=11), 37 * 11),
    "pachinko": (lambda seed: pachinko(FINE // 5, FINE, 37, seed=seed), 37 * (5000 // 37)),
    "pachinko-small": (lambda seed: pachinko(FINE // 5, FINE, 37, seed=seed, examples_per_client=11), 37 * 11),
    "pathological": (lambda seed: pathological(LABELS, 37, 2, seed), 5000),
}


def counts(partition, labels):
    return label_matrix(partition, labels, labels.max() + 1)


@pytest.mark.parametrize("name", PARTITIONS)
def test_clients_share_no_example_and_hold_ascending_int64_rows(name):
    make, total = PARTITIONS[name]
    partition = make(0)
    rows = np.concatenate(partition)
    assert len(partition) == 37
    assert len(rows) == total == len(np.unique(rows))
    assert 0 <= rows.min() <= rows.max() < 5000
    assert all(own.dtype == np.int64 and (np.diff(own) > 0).all() for own in partition)


@pytest.mark.parametrize("name", PARTITIONS)
def test_the_seed_alone_decides(name):
    make, _ = PARTITIONS[name]
    same = [np.array_equal(a, b) for a, b in zip(make(3), make(3), strict=True)]
    other = [np.array_equal(a, b) for a, b in zip(make(3), make(4), strict=True)]
    assert all(same)
    assert not any(other)


def test_iid_sizes_differ_by_at_most_one():
    assert sorted({len(rows) for rows in iid(5000, 37, 0)}) == [5000 // 37, 5000 // 37 + 1]


def test_iid_clients_are_not_runs_of_the_data_set():
    assert_spread(iid(5000, 10, 0))


def assert_spread(partition):
    # The mean of 500 of 5,000 rows drawn without replacement has standard deviation sqrt(var / 500 * 0.9).
    assert [len(rows) for rows in partition] == [500] * 10
    means = np.array([rows.mean() for rows in partition])
    assert np.abs(means - 2499.5).max() < 4 * np.sqrt(5000**2 / 12 / 500 * 0.9)
    assert all(len(np.unique(np.diff(rows))) > 1 for rows in partition)


def test_examples_of_a_class_are_drawn_at_random():
    labels = np.zeros(5000)
    for partition in (dirichlet(labels, 10, 1.0, 0), pachinko(labels, labels, 10), pathological(labels, 10, 1, 0)):
        assert_spread(partition)


@pytest.mark.parametrize(("given", "expected"), [(None, 135), (11, 11)])
def test_dirichlet_and_pachinko_clients_have_the_size_asked_for(given, expected):
    for partition in (
        dirichlet(LABELS, 37, 0.1, 0, examples_per_client=given),
        pachinko(FINE // 5, FINE, 37, examples_per_client=given),
    ):
        assert {len(rows) for rows in partition} == {expected}


@pytest.mark.parametrize("kind", ["dirichlet", "pachinko"])
def test_large_concentrations_give_the_shares_of_the_data_set(kind):
    labels = np.arange(20_000) % 10
    if kind == "dirichlet":
        partition = dirichlet(labels, 20, 1e8, 0, examples_per_client=200)
    else:
        partition = pachinko(labels // 5, labels, 20, 1e8, 1e8, 0, examples_per_client=200)
    shares = counts(partition, labels) / 200
    assert np.abs(shares - 0.1).max() < 4 * np.sqrt(0.1 * 0.9 / 200)


def test_small_concentrations_give_one_class_a_client():
    labels = np.arange(50_000) % 10
    shares = counts(dirichlet(labels, 100, 0.01, 0, examples_per_client=50), labels) / 50
    assert shares.max(axis=1).mean() > 0.9
    # Which class it is differs: 100 draws of 10 classes miss one with probability 10 * 0.9 ** 100 = 3e-4.
    assert len(set(shares.argmax(axis=1).tolist())) == 10


def same_label_share(table):
    """Share of pairs of a row's examples that have the same label, without bias under multinomial draws."""
    size = table.sum(axis=-1)
    return (table * (table - 1)).sum(axis=-1) / (size * (size - 1))


def assert_mean(values, expected):
    # Values in [0, 1] with mean p have a variance of at most p (1 - p), reached where all are 0 or 1.
    assert abs(values.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / len(values))


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
def test_a_client_s_mixture_is_a_symmetric_dirichlet_draw(alpha):
    # Two draws by q ~ Dir(alpha, ..., alpha) of K classes agree with probability E[sum q^2] = (alpha+1) / (K alpha+1).
    labels = np.arange(200_000) % 10
    partition = dirichlet(labels, 1000, alpha, 0, examples_per_client=10)
    assert_mean(same_label_share(counts(partition, labels)), (alpha + 1) / (10 * alpha + 1))


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 10.0), (10.0, 0.1), (1.0, 1.0)])
def test_pachinko_concentrates_coarse_labels_by_alpha_and_fine_ones_within_them_by_beta(alpha, beta):
    fine = np.arange(500_000) % 100
    partition = pachinko(fine // 5, fine, 500, alpha, beta, 0, examples_per_client=100)
    table = counts(partition, fine).reshape(500, 20, 5)
    assert_mean(same_label_share(table.sum(axis=2)), (alpha + 1) / (20 * alpha + 1))
    pairs = table.reshape(-1, 5)
    pairs = pairs[pairs.sum(axis=1) >= 2]
    assert_mean(same_label_share(pairs), (beta + 1) / (5 * beta + 1))


def test_fine_labels_of_the_same_name_under_two_coarse_ones_are_apart():
    coarse, fine = np.repeat([0, 1], 500), np.arange(1000) % 5
    partition = pachinko(coarse, fine, 50, alpha=1e-3, beta=1e6, examples_per_client=10)
    table = np.stack([np.bincount(coarse[rows], minlength=2) for rows in partition])
    # With two coarse labels and so small an alpha a client holds one, but its fine labels are spread.
    assert (table.max(axis=1) == 10).mean() > 0.9
    assert np.mean([len(set(fine[rows])) for rows in partition]) > 3


@pytest.mark.parametrize("alpha", [1e-300, 1e-4, 0.01, 1.0, 1e8])
def test_a_class_that_runs_out_is_passed_over_and_clients_stay_full(alpha):
    labels = np.repeat(np.arange(5), [2, 3, 5, 40, 950])
    partition = dirichlet(labels, 100, alpha, 0)
    assert {len(rows) for rows in partition} == {10}
    assert counts(partition, labels).sum(axis=0).tolist() == [2, 3, 5, 40, 950]
    pairs = pachinko(labels // 2, labels, 100, alpha, alpha)
    assert counts(pairs, labels).sum(axis=0).tolist() == [2, 3, 5, 40, 950]


def test_a_class_that_runs_out_hands_its_share_to_the_others_in_proportion():
    # One example of class 0. Nearly equal mixtures: after it is gone, the two others have one half each, and the many
    # clients that come later never draw it.
    labels = np.concatenate([[0], np.repeat([1, 2], 5000)])
    table = counts(dirichlet(labels, 100, 1e8, 0, examples_per_client=50), labels)
    assert table[:, 0].sum() == 1
    assert abs(table[:, 1].sum() - 2500) < 4 * np.sqrt(5000 / 4)


def test_pachinko_keeps_the_share_of_a_coarse_label_when_a_fine_one_of_it_runs_out():
    # Coarse 0 holds fine 0 (one example) and 1; coarse 1 holds fine 2 and 3. Halves, then halves of halves.
    fine = np.concatenate([[0], np.repeat([1, 2, 3], 5000)])
    table = counts(pachinko(fine // 2, fine, 100, 1e8, 1e8, 0, examples_per_client=40), fine)
    assert table[:, 0].sum() == 1
    assert abs(table[:, :2].sum() - 2000) < 4 * np.sqrt(4000 / 4)


def test_a_mixture_without_mass_on_what_is_left_is_drawn_anew(monkeypatch):
    # Every client's mixture is all class 0, of which there are 30: the fourth and later ones meet 0 / 0.
    real, drawn = np.random.default_rng, []

    class Generator:
        def __init__(self, seed):
            self.real = real(seed)

        def __getattr__(self, name):
            return getattr(self.real, name)

        def dirichlet(self, alpha, size=None):
            if size is None:
                drawn.append(alpha)
                return self.real.dirichlet(alpha)
            return np.tile(np.eye(len(alpha))[0], (size, 1))

    monkeypatch.setattr(np.random, "default_rng", Generator)
    labels = np.repeat(np.arange(4), [30, 500, 500, 500])
    partition = dirichlet(labels, 20, 1e6, 0, examples_per_client=10)
    table = counts(partition, labels)
    assert table[:3, 0].tolist() == [10, 10, 10]
    assert [alpha.tolist() for alpha in drawn] == [[1e6] * 3] * 17
    # Drawn anew by so large an alpha, the three classes that are left share the rest equally.
    assert np.abs(table[3:, 1:].sum(axis=0) - 170 / 3).max() < 4 * np.sqrt(170 * 2 / 9)


def test_pathological_clients_hold_few_classes_and_every_example_is_used():
    for classes_per_client in (1, 2, 3):
        partition = pathological(LABELS, 50, classes_per_client, 0)
        table = counts(partition, LABELS)
        assert (table > 0).sum(axis=1).max() <= classes_per_client
        assert table.sum(axis=0).tolist() == np.bincount(LABELS).tolist()


def test_pathological_shards_are_as_equal_as_in_mcmahan_s_where_classes_are_balanced():
    labels = np.arange(6000) % 10
    partition = pathological(labels, 100, 2, 0)
    assert {len(rows) for rows in partition} == {60}
    # A client's two of 200 shards, 20 a class, are of one class with probability 19 / 199.
    single = ((counts(partition, labels) > 0).sum(axis=1) == 1).mean()
    assert abs(single - 19 / 199) < 4 * np.sqrt(0.1 * 0.9 / 100)


def test_pathological_shards_go_where_classes_are_large():
    labels = np.repeat([0, 1, 2], [4, 40, 400])
    partition = pathological(labels, 111, 1, 0)
    assert {len(rows) for rows in partition} == {4}
    everything = pathological(labels, 222, 2, 0)
    assert {len(rows) for rows in everything} == {2}


def test_clients_by_key_equal_a_dictionary_of_lists():
    for values in (LABELS, np.array(["b", "a", "c", "a", "b", "a"]), ["x", "yy", "x"], LABELS - 5.5):
        expected = {}
        for row, value in enumerate(values):
            expected.setdefault(value, []).append(row)
        assert [rows.tolist() for rows in by_key(values)] == [expected[value] for value in sorted(expected)]
    assert [rows.tolist() for rows in by_key(["b", "a", "c", "a", "b", "a"], min_examples=2)] == [[1, 3, 5], [0, 4]]


def speeches():
    rng = np.random.default_rng(0)
    columns = {
        "play": [["Lear", "Hamlet"][i] for i in rng.integers(0, 2, 200)],
        "role": [["King", "Ghost", "Fool"][i] for i in rng.integers(0, 3, 200)],
        "act": rng.integers(1, 4, 200).tolist(),
    }
    return Dataset.from_dict(columns)


@pytest.mark.parametrize("columns", ["role", ["role"], ["play", "role"], ["act", "play", "role"]])
def test_clients_of_several_columns_are_their_combinations_in_sorted_order(columns, monkeypatch):
    monkeypatch.setattr("lightning_iclr.fedopt.partition._PIECE", 64)
    # Shuffled and cut, so that rows are not those of the table below.
    data = speeches().shuffle(seed=1).select(range(150))
    names = [columns] if isinstance(columns, str) else columns
    expected = {}
    for row, example in enumerate(data):
        expected.setdefault(tuple(example[name] for name in names), []).append(row)
    got = KeyPartitioner(columns)(data)
    assert [rows.tolist() for rows in got] == [expected[key] for key in sorted(expected)]
    large = KeyPartitioner(columns, min_examples=9)(data)
    assert [rows.tolist() for rows in large] == [expected[key] for key in sorted(expected) if len(expected[key]) >= 9]


def test_classes_give_what_the_functions_give():
    features = Features({"label": ClassLabel(names=[str(i) for i in range(10)]), "fine": Value("string")})
    fine = [f"{i:03}" for i in FINE]  # sorts as the numbers do
    data = Dataset.from_dict({"label": LABELS, "fine": fine}, features=features)
    coarse = data.add_column("coarse", FINE // 5)
    pairs = [
        (IIDPartitioner(9, seed=2)(data), iid(5000, 9, 2)),
        (IIDPartitioner(9, seed=2)(range(5000)), iid(5000, 9, 2)),
        (DirichletPartitioner(9, 0.3, seed=2)(data), dirichlet(LABELS, 9, 0.3, 2)),
        (
            DirichletPartitioner(9, 0.3, label_column="fine", examples_per_client=20)(data),
            dirichlet(FINE, 9, 0.3, 0, examples_per_client=20),
        ),
        (
            PachinkoPartitioner(9, "coarse", "fine", alpha=0.5, beta=2.0, examples_per_client=50, seed=2)(coarse),
            pachinko(FINE // 5, FINE, 9, 0.5, 2.0, 2, examples_per_client=50),
        ),
        (PathologicalPartitioner(9, 3, seed=2)(data), pathological(LABELS, 9, 3, 2)),
        (KeyPartitioner("fine")(data), by_key(FINE)),
    ]
    for got, expected in pairs:
        assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_embedded_digits_divide_into_a_hundred_clients():
    digits = load_digits()
    partition = DirichletPartitioner(100, alpha=0.1)(digits)
    check_partition(partition, len(digits))
    assert {len(rows) for rows in partition} == {17}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("IIDPartitioner", {"num_clients": 2}),
        ("DirichletPartitioner", {"num_clients": 2, "alpha": 0.1, "label_column": "role", "examples_per_client": 7}),
        ("PachinkoPartitioner", {"num_clients": 2, "coarse_column": "play", "fine_column": "role"}),
        ("KeyPartitioner", {"columns": ["play", "role"], "min_examples": 2}),
        ("KeyPartitioner", {"columns": "role"}),
        ("PathologicalPartitioner", {"num_clients": 3, "classes_per_client": 1, "label_column": "role", "seed": 4}),
    ],
)
def test_a_recipe_builds_each_by_its_class_path(name, arguments):
    from collections.abc import Callable
    from typing import Any

    parser = ArgumentParser()
    parser.add_argument("--partition", type=Callable[[Any], list])
    config = {"class_path": f"lightning_iclr.fedopt.partition.{name}", "init_args": arguments}
    partitioner = parser.instantiate_classes(parser.parse_object({"partition": config})).partition
    assert type(partitioner).__name__ == name
    assert {key: getattr(partitioner, key) for key in arguments} == arguments
    check_partition(partitioner(speeches()), 200)


def test_the_label_matrix_counts_each_client_s_classes():
    partition = [np.array([0, 2, 3]), np.array([1])]
    assert label_matrix(partition, [2, 0, 2, 1], num_classes=4).tolist() == [[0, 1, 2, 0], [1, 0, 0, 0]]
    with pytest.raises(ValueError, match="labels must be from 0 to 1, got 0 to 2"):
        label_matrix(partition, [2, 0, 2, 1], num_classes=2)
    with pytest.raises(ValueError, match="labels must be from 0 to 1, got -1 to 1"):
        label_matrix(partition, [-1, 0, 1, 1], num_classes=2)


@pytest.mark.parametrize(
    ("partition", "error", "message"),
    [
        ([], ValueError, "partition must hold at least one client, got none"),
        ([[0], []], ValueError, "client 1 must hold a flat array of one row or more, got shape \\(0,\\)"),
        ([[[0, 1]]], ValueError, "client 0 must hold a flat array of one row or more, got shape \\(1, 2\\)"),
        ([[0], [1, 2, 1]], ValueError, "client 1 must hold each example once, got row 1 twice"),
        ([[0], [1, 5]], ValueError, "client 1 must hold rows from 0 to 4, got 5"),
        ([[0], [2], [-1]], ValueError, "client 2 must hold rows from 0 to 4, got -1"),
        ([[0], [0.5]], TypeError, "client 1 must hold integers, got float64"),
        ([[True, False]], TypeError, "client 0 must hold integers, got bool"),
    ],
)
def test_a_bad_partition_names_the_client(partition, error, message):
    with pytest.raises(error, match=message):
        check_partition(partition, num_examples=5)


def test_clients_that_overlap_are_warned_of_once():
    with pytest.warns(
        UserWarning, match="clients share 2 of the data set's 5 examples; the first is row 1, of clients 0"
    ) as caught:
        check_partition([[0, 1, 2], [1, 3], [1, 2], [4]], num_examples=5)
    assert len(caught) == 1
    check_partition([[0, 1, 2], [3], [4]], num_examples=5)  # a warning would be an error here


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: iid(3, 0, 0), "num_clients must be at least 1, got 0"),
        (lambda: iid(3, 4, 0), "num_clients must be at most the 3 examples, got 4"),
        (lambda: dirichlet([0, 1], 3, 1.0, 0), "num_clients must be at most the 2 examples, got 3"),
        (lambda: dirichlet([], 3, 1.0, 0), "labels must be a flat array of one example or more, got shape \\(0,\\)"),
        (lambda: dirichlet([[0], [1]], 2, 1.0, 0), "labels must be a flat array"),
        (lambda: dirichlet([0, 1], 2, 0.0, 0), "alpha must be positive and finite, got 0.0"),
        (lambda: dirichlet([0, 1], 2, np.inf, 0), "alpha must be positive and finite, got inf"),
        (lambda: dirichlet(LABELS, 9, 1.0, 0, 556), "must be between 1 and 555, so that 9 clients .* 5000 .*; got 556"),
        (lambda: dirichlet(LABELS, 9, 1.0, 0, 0), "examples_per_client must be between 1 and 555, .*; got 0"),
        (lambda: pachinko([0, 0], [0, 1], 1, beta=-1.0), "beta must be positive and finite, got -1.0"),
        (lambda: pachinko([0, 0], [0, 1, 2], 1), "coarse and fine must hold one label .*, got 2 and 3"),
        (lambda: by_key([0, 1], min_examples=0), "min_examples must be at least 1, got 0"),
        (lambda: by_key([0, 1, 1], min_examples=3), "min_examples must be at most the largest client's 2 .*, got 3"),
        (lambda: pathological(LABELS, 5, 11, 0), "classes_per_client must be between 1 and the 10 classes, got 11"),
        (lambda: pathological(LABELS, 5, 0, 0), "classes_per_client must be between 1 and the 10 classes, got 0"),
        (lambda: pathological(LABELS, 4, 2, 0), "between the 10 classes and the 5000 examples, got 4 \\* 2"),
        (lambda: pathological(LABELS, 4000, 2, 0), "between the 10 classes and the 5000 examples, got 4000 \\* 2"),
        (lambda: IIDPartitioner(0), "num_clients must be at least 1, got 0"),
        (lambda: DirichletPartitioner(2, alpha=-1.0), "alpha must be positive and finite, got -1.0"),
        (
            lambda: DirichletPartitioner(2, 1.0, examples_per_client=0),
            "examples_per_client must be at least 1, .* got 0",
        ),
        (lambda: PachinkoPartitioner(2, "a", "b", beta=0.0), "beta must be positive and finite, got 0.0"),
        (lambda: KeyPartitioner([]), "columns must name at least one column, got \\[\\]"),
        (lambda: KeyPartitioner("role", min_examples=0), "min_examples must be at least 1, got 0"),
        (lambda: PathologicalPartitioner(2, 0), "classes_per_client must be at least 1, got 0"),
        (
            lambda: DirichletPartitioner(2, 1.0)(speeches()),
            "label_column must name columns of the data set, which are play, role, act; got 'label'",
        ),
        (lambda: PachinkoPartitioner(2, "play", "line")(speeches()), "fine_column must name .* got 'line'"),
        (lambda: KeyPartitioner(["play", "line"])(speeches()), "columns must name .* got 'line'"),
        (
            lambda: KeyPartitioner("a")(Dataset.from_dict({"a": [1, None, None]})),
            "columns must name columns with a value in each row, got 'a' with 2 empty",
        ),
        (
            lambda: KeyPartitioner("a")(Dataset.from_dict({"a": [[1], [2]]})),
            "columns must name columns of numbers or strings, got 'a' of list<item: int64>",
        ),
        (
            lambda: KeyPartitioner("a")(Dataset.from_dict({"a": []})),
            "dataset must hold at least one example, got none",
        ),
    ],
)
def test_bad_arguments_are_named_with_what_was_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()
