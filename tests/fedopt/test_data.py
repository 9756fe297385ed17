"""Federated data: where rows come from, how they are held out and divided, and what the loaders serve."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from PIL import Image
from torch.utils.data import DataLoader

from lightning_iclr.embedded import load_digits, load_shakespeare
from lightning_iclr.fedopt.data import FederatedDataModule, _cut
from lightning_iclr.fedopt.embedded_tasks import FederatedDigits, ShakespeareRoles
from lightning_iclr.fedopt.encoders import ImageEncoder
from lightning_iclr.fedopt.loader import FederatedLoader, Place
from lightning_iclr.fedopt.partition import DirichletPartitioner, KeyPartitioner
from lightning_iclr.fedopt.strategy import FedOptStrategy
from lightning_iclr.fedopt.tables import hold_out
from lightning_iclr.fedopt.text_encoders import CharacterEncoder, TagEncoder, WordEncoder
from lightning_iclr.sampling import SampleKey

ROWS = 60
IMAGES = np.random.default_rng(0).integers(0, 256, (ROWS, 6, 6), dtype=np.uint8)
TABLE = Dataset.from_dict(
    {
        "image": IMAGES,
        "label": [row % 3 for row in range(ROWS)],
        "user": ["bca"[row % 3] for row in range(ROWS)],
    }
)


def numbers(columns):
    """Encode each row as its own number: what is served tells which row it was."""
    rows = torch.tensor(columns["row"])
    return rows.float(), rows


def numbered(size=ROWS, **columns):
    return Dataset.from_dict({"row": list(range(size)), **columns})


def module(dataset=TABLE, **arguments):
    defaults = {"encode": ImageEncoder(), "partition": KeyPartitioner("user"), "clients_per_round": 2, "batch_size": 4}
    data = FederatedDataModule(dataset, **{**defaults, **arguments})
    data.prepare_data()
    data.setup()
    return data


def rows_of(loader):
    return torch.cat([targets for _, targets in loader]).tolist()


def serve(loader, round_index=0):
    loader.connect(Place(rank=0, world_size=1, accumulate_grad_batches=1, vectorize_clients=1,
                         current_round=lambda: round_index))  # fmt: skip
    return list(loader)


def test_a_round_serves_whole_batches_of_one_client_after_the_other():
    data = module(numbered(user=["bca"[row % 3] for row in range(ROWS)]), encode=numbers, local_epochs=2)
    loader = data.train_dataloader()
    assert isinstance(loader, FederatedLoader)
    plan = loader.plan(3)
    batches = serve(loader, 3)
    assert len(batches) == 2 * 2 * 5
    for position, client in enumerate(plan.cohort):
        own = batches[position * 10 : position * 10 + 10]
        rows = torch.cat([targets for _, targets in own]).tolist()
        assert Counter(rows) == {row: 2 for row in range(ROWS) if "bca"[row % 3] == "abc"[client]}


def test_arguments_reach_the_loader_of_rounds():
    data = module(max_local_steps=2, client_dropout=0.25, local_epochs=3, drop_last=True, seed=5, clients_per_round=0.4)
    loader = data.train_dataloader()
    assert (loader.max_local_steps, loader.client_dropout, loader.local_epochs, loader.drop_last, loader.seed) == (
        2, 0.25, 3, True, 5,
    )  # fmt: skip
    assert loader.clients_per_round == 1
    assert loader.batch_size == 4


def test_training_images_are_augmented_by_seed_pass_and_example_alone():
    def served(seed=0, batch_size=4, round_index=0):
        data = module(encode=ImageEncoder(crop=3, flip=True), seed=seed, batch_size=batch_size, clients_per_round=3)
        loader = data.train_dataloader()
        plan = loader.plan(round_index)
        images = torch.cat([images for images, _ in serve(loader, round_index)])
        rows = [row for task in plan.tasks[0] for batch in loader._task_rows(round_index, task) for row in batch]
        return {key.index: image for key, image in zip(rows, images, strict=True)}

    def same(first, second):
        return [torch.equal(first[row], second[row]) for row in range(ROWS)]

    first = served()
    assert all(same(first, served(batch_size=7)))
    assert sum(same(first, served(round_index=1))) < ROWS / 2
    assert sum(same(first, served(seed=1))) < ROWS / 2


def test_workers_serve_what_the_main_process_does():
    def images(num_workers):
        loader = module(encode=ImageEncoder(crop=3, flip=True), num_workers=num_workers).train_dataloader()
        return torch.cat([images for images, _ in serve(loader)])

    assert torch.equal(images(0), images(1))


@pytest.mark.parametrize("sizes", [(6, 9), (0.1, 0.15)])
def test_drawn_parts_are_disjoint_in_order_and_hold_each_class_in_proportion(sizes):
    labels = ["cba"[row % 3] for row in range(ROWS)]
    data = module(
        numbered(label=labels),
        encode=numbers,
        partition=DirichletPartitioner(3, 1.0),
        val_size=sizes[0],
        test_size=sizes[1],
        stratify_column="label",
    )
    parts = {part: rows_of(data.evaluation_loader(part)) for part in ("train", "val", "test")}
    assert sorted(row for rows in parts.values() for row in rows) == list(range(ROWS))
    assert parts["val"] == sorted(parts["val"])
    assert parts["test"] == sorted(parts["test"])
    by_class = {part: [sum(row % 3 == kind for row in rows) for kind in range(3)] for part, rows in parts.items()}
    assert by_class == {"train": [15, 15, 15], "val": [2, 2, 2], "test": [3, 3, 3]}


@pytest.mark.parametrize("stratify_column", [None, "label"])
def test_each_row_is_held_out_equally_often(stratify_column):
    table = Dataset.from_dict({"label": [0] * 3 + [1] * 7 + [2] * 11})
    draws = 400
    held_out = np.concatenate([hold_out(table, 5, seed, stratify_column)[1] for seed in range(draws)])
    counts = np.bincount(held_out, minlength=21)
    p = 5 / 21
    if stratify_column is None:
        assert np.abs(counts - draws * p).max() < 4.5 * math.sqrt(draws * p * (1 - p))
    else:
        # The shares are 0.71, 1.67 and 2.62: 0 + 1 + 2 and the two largest remainders, so 1, 2 and 2 rows.
        for rows, quota in ((slice(0, 3), 1 / 3), (slice(3, 10), 2 / 7), (slice(10, 21), 2 / 11)):
            assert np.abs(counts[rows] - draws * quota).max() < 4.5 * math.sqrt(draws * quota * (1 - quota))
            assert counts[rows].sum() == round(draws * quota * (rows.stop - rows.start))


def test_split_seed_changes_the_drawn_rows_and_seed_does_not():
    def held_out(**arguments):
        partition = DirichletPartitioner(3, 1.0)
        table = numbered(label=[0, 1] * 30)
        return rows_of(module(table, encode=numbers, partition=partition, test_size=20, **arguments).test_dataloader())

    assert held_out() == held_out(seed=1)
    assert held_out() != held_out(split_seed=1)


def test_splits_are_named_by_slices_and_a_part_of_its_own_needs_no_client():
    tables = DatasetDict(train=numbered(40, user=["a", "b"] * 20), test=numbered(20))
    data = module(tables, encode=numbers, train_split="train[:30]", val_split="test[:25%]", test_split="test")
    assert rows_of(data.val_dataloader()) == list(range(5))
    assert rows_of(data.test_dataloader()) == list(range(20))
    assert [len(rows) for rows in data.client_datasets("train")[1]] == [15, 15]
    with pytest.raises(ValueError, match="the rows of 'test' belong to no client; set client_split"):
        data.client_datasets("test")


# Rows of a client, shares of validation and test, and how many rows each part gets.
CUTS = [
    (1, (0.1, 0.2), (1, 0, 0)),
    (2, (0.1, 0.2), (1, 0, 1)),
    (3, (0.1, 0.2), (2, 0, 1)),
    (5, (0.1, 0.2), (3, 1, 1)),
    (10, (0.1, 0.2), (7, 1, 2)),
    (13, (0.1, 0.2), (9, 1, 3)),
    (2, (0.5, 0.4), (1, 0, 1)),
    (10, (0.5, 0.4), (1, 5, 4)),
    (2, (0.2, 0.0), (1, 1, 0)),
    (10, (0.0, 0.2), (8, 0, 2)),
    (1, (0.2, 0.0), (1, 0, 0)),
]


@pytest.mark.parametrize(("size", "shares", "expected"), CUTS)
def test_a_clients_last_rows_are_held_out(size, shares, expected):
    rows = np.arange(size) * 7
    parts = _cut(rows, shares)
    assert tuple(len(part) for part in parts) == expected
    assert np.concatenate(parts).tolist() == rows.tolist()


def test_each_client_is_tested_on_its_own_last_rows():
    users = ["a"] * 10 + ["b"] * 2 + ["c"] + ["a"] * 5
    data = module(numbered(18, user=users), encode=numbers, client_split=(0.2, 0.2))
    expected = {
        "train": [[0, 1, 2, 3, 4, 5, 6, 7, 8], [10], [12]],
        "val": [[9, 13, 14], [], []],
        "test": [[15, 16, 17], [11], []],
    }
    for part, by_client in expected.items():
        examples, clients = data.client_datasets(part)
        assert [[int(examples[int(row)][1]) for row in own] for own in clients] == by_client
        assert rows_of(data.evaluation_loader(part)) == [row for own in by_client for row in own]


def test_clients_are_thinned_limited_and_capped_in_that_order():
    users = ["a"] * 30 + ["b"] * 10 + ["c"] * 20
    data = module(numbered(user=users), encode=numbers, take_every=3, max_clients=2, max_examples_per_client=4,
                  client_split=(0.0, 0.5))  # fmt: skip
    examples, clients = data.client_datasets("train")
    served = [[int(examples[int(row)][1]) for row in own] for own in clients]
    assert served == [[0, 3, 6, 9], [40, 43, 46]]  # 10 rows of a, 7 of c; the first half; at most 4
    assert rows_of(data.test_dataloader()) == [15, 18, 21, 24, 27, 49, 52, 55, 58]


def test_predict_serves_positions_and_padding_is_never_counted():
    data = module(val_size=5, test_size=10, partition=DirichletPartitioner(3, 1.0))
    batches = list(data.predict_dataloader())
    assert torch.cat([positions for _, positions in batches]).tolist() == list(range(10))
    test = data.test_dataloader().dataset
    keys = [SampleKey(0, 0, False), SampleKey(1, 0, True)]
    images, labels = test.__getitems__(keys)
    assert labels.tolist() == [int(test[0][1]), -100]
    assert torch.equal(images[1], test[1][0])
    assert data.predict_dataloader().dataset.__getitems__(keys)[1].tolist() == [0, -1]
    assert test[1][1] != -100  # the stored labels stay


def test_padding_marks_all_targets_of_a_text_or_tag_row():
    table = Dataset.from_dict({"text": ["abc", "def"] * 4, "user": ["a", "b"] * 4})
    texts = module(table, encode=CharacterEncoder(sequence_length=3), client_split=(0.0, 0.5))
    keys = [SampleKey(0, 0, True), SampleKey(1, 0, False)]
    targets = texts.test_dataloader().dataset.__getitems__(keys)[1]
    assert (targets[0] == -100).all()
    assert (targets[1] >= 0).all()
    alone, targets = texts.test_dataloader().dataset.__getitems__(keys[:1])
    assert (targets == -100).all()
    assert (alone >= 0).all()  # a row alone may share its memory with its targets
    questions = Dataset.from_dict({"tokens": ["a b", "b"], "title": ["", ""], "tags": ["x", "y"], "user": ["a", "b"]})
    tags = module(DatasetDict(train=questions, test=questions), encode=TagEncoder(), test_split="test")
    targets = tags.test_dataloader().dataset.__getitems__(keys)[1]
    assert (targets[0] == -100).all()
    assert targets[1].sum() == 1


def test_the_examples_of_a_client_are_the_windows_of_its_own_texts():
    texts = ["a" * length for length in (2, 9, 4, 30, 1, 12)]
    table = Dataset.from_dict({"text": texts, "user": ["b", "a", "b", "a", "b", "a"]})
    encode = CharacterEncoder(sequence_length=4)
    data = module(table, encode=encode, client_split=(0.0, 0.34))
    for part, rows in (("train", [[1, 3], [0, 2]]), ("test", [[5], [4]])):
        examples, clients = data.client_datasets(part)
        for own, own_rows in zip(clients, rows, strict=True):
            expected = encode.serve(encode({"text": [texts[row] for row in own_rows]}).tensors, None)
            served = examples.__getitems__(own.tolist())
            assert all(torch.equal(*pair) for pair in zip(served, expected, strict=True))


@pytest.mark.parametrize("encode", [ImageEncoder(crop=3), WordEncoder(tokens_column="words", sequence_length=4)])
def test_rows_encoded_on_demand_equal_those_encoded_once(encode):
    words = ["alpha beta", "beta", "gamma delta epsilon", "alpha"] * 15
    table = TABLE.add_column("words", words)
    once, on_demand = (
        module(table, encode=encode, in_memory=in_memory, client_split=(0.0, 0.2), take_every=3)
        for in_memory in (True, False)
    )
    for loaders in ((once.test_dataloader(), on_demand.test_dataloader()),
                    (serve(once.train_dataloader()), serve(on_demand.train_dataloader()))):  # fmt: skip
        for first, second in zip(*loaders, strict=True):
            assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_several_examples_a_row_cannot_be_encoded_on_demand():
    table = Dataset.from_dict({"text": ["a"] * 4, "user": ["a", "b"] * 2})
    data = module(table, encode=CharacterEncoder(), in_memory=False, client_split=(0.0, 0.5))
    with pytest.raises(ValueError, match="in_memory=false needs one example a row"):
        next(iter(data.test_dataloader()))


def test_a_vocabulary_is_learned_from_training_rows_alone():
    words = [f"w{row}" for row in range(12)]
    table = Dataset.from_dict({"tokens": words, "user": ["a", "b"] * 6})
    data = module(table, encode=WordEncoder(), client_split=(0.2, 0.2), max_examples_per_client=3)
    assert data.encode.vocabulary == tuple(sorted(words[:6]))
    assert data.evaluation_loader("test").dataset[0][1][0] == data.encode.num_tokens - 3  # another word


def test_setup_twice_keeps_the_first_rows():
    calls = []

    def partition(table):
        calls.append(len(table))
        return [np.arange(30), np.arange(30, 60)]

    data = module(partition=partition)
    data.setup("test")
    assert calls == [60]
    assert data.train_dataloader().dataset.source is data.train_dataloader().dataset.source


def test_a_user_can_iterate_over_a_clients_own_rows():
    examples, clients = module(client_split=(0.0, 0.2)).client_datasets("test")
    loader = DataLoader(examples, sampler=clients[1].tolist(), batch_size=3, collate_fn=lambda batch: batch)
    assert [len(labels) for _, labels in loader] == [3, 1]


@pytest.mark.parametrize("layout", ["memory", "file", "folder", "csv", "saved"])
def test_the_same_rows_come_from_memory_files_and_folders(tmp_path, layout):
    table = Dataset.from_dict({"text": ["To be", "or not", "to be", "that"], "user": ["a", "b", "b", "a"]})
    source = {"memory": table, "file": tmp_path / "a.parquet", "folder": tmp_path / "d", "csv": tmp_path / "a.csv",
              "saved": tmp_path / "s"}[layout]  # fmt: skip
    if layout == "file":
        table.to_parquet(source)
    elif layout == "folder":
        source.mkdir()
        table.to_parquet(source / "train-00000.parquet")
        table.to_parquet(source / "test-00000.parquet")
    elif layout == "csv":
        table.to_csv(source)
    elif layout == "saved":
        DatasetDict(train=table).save_to_disk(source)
    source = source if layout == "memory" else str(source)
    data = module(source, encode=CharacterEncoder(), test_split="test" if layout == "folder" else "train")
    assert [len(rows) for rows in data.client_datasets("train")[1]] == [2, 2]
    assert len(data.test_dataloader().dataset) == 4


def test_a_folder_of_pictures_by_class_is_a_dataset(tmp_path):
    for row, array in enumerate(IMAGES[:8]):
        folder = tmp_path / "pictures" / "train" / ("cat" if row % 2 else "ant")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / f"{row}.png")
    data = module(str(tmp_path / "pictures"), partition=KeyPartitioner("label"), client_split=(0.0, 0.25))
    examples, clients = data.client_datasets("train")
    assert [len(own) for own in clients] == [3, 3]
    assert examples.__getitems__(clients[1].tolist())[1].tolist() == [1, 1, 1]
    np.testing.assert_allclose(examples[int(clients[0][0])][0][0].numpy() * 255, IMAGES[0], atol=1e-3)


def test_a_missing_dataset_is_named_with_the_way_out():
    data = FederatedDataModule("nobody/nothing", encode=numbers, partition=KeyPartitioner("user"), clients_per_round=1)
    with pytest.raises((ConnectionError, FileNotFoundError), match="'nobody/nothing' is no local file or folder"):
        data.prepare_data()


COLUMNS = "which has: image, label, user; set"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encode": ImageEncoder(image_column="img")}, f"image_column='img' is no column.*{COLUMNS} image_column"),
        ({"encode": ImageEncoder(label_column="fine")}, f"label_column='fine' is no column.*{COLUMNS} label_column"),
        ({"encode": CharacterEncoder()}, f"text_column='text' is no column.*{COLUMNS} text_column"),
        ({"encode": WordEncoder()}, f"tokens_column='tokens' is no column.*{COLUMNS} tokens_column"),
        ({"test_size": 6, "stratify_column": "kind"}, f"stratify_column='kind' is no.*{COLUMNS} stratify_column"),
        ({"partition": KeyPartitioner("writer")}, "which are image, label, user; got 'writer'"),
        ({"val_split": "dev"}, r"val_split='dev' is no split of this dataset, which has: train \(60\)"),
        ({"test_size": 60}, "val_size and test_size must leave training rows of 60, got 60 in all"),
    ],
)  # fmt: skip
def test_a_missing_column_or_split_is_named_with_the_argument_to_change(arguments, message):
    with pytest.raises(ValueError, match=message):
        module(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"take_every": 0}, "take_every must be at least 1, got 0"),
        ({"max_clients": 0}, "max_clients must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be 0 or more, got -1"),
        ({"val_size": 1.0}, r"val_size must be a number of rows or a share in \(0, 1\), got 1.0"),
        ({"val_split": "dev", "val_size": 3}, "val_split and val_size exclude each other, got 'dev' and 3"),
        ({"client_split": (0.1, 0.2), "test_size": 3}, "client_split already holds rows out, so leave out test_size"),
        ({"client_split": (0.5, 0.5)}, r"client_split must be two shares with a sum in \(0, 1\), got \(0.5, 0.5\)"),
        ({"client_split": (0.5, -0.1)}, "client_split must be two shares"),
    ],
)
def test_an_argument_outside_its_range_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        module(**arguments)


def test_a_part_that_is_not_there_is_named_with_the_way_to_it():
    data = module()
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match="split must be one of train, got 'test'; set test_split, test_size or client"):
        data.test_dataloader()


def test_an_encoder_with_another_number_of_entries_is_refused():
    data = module(encode=lambda columns: (torch.zeros(3), torch.zeros(3)))
    with pytest.raises(ValueError, match="encode must return one entry a row, got 3 for 60 rows"):
        data.train_dataloader()


class Linear(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(36, 3)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_another_strategy_is_refused_with_how_federated_recipes_scale(tmp_path, strategy):
    trainer = Trainer(max_epochs=1, accelerator="cpu", devices=1, strategy=strategy, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path)  # fmt: skip
    name = {"auto": "SingleDeviceStrategy", "ddp": "DDPStrategy"}[strategy]
    data = module()
    data.trainer = trainer
    with pytest.raises(ValueError, match=f"by trainer.devices and trainer.num_nodes alone: .* got strategy {name}"):
        data.train_dataloader()


def test_a_module_trains_a_round_and_is_validated_and_tested(tmp_path):
    class Evaluated(Linear):
        def validation_step(self, batch, batch_idx):
            self.log("loss", self.training_step(batch, batch_idx))

        test_step = validation_step

    data = module(client_split=(0.1, 0.1))
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        strategy=FedOptStrategy(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    net = Evaluated()
    trainer.fit(net, data)
    assert trainer.strategy.server_round == 1
    ((images, labels),) = data.test_dataloader()
    with torch.no_grad():
        expected = float(torch.nn.functional.cross_entropy(net.net(images.flatten(1)), labels))
    assert trainer.test(net, data, verbose=False)[0]["loss"] == pytest.approx(expected)


def test_the_command_line_builds_encoders_and_partitions_by_class_path():
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(FederatedDataModule, "data")
    room = "lightning_iclr.fedopt"
    config = {
        "dataset": "somewhere",
        "encode": {"class_path": f"{room}.encoders.ImageEncoder", "init_args": {"crop": 24, "std": [0.5, 0.5, 0.5]}},
        "partition": {"class_path": f"{room}.partition.KeyPartitioner", "init_args": {"columns": "user"}},
        "clients_per_round": 0.1,
        "client_split": [0.1, 0.2],
        "max_local_steps": {"class_path": f"{room}.loader.Stragglers", "init_args": {"probability": 0.5}},
    }
    data = parser.instantiate(parser.parse_object({"data": config}))["data"]
    assert data.encode == ImageEncoder(crop=24, std=(0.5, 0.5, 0.5))
    assert data.partition == KeyPartitioner("user")
    assert data.client_split == (0.1, 0.2)
    assert data.max_local_steps.probability == 0.5


@pytest.fixture(scope="module")
def digits():
    data = FederatedDigits()
    data.prepare_data()
    data.setup()
    return data


def test_the_digits_are_held_out_in_equal_shares_and_the_rest_is_1437(digits):
    assert [len(digits.evaluation_loader(part).dataset) for part in ("val", "test")] == [180, 180]
    assert len(digits._tables["train"]) == 1437
    share = np.bincount(load_digits()["label"]) / 1797
    for part in ("val", "test"):
        ((images, labels),) = digits.evaluation_loader(part)
        assert images.shape == (180, 1, 8, 8)
        assert images.min() == 0
        assert images.max() == 1
        # Two cuts, each of which rounds a class's count to a neighbouring integer.
        assert np.abs(np.bincount(labels, minlength=10) - 180 * share).max() < 2


def test_a_hundred_clients_draw_14_digits_each_and_most_see_few_classes(digits):
    examples, clients = digits.client_datasets("train")
    assert [len(own) for own in clients] == [14] * 100
    assert len(np.unique(np.concatenate(clients))) == 1400
    largest = [examples.__getitems__(own.tolist())[1].bincount().max().item() / 14 for own in clients]
    # 200,000 clients of 14 draws from Dirichlet(0.1) have 0.685 of one class on average, with a deviation of 0.194;
    # those who come last find their classes used up and differ more.
    assert abs(np.mean(largest) - 0.685) < 4 * 0.194 / math.sqrt(100)
    loader = digits.train_dataloader()
    assert [len(labels) for _, labels in serve(loader)] == [5, 5, 4] * 10


def test_digits_take_another_partition_and_its_seed_is_that_of_the_split():
    def clients(**arguments):
        data = FederatedDigits(**arguments)
        data.setup()
        return data.client_datasets("train")[1]

    assert len(clients(num_clients=7, alpha=10.0, examples_per_client=20)) == 7
    assert len(clients(partition=KeyPartitioner("label"))) == 10
    first, again, other = clients(), clients(seed=3), clients(split_seed=1)
    assert np.array_equal(first[0], again[0])
    assert not np.array_equal(first[0], other[0])


@pytest.fixture(scope="module")
def roles():
    data = ShakespeareRoles()
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture(scope="module")
def speeches():
    by_role = defaultdict(list)
    plays = load_shakespeare()
    for play, role, text in zip(plays["play"], plays["role"], plays["text"], strict=True):
        by_role[play, role].append(text)
    return by_role


def test_the_plays_have_the_counts_that_the_documentation_states(speeches):
    assert sum(map(len, speeches.values())) == 30_911
    assert len(speeches) == 1_380
    characters = np.array([sum(map(len, texts)) for texts in speeches.values()])
    assert (characters >= 1_000).sum() == 635
    clients = {role: texts for role, texts in speeches.items() if len(texts) >= 2}
    assert len(clients) == 1_123
    sizes = np.sort([len("\n".join(texts)) for texts in clients.values()])[::-1]
    assert (sizes >= 2_000).sum() == 445
    assert round(sizes.sum() / 1e6, 2) == 4.27
    assert round(sizes[:50].sum() / sizes.sum(), 3) == 0.295
    assert (sizes // 80).sum() == 52_797


def test_each_role_is_a_client_whose_last_fifth_of_speeches_is_its_test(roles, speeches):
    encode = CharacterEncoder()
    names = sorted(role for role, texts in speeches.items() if len(texts) >= 2)
    counts = {part: [len(own) for own in roles.client_datasets(part)[1]] for part in ("train", "val", "test")}
    assert [len(sizes) for sizes in counts.values()] == [1_123] * 3
    for client, name in enumerate(names):
        texts = speeches[name]
        test = max(1, math.floor(len(texts) / 5 + 0.5))
        val = min(math.floor(len(texts) / 10 + 0.5), len(texts) - 1 - test)
        cuts = [texts[: len(texts) - test - val], texts[len(texts) - test - val : len(texts) - test], texts[-test:]]
        for part, own in zip(counts, cuts, strict=True):
            assert counts[part][client] == sum(-(-(len(text) + 2) // 81) for text in own)
    examples, clients = roles.client_datasets("test")
    hamlet = speeches["Hamlet", "HAMLET"]
    own = hamlet[-math.floor(len(hamlet) / 5 + 0.5) :]
    expected = encode.serve(encode({"text": own}).tensors, None)[0]
    served = examples.__getitems__(clients[names.index(("Hamlet", "HAMLET"))].tolist())[0]
    assert torch.equal(served, expected)


def test_a_round_of_roles_is_batches_of_80_characters_and_the_next(roles):
    loader = roles.train_dataloader()
    batches = serve(loader)
    assert {len(inputs) for inputs, _ in batches} <= {1, 2, 3, 4}
    for inputs, targets in batches:
        assert inputs.shape[1:] == targets.shape[1:] == (80,)
        assert inputs.max() < 90
