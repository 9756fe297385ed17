"""What a recipe, its overlays and the command line can set reaches the objects, and what they compute."""

import csv
import json
import os
import subprocess
import sys
from functools import partial, reduce
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from torch.optim.lr_scheduler import StepLR

from lightning_iclr.__main__ import main
from lightning_iclr._recipes import recipe_root
from lightning_iclr.cli import ICLRCLI
from lightning_iclr.embedded import load_shakespeare
from lightning_iclr.fedopt import (
    CharacterEncoder,
    CharacterLSTM,
    Classifier,
    ClientTask,
    DigitsConvNet,
    FedAvg,
    FederatedDigits,
    FedOptStrategy,
    FedYogi,
    Stragglers,
    TopK,
)
from lightning_iclr.fedopt.privacy import epsilon

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
]
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
LAST = "lightning_logs/version_{}/checkpoints/last.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["trainer/ddp", "trainer/fsdp"])
def test_an_overlay_of_another_strategy_is_refused_in_a_line(overlay):
    command = [sys.executable, "-m", "lightning_iclr", "fit", "--config", "fedopt/digits_fedavg", "--config", overlay]
    command += ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(recipe_root().parent), os.environ["PYTHONPATH"]])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert result.returncode == 2, result.stderr
    assert "federated recipes scale by trainer.devices and trainer.num_nodes alone" in result.stderr


class Option(NamedTuple):
    """A key of a recipe, what it is set to, and what is then found in the objects that are built."""

    section: str
    name: str
    value: Any
    find: Any
    expected: Any


def made(class_path, **init_args):
    return {"class_path": class_path, "init_args": init_args}


def attribute(path, of="strategy"):
    return lambda built: reduce(getattr, path.split("."), built[of])


def server_optimizer(built):
    optimizer = built["strategy"].server_optimizer([torch.nn.Parameter(torch.zeros(1))])
    return type(optimizer), optimizer.defaults["lr"], optimizer.defaults["tau"]


def server_rates(built):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = built["strategy"].server_lr_scheduler(optimizer)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def classes_of_clients(built):
    loader = built["loader"]
    return [len({int(loader.dataset[row][1]) for row in rows.tolist()}) for rows in loader.partition]


def client_schedule(built):
    configured = built["model"].configure_optimizers()
    schedule = configured["lr_scheduler"]["scheduler"]
    return type(configured["optimizer"]), type(schedule), schedule.step_size, configured["lr_scheduler"]["interval"]


FEDOPT, SCHEDULERS = "lightning_iclr.fedopt", "torch.optim.lr_scheduler"
OPTIONS = [
    Option("strategy", "server_optimizer", made(f"{FEDOPT}.FedYogi", lr=0.25, tau=0.5), server_optimizer,
           (FedYogi, 0.25, 0.5)),
    Option("strategy", "server_lr_scheduler", made(f"{SCHEDULERS}.StepLR", step_size=2), server_rates,
           pytest.approx([1.0, 1.0, 0.1, 0.1])),
    Option("strategy", "weighting", "uniform", attribute("aggregator.weighting"), "uniform"),
    Option("strategy", "buffers", "keep", attribute("buffers"), "keep"),
    Option("strategy", "proximal", 0.1, attribute("proximal"), 0.1),
    Option("strategy", "clip_norm", 2.0, attribute("aggregator.clip_norm"), 2.0),
    Option("strategy", "noise_multiplier", 0.5, attribute("aggregator.noise_multiplier"), 0.5),
    Option("strategy", "delta", 1e-5, attribute("aggregator.delta"), 1e-5),
    Option("strategy", "compression", made(f"{FEDOPT}.TopK", fraction=0.25), attribute("aggregator.compression"),
           TopK(0.25)),
    Option("strategy", "personal", ["net.head.*", "net.b"], attribute("personal"), ("net.head.*", "net.b")),
    Option("strategy", "vectorize_clients", 3, attribute("vectorize_clients"), 3),
    Option("strategy", "aggregation_dtype", "float32", attribute("aggregator.dtype"), torch.float32),
    Option("data", "clients_per_round", 0.25, attribute("clients_per_round", "loader"), 5),
    Option("data", "partition", made(f"{FEDOPT}.PathologicalPartitioner", num_clients=20, classes_per_client=1),
           classes_of_clients, [1] * 20),
    Option("data", "batch_size", 7, attribute("batch_size", "loader"), 7),
    Option("data", "local_epochs", 2, attribute("local_epochs", "loader"), 2),
    Option("data", "max_local_steps", made(f"{FEDOPT}.Stragglers", probability=0.5, local_steps=2),
           attribute("max_local_steps", "loader"), Stragglers(0.5, 2)),
    Option("data", "client_dropout", 0.2, attribute("client_dropout", "loader"), 0.2),
    Option("data", "drop_last", True, attribute("drop_last", "loader"), True),
    Option("data", "seed", 9, attribute("seed", "loader"), 9),
    Option("data", "split_seed", 8, attribute("split_seed", "data"), 8),
    Option("model", "optimizer", made("torch.optim.Adam", lr=0.02), lambda built: client_schedule(built)[0],
           torch.optim.Adam),
    Option("model", "lr_scheduler", made(f"{SCHEDULERS}.StepLR", step_size=4),
           lambda built: client_schedule(built)[1:3], (StepLR, 4)),
    Option("model", "lr_scheduler_interval", "step", lambda built: client_schedule(built)[3], "step"),
]  # fmt: skip
PREFIXES = {"strategy": "trainer.strategy.init_args", "data": "data", "model": "model"}


