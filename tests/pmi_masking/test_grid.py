import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightning_iclr._recipes import recipe_root
from lightning_iclr.pmi_masking import MaskedLM, grid, load_tokenizer
from lightning_iclr.pmi_masking.grid import Run, finetune_grid, summarize, table
from tests.pmi_masking.evaluation_toys import ONE_CPU, SMALL, glue_rows, write

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")


def overrides():
    own = [f"--data.dataset={write(glue_rows('mrpc'))}", "--data.train_split=train", "--data.val_split=train", *ONE_CPU]
    return [argument.removeprefix("--") for argument in own]


def fake_launch(score_of):
    """Return what stands for a run's process: it writes the score of its settings."""

    def launch(command, log):
        given = dict(argument.removeprefix("--").split("=", 1) for argument in command if "=" in argument)
        score = score_of(float(given["model.optimizer.lr"]), int(given["data.batch_size"]), int(given["data.seed"]))
        Path(given["trainer.callbacks.path"]).write_text(json.dumps({"val/score": score, "val/loss": 1.0}))
        launch.runs.append(given)
        return 0

    launch.runs = []
    return launch


def scores(rate, size, seed):
    return {(1e-5, 2): [50, 70, 60], (1e-5, 4): [65, 64, 10], (3e-5, 2): [90, 1, 2], (3e-5, 4): [0, 0, 0]}[rate, size][
        seed
    ]


GRID = {"learning_rates": [1e-5, 3e-5], "batch_sizes": [2, 4], "seeds": [0, 1, 2], "out": "grid"}


def test_the_best_setting_has_the_best_median_of_its_seeds(monkeypatch, capsys):
    MaskedLM(SMALL).save_pretrained("pretrained", load_tokenizer("embedded"))
    monkeypatch.setattr(grid, "_launch", fake_launch(scores))
    finetune_grid("pmi_masking/finetune_glue", **GRID, override=overrides())
    found = json.loads(Path("grid/results.json").read_text())
    assert [row["median"] for row in found["settings"]] == [60, 64, 2, 0]
    assert (found["best"]["learning_rate"], found["best"]["batch_size"]) == (1e-5, 4)
    assert "best: learning rate 1e-05, batch size 4: median val/score 64.00 of 3 seeds" in capsys.readouterr().out
    with Path("grid/results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert float(rows[0]["val/score"]) == 50


def test_runs_that_have_finished_are_not_run_again_and_stopped_ones_are(monkeypatch):
    MaskedLM(SMALL).save_pretrained("pretrained", load_tokenizer("embedded"))

    def stop(command, log):
        if len(launch.runs) == 5:
            raise KeyboardInterrupt
        return launch(command, log)

    launch = fake_launch(scores)
    own = overrides()
    monkeypatch.setattr(grid, "_launch", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune_grid("pmi_masking/finetune_glue", **GRID, override=own)
    rest = fake_launch(scores)
    monkeypatch.setattr(grid, "_launch", rest)
    finetune_grid("pmi_masking/finetune_glue", **GRID, override=own)
    assert len(rest.runs) == 12 - 5
    with pytest.raises(ValueError, match="out must be another folder: the runs in grid have trainer.max_epochs 1"):
        finetune_grid("pmi_masking/finetune_glue", **GRID, override=[*own, "trainer.max_epochs=2"])


def test_a_run_that_fails_is_told_with_its_last_line(monkeypatch):
    MaskedLM(SMALL).save_pretrained("pretrained", load_tokenizer("embedded"))

    def fail(command, log):
        log.write("first\nout of memory\n")
        return 1

    monkeypatch.setattr(grid, "_launch", fail)
    with pytest.raises(RuntimeError, match="run lr=1e-05_batch=2_seed=0 ended with code 1, see .*: out of memory"):
        finetune_grid("pmi_masking/finetune_glue", **GRID, override=overrides())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rates": [0.0]}, "learning_rates must be above 0, and there must be some, got 0.0"),
        ({"batch_sizes": []}, "batch_sizes must be at least 1, and there must be some, got none"),
        ({"seeds": [1, 1]}, "seeds must differ, got 1, 1"),
        ({"override": ["model.task"]}, "override must be settings KEY=VALUE, got 'model.task'"),
        ({"override": ["model.seed=3"]}, "override must leave model.seed to the grid, got 3"),
    ],
)
def test_a_bad_grid_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        finetune_grid("pmi_masking/finetune_glue", **{**GRID, **arguments})


def test_a_setting_that_diverged_is_never_the_best():
    found = summarize({Run(1e-5, 2, 0): {"s": math.nan}, Run(2e-5, 2, 0): {"s": 3.0}}, "s")
    assert found["best"]["learning_rate"] == 2e-5
    assert table(found).splitlines()[2].split() == ["2e-05", "2", "1", "3.00", "3.00", "3.00", "best"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_goes_on_after_a_kill_and_prints_the_medians():
    MaskedLM(SMALL).save_pretrained("pretrained", load_tokenizer("embedded"))
    command = [sys.executable, "-m", "lightning_iclr", "pmi-finetune", "--recipe=pmi_masking/finetune_glue"]
    command += ["--learning_rates=[1e-3,1e-2]", "--batch_sizes=[4]", "--seeds=[0,1]", "--out=grid"]
    command += [f"--override+={setting}" for setting in overrides()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(recipe_root().parent), os.environ["PYTHONPATH"]])}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        while not list(Path("grid").glob("*/score.json")):
            assert process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    finished = {path: path.stat().st_mtime_ns for path in Path("grid").glob("*/score.json")}
    assert 0 < len(finished) < 4
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    found = json.loads(Path("grid/results.json").read_text())
    for row, rate in zip(found["settings"], ("0.001", "0.01"), strict=True):
        paths = [Path(f"grid/lr={rate}_batch=4_seed={seed}/score.json") for seed in (0, 1)]
        runs = [json.loads(path.read_text())["val/score"] for path in paths]
        assert row["median"] == pytest.approx(sum(runs) / 2)
    best = max(row["median"] for row in found["settings"])
    assert f"median val/score {best:.2f} of 2 seeds" in result.stdout
    assert not list(Path("grid").rglob("*.ckpt"))
