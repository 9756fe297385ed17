import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from lightning.pytorch import Callback
from PIL import Image

from lightning_iclr.__main__ import main
from lightning_iclr._recipes import HEADER, list_recipes, recipe_header, recipe_root
from lightning_iclr.cli import ICLRCLI
from lightning_iclr.vit import VisionTransformer, ViTClassifier, to_official

OVERLAYS = [name for name in list_recipes() if name.startswith("trainer/")]
EMBEDDED = [name for name in list_recipes() if recipe_header(name).get("data", "").startswith("embedded")]
FULL_SCALE = [name for name in list_recipes() if name.startswith("vit/") and name not in EMBEDDED]
FAST = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=2",
        "--trainer.limit_predict_batches=2", "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false"]  # fmt: skip
ROUNDS = ["--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1", "--trainer.limit_val_batches=1",
          "--trainer.limit_test_batches=2", "--trainer.limit_predict_batches=2", "--trainer.enable_progress_bar=false",
          "--data.max_local_steps=2"]  # fmt: skip
# How a method's recipes are cut short, and the pictures they draw.
QUICK = {"vit": FAST, "fedopt": ROUNDS, "pmi_masking": FAST}
PICTURES = {
    "vit": {"attention_distance", "training_curves", "patch_filters", "position_similarity"},
    "fedopt": {"rounds"},
    "pmi_masking": {"masked_paragraph", "unit_lengths", "loss_by_unit"},
}
# What cuts a recipe shorter yet: all roles would be evaluated one by one, all definitions tokenized.
GLOSSES = ["--data.train_split=train[:3000]", "--data.val_split=validation[:300]", "--data.test_split=test[:1000]",
           "--data.vocabulary_settings.min_count=2", "--data.vocabulary_settings.size=400"]  # fmt: skip
OWN = {"fedopt/shakespeare_roles": ["--data.max_clients=10", "--model.net.hidden_dim=16"],
       **{name: GLOSSES for name in EMBEDDED if name.startswith("pmi_masking/")}}  # fmt: skip
# Columns of what a federated recipe predicts.
PREDICTED = {
    "fedopt/digits": ("label", "probability", "probability/9"),
    "fedopt/zipf": ("client", "label_1", "probability_5"),
    "fedopt/shakespeare": ("client", "example", "prediction"),
    "pmi_masking/glosses": ("row", "prediction"),
}
ONE_CPU = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.precision=32-true"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
]


class Parsed(ICLRCLI):
    """What the command would build, not built."""

    def instantiate_classes(self):
        pass


def parse(*arguments):
    return Parsed(args=list(arguments), run=False).config


def test_each_kind_of_recipe_is_there():
    assert [f"trainer/{name}" for name in ("cpu", "ddp", "debug", "fsdp", "gpu", "slurm")] == OVERLAYS
    assert {name.partition("/")[0] for name in EMBEDDED} == set(QUICK)
    assert len(FULL_SCALE) >= 7


@pytest.mark.parametrize("name", list_recipes())
def test_the_header_says_what_the_table_needs_and_a_command_that_parses(name):
    lines = (recipe_root() / f"{name}.yaml").read_text().splitlines()
    assert [re.match(r"# (\w+): \S", line)[1] for line in lines[:5]] == list(HEADER)
    assert "MEASURED" not in "".join(lines)
    command = recipe_header(name)["run"].split()
    arguments = command[command.index("lightning-iclr") + 2 :]
    assert name in arguments
    assert parse(*arguments).trainer is not None


def predictions():
    (path,) = Path().rglob("predictions.csv")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_recipe_trains_tests_and_predicts(name, capsys):
    method = name.partition("/")[0]
    quick = [*QUICK[method], *OWN.get(name, [])]
    main(["fit", "--config", name, *quick])
    command = capsys.readouterr().out.splitlines()[-1].split()[1:]
    main([*command, *quick])
    assert "test/loss" in capsys.readouterr().out
    main(["predict", *command[1:], *quick])
    drawn = {path.stem for path in Path("lightning_logs/version_0/figures").iterdir()}
    assert drawn >= PICTURES[method]
    if method == "vit":
        assert drawn & {"rollout", "masked_patches"}
        recipe = yaml.safe_load((recipe_root() / f"{name}.yaml").read_text())
        assert len({row["image"] for row in predictions()}) == 2 * recipe["data"]["init_args"]["batch_size"]
    elif method == "fedopt":
        rows, kind = predictions(), PREDICTED[name.split("_")[0]]
        assert {"row", *kind} <= rows[0].keys()
        assert len({(row["row"], row.get("example")) for row in rows}) == len(rows) > 100
        assert all(row[column] for row in rows for column in kind)


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_changes_how_a_recipe_runs_and_not_what(name):
    plain, laid = parse("--config", "vit/digits"), parse("--config", "vit/digits", "--config", name)
    assert laid.model == plain.model
    assert laid.data == plain.data
    overlay = yaml.safe_load((recipe_root() / f"{name}.yaml").read_text())
    assert list(overlay) == ["trainer"]
    assert "callbacks" not in overlay["trainer"]


