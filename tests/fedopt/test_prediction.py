"""Files of predictions: each row's origin, and what a module of the paper's tasks finds there."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_iclr.__main__ import main
from lightning_iclr.embedded import load_digits
from lightning_iclr.fedopt.data import FederatedDataModule
from lightning_iclr.fedopt.encoders import ImageEncoder
from lightning_iclr.fedopt.model import CharacterLSTM, DigitsConvNet, TagClassifier
from lightning_iclr.fedopt.module import Autoencoder, Classifier, LanguageModel
from lightning_iclr.fedopt.partition import KeyPartitioner
from lightning_iclr.fedopt.text_encoders import CharacterEncoder, TagEncoder
from lightning_iclr.fedopt.zipf import ZipfTags, generate_zipf_texts
from lightning_iclr.prediction import PredictionWriter

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
]

USERS = ["a"] * 20 + ["b"] * 9 + ["c"] * 11


def numbers(columns):
    """Encode each row as its own number: what is served tells which row it was."""
    rows = torch.tensor(columns["row"])
    return rows.float(), rows


def numbered(size=40):
    return Dataset.from_dict({"row": list(range(size)), "user": (USERS * 3)[:size]})


def federated(dataset, **arguments):
    defaults = {"encode": numbers, "partition": KeyPartitioner("user"), "clients_per_round": 1, "batch_size": 4}
    data = FederatedDataModule(dataset, **{**defaults, **arguments})
    data.prepare_data()
    data.setup()
    return data


def predicted(data):
    """Return the inputs that prediction serves, and where the data module says that they come from."""
    inputs, positions = (torch.cat(parts) for parts in zip(*data.predict_dataloader(), strict=True))
    assert positions.tolist() == list(range(len(positions)))
    return inputs, data.identify(positions)


@pytest.mark.parametrize(
    "sizes",
    [
        {"val_size": 8, "test_size": 6},
        {"test_size": 0.25, "stratify_column": "user"},
        {"val_size": 5},
        {"client_split": (0.1, 0.3)},
        {"client_split": (0.2, 0.0)},
        {"client_split": (0.0, 0.5), "take_every": 2, "max_clients": 2, "max_examples_per_client": 3},
    ],
    ids=lambda sizes: "-".join(sizes),
)
def test_the_row_of_a_prediction_is_that_of_the_training_split(sizes):
    inputs, origin = predicted(federated(numbered(), **sizes))
    assert origin["row"] == inputs.int().tolist()
    assert len(origin["row"]) > 1
    assert ("client" in origin) == ("client_split" in sizes)
    if "client" in origin:
        kept = "ac" if "max_clients" in sizes else "abc"
        assert [kept[client] for client in origin["client"]] == [USERS[row] for row in origin["row"]]
    assert "example" not in origin


def test_the_row_of_a_part_of_its_own_counts_in_its_split():
    tables = DatasetDict(train=numbered(), test=numbered(80))
    inputs, origin = predicted(federated(tables, test_split="test[60:]"))
    assert origin == {"row": list(range(20))}
    assert inputs.int().tolist() == list(range(60, 80))
    _, origin = predicted(federated(tables, val_size=10, test_split="test[60:]"))  # a drawn part beside it
    assert origin == {"row": list(range(20))}


def test_a_window_of_text_is_identified_by_its_row_and_its_number_there():
    texts = ["abcdefgh" * length for length in (1, 4, 2, 3, 1, 5, 2)]
    table = Dataset.from_dict({"text": texts, "user": list("babaaba")})
    encode = CharacterEncoder(sequence_length=5)
    windows, origin = predicted(federated(table, encode=encode, client_split=(0.0, 0.5)))
    assert len(windows) > len(set(origin["row"])) > 2
    for window, row, client, example in zip(windows, *origin.values(), strict=True):
        assert "ab"[client] == table["user"][row]
        assert torch.equal(window, encode.serve(encode({"text": [texts[row]]}).tensors, None)[0][example])
    assert list(origin) == ["row", "client", "example"]


def test_classes_have_the_names_of_the_column_or_of_the_tags():
    table = Dataset.from_dict({"image": np.zeros((40, 2, 2), np.uint8), "label": [0, 1] * 20, "user": USERS})
    table = table.cast_column("label", ClassLabel(names=["cat", "dog"]))
    assert federated(table, encode=ImageEncoder(), test_size=4).class_names == ["cat", "dog"]
    assert federated(numbered(), test_size=4).class_names == []
    questions = Dataset.from_dict({"tokens": ["a"] * 6, "tags": ["x|z", "z", "z", "y|z", "y", "w"], "user": ["u"] * 6})
    encode = TagEncoder(title_column=None, vocabulary_size=1, num_tags=6)
    data = federated(questions, encode=encode, test_size=1)
    held_out = predicted(data)[1]["row"][0]
    counts = {tag: sum(tag in tags for i, tags in enumerate(questions["tags"]) if i != held_out) for tag in "wxyz"}
    frequent = sorted((tag for tag in counts if counts[tag]), key=lambda tag: (-counts[tag], tag))
    assert data.class_names == [*frequent, *map(str, range(len(frequent), 6))]


def predict(module, data, **options):
    Trainer(
        accelerator="cpu",
        devices=1,
        logger=CSVLogger(".", name=None, version=""),
        callbacks=[PredictionWriter(**options)],
        enable_progress_bar=False,
        enable_model_summary=False,
    ).predict(module, data)


def read(path="predictions.csv"):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_command_writes_classes_and_probabilities_of_the_trained_network():
    quick = ["--config", "fedopt/digits_fedadam", "--trainer.max_epochs=12", "--trainer.enable_progress_bar=false"]
    main(["fit", *quick])
    checkpoint = "lightning_logs/version_0/checkpoints/last.ckpt"
    main(["predict", *quick, "--ckpt_path", checkpoint])
    (path,) = Path().rglob("predictions.csv")
    rows = read(path)
    assert len(rows) == 180
    numbers = [int(row["row"]) for row in rows]
    assert len(set(numbers)) == 180
    net = DigitsConvNet()
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    net.load_state_dict({name.removeprefix("net."): weight for name, weight in weights.items()})
    table = load_digits().with_format("numpy")
    images = torch.from_numpy(table["image"][:][numbers]).unsqueeze(1) / 16.0
    with torch.no_grad():
        logits = net.eval()(images).numpy()
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert [int(row["label"]) for row in rows] == expected.argmax(axis=1).tolist()
    assert len({row["label"] for row in rows}) > 2
    written = np.array([[float(row[f"probability/{digit}"]) for digit in range(10)] for row in rows])
    np.testing.assert_allclose(written, expected, rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose([float(row["probability"]) for row in rows], expected.max(axis=1), rtol=2e-5)
    # The network has learned something of these very rows; a tenth of them would be right by chance.
    assert np.mean(table["label"][:][numbers] == expected.argmax(axis=1)) > 0.3


def test_the_five_likeliest_tags_are_those_of_the_texts_words():
    net = TagClassifier(2000, 100)
    nn.init.normal_(net.head.weight, std=5.0)
    predict(Classifier(net, loss="sigmoid"), ZipfTags(), top_k=5)
    texts, rows = generate_zipf_texts(), read()
    numbers = [int(row["row"]) for row in rows]
    assert [int(row["client"]) for row in rows] == texts.client[numbers].tolist()
    words = texts.words[numbers]
    bags = np.stack([np.bincount(own[own >= 0], minlength=2000) / (own >= 0).sum() for own in words])
    weight, bias = (parameter.detach().double().numpy() for parameter in (net.head.weight, net.head.bias))
    logits = bags @ weight.T + bias
    highest = np.argsort(-logits, axis=1)[:, :5]
    assert [[int(row[f"label_{place}"]) for place in range(1, 6)] for row in rows] == highest.tolist()
    written = [[float(row[f"probability_{place}"]) for place in range(1, 6)] for row in rows]
    expected = 1 / (1 + np.exp(-np.take_along_axis(logits, highest, axis=1)))
    np.testing.assert_allclose(written, expected, rtol=1e-4)


def test_a_language_model_continues_a_text_at_each_place():
    table = Dataset.from_dict({"text": ["to be or not", "that is", "the question"], "user": ["a", "a", "b"]})
    encode = CharacterEncoder(sequence_length=6, vocabulary=" abehinoqrstu")
    net = CharacterLSTM(vocabulary_size=17, hidden_dim=8)
    nn.init.normal_(net.head.weight)
    predict(LanguageModel(net), federated(table, encode=encode, partition=KeyPartitioner("user"), test_size=2))
    rows = read()
    assert len(rows) > 2
    assert len({row["prediction"] for row in rows}) > 1
    for row in rows:
        # A start sign, the text and an end sign; a window is six of them, and the next begins at the seventh.
        numbers = [15, *(" abehinoqrstu".index(c) + 1 for c in table["text"][int(row["row"])]), 16]
        window = (numbers + [0] * 14)[7 * int(row["example"]) :][:6]
        with torch.no_grad():
            guesses = net(torch.tensor([window]))[0].argmax(dim=-1).tolist()
        assert row["prediction"] == "".join("␀ abehinoqrstu␦␂␃"[guess] for guess in guesses)


def test_an_autoencoder_writes_reconstructions_beside_their_rows():
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 4), dtype=np.uint8)
    table = Dataset.from_dict({"image": images, "user": USERS[14:26]})
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Tanh(), nn.Linear(3, 16), nn.Unflatten(1, (1, 4, 4)))
    data = federated(table, encode=ImageEncoder(label_column=None), client_split=(0.0, 0.5))
    predict(Autoencoder(net), data)
    with np.load("predictions.npz") as arrays, torch.no_grad():
        rows = arrays["row"]
        assert rows.tolist() == [3, 4, 5, 9, 10, 11]  # the last half of six rows of a, and of b
        assert arrays["client"].tolist() == [0, 0, 0, 1, 1, 1]
        expected = net(torch.from_numpy(images[rows]).unsqueeze(1) / 255)
        np.testing.assert_allclose(arrays["prediction"], expected.numpy(), rtol=1e-5, atol=1e-6)
