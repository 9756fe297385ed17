import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer

from lightning_iclr.__main__ import main
from lightning_iclr.cli import _check_schedule, newest_checkpoint
from lightning_iclr.vit import ViTClassifier
from tests.toys import ToyClassifier, ToyImages, ToyNet

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
    line = refuse(capsys, "fit", "--config", "toy.yaml", "--trainer.max_epochs", "2", "--ckpt_path", checkpoint)
    assert "size mismatch" in line  # the user's 3, not the checkpoint's 5
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


def test_the_newest_checkpoint_is_one_of_the_same_module_on_the_same_data(tmp_path):
    runs = [("logs/a/v0", "Mine", "Digits"), ("b", "Mine", "Images"), ("logs/c", "MineToo", "Digits")]
    for age, (name, kind, data) in enumerate(runs):
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_text(f"model: {{class_path: my.{kind}}}\ndata: {{class_path: my.{data}}}\n")
        (folder / "checkpoints/x.ckpt").touch()
        os.utime(folder / "checkpoints/x.ckpt", (1e9 + age, 1e9 + age))
    assert newest_checkpoint(tmp_path, ["my.Mine", "my.Digits"]).parts[-3] == "v0"
    assert newest_checkpoint(tmp_path, ["my.Mine"]).parts[-3] == "b"
    assert newest_checkpoint(tmp_path).parts[-3] == "c"
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_the_config_of_a_resumed_run_does_not_test_the_run_it_went_on_from(capsys):
    main(["fit", "--config", "toy.yaml"])
    checkpoint = "lightning_logs/version_0/checkpoints/last.ckpt"
    main(["fit", "--config", "toy.yaml", "--trainer.max_epochs", "2", "--ckpt_path", checkpoint])
    line = refuse(capsys, "test", "--config", "lightning_logs/version_1/config.yaml")
    assert line.endswith("--ckpt_path lightning_logs/version_1/checkpoints/last.ckpt")


def test_a_run_that_had_ended_prints_no_command_for_a_file_that_is_not_there(capsys):
    main(["fit", "--config", "toy.yaml"])
    capsys.readouterr()
    main(["fit", "--config", "toy.yaml", "--ckpt_path", "lightning_logs/version_0/checkpoints/last.ckpt"])
    assert "test it with" not in capsys.readouterr().out


def test_a_checkpoint_of_a_run_in_python_is_tested_with_the_user_s_arguments(capsys):
    module = ToyClassifier(ToyNet(dim=5))
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.fit(module, ToyImages(dim=5))
    trainer.save_checkpoint("python.ckpt")
    arguments = ["--config", "toy.yaml", "--model.net.dim", "5", "--data.dim", "5", "--ckpt_path", "python.ckpt"]
    main(["test", *arguments])
    assert re.search(r"test/dim\D+5\.0", capsys.readouterr().out)


def test_a_class_of_the_working_folder_is_found(tmp_path):
    (tmp_path / "a_project_of_mine.py").write_text(
        "import torch\n"
        "from tests.toys import ToyNet\n\n\n"
        "class Mine(ToyNet):\n"
        "    def __init__(self, own: float = 0.0) -> None:\n"
        "        super().__init__()\n"
        "        self.register_buffer('mark', torch.tensor(own))\n"
    )
    main(["fit", "--config", "toy.yaml", "--model.net", "a_project_of_mine.Mine", "--model.net.own", "2.5"])
    checkpoint = torch.load(tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]["net.mark"] == 2.5


def test_a_schedule_that_ends_before_the_training_is_told():
    with pytest.warns(UserWarning, match="schedule ends at step 900, and trainer.max_steps is 901"):
        _check_schedule(
            Namespace(
                model=Namespace(init_args=Namespace(lr_scheduler=Namespace(init_args=Namespace(total_steps=900)))),
                trainer=Namespace(max_steps=901),
            )
        )


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
            ["--config", "toy.yaml", "--trainer.max_steps", "-5"],
            re.compile("`max_steps` must be a non-negative integer"),
        ),
        (
            ["--config", "toy.yaml", "--trainer.devices", "0"],
            re.compile("value is not a valid input using cpu"),
        ),
        (["--config", "toy.yaml", "--config", "trainer/gpu"], re.compile("No supported gpu backend found")),
        (["--config", "toy.yaml", "--ckpt_path", "toy.yaml"], re.compile("Weights only load failed")),
        (
            ["--config", "toy.yaml", "--model.net", "tests.toys.NeedsExtra"],
            "no_such_package_at_all is needed here and is not installed; run: pip install 'lightning-iclr[text]'",
        ),
    ],
)
def test_what_the_user_got_wrong_is_one_line_and_exit_code_2(capsys, arguments, line):
    found = refuse(capsys, "fit", *arguments)
    assert found == line if isinstance(line, str) else line.search(found)


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="dim must be positive, got 0"):
        main(["fit", "--config", "toy.yaml", "--model.net.dim", "0", "--debug"])


def test_an_error_in_the_middle_of_training_keeps_its_traceback():
    with pytest.raises(ValueError, match="the loss is not finite"):
        main(["fit", "--config", "toy.yaml", "--model.fail_in", "training_step"])
    with pytest.raises(OSError, match="no space left"):
        main(["fit", "--config", "toy.yaml", "--trainer.callbacks+=tests.toys.FullDisk"])


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
    module = ToyClassifier(ToyNet(dim=4), smoothing=0.1)
    assert dict(module.hparams) == {"smoothing": 0.1, "sizes": (1, 2), "fail_in": None}


def test_neither_is_one_that_a_subclass_adds():
    class Taught(ToyClassifier):
        def __init__(self, teacher, weight=0.5, **kwargs):
            super().__init__(**kwargs)
            self.teacher, self.weight = teacher, weight

    module = Taught(ToyNet(), weight=0.25, net=ToyNet())
    assert dict(module.hparams) == {"weight": 0.25, "smoothing": 0.0, "sizes": (1, 2), "fail_in": None}


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
