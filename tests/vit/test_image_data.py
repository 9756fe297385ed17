import itertools
import logging

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from lightning_iclr.sampling import SampleKey
from lightning_iclr.vit import ImageDataModule
from lightning_iclr.vit.images import BrokenImageError

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 10, 14, 3), dtype=np.uint8)
LABELS = [i % 3 for i in range(24)]
SMALL = {"image_size": 8, "batch_size": 4, "val_fraction": 0.25}


def table(image="image", label="label", labels=LABELS, count=24):
    return Dataset.from_dict({image: [Image.fromarray(p) for p in PIXELS[:count]], label: labels[:count]})


def served(data, split="train"):
    """All images and labels of a split, as evaluation shows them."""
    data.prepare_data()
    data.setup()
    batches = list(data.evaluation_loader(split))
    return torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches])


@pytest.fixture
def expected():
    data = ImageDataModule(table(), **SMALL)
    return served(data), data.class_names


@pytest.mark.parametrize("kind", ["folder", "parquet", "parquet folder", "saved", "dictionary", "columns"])
def test_the_same_images_come_from_every_kind_of_dataset(tmp_path, kind, expected):
    arguments = dict(SMALL)
    dataset = str(tmp_path / "data")
    if kind == "folder":
        # By class and in the table's order, which the folder builder sorts by name.
        for i, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
            folder = tmp_path / "data" / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    elif kind == "parquet":
        dataset = str(tmp_path / "data.parquet")
        table().to_parquet(dataset)
    elif kind == "parquet folder":
        (tmp_path / "data").mkdir()
        table().to_parquet(tmp_path / "data/train.parquet")
    elif kind == "saved":
        table().save_to_disk(dataset)
    elif kind == "dictionary":
        dataset, arguments["train_split"] = DatasetDict(all=table()), "all"
    else:
        dataset = table("picture", "digit")
        arguments |= {"image_column": "picture", "label_column": "digit"}
    data = ImageDataModule(dataset, **arguments)
    (images, labels), names = served(data), data.class_names
    (wanted, wanted_labels), _ = expected
    assert len(data.splits["train"][0]) == 18
    if kind == "folder":
        assert names == ["class0", "class1", "class2"]
        everything = torch.cat([images, served(data, "val")[0]])
        reference = ImageDataModule(table(), **SMALL)
        all_wanted = torch.cat([served(reference)[0], served(reference, "val")[0]])
        sums = lambda x: sorted(x.sum((1, 2, 3)).tolist())  # noqa: E731
        assert sums(everything) == pytest.approx(sums(all_wanted), abs=1e-4)
    else:
        torch.testing.assert_close(images, wanted)
        assert torch.equal(labels, wanted_labels)


def test_a_hub_dataset_that_cannot_be_reached_is_named():
    with pytest.raises(ConnectionError, match="dataset 'someone/pictures' is no local file.*needs a network once"):
        ImageDataModule("someone/pictures", **SMALL).prepare_data()


def test_a_hub_dataset_is_read_by_id_configuration_and_revision(monkeypatch):
    asked = []

    class Builder:
        def download_and_prepare(self):
            asked.append("prepared")

        def as_dataset(self):
            return DatasetDict(train=table(), validation=table(count=6))

    def load_dataset_builder(path, name, data_files=None, revision=None):
        asked.append((path, name, revision))
        return Builder()

    monkeypatch.setattr("datasets.load_dataset_builder", load_dataset_builder)
    data = ImageDataModule("someone/pictures", config_name="big", revision="v2", val_split="validation", **SMALL)
    images, _ = served(data, "val")
    assert asked == [("someone/pictures", "big", "v2"), "prepared", ("someone/pictures", "big", "v2")]
    assert len(images) == 6


def test_names_and_classes_become_numbers():
    words = ["cat", "dog", "ant"]
    by_name = ImageDataModule(table(labels=[words[i] for i in LABELS]), **SMALL)
    _, labels = served(by_name)
    assert by_name.class_names == ["ant", "cat", "dog"]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=words)})
    by_class = ImageDataModule(table().cast(features), **SMALL)
    _, classes = served(by_class)
    assert by_class.class_names == words
    assert by_class.num_classes == 3
    counts = labels.bincount()
    assert torch.equal(counts, classes.bincount()[[2, 0, 1]])


def test_the_holdout_is_stratified_and_disjoint():
    data = ImageDataModule(table(), **SMALL)
    _, train = served(data)
    _, val = served(data, "val")
    assert train.bincount().tolist() == [6, 6, 6]
    assert val.bincount().tolist() == [2, 2, 2]
    images = torch.cat([served(data)[0], served(data, "val")[0]])
    assert len(torch.unique(images.flatten(1), dim=0)) == 24


