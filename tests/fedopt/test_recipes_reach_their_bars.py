"""The embedded digits recipes, trained in full. benchmarks/fedopt.py measures the same on the test part."""

import json
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Callback

from lightning_iclr.__main__ import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
KEEP = "--trainer.callbacks+=tests.fedopt.test_recipes_reach_their_bars.Accuracies"


class Accuracies(Callback):
    """Write the validation accuracy of every round, for the test to read."""

    def __init__(self):
        self.values = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.values.append(float(trainer.callback_metrics["val/accuracy"]))

    def on_train_end(self, trainer, pl_module):
        Path("accuracies.json").write_text(json.dumps(self.values))


def accuracies(method, seed):
    main(["fit", "--config", f"fedopt/digits_{method}", f"--seed_everything={seed}", f"--data.seed={seed}", KEEP,
          "--trainer.enable_progress_bar=false"])  # fmt: skip
    return np.array(json.loads(Path("accuracies.json").read_text()))


def rounds_to(target, values):
    means = np.convolve(values, np.ones(3) / 3, "valid")
    return int(np.argmax(means >= target)) + 3 if (means >= target).any() else len(values) + 1


def test_adaptive_methods_need_fewer_rounds_than_federated_averaging():
    runs = {method: [accuracies(method, seed) for seed in range(3)] for method in ("fedavg", "fedadam", "fedyogi")}
    rounds = {method: np.mean([rounds_to(0.85, run) for run in own]) for method, own in runs.items()}
    for method in ("fedadam", "fedyogi"):
        assert rounds[method] <= 0.85 * rounds["fedavg"]
        assert np.mean([run[-10:].mean() for run in runs[method]]) >= 0.92
