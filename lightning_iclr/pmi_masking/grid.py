"""`lightning-iclr pmi-finetune`: the paper's fine-tuning grid, and the median of its seeds."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm.auto import tqdm

from lightning_iclr._recipes import find_recipe
from lightning_iclr.cli import ICLRCLI

_OWN = (
    "data.batch_size",
    "data.seed",
    "model.optimizer.lr",
    "model.seed",
    "seed_everything",
    "trainer.default_root_dir",
)


class Run(NamedTuple):
    """A run of the grid."""

    learning_rate: float
    batch_size: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"lr={self.learning_rate:g}_batch={self.batch_size}_seed={self.seed}"


def finetune_grid(
    recipe: str,
    out: str,
    learning_rates: list[float] = [1e-5, 2e-5, 3e-5, 5e-5],  # noqa: B006  # shown by --help, and never changed
    batch_sizes: list[int] = [16, 32],  # noqa: B006
    seeds: list[int] = [0, 1, 2, 3, 4],  # noqa: B006
    monitor: str = "val/score",
    override: list[str] | None = None,
) -> None:
    """Fine-tune with each learning rate and batch size, and print the median of the seeds and the best setting.

    Each run is a process of its own, ``lightning-iclr fit``, whose output is in its folder's ``log.txt``. A run that
    has finished is kept, as ``score.json``, and is not run again; one that was stopped starts anew. Checkpoints go when
    a run has finished. Several commands may share a folder if their seeds differ.

    Args:
        recipe: Recipe, or YAML file.
        out: Folder for runs and results, made where there is none: ``results.csv`` has all runs, ``results.json`` also
            the medians and the best setting.
        learning_rates: Learning rates, the optimizer's ``lr``.
        batch_sizes: Rows that one process takes at a step.
        seeds: Seeds of the new head's weights, the orders and dropout.
        monitor: What the last validation of a run is judged by, the more the better.
        override: Further settings of all runs, each with ``--override+=KEY=VALUE``, such as
            ``--override+=model.net=FOLDER --override+=data.tokenizer=FOLDER``.
    """
    runs = _grid(learning_rates, batch_sizes, seeds)
    arguments = ["--config", find_recipe(recipe), *_overrides(override or [])]
    settings = _settings(arguments, monitor)
    folder = Path(out)
    _keep_settings(folder, settings)
    scores: dict[Run, dict[str, float]] = {}
    with tqdm(runs, desc="fine-tuning", unit="run") as bar:
        for run in bar:
            bar.set_postfix_str(run.name)
            if not (folder / run.name / "score.json").is_file():
                _fine_tune(run, folder / run.name, arguments, monitor)
            for checkpoints in [*(folder / run.name).rglob("checkpoints")]:
                shutil.rmtree(checkpoints)
            scores[run] = _read(folder / run.name, run, monitor)
    found = summarize(scores, monitor)
    _write(folder / "results.json", json.dumps(found, indent=1))
    _write_table(folder / "results.csv", scores)
    print(table(found))
    best = found["best"]
    print(
        f"best: learning rate {best['learning_rate']:g}, batch size {best['batch_size']}: median {monitor} "
        f"{best['median']:.2f} of {len(best['scores'])} seeds; all runs are in {folder / 'results.csv'}"
    )


def summarize(scores: Mapping[Run, Mapping[str, float]], monitor: str) -> dict[str, Any]:
    """Return each setting's scores by seed and their median, and the best setting, of equals the first.

    Args:
        scores: What each run's last validation gave.
        monitor: Which of that the settings are judged by.
    """
    settings: dict[tuple[float, int], dict[str, float]] = {}
    for run, found in scores.items():
        settings.setdefault((run.learning_rate, run.batch_size), {})[str(run.seed)] = found[monitor]
    rows: list[dict[str, Any]] = [
        {"learning_rate": rate, "batch_size": size, "median": median(by_seed.values()), "scores": by_seed}
        for (rate, size), by_seed in settings.items()
    ]
    # A run that diverged is worse than any other, and its score no number to compare.
    best = max(rows, key=lambda row: -math.inf if math.isnan(row["median"]) else row["median"])
    return {"monitor": monitor, "best": best, "settings": rows}


def table(found: Mapping[str, Any]) -> str:
    """Return a table of what `summarize` found."""
    rows: list[Sequence[str]] = [("learning rate", "batch size", "seeds", "median", "least", "most", "")]
    for row in found["settings"]:
        values = list(row["scores"].values())
        numbers = (f"{number:.2f}" for number in (row["median"], min(values), max(values)))
        mark = "best" if row is found["best"] else ""
        rows.append((f"{row['learning_rate']:g}", str(row["batch_size"]), str(len(values)), *numbers, mark))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


class KeepScore(Callback):
    """Write what the last validation of a fit found to a file, when the fit has ended.

    Args:
        path: File to write, as JSON.
        monitor: What it must hold.

    Raises:
        RuntimeError: When the fit has ended, the last step has not been validated, or ``monitor`` was not logged.
    """

    def __init__(self, path: str, monitor: str) -> None:
        self.path, self.monitor = path, monitor
        self.step, self.scores = -1, dict[str, float]()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            found = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.step, self.scores = trainer.global_step, {n: v for n, v in found.items() if not n.startswith("train/")}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.step != trainer.global_step:
            raise RuntimeError(f"the last step, {trainer.global_step}, must be validated, and the last was {self.step}")
        if self.monitor not in self.scores:
            raise RuntimeError(f"monitor must be one of {', '.join(self.scores)}, got {self.monitor!r}")
        if trainer.is_global_zero:
            _write(Path(self.path), json.dumps(self.scores))


class _Parsed(ICLRCLI):
    """What the command would build, not built."""

    def instantiate_classes(self) -> None:
        pass


def _grid(learning_rates: Sequence[float], batch_sizes: Sequence[int], seeds: Sequence[int]) -> list[Run]:
    for name, values, least in (
        ("learning_rates", learning_rates, "above 0"),
        ("batch_sizes", batch_sizes, "at least 1"),
        ("seeds", seeds, "at least 0"),
    ):
        wrong = [value for value in values if value < 0 or (value == 0 and name != "seeds") or not math.isfinite(value)]
        if not values or wrong:
            raise ValueError(f"{name} must be {least}, and there must be some, got {wrong[0] if wrong else 'none'}")
        if len(set(values)) < len(values):
            raise ValueError(f"{name} must differ, got {', '.join(map(str, values))}")
    return [Run(*values) for values in product(learning_rates, batch_sizes, seeds)]


def _overrides(override: Sequence[str]) -> list[str]:
    """Return further arguments of the command."""
    for each in override:
        name, separator, value = each.removeprefix("--").partition("=")
        if not separator:
            raise ValueError(f"override must be settings KEY=VALUE, got {each!r}")
        if name in _OWN:
            raise ValueError(f"override must leave {name} to the grid, got {value}")
    return [f"--{each.removeprefix('--')}" for each in override]


def _flat(nested: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in nested.items():
        if isinstance(value, Mapping) and value:
            yield from ((f"{name}.{rest}", inner) for rest, inner in _flat(value))
        else:
            yield name, value


def _settings(arguments: list[str], monitor: str) -> dict[str, Any]:
    """Return all settings of the runs but what the grid varies; whatever is no setting is told here."""
    probe = [*arguments, *_arguments(Run(1e-5, 1, 0))]
    cli = _Parsed(args=probe, run=False)
    config = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))
    config["trainer"].pop("default_root_dir", None)
    return {"monitor": monitor, **config}


def _keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "settings.yaml"
    if path.is_file():
        kept, wanted = dict(_flat(yaml.safe_load(path.read_text("utf-8")))), dict(_flat(settings))
        for name in sorted({*kept, *wanted}):
            if kept.get(name) != wanted.get(name):
                raise ValueError(
                    f"out must be another folder: the runs in {folder} have {name} {kept.get(name)!r}, got "
                    f"{wanted.get(name)!r}"
                )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, yaml.safe_dump(settings))


def _arguments(run: Run) -> list[str]:
    rate, size, seed = run
    return [
        f"--model.optimizer.lr={rate!r}",
        f"--data.batch_size={size}",
        *(f"--{name}={seed}" for name in ("seed_everything", "model.seed", "data.seed")),
    ]


def _fine_tune(run: Run, folder: Path, arguments: list[str], monitor: str) -> None:
    if folder.exists():  # of a run that was stopped
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    command = [
        *("fit", *arguments, *_arguments(run)),
        f"--trainer.default_root_dir={folder}",
        f"--trainer.callbacks+={__name__}.KeepScore",
        f"--trainer.callbacks.path={folder.resolve() / 'score.json'}",
        f"--trainer.callbacks.monitor={monitor}",
    ]
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        code = _launch(command, log)
    if code != 0 or not (folder / "score.json").is_file():
        lines = (folder / "log.txt").read_text("utf-8").strip().splitlines() or ["it wrote nothing"]
        raise RuntimeError(f"run {run.name} ended with code {code}, see {folder / 'log.txt'}: {lines[-1]}")


def _launch(command: Sequence[str], log: Any) -> int:
    # A process of its own: under DDP the Trainer starts its command anew for each device, which must be one run's.
    program = [sys.executable, "-m", "lightning_iclr", *command]
    return subprocess.run(
        program, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=False
    ).returncode


def _read(folder: Path, run: Run, monitor: str) -> dict[str, float]:
    scores: dict[str, float] = json.loads((folder / "score.json").read_text("utf-8"))
    if monitor not in scores:
        raise ValueError(f"{folder / 'score.json'} must hold {monitor}, got {', '.join(scores)}")
    return scores


def _write(path: Path, content: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(content, "utf-8")
    partial.replace(path)


def _write_table(path: Path, scores: Mapping[Run, Mapping[str, float]]) -> None:
    names = sorted({name for found in scores.values() for name in found})
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*Run._fields, *names])
        writer.writerows([*run, *(found.get(name, "") for name in names)] for run, found in scores.items())
    partial.replace(path)
