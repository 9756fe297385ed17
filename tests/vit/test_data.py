"""The embedded digits: splits, subsets, augmentation and loaders."""

import math
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lightning_iclr.embedded import load_digits
from lightning_iclr.sampling import SampleKey
from lightning_iclr.vit.data import DigitsDataModule, MNIST5kDataModule, balanced_subset

SIZES = [(DigitsDataModule, (1257, 180, 360), 8), (MNIST5kDataModule, (3500, 500, 1000), 28)]


@pytest.mark.parametrize(("kind", "sizes", "side"), SIZES)
def test_the_splits_have_the_stated_sizes_are_disjoint_and_stratified(kind, sizes, side):
    data = kind()
    data.setup()
    splits = [data.splits[name] for name in ("train", "val", "test")]
    assert tuple(len(split) for split in splits) == sizes
    assert splits[0].images.shape[1:] == (1, side, side)
    assert sorted(torch.cat([split.rows for split in splits]).tolist()) == list(range(sum(sizes)))
    share = torch.cat([split.labels for split in splits]).bincount() / sum(sizes)
    for split in splits:
        # Two cuts, each of which rounds a class's count to a neighbouring integer.
        assert (split.labels.bincount() - share * len(split)).abs().max() < 2


def test_the_split_is_that_of_datasets_with_its_seed():
    data = DigitsDataModule()
    data.setup()
    whole = load_digits().add_column("row", range(1797))
    rest = whole.train_test_split(test_size=360, stratify_by_column="label", seed=0)
    inner = rest["train"].train_test_split(test_size=180, stratify_by_column="label", seed=0)
    assert data.splits["test"].rows.tolist() == rest["test"]["row"][:]
    assert data.splits["train"].rows.tolist() == inner["train"]["row"][:]


def test_split_seed_changes_the_split_and_seed_does_not():
    def test_rows(**arguments):
        data = DigitsDataModule(**arguments)
        data.setup()
        return data.splits["test"].rows.tolist()

    assert test_rows() == test_rows(seed=1)
    assert test_rows() != test_rows(split_seed=1)


def test_setup_twice_keeps_the_first_tensors():
    data = DigitsDataModule()
    data.setup("fit")
    first = data.splits["train"]
    data.setup("test")
    assert data.splits["train"] is first


def test_served_pixels_are_the_embedded_ones_standardised():
    loader = DigitsDataModule(batch_size=7, mean=0.2, std=0.5).evaluation_loader("val")
    images, labels = next(iter(loader))
    rows = loader.dataset.rows[:7]
    table = load_digits().with_format("numpy")[rows.numpy()]
    expected = (np.asarray(table["image"], dtype=np.float64)[:, None] / 16 - 0.2) / 0.5
    np.testing.assert_allclose(images.numpy(), expected, atol=1e-6)
    assert labels.tolist() == table["label"].tolist()


def test_a_final_fit_trains_on_validation_too_and_still_shows_it():
    data = DigitsDataModule(train_on_validation=True)
    data.setup()
    assert len(data.splits["train"]) == 1437
    assert len(data.splits["val"]) == 180
    assert set(data.splits["val"].rows.tolist()) < set(data.splits["train"].rows.tolist())
    assert not set(data.splits["test"].rows.tolist()) & set(data.splits["train"].rows.tolist())


def test_few_labels_are_balanced_and_change_with_subset_seed_only():
    def rows(**arguments):
        data = MNIST5kDataModule(num_train_labels=100, **arguments)
        data.setup()
        assert data.splits["train"].labels.bincount().tolist() == [10] * 10
        return data.splits["train"].rows.tolist()

    assert rows() == rows(seed=3)
    assert rows() != rows(subset_seed=1)


def test_a_subset_that_classes_do_not_divide_gives_some_classes_one_more():
    labels = torch.arange(3).repeat(5)
    chosen = balanced_subset(labels, 8, seed=0)
    assert sorted(labels[chosen].bincount().tolist()) == [2, 3, 3]
    assert len(set(chosen.tolist())) == 8


def test_a_subset_larger_than_a_class_names_the_class():
    with pytest.raises(ValueError, match="num_train_labels=6 takes 3 images of class 1, which has 2"):
        balanced_subset(torch.tensor([0, 0, 0, 1, 1]), 6, seed=0)


def _epoch(data, epoch, workers_loader=None):
    loader = workers_loader or data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [torch.cat(parts) for parts in zip(*loader, strict=True)]


