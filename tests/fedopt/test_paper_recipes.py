"""The paper's recipes: their rates are the published ones, and their columns those of the public data."""

import math

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from lightning.pytorch.cli import LightningArgumentParser
from PIL import Image

from lightning_iclr.__main__ import main
from lightning_iclr._recipes import recipe_root
from lightning_iclr.fedopt.data import FederatedDataModule
from lightning_iclr.fedopt.loader import Place

METHODS = {
    "fedadagrad": "FedAdagrad",
    "fedadam": "FedAdam",
    "fedyogi": "FedYogi",
    "fedavgm": "FedAvgM",
    "fedavg": "FedAvg",
}
# Rounds, clients of a cohort, batch, and base-10 logarithms of the best client rate, server rate and tau by method.
PUBLISHED = {
    "cifar10": (4000, 10, 20, (-1.5, -1.5, -1.5, -1.5, -0.5), (-1, -2, -2, -0.5, 0), (-2, -3, -3)),
    "cifar100": (4000, 10, 20, (-1, -1.5, -1.5, -1.5, -1), (-1, 0, 0, 0, 0.5), (-2, -1, -1)),
    "emnist_ae": (3000, 10, 20, (1.5, 1, 1, 0.5, 1), (-1.5, -1.5, -1.5, 0, 0), (-3, -3, -3)),
    "emnist_cr": (1500, 10, 20, (-1.5, -1.5, -1.5, -1.5, -1), (-1, -2.5, -2.5, -0.5, 0), (-2, -4, -4)),
    "shakespeare": (1200, 10, 4, (0, 0, 0, 0, 0), (-0.5, -2, -2, -0.5, 0), (-1, -3, -3)),
    "stackoverflow_nwp": (1500, 50, 16, (-0.5, -0.5, -0.5, -0.5, -0.5), (-1.5, -2, -2, 0, 0), (-4, -5, -5)),
    "stackoverflow_lr": (1500, 10, 100, (2, 2, 2, 2, 2), (1, -0.5, -0.5, 0, 0), (-2, -5, -5)),
}


def recipe(name):
    return yaml.safe_load((recipe_root() / "fedopt" / f"{name}.yaml").read_text())


def serve(loader):
    loader.connect(Place(0, 1, 1, 1, lambda: 0))
    return list(loader)


@pytest.mark.parametrize("task", PUBLISHED)
def test_rounds_cohorts_batches_and_rates_are_the_published_ones(task):
    rounds, cohort, batch_size, client, server, tau = PUBLISHED[task]
    base = recipe(f"paper_{task}")
    assert base["trainer"]["max_epochs"] == rounds
    assert base["data"]["init_args"]["clients_per_round"] == cohort
    assert base["data"]["init_args"]["batch_size"] == batch_size
    for place, (method, kind) in enumerate(METHODS.items()):
        own = base if method == "fedyogi" else recipe(f"paper_{task}_{method}")
        optimizer = own["trainer"]["strategy"]["init_args"]["server_optimizer"]
        assert optimizer["class_path"] == f"lightning_iclr.fedopt.{kind}"
        assert math.log10(optimizer["init_args"]["lr"]) == pytest.approx(server[place], abs=1e-4)
        if place < len(tau):
            assert math.log10(optimizer["init_args"]["tau"]) == pytest.approx(tau[place], abs=1e-4)
        lr = own["model"]["init_args"]["optimizer"]["init_args"]["lr"]
        assert math.log10(lr) == pytest.approx(client[place], abs=1e-4)


@pytest.mark.parametrize("task", PUBLISHED)
@pytest.mark.parametrize("method", [method for method in METHODS if method != "fedyogi"])
def test_an_overlay_holds_the_methods_optimizers_and_nothing_else(task, method):
    overlay = recipe(f"paper_{task}_{method}")
    assert list(overlay) == ["trainer", "model"]
    assert list(overlay["trainer"]) == ["strategy"]
    assert list(overlay["trainer"]["strategy"]["init_args"]) == ["server_optimizer"]
    assert overlay["model"]["class_path"] == recipe(f"paper_{task}")["model"]["class_path"]
    assert list(overlay["model"]["init_args"]) == ["optimizer"]