def test_splits_can_be_slices_and_sums():
    parts = DatasetDict(train=table(), extra=table(count=10))
    data = ImageDataModule(
        parts, train_split="train[:50%]+extra", val_split="train[50%:]", test_split="extra[:3]", **SMALL
    )
    assert [len(served(data, split)[0]) for split in ("train", "val", "test")] == [22, 12, 3]


def keys(data, epoch):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return loader


def test_training_batches_are_a_function_of_seed_epoch_and_row_alone():
    def epoch(seed, number, **arguments):
        data = ImageDataModule(table(), seed=seed, rand_augment=(2, 10), **{**SMALL, **arguments})
        data.setup()
        return torch.cat([images for images, _ in keys(data, number)])

    first = epoch(0, 0)
    assert torch.equal(first, epoch(0, 0))
    assert torch.equal(first, epoch(0, 0, num_workers=2))
    assert not torch.equal(first, epoch(0, 1))
    assert not torch.equal(first, epoch(1, 0))
    data = ImageDataModule(table(), **SMALL)
    data.setup()
    rows = data.train_dataloader().dataset
    alone = rows[SampleKey(5, 3, False)][0]
    rows[SampleKey(2, 3, False)]
    assert torch.equal(rows[SampleKey(5, 3, False)][0], alone)
    assert not torch.equal(rows[SampleKey(5, 4, False)][0], alone)


def test_padded_rows_of_an_evaluation_have_no_label():
    data = ImageDataModule(table(), **SMALL)
    data.setup()
    rows = data.evaluation_loader("val").dataset
    assert rows[SampleKey(1, 0, True)][1] == -100
    assert rows[SampleKey(1, 0, False)][1] == int(data.splits["val"][1][1])
    assert data.predict_dataloader().dataset[SampleKey(1, 0, True)][1] == -1


def broken(at=7):
    files = []
    for i, pixels in enumerate(PIXELS):
        import io

        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        data = buffer.getvalue()
        files.append({"bytes": data[:60] if i == at else data, "path": None})
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    return Dataset.from_dict({"image": files, "label": LABELS}, features=features)


def test_a_broken_image_is_named_by_its_row():
    data = ImageDataModule(broken(), train_split="train", val_split="train", **SMALL)
    data.setup()
    with pytest.raises(
        BrokenImageError, match=r"the given dataset \(val\), row 7: the image cannot be read.*on_error="
    ):
        list(data.val_dataloader())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_image_can_be_skipped_and_is_counted(caplog, num_workers):
    data = ImageDataModule(broken(), val_split="train", on_error="skip", num_workers=num_workers, **SMALL)
    data.setup()
    with caplog.at_level(logging.WARNING):
        labels = torch.cat([batch[1] for batch in data.val_dataloader()])
    assert (labels == -100).nonzero().flatten().tolist() == [7]
    assert data.skipped == 1
    if not num_workers:
        assert "row 7: the image cannot be read" in caplog.text
    shown = torch.cat([batch[1] for batch in data.train_dataloader()])
    assert len(shown) == 24
    assert (shown >= 0).all()


