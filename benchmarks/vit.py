"""Measure the Vision Transformer: `claim` trains it against baselines, `speed` times it against Hugging Face's.

    python benchmarks/vit.py accuracy     # the embedded recipes over three seeds, and an RBF machine on the same split
    python benchmarks/vit.py claim        # data-regime curve against a CNN; few labels with and without pre-training
    python benchmarks/vit.py speed        # train step, inference and memory against transformers' ViT

Every command writes its part of ``benchmarks/results/vit.json`` with versions, machine, date and seeds.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from lightning_iclr.cli import ICLRCLI
from lightning_iclr.schedules import WarmupCosine
from lightning_iclr.vit import MNIST5kDataModule, VisionTransformer, ViTClassifier

RESULTS = Path(__file__).parent / "results" / "vit.json"
PICTURES = Path(__file__).parents[1] / "docs" / "images"


class SmallCNN(nn.Sequential):
    """Three stages of 3x3 convolution, batch norm, ReLU and pooling (16, 32, 64 channels), then a linear head."""

    num_classes = 10

    def __init__(self) -> None:
        stages: list[nn.Module] = []
        for before, after in ((1, 16), (16, 32), (32, 64)):
            stages += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            stages += [nn.MaxPool2d(2)]
        super().__init__(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def recipe(name: str, *overrides: str) -> tuple[LightningModule, LightningDataModule, dict[str, Any]]:
    """Build a shipped recipe's module and data module, and the Trainer arguments that training depends on."""
    arguments = ["--config", name, "--trainer.callbacks", "null", *overrides]
    cli = ICLRCLI(args=arguments, run=False)
    trainer = {key: cli.config["trainer"][key] for key in ("max_steps", "gradient_clip_val")}
    return cli.model, cli.datamodule, trainer


def fit_and_test(
    module: LightningModule, data: LightningDataModule, max_steps: int, gradient_clip_val: float | None
) -> tuple[float, float]:
    """Train, test, and return the test accuracy and the CPU seconds of the fit alone."""
    data.setup("fit")  # splitting costs seconds that are not training
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=max_steps,
            gradient_clip_val=gradient_clip_val,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        start = time.process_time()
        trainer.fit(module, datamodule=data)
        seconds = time.process_time() - start
        return trainer.test(module, datamodule=data, verbose=False)[0]["test/accuracy"], seconds


def accuracy(seeds: int) -> dict[str, Any]:
    """Test accuracy of the embedded recipes over seeds, and of the machines that the specification names."""
    out: dict[str, Any] = {"seeds": list(range(seeds))}
    for name in ("vit/digits", "vit/mnist5k"):
        runs = []
        for seed in range(seeds):
            module, data, settings = recipe(name, "--seed_everything", str(seed), "--data.seed", str(seed))
            score, seconds = fit_and_test(module, data, **settings)
            runs.append({"seed": seed, "test_accuracy": score, "cpu_seconds": seconds})
            print(name, runs[-1], flush=True)
        scores = [run["test_accuracy"] for run in runs]
        out[name] = {"mean": statistics.mean(scores), "min": min(scores), "runs": runs, **_references(data)}
        print(name, {k: v for k, v in out[name].items() if k != "runs"}, flush=True)
    return out


def _references(data: LightningDataModule) -> dict[str, float]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    data.setup("fit")
    parts = {}
    for split in ("train", "test"):
        batches = list(data.evaluation_loader(split))  # type: ignore[operator]
        images = torch.cat([batch[0] for batch in batches]).flatten(1).numpy()
        parts[split] = (images * 0.35 + 0.3, torch.cat([batch[1] for batch in batches]).numpy())  # pixels in [0, 1]
    svc = SVC(C=10).fit(*parts["train"])
    logistic = LogisticRegression(C=1.0 if parts["train"][0].shape[1] == 64 else 0.05, max_iter=5000).fit(
        *parts["train"]
    )
    return {"rbf_svc": svc.score(*parts["test"]), "logistic_regression": logistic.score(*parts["test"])}


def data_regime(seeds: int, budget: float, sizes: tuple[int, ...] = (100, 600, 3500)) -> dict[str, Any]:
    """Accuracy against the number of training images, ViT and CNN, each fit given the same CPU seconds."""
    rows = []
    per_step = {arm: _cpu_seconds_per_step(arm) for arm in ("vit", "cnn")}
    for size in sizes:
        for seed in range(seeds):
            for arm in ("vit", "cnn"):
                data = MNIST5kDataModule(num_train_labels=size, subset_seed=seed, seed=seed, batch_size=64)
                steps = max(int(budget / per_step[arm]), 10)
                seed_everything(seed, verbose=False)
                score, seconds = fit_and_test(_arm(arm, steps), data, steps, 1.0)
                row = {"arm": arm, "images": size, "seed": seed, "steps": steps, "cpu_seconds": seconds}
                rows.append({**row, "test_accuracy": score})
                print(rows[-1], flush=True)
    table = {
        arm: {str(n): [r["test_accuracy"] for r in rows if r["arm"] == arm and r["images"] == n] for n in sizes}
        for arm in ("vit", "cnn")
    }
    _draw_data_regime(table, budget)
    return {"cpu_seconds_a_fit": budget, "seeds": list(range(seeds)), "accuracy": table, "runs": rows}


