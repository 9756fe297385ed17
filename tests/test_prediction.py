import csv

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_iclr.prediction import PredictionWriter
from tests.distributed import Ranks, run_distributed

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'predict_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler`"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty"),
]

NAMES = ["cat", "a dog", 'the "owl"', "eel, grey"]
LOGITS = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)


class Returns(LightningModule):
    """Predict what a function makes of a batch's first element."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def predict_step(self, batch, batch_idx):
        return self.function(batch[0])


class Classifies(Returns):
    num_classes = 4


class Named(LightningDataModule):
    """Serve inputs in any order with their rows, which it identifies by two columns."""

    class_names = NAMES

    def __init__(self, inputs, rows=None):
        super().__init__()
        rows = torch.arange(len(inputs)) if rows is None else torch.tensor(rows)
        self.data = TensorDataset(torch.as_tensor(inputs), rows)

    def predict_dataloader(self):
        return DataLoader(self.data, batch_size=3)

    def identify(self, rows):
        return {"file": [f"{row},{row}.png" for row in rows.tolist()], "user": (rows % 2).tolist()}


class Texts(Named):
    def decode(self, tokens):
        return ["".join("\n,bc"[token] for token in row) for row in tokens.tolist()]


def predict(module, data, folder=".", **options):
    ranks = {"devices": 2, "strategy": "ddp", "plugins": [Ranks()]} if torch.distributed.is_initialized() else {}
    trainer = Trainer(
        accelerator="cpu",
        logger=CSVLogger(folder, name=None, version=""),
        callbacks=[PredictionWriter(**options)],
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"devices": 1, **ranks},
    )
    trainer.predict(module, data)


def read(path="predictions.csv"):
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    return header, rows


def softmax(logits):
    return torch.softmax(logits, dim=1)


PROBABILITIES = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)


def test_a_class_and_its_probability_are_written_for_each_row():
    predict(Classifies(softmax), Named(LOGITS))
    header, rows = read()
    assert header == ["file", "user", "label", "probability"]
    assert [row[:2] for row in rows] == [[f"{i},{i}.png", str(i % 2)] for i in range(7)]
    assert [row[2] for row in rows] == [NAMES[label] for label in LOGITS.argmax(axis=1)]
    assert [float(row[3]) for row in rows] == pytest.approx(PROBABILITIES.max(axis=1).tolist(), rel=1e-5)


@pytest.mark.parametrize("top_k", [3, 4, 9])
def test_the_likeliest_classes_come_first_and_each_class_has_a_column(top_k):
    predict(Classifies(softmax), Named(LOGITS), top_k=top_k, all_probabilities=True)
    header, rows = read()
    written = min(top_k, 4)
    pairs = [f"{kind}_{place}" for place in range(1, written + 1) for kind in ("label", "probability")]
    assert header == ["file", "user", *pairs, *(f"probability/{name}" for name in NAMES)]
    order = np.argsort(-LOGITS, axis=1)[:, :written]
    for row, best, expected in zip(rows, order, PROBABILITIES, strict=True):
        assert row[2 : 2 + 2 * written : 2] == [NAMES[label] for label in best]
        numbers = [float(number) for number in row[3 : 2 + 2 * written : 2] + row[2 + 2 * written :]]
        assert numbers == pytest.approx([*expected[best], *expected], rel=1e-5)


def test_rows_are_in_the_datas_order_and_those_that_fill_up_a_batch_are_left_out():
    order = [4, 2, -1, 0, 6, -1, 1]
    predict(Classifies(softmax), Named(LOGITS, order))
    _, rows = read()
    assert [row[0] for row in rows] == [f"{i},{i}.png" for i in (0, 1, 2, 4, 6)]
    assert [row[2] for row in rows] == [NAMES[LOGITS[order.index(i)].argmax()] for i in (0, 1, 2, 4, 6)]


def test_tokens_are_written_as_the_data_decode_them_or_as_numbers():
    tokens = torch.tensor([[3, 1, 0, 2], [2, 2, 1, 3]])
    predict(Returns(lambda inputs: inputs), Texts(tokens))
    assert read() == (["file", "user", "prediction"], [["0,0.png", "0", "c,\nb"], ["1,1.png", "1", "bb,c"]])
    predict(Returns(lambda inputs: inputs), Named(tokens))
    assert [row[2] for row in read()[1]] == ["3 1 0 2", "2 2 1 3"]
    predict(Returns(lambda inputs: inputs[:, 0]), Texts(tokens))
    assert [row[2] for row in read()[1]] == ["3", "2"]


def test_numbers_of_no_class_are_features():
    predict(Returns(lambda inputs: inputs.double()), Named(LOGITS))
    header, rows = read()
    assert header == ["file", "user", *(f"feature_{i}" for i in range(4))]
    np.testing.assert_allclose(np.array([row[2:] for row in rows], dtype=np.float64), LOGITS, rtol=1e-5)
    predict(Returns(lambda inputs: inputs[:, 1]), Named(LOGITS))
    header, rows = read()
    assert header[2:] == ["feature_0"]
    np.testing.assert_allclose([float(row[2]) for row in rows], LOGITS[:, 1], rtol=1e-5)


def test_images_are_an_array_beside_what_identifies_them():
    predict(Classifies(lambda inputs: inputs.view(-1, 1, 2, 2) * 2), Named(LOGITS, [6, 5, 4, 3, 2, 1, 0]))
    with np.load("predictions.npz") as arrays:
        assert sorted(arrays) == ["file", "prediction", "user"]
        np.testing.assert_array_equal(arrays["prediction"], LOGITS[::-1].reshape(7, 1, 2, 2) * 2)
        assert arrays["file"].tolist() == [f"{i},{i}.png" for i in range(7)]
        assert arrays["user"].tolist() == [0, 1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("shape", [(-1, 4), (-1, 2, 2)], ids=["table", "array"])
@pytest.mark.parametrize("kind", [Named, lambda inputs: DataLoader(TensorDataset(torch.tensor(inputs)), batch_size=2)])
def test_two_processes_write_what_one_writes(tmp_path, shape, kind):
    def run(folder):
        predict(Returns(lambda inputs: inputs.view(shape)), kind(LOGITS), folder)
        return {}

    run(tmp_path / "one")
    run_distributed(run, tmp_path / "two")  # one has four rows, the other three
    if len(shape) == 2:
        one, two = (read(tmp_path / name / "predictions.csv") for name in ("one", "two"))
        assert one == two
        assert len(one[1]) == 7
    else:
        one, two = (dict(np.load(tmp_path / name / "predictions.npz")) for name in ("one", "two"))
        np.testing.assert_equal(two, one)
        np.testing.assert_array_equal(one["prediction"], LOGITS.reshape(7, 2, 2))


def test_rows_of_data_without_names_are_counted():
    predict(Returns(lambda inputs: inputs), DataLoader(TensorDataset(torch.tensor(LOGITS)), batch_size=3))
    header, rows = read()
    assert header[0] == "row"
    assert [row[0] for row in rows] == [str(i) for i in range(7)]


@pytest.mark.parametrize(
    ("function", "kind"), [(lambda inputs: {"logits": inputs}, "dict"), (lambda inputs: inputs.sum(), "a scalar")]
)
def test_what_has_no_entry_for_each_row_is_refused(function, kind):
    with pytest.raises(TypeError, match=f"a tensor with one entry a row, got {kind}"):
        predict(Returns(function), Named(LOGITS))


def test_a_bad_number_of_classes_is_named():
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        PredictionWriter(top_k=0)