@pytest.mark.parametrize("kind", ["folder", "parquet", "memory"])
def test_cmyk_16_bit_and_truncated_files_come_from_every_kind_of_dataset(tmp_path, kind):
    pictures = [
        ("0.jpg", Image.new("CMYK", (8, 8), (0, 255, 0, 0))),
        ("1.png", Image.fromarray(np.full((8, 8), 32_768, dtype=np.uint16))),
        ("2.png", Image.fromarray(PIXELS[0])),
        *((f"{i}.png", Image.new("RGB", (8, 8), "blue")) for i in range(3, 6)),
    ]
    paths = [tmp_path / "data" / ("odd" if i < 3 else "plain") / name for i, (name, _) in enumerate(pictures)]
    for path, (_, picture) in zip(paths, pictures, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    paths[2].write_bytes(paths[2].read_bytes()[:-200])
    files = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    dataset = Dataset.from_dict({"image": files, "label": [0, 0, 0, 1, 1, 1]}, features)
    if kind == "folder":
        dataset = str(tmp_path / "data")
    elif kind == "parquet":
        dataset.to_parquet(tmp_path / "data.parquet")
        dataset = str(tmp_path / "data.parquet")
    arguments = {"image_size": 8, "resize": "squash", "batch_size": 6, "val_split": "train"}
    images, labels = served(ImageDataModule(dataset, on_error="skip", **arguments), "val")
    assert labels.tolist() == [0, 0, -100, 1, 1, 1]
    colours = images.mean(dim=(2, 3)) * 0.5 + 0.5
    expected = torch.tensor([[1.0, 0.0, 1.0], [128 / 255] * 3])
    torch.testing.assert_close(colours[:2], expected, rtol=0, atol=0.02)  # JPEG
    with pytest.raises(BrokenImageError, match=r"row 2: the image cannot be read"):
        served(ImageDataModule(dataset, **arguments), "val")


def test_predictions_of_a_folder_are_named_by_file(tmp_path):
    for name in ("b.png", "sub/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(PIXELS[0]).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    data = ImageDataModule(table(), predict_folder=str(tmp_path), **SMALL)
    data.setup()
    ((images, rows),) = data.predict_dataloader()
    assert images.shape == (2, 3, 8, 8)
    assert data.identify(rows) == {"image": ["b.png", "sub/a.jpg"]}


def test_predictions_of_a_table_are_named_by_row():
    data = ImageDataModule(table(), test_split="train[:5]", **SMALL)
    data.setup()
    rows = torch.cat([rows for _, rows in data.predict_dataloader()])
    assert data.identify(rows) == {"image": ["0", "1", "2", "3", "4"]}


def test_batches_can_be_what_hugging_face_s_models_take():
    data = ImageDataModule(table(), batch_format="dict", **SMALL)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert {name: tuple(value.shape) for name, value in batch.items()} == {"pixel_values": (4, 3, 8, 8), "labels": (4,)}
    assert set(next(iter(data.predict_dataloader()))) == {"pixel_values", "rows"}


def test_a_transform_of_the_user_s_replaces_ours():
    def transform(image, generator):
        return torch.full((1, 2, 2), float(np.asarray(image).max())) + torch.rand((), generator=generator)

    data = ImageDataModule(table(), transform=transform, evaluation_transform=transform, **SMALL)
    data.setup()
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (4, 1, 2, 2)


def test_labels_are_not_needed_for_pre_training():
    data = ImageDataModule(table().remove_columns("label"), label_column=None, **SMALL)
    _, labels = served(data)
    assert labels.unique().tolist() == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_column": "img"}, "image_column='img' is no column of .*image, label; set image_column"),
        ({"label_column": "y"}, "label_column='y' is no column of .*image, label; set label_column"),
        ({"train_split": "all"}, r"train_split='all' is no split of this dataset, which has: train \(24\)"),
        ({"num_classes": 2}, "label 2 in row 2 of .* is outside of 0 to 1"),
        ({"val_fraction": 0.99}, "val_fraction=0.99 leaves no training rows of 24"),
        ({"predict_folder": "nowhere"}, "predict_folder='nowhere' is no folder with images"),
        ({"dataset": "nowhere/at/all"}, "dataset 'nowhere/at/all' is no file or folder, and cannot be a hub id"),
        ({"dataset": 3}, "dataset must be a name, a Dataset or a DatasetDict, got int"),
    ],
)
def test_data_that_do_not_fit_are_named(arguments, message):
    data = ImageDataModule(**{"dataset": table(), **SMALL, **arguments})
    with pytest.raises((ValueError, FileNotFoundError, TypeError), match=message):
        served(data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be 0 or more, got -1"),
        ({"val_fraction": 1.0}, "val_fraction must be between 0 and 1, got 1.0"),
        ({"image_size": (0, 4)}, r"image_size must be .* got \(0, 4\)"),
        ({"crop": "random"}, "crop must be 'inception' or 'centre', got 'random'"),
        ({"std": 0.0}, "std must be positive, got 0.0"),
        ({"mean": (0.5, 0.5)}, r"mean must be one number, or one a channel \(3\)"),
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'skip', got 'ignore'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageDataModule(table(), **{**SMALL, **arguments})


def test_grey_images_of_arrays_are_served_in_one_channel():
    pixels = [PIXELS[i, :, :, 0] for i in range(24)]
    from datasets import Array2D

    features = Features({"image": Array2D((10, 14), "uint8"), "label": Value("int64")})
    data = ImageDataModule(Dataset.from_dict({"image": pixels, "label": LABELS}, features), in_channels=1, **SMALL)
    images, _ = served(data)
    assert images.shape == (18, 1, 8, 8)


def test_every_row_is_trained_on_once_an_epoch():
    data = ImageDataModule(table(), val_split="train", image_size=8, batch_size=4)
    data.setup()
    labels = list(itertools.chain.from_iterable(batch[1].tolist() for batch in data.train_dataloader()))
    assert sorted(labels) == sorted(LABELS)