def _arm(arm: str, steps: int) -> ViTClassifier:
    if arm == "vit":
        module, _, _ = recipe("vit/mnist5k")
        assert isinstance(module, ViTClassifier)
        net = module.net
    else:
        net = SmallCNN()
    return ViTClassifier(
        net,
        optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3, weight_decay=0.05),
        lr_scheduler=lambda optimizer: WarmupCosine(optimizer, warmup_steps=steps // 10, total_steps=steps),
    )


def _cpu_seconds_per_step(arm: str, short: int = 20, long: int = 120) -> float:
    """Return the cost of a step alone: the difference of two fits has no start-up in it."""
    seconds = [
        fit_and_test(_arm(arm, steps), MNIST5kDataModule(batch_size=64), steps, 1.0)[1] for steps in (short, long)
    ]
    return (seconds[1] - seconds[0]) / (long - short)


def _draw_data_regime(table: dict[str, dict[str, list[float]]], budget: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for arm, label in (("cnn", "small CNN, 24k parameters"), ("vit", "ViT, 136k parameters")):
        sizes = [int(n) for n in table[arm]]
        scores = np.array(list(table[arm].values()))
        axes.plot(sizes, scores.mean(1), marker="o", label=label)
        axes.fill_between(sizes, scores.min(1), scores.max(1), alpha=0.2)
    axes.set(xscale="log", xlabel="training images", ylabel="test accuracy")
    axes.set_title(f"MNIST-5k, {budget:.0f} CPU-seconds a fit; mean and range over seeds")
    axes.legend()
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURES / "vit_data_regime.png", dpi=120)


def few_labels(seeds: int, labels: int = 100) -> dict[str, Any]:
    """Accuracy on few labels from scratch and after masked-patch pre-training, and of an RBF machine."""
    rows = []
    for seed in range(seeds):
        common = ["--seed_everything", str(seed), "--data.seed", str(seed)]
        pretraining, data, settings = recipe("vit/mnist5k_masked_patch", *common)
        masked, _ = _fit_pretraining(pretraining, data, settings)
        row: dict[str, Any] = {"seed": seed, "masked_accuracy": masked}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pretrained.ckpt"
            torch.save({"state_dict": pretraining.state_dict()}, path)
            subset = ["--data.num_train_labels", str(labels), "--data.subset_seed", str(seed)]
            for arm, extra in (("scratch", []), ("pretrained", ["--model.pretrained", str(path)])):
                module, data, settings = recipe("vit/mnist5k_masked_patch_finetune", *common, *subset, *extra)
                row[arm], row[f"{arm}_cpu_seconds"] = fit_and_test(module, data, **settings)
        row["rbf_svc"] = _references(data)["rbf_svc"]
        rows.append(row)
        print(row, flush=True)
    _draw_few_labels(rows, labels)
    gains = [row["pretrained"] - row["scratch"] for row in rows]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
    means = {arm: statistics.mean(row[arm] for row in rows) for arm in ("scratch", "pretrained", "rbf_svc")}
    return {"labels": labels, **means, "gain": statistics.mean(gains), "gain_standard_error": error, "runs": rows}


def _draw_few_labels(rows: list[dict[str, Any]], labels: int) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 3.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        axes.plot([0, 1], [row["scratch"], row["pretrained"]], marker="o", color="C0")
    machine = statistics.mean(row["rbf_svc"] for row in rows)
    axes.axhline(machine, color="grey", linestyle=":", label="RBF machine (mean)")
    axes.set(xticks=[0, 1], xticklabels=["from scratch", "pre-trained"], xlim=(-0.3, 1.3), ylabel="test accuracy")
    axes.set_title(f"MNIST-5k, {labels} labels; a line for each seed")
    axes.legend(loc="lower right")
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURES / "vit_few_labels.png", dpi=120)