def as_arguments(section, name, value):
    """Write a setting as the command line's arguments."""
    key = f"--{PREFIXES[section]}.{name}"
    if not isinstance(value, dict):
        return [f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    return [f"{key}={value['class_path']}", *(f"{key}.{part}={own}" for part, own in value["init_args"].items())]


def build(*arguments):
    """Build what the command would run."""
    cli = ICLRCLI(args=["--config", "fedopt/digits_fedavg", *arguments], run=False)
    cli.datamodule.setup()
    return {
        "strategy": cli.trainer.strategy,
        "model": cli.model,
        "data": cli.datamodule,
        "loader": cli.datamodule.train_dataloader(),
    }


@pytest.fixture(scope="module", params=["arguments", "overlay"])
def built(request, tmp_path_factory):
    """Everything that is set by ``OPTIONS``, built once from arguments and once from an overlay."""
    if request.param == "arguments":
        return build(*(part for option in OPTIONS for part in as_arguments(*option[:3])))
    sections = {section: {} for section in PREFIXES}
    for option in OPTIONS:
        sections[option.section][option.name] = option.value
    overlay = {
        "trainer": {"strategy": {"init_args": sections["strategy"]}},
        "data": {"init_args": sections["data"]},
        "model": {"init_args": sections["model"]},
    }
    path = tmp_path_factory.mktemp("overlay") / "overlay.yaml"
    path.write_text(yaml.safe_dump(overlay))
    return build("--config", str(path))


@pytest.fixture(scope="module")
def plain():
    return build()


def found(option, objects):
    try:
        return option.find(objects)
    except (KeyError, TypeError):
        return None  # there is no such part


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_an_option_arrives_in_the_object_that_uses_it(built, plain, option):
    assert found(option, built) == option.expected
    assert found(option, plain) != option.expected  # so that the recipe alone would not do


def by_steps(task):
    return 2.0 * task.steps


def test_clients_are_weighed_by_a_function_and_the_server_takes_any_optimizer():
    name = "trainer.strategy.init_args"
    arguments = [f"--{name}.weighting={__name__}.by_steps", f"--{name}.server_optimizer=torch.optim.RMSprop"]
    strategy = build(*arguments, f"--{name}.server_optimizer.alpha=0.5")["strategy"]
    assert strategy.aggregator.weighting.__name__ == "by_steps"
    assert strategy.aggregator.weighting(ClientTask(0, 0, steps=3, num_examples=14)) == 6.0
    optimizer = strategy.server_optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert (type(optimizer), optimizer.defaults["alpha"]) == (torch.optim.RMSprop, 0.5)


def test_a_network_s_batch_norms_are_replaced_by_a_class_path():
    replaced = f"{FEDOPT}.replace_batch_norm"
    model = build(f"--model.net={replaced}", f"--model.net.net={__name__}.Normalized", "--model.net.num_groups=2",
                  "--model.num_classes=10")["model"]  # fmt: skip
    assert [type(part) for part in model.net] == [torch.nn.Flatten, torch.nn.Linear, torch.nn.GroupNorm]
    assert model.net[2].num_groups == 2


class Normalized(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.BatchNorm1d(10))


# What changes the weights of two rounds: arguments of the command, and the same in Python.
STRATEGY = {
    "weighting": ("uniform", "uniform"),
    "proximal": (0.5, 0.5),
    "clip_norm": (0.2, 0.2),
    "noise_multiplier": (0.1, 0.1),
    "delta": (1e-5, 1e-5),
    "compression": (made(f"{FEDOPT}.TopK", fraction=0.5), TopK(0.5)),
    "personal": (["net.head.*"], ["net.head.*"]),
    "server_lr_scheduler": (made(f"{SCHEDULERS}.StepLR", step_size=1), partial(StepLR, step_size=1)),
}
DATA = {
    "max_local_steps": (made(f"{FEDOPT}.Stragglers", probability=0.5), Stragglers(0.5)),
    "client_dropout": (0.3, 0.3),
    "local_epochs": (2, 2),
    "seed": (3, 3),
}
NOISE = {"noise_multiplier", "delta"}  # which need the weighting and the norm that others leave out


def trained(*left_out):
    """Train two rounds in Python, without some of the options, and return the server's weights."""
    seed_everything(0)
    strategy, data = ({name: own for name, (_, own) in options.items() if name not in left_out}
                      for options in (STRATEGY, DATA))  # fmt: skip
    module = Classifier(DigitsConvNet(), optimizer=lambda params: torch.optim.SGD(params, lr=0.3))
    trainer = Trainer(
        strategy=FedOptStrategy(FedAvg, **strategy), max_epochs=2, accelerator="cpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, FederatedDigits(**data))
    return {name: value.clone() for name, value in module.state_dict().items()}


def differ(left, right):
    return any(not torch.allclose(left[name], right[name], rtol=0, atol=1e-5) for name in left)


@pytest.fixture(scope="module")
def without_noise():
    return trained(*NOISE)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_the_command_trains_with_its_options_as_python_does(without_noise):
    options = [as_arguments("strategy", name, value) for name, (value, _) in STRATEGY.items()]
    options += [as_arguments("data", name, value) for name, (value, _) in DATA.items()]
    main(["fit", "--config", "fedopt/digits_fedavg", *QUIET, "--trainer.max_epochs=2", "--trainer.callbacks=null",
          "--trainer.limit_val_batches=0", "--trainer.strategy.init_args.vectorize_clients=null",
          "--trainer.strategy.init_args.server_optimizer.lr=1.0", "--model.optimizer.lr=0.3",
          "--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=.",
          *(part for option in options for part in option)])  # fmt: skip
    weights = torch.load(LAST.format(0), weights_only=True)["state_dict"]
    torch.testing.assert_close(weights, trained(), rtol=0, atol=1e-6)
    assert differ(weights, without_noise)
    with open("lightning_logs/version_0/metrics.csv") as file:
        spent = [float(row["fedopt/epsilon"]) for row in csv.DictReader(file) if row["fedopt/epsilon"]]
    assert spent == pytest.approx([epsilon(0.1, 0.1, rounds, 1e-5) for rounds in (1, 2)], rel=1e-5)


@pytest.mark.parametrize("name", [name for name in {**STRATEGY, **DATA} if name not in NOISE])
def test_each_of_these_options_changes_the_weights(name, without_noise):
    # So the command's weights above would be others, had it ignored one.
    assert differ(trained(*NOISE, name), without_noise)


def test_clients_trained_at_once_are_steps_of_the_trainer_and_change_no_weight():
    for size in ("5", "null"):
        main(["fit", "--config", "fedopt/digits_fedavg", *QUIET, "--trainer.max_epochs=2", "--trainer.callbacks=null",
              "--trainer.limit_val_batches=0", f"--trainer.strategy.init_args.vectorize_clients={size}"])  # fmt: skip
    at_once, in_turn = (torch.load(LAST.format(number), weights_only=True) for number in (0, 1))
    assert at_once["global_step"] == 2 * 10 // 5  # chunks of five clients of ten
    assert in_turn["global_step"] == 2 * 10 * 3  # 14 digits in batches of 5
    torch.testing.assert_close(at_once["state_dict"], in_turn["state_dict"], rtol=0, atol=1e-5)


ROLES = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1", "--trainer.limit_val_batches=1",
         "--trainer.limit_test_batches=1", "--model.net.hidden_dim=16", "--data.max_clients=4",
         "--data.clients_per_round=2", "--data.max_local_steps=4",
         "--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=."]  # fmt: skip


def test_the_command_evaluates_each_role_on_its_own_last_speeches():
    main(["fit", "--config", "fedopt/shakespeare_roles", *QUIET, *ROLES])
    main(["test", "--config", "fedopt/shakespeare_roles", *QUIET, *ROLES, "--ckpt_path", LAST.format(0)])
    speeches = load_shakespeare()
    own = {}
    for row, role in enumerate(zip(speeches["play"], speeches["role"], strict=True)):
        own.setdefault(role, []).append(row)
    largest = sorted(own.values(), key=len)[-4:]
    checkpoint = torch.load(LAST.format(0), weights_only=True)
    net = CharacterLSTM(hidden_dim=16)
    net.load_state_dict({name.removeprefix("net."): value for name, value in checkpoint["state_dict"].items()})
    encode, texts = CharacterEncoder(), speeches["text"]
    accuracies = {}
    for split, version in (("val", 0), ("test", 1)):
        accuracies[split] = []
        for rows in largest:
            tenth, fifth = (int(share * len(rows) + 0.5) for share in (0.1, 0.2))
            part = rows[-tenth - fifth : -fifth] if split == "val" else rows[-fifth:]
            inputs, targets = encode.serve(encode({"text": [texts[row] for row in part]}).tensors, None)
            with torch.no_grad():
                right = net(inputs).argmax(dim=-1) == targets
            accuracies[split].append(float(right.double().mean()))
        with open(f"lightning_logs/version_{version}/metrics.csv") as file:
            rows = list(csv.DictReader(file))
        assert len(set(accuracies[split])) == 4
        for kind, expected in (("mean", np.mean), ("worst", np.min), ("std", np.std)):
            (logged,) = (row[f"client/{split}/accuracy/{kind}"] for row in rows if row.get(f"client/{split}/loss/mean"))
            assert float(logged) == pytest.approx(expected(accuracies[split]), abs=1e-6)
        picture = "client_evaluation" if split == "val" else "client_evaluation_test"
        assert os.path.getsize(f"lightning_logs/version_{version}/figures/{picture}.png") > 2000