def test_augmentation_depends_on_epoch_and_seed_and_not_on_the_number_of_workers():
    def epochs(num_workers, seed=0):
        data = DigitsDataModule(num_train_labels=50, batch_size=16, num_workers=num_workers, seed=seed)
        data.setup()
        loader = data.train_dataloader()
        return [_epoch(data, epoch, loader)[0] for epoch in (0, 1)]

    alone, with_workers, reseeded = epochs(0), epochs(2), epochs(0, seed=1)
    assert torch.equal(torch.stack(alone), torch.stack(with_workers))
    assert not torch.equal(alone[0], reseeded[0])
    assert not torch.equal(alone[0].sort(dim=0).values, alone[1].sort(dim=0).values)  # not only the order


def test_augmentation_of_a_batch_is_that_of_each_image_alone():
    data = DigitsDataModule()
    data.setup()
    dataset = data.train_dataloader().dataset
    keys = [SampleKey(index, epoch, False) for index, epoch in ((5, 0), (2, 3), (5, 1))]
    images, labels = dataset.__getitems__(keys)
    for key, image, label in zip(keys, images, labels, strict=True):
        torch.testing.assert_close(dataset[key][0], image, rtol=0, atol=1e-6)
        assert dataset[key][1] == label


def test_validation_test_and_switched_off_training_images_are_not_augmented():
    data = DigitsDataModule(augment=False)
    data.setup()
    plain = (data.splits["train"].images - 0.3) / 0.35
    torch.testing.assert_close(
        data.train_dataloader().dataset.__getitems__([SampleKey(i, 4, False) for i in range(1257)])[0], plain
    )
    torch.testing.assert_close(
        torch.cat([images for images, _ in DigitsDataModule().evaluation_loader("train")]), plain
    )


def test_padded_keys_have_the_ignored_label_and_row():
    data = DigitsDataModule()
    data.setup()
    keys = [SampleKey(0, 0, False), SampleKey(1, 0, True)]
    labels = data.val_dataloader().dataset.__getitems__(keys)[1]
    assert labels[0] == data.splits["val"].labels[0]
    assert labels[1] == -100
    rows = data.predict_dataloader().dataset.__getitems__(keys)[1]
    assert rows.tolist() == [int(data.splits["test"].rows[0]), -1]


def test_predict_serves_the_test_images_with_their_rows():
    data = MNIST5kDataModule(batch_size=400)
    data.setup()
    images, rows = (torch.cat(parts) for parts in zip(*data.predict_dataloader(), strict=True))
    assert rows.tolist() == data.splits["test"].rows.tolist()
    torch.testing.assert_close(images, (data.splits["test"].images - 0.3) / 0.35)
    assert data.identify(rows[:2]) == {"image": [str(int(rows[0])), str(int(rows[1]))]}
    assert data.class_names == list("0123456789")
    assert data.num_classes == 10


def test_all_loaders_work_under_a_trainer(tmp_path):
    class Mean(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(64, 10)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.training_step(batch, batch_idx))

        def test_step(self, batch, batch_idx):
            self.log("test/loss", self.training_step(batch, batch_idx))

        def predict_step(self, batch, batch_idx):
            return batch[1]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = DigitsDataModule(batch_size=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning advises workers and devices
        trainer = Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        module = Mean()
        trainer.fit(module, data)
        loss = trainer.test(module, data, verbose=False)[0]["test/loss"]
        rows = torch.cat(trainer.predict(module, data))
    assert loss < math.log(10)
    assert rows.tolist() == data.splits["test"].rows.tolist()


@pytest.mark.parametrize("kind", [DigitsDataModule, MNIST5kDataModule])
def test_the_command_line_knows_every_argument(kind):
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(kind, "data")
    parsed = parser.parse_args(["--data.batch_size=5", "--data.train_on_validation=true", "--data.rotate=3"])
    data = parser.instantiate(parsed)["data"]
    assert (data.batch_size, data.train_on_validation, data.augment["rotate"]) == (5, True, 3.0)
    assert data.augment["shift"] == {DigitsDataModule: 0.5, MNIST5kDataModule: 1.0}[kind]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be 0 or more, got -1"),
        ({"num_train_labels": 9}, "num_train_labels must be at least one a class, 10; got 9"),
        ({"shift": -1.0}, "shift must be between 0 and 8, got -1.0"),
        ({"rotate": 181.0}, "rotate must be between 0 and 180.0, got 181.0"),
        ({"scale": 1.0}, "scale must be between 0 and 0.99, got 1.0"),
        ({"std": 0.0}, "std must be positive, got 0.0"),
    ],
)
def test_a_number_outside_its_range_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        DigitsDataModule(**arguments)


def test_an_unknown_split_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="split must be one of train, val, test; got 'dev'"):
        DigitsDataModule().evaluation_loader("dev")