def _fit_pretraining(
    module: LightningModule, data: LightningDataModule, settings: dict[str, Any]
) -> tuple[float, float]:
    trainer = Trainer(
        accelerator="cpu",
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    start = time.process_time()
    trainer.fit(module, datamodule=data)
    seconds = time.process_time() - start
    return trainer.test(module, datamodule=data, verbose=False)[0]["test/masked_accuracy"], seconds


def _ours() -> nn.Module:
    return VisionTransformer.from_variant("Ti/16", activation="gelu")


def _theirs() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768)
    config.num_labels = 1000
    return ViTForImageClassification(config)


def _steps(build: Callable[[], nn.Module]) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a training step and an inference at batch 8, 224 px."""
    torch.manual_seed(0)
    net = build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    images, labels = torch.randn(8, 3, 224, 224), torch.randint(1000, (8,))

    def logits() -> Tensor:
        out = net(images)
        return out if isinstance(out, Tensor) else out.logits

    def train() -> None:
        net.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits(), labels).backward()
        optimizer.step()

    def infer() -> None:
        net.eval()
        with torch.inference_mode():
            logits()

    return train, infer


def speed(rounds: int) -> dict[str, Any]:
    """CPU seconds of the peer divided by ours, interleaved, and both peaks of memory."""
    torch.set_num_threads(1)
    steps = {"ours": _steps(_ours), "huggingface": _steps(_theirs)}
    seconds: dict[str, dict[str, list[float]]] = {kind: {arm: [] for arm in steps} for kind in ("train", "inference")}
    for number in range(-2, rounds):  # two rounds to warm up
        for arm in steps if number % 2 else reversed(steps):
            for kind, step in zip(seconds, steps[arm], strict=True):
                start = time.process_time()
                step()
                if number >= 0:
                    seconds[kind][arm].append(time.process_time() - start)
    out: dict[str, Any] = {"rounds": rounds, "batch_size": 8, "image_size": 224, "variant": "Ti/16", "threads": 1}
    for kind, arms in seconds.items():
        ratios = [b / a for a, b in zip(arms["ours"], arms["huggingface"], strict=True)]
        medians = {arm: statistics.median(values) for arm, values in arms.items()}
        quartiles = statistics.quantiles(ratios, n=4)
        out[kind] = {**medians, "ratio": statistics.median(ratios), "ratio_quartiles": [quartiles[0], quartiles[2]]}
    for kind in ("train", "inference"):
        peaks: dict[str, list[float]] = {arm: [] for arm in steps}
        for _ in range(5):
            for arm in steps:
                peaks[arm].append(_peak(arm, kind))
        out[f"{kind}_peak_mebibytes"] = {arm: statistics.median(values) for arm, values in peaks.items()}
    return out


def _peak(arm: str, kind: str) -> float:
    """Largest resident set of a fresh process, less that of its imports, in MiB."""
    command = [sys.executable, __file__, "memory", "--arm", arm, "--kind", kind]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def memory(arm: str, kind: str) -> float:
    """Run two steps in this process and return the growth of its largest resident set, in MiB."""
    import transformers.models.vit.modeling_vit  # noqa: F401  (the imports are the same for both)

    torch.set_num_threads(1)
    before = _largest_resident_set()
    train, infer = _steps(_ours if arm == "ours" else _theirs)
    for _ in range(3):
        train() if kind == "train" else infer()
    return (_largest_resident_set() - before) / 1024


def _largest_resident_set() -> int:
    """Return this process's own peak in KiB; getrusage would also count the parent that it was forked from."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def save(part: str, result: dict[str, Any]) -> None:
    """Write one part of the results file; the others stay as they are."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    packages = ("torch", "lightning", "transformers", "datasets", "numpy", "scikit-learn")
    results[part] = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("lightning-iclr", *packages)},
        **result,
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps({k: v for k, v in results[part].items() if k != "runs"}, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["accuracy", "claim", "data-regime", "few-labels", "speed", "memory"])
    parser.add_argument("--seeds", type=int, default=3, help="seeds of accuracy and of the data-regime curve")
    parser.add_argument("--pretraining-seeds", type=int, default=5, help="seeds of the few-label comparison")
    parser.add_argument("--budget", type=float, default=60.0, help="CPU seconds of each fit of the data-regime curve")
    parser.add_argument("--rounds", type=int, default=12, help="interleaved rounds of the speed comparison")
    parser.add_argument("--arm", choices=["ours", "huggingface"], help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=["train", "inference"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.command == "memory":
        print(memory(args.arm, args.kind))
    if args.command == "accuracy":
        save("accuracy", accuracy(args.seeds))
    if args.command in ("claim", "data-regime"):
        save("data_regime", data_regime(args.seeds, args.budget))
    if args.command in ("claim", "few-labels"):
        save("few_labels", few_labels(args.pretraining_seeds))
    if args.command == "speed":
        save("speed", speed(args.rounds))


if __name__ == "__main__":
    main()
