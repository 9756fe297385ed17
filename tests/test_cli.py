import os
import re
from pathlib import Path

import pytest
import torch
import yaml

from lightning_iclr.__main__ import main
from lightning_iclr.cli import newest_checkpoint
from lightning_iclr.vit import ViTClassifier
from tests.toys import ToyClassifier

TOY = """
trainer: {accelerator: cpu, devices: 1, max_epochs: 1, enable_progress_bar: false, enable_model_summary: false}
model:
  class_path: tests.toys.ToyClassifier
  init_args:
    net: {class_path: tests.toys.ToyNet}
data: {class_path: tests.toys.ToyImages}
"""
pytestmark = [
    # A plain DataLoader without workers, and fewer batches than logging steps, are what a toy is.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


@pytest.fixture(autouse=True)
def toy(tmp_path):
    (tmp_path / "toy.yaml").write_text(TOY)


def refuse(capsys, *arguments):
    """Run what must be refused, and return the one line."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("lightning-iclr:"))
    assert line.startswith("lightning-iclr: error: ")
    return line.removeprefix("lightning-iclr: error: ")


def test_fit_fills_the_run_folder_and_prints_the_command_that_tests(capsys, tmp_path):
    main(["fit", "--config", "toy.yaml"])
    folder = tmp_path / "lightning_logs/version_0"
    assert {p.name for p in folder.iterdir()} >= {"config.yaml", "checkpoints"}
    command = capsys.readouterr().out.splitlines()[-1].split()
    assert command[:2] == ["lightning-iclr", "test"]
    main(command[1:])
    assert "test/dim" in capsys.readouterr().out


def test_the_final_weights_are_kept_wherever_training_ends(tmp_path):
    main(["fit", "--config", "toy.yaml", "--trainer.max_steps", "1"])
    checkpoint = torch.load(tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1


def test_the_saved_config_runs_the_same_again(tmp_path):
    main(["fit", "--config", "toy.yaml", "--model.net.dim", "5", "--data.dim", "5"])
    main(["fit", "--config", "lightning_logs/version_0/config.yaml"])
    first, second = (
        torch.load(tmp_path / f"lightning_logs/version_{i}/checkpoints/last.ckpt", weights_only=True) for i in (0, 1)
    )
    torch.testing.assert_close(second["state_dict"], first["state_dict"], rtol=0, atol=0)


def test_several_configs_merge_key_by_key_and_overrides_come_last(tmp_path):
    (tmp_path / "more.yaml").write_text("model: {init_args: {smoothing: 0.1, net: {init_args: {dim: 4}}}}")
    main(["fit", "--config", "toy.yaml", "--config", "more.yaml", "--data.dim", "4", "--model.smoothing", "0.2"])
    config = yaml.safe_load((tmp_path / "lightning_logs/version_0/config.yaml").read_text())
    assert config["model"]["init_args"]["smoothing"] == 0.2
    assert config["model"]["init_args"]["net"]["init_args"]["dim"] == 4
    assert config["trainer"]["max_epochs"] == 1


def test_a_resumed_fit_keeps_the_user_s_arguments_and_test_takes_the_checkpoint_s(capsys, tmp_path):
    main(["fit", "--config", "toy.yaml", "--model.net.dim", "5", "--data.dim", "5"])
    checkpoint = "lightning_logs/version_0/checkpoints/last.ckpt"
    main(["fit", "--config", "toy.yaml", "--model.net.dim", "5", "--data.dim", "5", "--model.smoothing", "0.3",
          "--trainer.max_epochs", "2", "--ckpt_path", checkpoint])  # fmt: skip
    resumed = torch.load(tmp_path / "lightning_logs/version_1/checkpoints/last.ckpt", weights_only=True)
    assert resumed["hyper_parameters"]["smoothing"] == 0.3
    assert resumed["global_step"] == 4
    with pytest.raises(RuntimeError, match="size mismatch"):  # the user's 3, not the checkpoint's 5
        main(["fit", "--config", "toy.yaml", "--trainer.max_epochs", "2", "--ckpt_path", checkpoint])
    capsys.readouterr()
    main(["test", "--config", "toy.yaml", "--data.dim", "5", "--ckpt_path", checkpoint])
    assert re.search(r"test/dim\D+5\.0", capsys.readouterr().out)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_what_evaluates_wants_a_checkpoint_and_names_the_newest(capsys, command):
    assert "there is no checkpoint here yet" in refuse(capsys, command, "--config", "toy.yaml")
    for _ in range(2):
        main(["fit", "--config", "toy.yaml"])
    os.utime("lightning_logs/version_1/checkpoints/last.ckpt", (2e9, 2e9))
    line = refuse(capsys, command, "--config", "toy.yaml")
    assert line.endswith("--ckpt_path lightning_logs/version_1/checkpoints/last.ckpt")
    main([command, "--config", "toy.yaml", *line.split()[-2:]])


def test_the_newest_checkpoint_is_one_of_the_same_module(tmp_path):
    for age, (name, kind) in enumerate([("a", "Mine"), ("b", "Other")]):
        folder = tmp_path / "lightning_logs" / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_text(f"model:\n  class_path: my.{kind}\n")
        (folder / "checkpoints/x.ckpt").touch()
        os.utime(folder / "checkpoints/x.ckpt", (1e9 + age, 1e9 + age))
    assert newest_checkpoint(tmp_path, "my.Mine").parts[-3] == "a"
    assert newest_checkpoint(tmp_path, None).parts[-3] == "b"
    assert newest_checkpoint(tmp_path / "nowhere", None) is None


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--config", "vit/digitz"], "no recipe or file 'vit/digitz'; `lightning-iclr recipes` lists the recipes"),
        (["--config", "toy.yaml", "--model.smoothin", "0.1"], "model: Option 'smoothin' is not accepted"),
        (["--config", "toy.yaml", "--model.net.dims", "1"], "model.net: Option 'dims' is not accepted"),
        (["--config", "toy.yaml", "--trainer.max_epoch", "1"], "unrecognized arguments: --trainer.max_epoch 1"),
        (["--config", "toy.yaml", "--model.net.dim", "x"], "model.net.dim: Expected a <class 'int'>. Got value: x"),
        (["--config", "toy.yaml", "--model.smoothing", "2"], "smoothing must be in [0, 1), got 2.0"),
        (["--config", "toy.yaml", "--model.net.dim", "0"], "dim must be positive, got 0"),
        (["--config", "toy.yaml", "--model.fail_in", "setup"], "setup found no data"),
        (
            ["--config", "toy.yaml", "--model.net", "tests.toys.NeedsExtra"],
            "no_such_package_at_all is needed here and is not installed; run: pip install 'lightning-iclr[text]'",
        ),
    ],
)
def test_what_the_user_got_wrong_is_one_line_and_exit_code_2(capsys, arguments, line):
    assert refuse(capsys, "fit", *arguments) == line


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="dim must be positive, got 0"):
        main(["fit", "--config", "toy.yaml", "--model.net.dim", "0", "--debug"])


def test_an_error_in_the_middle_of_training_keeps_its_traceback():
    with pytest.raises(ValueError, match="the loss is not finite"):
        main(["fit", "--config", "toy.yaml", "--model.fail_in", "training_step"])


def test_a_checkpoint_of_the_command_loads_with_nothing_but_its_path(tmp_path):
    fast = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.num_sanity_val_steps=0"]
    main(
        ["fit", "--config", "vit/digits", *fast, "--trainer.callbacks=null", "--model.net.depth=1", "--model.mixup=0.1"]
    )
    (path,) = Path(tmp_path).rglob("last.ckpt")
    module = ViTClassifier.load_from_checkpoint(path, weights_only=True)
    assert (module.net.depth, module.mixup) == (1, 0.1)
    state = torch.load(path, weights_only=True)["state_dict"]
    torch.testing.assert_close(module.state_dict(), state, rtol=0, atol=0)
    optimizer = module.configure_optimizers()["optimizer"]
    assert optimizer.param_groups[0]["initial_lr"] == 2e-3


def test_a_live_argument_of_a_python_run_is_not_pickled():
    from tests.toys import ToyNet

    module = ToyClassifier(ToyNet(dim=4), smoothing=0.1)
    assert dict(module.hparams) == {"smoothing": 0.1, "sizes": (1, 2), "fail_in": None}


@pytest.mark.parametrize("first", [20, 25], ids=["epoch-end", "mid-epoch"])
def test_a_run_that_ended_goes_on_from_its_final_weights_as_if_it_had_not(tmp_path, first):
    small = ["--config=vit/digits", "--trainer.callbacks=null", "--model.net.depth=1", "--model.net.dim=16",
             "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0"]  # fmt: skip
    main(["fit", *small, "--trainer.max_steps=45"])
    main(["fit", *small, f"--trainer.max_steps={first}"])
    last = "lightning_logs/version_{}/checkpoints/last.ckpt"
    main(["fit", *small, "--trainer.max_steps=45", "--ckpt_path", last.format(1)])
    straight, resumed = (torch.load(tmp_path / last.format(i), weights_only=True) for i in (0, 2))
    assert resumed["global_step"] == straight["global_step"] == 45
    torch.testing.assert_close(resumed["state_dict"], straight["state_dict"], rtol=0, atol=1e-7)
