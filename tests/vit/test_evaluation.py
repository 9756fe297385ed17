import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from sklearn.linear_model import Ridge
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_iclr.vit import (
    DigitsDataModule,
    FewShotEvaluation,
    MaskedPatchPretraining,
    PredictionWriter,
    VisionTransformer,
    ViTClassifier,
)
from lightning_iclr.vit.fewshot import few_shot_rows
from tests.distributed import Ranks, run_distributed

TINY = {"image_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 10, "dim": 8, "depth": 1, "num_heads": 2}


def classifier():
    torch.manual_seed(0)
    module = ViTClassifier(VisionTransformer(**TINY))
    nn.init.normal_(module.net.head.weight)
    return module


def trainer(folder, callback, **arguments):
    ranks = {"devices": 2, "strategy": "ddp", "plugins": [Ranks()]} if torch.distributed.is_initialized() else {}
    return Trainer(
        accelerator="cpu",
        logger=CSVLogger(folder, name=None, version=""),
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **{"devices": 1, **ranks, **arguments},
    )


def predict(folder, module):
    trainer(folder, PredictionWriter()).predict(module, datamodule=DigitsDataModule(batch_size=50))
    return {}


def read(folder):
    header, *rows = csv.reader((Path(folder) / "predictions.csv").read_text().splitlines())
    return header, rows


def test_a_classifier_s_predictions_are_those_of_a_plain_loop(tmp_path):
    module, data = classifier(), DigitsDataModule()
    predict(tmp_path, module)
    header, rows = read(tmp_path)
    assert header == ["image", "label", "probability"]
    data.setup()
    split = data.splits["test"]
    images = (split.images - 0.3) / 0.35
    with torch.no_grad():
        probabilities = module(images).softmax(dim=1)
    order = split.rows.argsort()
    assert [row[0] for row in rows] == [str(i) for i in split.rows[order].tolist()]
    assert [row[1] for row in rows] == [str(i) for i in probabilities.argmax(1)[order].tolist()]
    written = torch.tensor([float(row[2]) for row in rows])
    torch.testing.assert_close(written, probabilities.amax(1)[order], rtol=0, atol=2e-6)


def test_pre_training_predicts_representations(tmp_path):
    module, data = MaskedPatchPretraining(VisionTransformer(**{**TINY, "num_classes": 0})), DigitsDataModule()
    predict(tmp_path, module)
    header, rows = read(tmp_path)
    assert header == ["image", *(f"feature_{i}" for i in range(8))]
    data.setup()
    split = data.splits["test"]
    with torch.no_grad():
        features = module.net.represent((split.images - 0.3) / 0.35)[split.rows.argsort()]
    written = torch.tensor([[float(v) for v in row[1:]] for row in rows])
    torch.testing.assert_close(written, features, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using `DistributedSampler`")
def test_two_processes_write_the_file_of_one_without_padded_rows(tmp_path):
    # 360 test images in batches of 7 to two ranks: the last batches are filled up
    def run():
        data = DigitsDataModule(batch_size=7, num_train_labels=None)
        data.setup()
        data.splits["test"] = type(data.splits["test"])(
            data.splits["test"].images[:11],
            data.splits["test"].labels[:11],
            data.splits["test"].rows[:11],
            0.3,
            0.35,
            0,
        )
        folder = tmp_path / ("two" if torch.distributed.is_initialized() else "one")
        trainer(folder, PredictionWriter()).predict(classifier(), datamodule=data)
        return {}

    run()
    run_distributed(run)
    assert read(tmp_path / "one") == read(tmp_path / "two")
    assert len(read(tmp_path / "two")[1]) == 11


def predict_plainly(folder):
    images = torch.arange(11.0).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    labels = torch.full((11,), 7)
    module = classifier()
    trainer(folder, PredictionWriter()).predict(module, DataLoader(TensorDataset(images, labels), batch_size=2))
    return {}


@pytest.mark.filterwarnings("ignore:The 'predict_dataloader' does not have many workers")
def test_images_of_a_plain_loader_are_numbered_on_any_number_of_processes(tmp_path):
    predict_plainly(tmp_path / "one")
    run_distributed(predict_plainly, tmp_path / "two")  # six images and five
    _, rows = read(tmp_path / "one")
    assert [row[0] for row in rows] == [str(i) for i in range(11)]
    assert read(tmp_path / "two") == read(tmp_path / "one")


def test_few_shot_accuracy_is_measured_at_every_nth_validation(tmp_path):
    callback = FewShotEvaluation(shots=(1,), seeds=1, every_n_validations=2)
    run = trainer(tmp_path, callback, max_steps=5, limit_val_batches=1, log_every_n_steps=1, val_check_interval=1)
    run.fit(classifier(), datamodule=DigitsDataModule(batch_size=32))
    table = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    validated = [row for row in table if row["val/loss"]]
    assert [bool(row["fewshot/1_shot"]) for row in validated] == [False, True, False, True, False]


def few_shot(folder):
    run = trainer(
        folder,
        FewShotEvaluation(shots=(1, 5), seeds=2),
        max_steps=1,
        limit_val_batches=1,
        log_every_n_steps=1,
        val_check_interval=1,
    )
    module = classifier()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module.net.head.weight.requires_grad_(True)
    module.optimizer = lambda params: torch.optim.SGD(params, lr=0.0)
    run.fit(module, datamodule=DigitsDataModule(batch_size=32))
    return {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("fewshot/")}


def test_few_shot_accuracy_equals_ridge_regression_on_the_same_images(tmp_path):
    measured = few_shot(tmp_path)
    module, data = classifier().eval(), DigitsDataModule()
    data.setup()
    train, val = data.splits["train"], data.splits["val"]
    with torch.no_grad():
        support, query = (module.net.represent((part.images - 0.3) / 0.35).double().numpy() for part in (train, val))
    for shots in (1, 5):
        accuracies = []
        for seed in range(2):
            rows = few_shot_rows(train.labels, 5, 10, seed)[:, :shots].flatten().numpy()
            mean, std = support[rows].mean(0), support[rows].std(0) + 1e-5
            x, z = (np.c_[(f - mean) / std, np.full(len(f), 100.0)] for f in (support[rows], query))
            targets = 2 * np.eye(10)[train.labels[rows]] - 1
            ridge = Ridge(alpha=1024, fit_intercept=False).fit(x, targets)
            accuracies.append((ridge.predict(z).argmax(1) == val.labels.numpy()).mean())
        assert measured[f"fewshot/{shots}_shot"] == pytest.approx(np.mean(accuracies), abs=1e-6)


def test_few_shot_accuracy_is_the_same_on_two_processes(tmp_path):
    one = few_shot(tmp_path / "one")
    for two in run_distributed(few_shot, tmp_path / "two"):
        assert two == pytest.approx(one, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shots": ()}, "shots must hold at least one number"),
        ({"shots": (0, 5)}, "shots must be at least 1, got 0"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"every_n_validations": 0}, "every_n_validations must be at least 1, got 0"),
        ({"l2": 0.0}, "l2 must be positive, got 0.0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        FewShotEvaluation(**arguments)


def test_a_class_with_too_few_images_is_named():
    with pytest.raises(ValueError, match="shots=3 takes more images of class 1 than there are, 2"):
        few_shot_rows(torch.tensor([0, 0, 0, 1, 1]), shots=3, num_classes=2, seed=0)