def paper_tables(rows=40):
    """Generate data with the exact columns of each of the paper's tasks."""
    random = np.random.default_rng(0)
    colour = [Image.fromarray(array) for array in random.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)]
    grey = [Image.fromarray(array) for array in random.integers(0, 256, (rows, 28, 28), dtype=np.uint8)]
    text = "".join(random.choice(list("to be or nt,"), 1000))
    characters = [(user, start) for user in "ab" for start in range(400)]
    words = ["how", "to", "sort", "a", "list", "in", "python"]
    questions = {
        "client_id": [f"u{row % 4}" for row in range(rows)],
        "creation_date": ["2017"] * rows,
        "score": [0] * rows,
        "type": ["question"] * rows,
        "tokens": [" ".join(random.choice(words, 5)) for _ in range(rows)],
        "title": [" ".join(random.choice(words, 2)) for _ in range(rows)],
        "tags": ["|".join(random.choice(["python", "list", "c++"], 2, replace=False)) for _ in range(rows)],
    }
    labels = [row % 10 for row in range(rows)]
    cifar10 = Dataset.from_dict({"img": colour, "label": labels})
    cifar100 = Dataset.from_dict(
        {"img": colour, "fine_label": labels, "coarse_label": [label // 2 for label in labels]}
    )
    writers = {"writer_id": [f"f{row % 4}" for row in range(rows)], "hsf_id": [0] * rows}
    femnist = DatasetDict(
        train=Dataset.from_dict({"image": grey, **writers, "character": [row % 62 for row in range(rows)]})
    )
    shakespeare = Dataset.from_dict(
        {
            "character_id": [user for user, _ in characters],
            "x": [text[start : start + 80] for _, start in characters],
            "y": [text[start + 80] for _, start in characters],
        }
    )
    stackoverflow = Dataset.from_dict(questions)
    return {
        "cifar10": DatasetDict(train=cifar10, test=cifar10),
        "cifar100": DatasetDict(train=cifar100, test=cifar100),
        "emnist_cr": femnist,
        "emnist_ae": femnist,
        "shakespeare": DatasetDict(train=shakespeare),
        "stackoverflow_nwp": DatasetDict(train=stackoverflow, test=stackoverflow),
        "stackoverflow_lr": DatasetDict(train=stackoverflow, test=stackoverflow),
    }


# What a batch of each task holds: shape and kind of an input and of a target.
PAPER = {
    "cifar10": ((3, 24, 24), torch.float32, (), torch.int64),
    "cifar100": ((3, 24, 24), torch.float32, (), torch.int64),
    "emnist_cr": ((1, 28, 28), torch.float32, (), torch.int64),
    "emnist_ae": ((1, 28, 28), torch.float32, (), torch.int64),
    "shakespeare": ((80,), torch.int64, (80,), torch.int64),
    "stackoverflow_nwp": ((20,), torch.int64, (20,), torch.int64),
    "stackoverflow_lr": ((10_000,), torch.float32, (500,), torch.float32),
}


@pytest.mark.parametrize("task", PAPER)
def test_the_papers_recipes_serve_their_own_columns(task):
    arguments = recipe(f"paper_{task}")["data"]["init_args"]
    arguments |= {"dataset": "data", "clients_per_round": 2, "num_workers": 0}
    clients = arguments["partition"]["init_args"]
    if "num_clients" in clients:
        assert clients["num_clients"] == 500
        clients["num_clients"] = 4
    paper_tables()[task].save_to_disk("data")
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(FederatedDataModule, "data")
    data = parser.instantiate(parser.parse_object({"data": arguments}))["data"]
    data.prepare_data()
    data.setup()
    input_shape, input_kind, target_shape, target_kind = PAPER[task]
    batches = serve(data.train_dataloader()) + list(data.val_dataloader()) + list(data.test_dataloader())
    assert len(batches) >= 4
    for inputs, targets in batches:
        assert inputs.shape[1:] == input_shape
        assert inputs.dtype == input_kind
        assert targets.shape[1:] == target_shape
        assert targets.dtype == target_kind
        assert len(inputs) == len(targets)
        assert torch.isfinite(inputs).all()
    if task == "shakespeare":  # of windows that overlap by 79 characters those are left that follow one another
        examples, clients = data.client_datasets("train")
        windows, following = examples.__getitems__(clients[0].tolist())
        assert [len(own) for own in clients] == [3, 3]
        assert following[:-1, -1].tolist() == windows[1:, 0].tolist()


# What makes each task small enough for a test.
SMALL = {
    "cifar10": ["--data.partition.num_clients=4"],
    "cifar100": ["--data.partition.num_clients=4"],
    "shakespeare": ["--model.net.hidden_dim=16"],
    "stackoverflow_nwp": ["--model.net.hidden_dim=16"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("task", "method"), list(zip(PUBLISHED, [*METHODS, "fedyogi", "fedavgm"], strict=True)))
def test_a_recipe_and_an_overlay_train_one_round_on_generated_data(task, method, capsys):
    paper_tables()[task].save_to_disk("data")
    overlay = [] if method == "fedyogi" else ["--config", f"fedopt/paper_{task}_{method}"]
    small = ["--data.dataset=data", "--data.clients_per_round=2", "--data.max_local_steps=1", "--data.batch_size=2",
             "--data.eval_batch_size=4", "--data.num_workers=0", *SMALL.get(task, [])]  # fmt: skip
    cpu = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1",
           "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=1"]  # fmt: skip
    main(["fit", "--config", f"fedopt/paper_{task}", *overlay, *small, *cpu])
    checkpoint = torch.load("lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert all(bool(value.isfinite().all()) for value in checkpoint["state_dict"].values())
    place = list(METHODS).index(method)
    (server,) = checkpoint["fedopt"]["optimizer"]["param_groups"]
    (client,) = checkpoint["optimizer_states"][0]["param_groups"]
    assert math.log10(server["lr"]) == pytest.approx(PUBLISHED[task][4][place], abs=1e-4)
    assert math.log10(client["lr"]) == pytest.approx(PUBLISHED[task][3][place], abs=1e-4)
    assert "lightning-iclr test" in capsys.readouterr().out