@pytest.mark.parametrize("name", ["trainer/cpu", "trainer/debug"])
def test_an_overlay_for_one_process_runs(name):
    overlay = yaml.safe_load((recipe_root() / f"{name}.yaml").read_text())["trainer"]
    quick = {"max_steps": "2", "limit_val_batches": "1", "enable_progress_bar": "false"}
    own = [f"--trainer.{key}={value}" for key, value in quick.items() if key not in overlay]
    main(["fit", "--config", "vit/digits", "--config", name, *own])
    saved = yaml.safe_load(Path("lightning_logs/version_0/config.yaml").read_text())["trainer"]
    assert overlay.items() <= saved.items()
    checkpoint = torch.load("lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == overlay.get("max_steps", 2)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Forty coloured images under every column name that a recipe asks for."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (40, 24, 20, 3), dtype=np.uint8)
    pictures = [Image.fromarray(array) for array in pixels]
    labels = [i % 2 for i in range(40)]
    folder = tmp_path_factory.mktemp("images")
    for image, label in (("image", "label"), ("img", "label"), ("img", "fine_label")):
        Dataset.from_dict({image: pictures, label: labels}).to_parquet(folder / f"{image}_{label}.parquet")
    return folder


def shrunk(name, images, size=32):
    """Arguments that let a full-scale recipe run on two small images a step."""
    recipe = yaml.safe_load((recipe_root() / f"{name}.yaml").read_text())
    data = recipe["data"]["init_args"]
    file = images / f"{data.get('image_column', 'image')}_{data.get('label_column', 'label')}.parquet"
    net = recipe["model"]["init_args"]["net"]["init_args"]
    small = [f"--data.dataset={file}", "--data.train_split=train[:50%]", "--data.val_split=train[50%:]",
             "--data.test_split=null", f"--data.image_size={size}", "--data.batch_size=4", "--data.num_workers=0",
             f"--model.net.image_size={size}", "--model.net.patch_size=16", "--model.net.dim=16", "--model.net.depth=2",
             "--model.net.num_heads=2", "--model.compile=false"]  # fmt: skip
    if net.get("representation_size"):
        small.append("--model.net.representation_size=16")
    if "pretrained" in recipe["model"]["init_args"]:
        small.append("--model.pretrained=null")
    return [*small, *ONE_CPU, "--trainer.num_sanity_val_steps=0"]


@pytest.mark.parametrize("name", FULL_SCALE)
def test_a_full_scale_recipe_fits_two_steps_when_shrunk(name, images):
    main(["fit", "--config", name, *shrunk(name, images), *FAST])
    assert Path("lightning_logs/version_0/checkpoints/last.ckpt").is_file()
    assert Path("lightning_logs/version_0/figures/training_curves.png").is_file()


class Start(Callback):
    """Keep the weights that training starts from, for the test to read."""

    def on_train_start(self, trainer, pl_module):
        torch.save(pl_module.net.state_dict(), "start.pt")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("vit/imagenet_b16_paper", "vit/imagenet_b16_384"),
        ("vit/masked_patch_imagenet", "vit/imagenet_b16_384"),
        ("vit/mnist5k_masked_patch", "vit/mnist5k_masked_patch_finetune"),
        ("official.npz", "vit/cifar10_finetune"),
        ("official.npz", "vit/cifar100_finetune"),
    ],
)
def test_fine_tuning_starts_from_the_stage_before_it(first, second, images):
    if first == "official.npz":
        sizes = {"image_size": 32, "dim": 16, "depth": 2, "num_heads": 2, "representation_size": 16}
        net = VisionTransformer(**sizes, num_classes=21)
        np.savez(first, **to_official(net.state_dict(), num_heads=2))
        before, path = net.state_dict(), first
    else:
        small = [] if first in EMBEDDED else shrunk(first, images)
        main(["fit", "--config", first, *small, *FAST])
        path = "lightning_logs/version_0/checkpoints/last.ckpt"
        weights = torch.load(path, weights_only=True)["state_dict"]
        prefix = "pretext.encoder." if "masked_patch" in first else "net."
        before = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    small = [] if second in EMBEDDED else shrunk(second, images, size=48)
    last = ["--trainer.callbacks=tests.recipes.test_recipes.Start", f"--model.pretrained={path}"]
    main(["fit", "--config", second, *small, *FAST, *last])
    start = torch.load("start.pt", weights_only=True)
    assert not start["head.weight"].any()
    for name, weight in start.items():
        if name == "pos_embed" and second not in EMBEDDED:
            corners = weight[0, 1:].view(3, 3, -1)[::2, ::2].flatten(0, 1)
            torch.testing.assert_close(corners, before[name][0, 1:])
        elif not name.startswith("head."):
            assert torch.equal(weight, before[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trainer/ddp", "trainer/fsdp"])
def test_an_overlay_for_several_devices_runs_on_two_cpu_processes(name):
    command = [sys.executable, "-m", "lightning_iclr", "fit", "--config", "vit/digits", "--config", name, *FAST]
    command += ["--trainer.accelerator=cpu", "--trainer.devices=2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(recipe_root().parent), os.environ["PYTHONPATH"]])}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "distributed_backend=gloo" in result.stderr
    checkpoint = Path("lightning_logs/version_0/checkpoints/last.ckpt")
    assert ViTClassifier.load_from_checkpoint(checkpoint, weights_only=True).net.depth == 4
    drawn = {path.stem for path in Path("lightning_logs/version_0/figures").iterdir()}
    assert drawn == {"attention_distance", "rollout", "position_similarity", "patch_filters", "training_curves"}
