"""Measure the Vision Transformer: `claim` trains it against baselines, `speed` times it against Hugging Face's.

    python benchmarks/vit.py ablation      # a few settings of the embedded recipes, compared on validation data
    python benchmarks/vit.py accuracy      # the embedded recipes over three seeds, and an RBF machine on the same split
    python benchmarks/vit.py masked-patch  # what pre-training costs, and the most frequent class
    python benchmarks/vit.py claim         # data-regime curve against a CNN; few labels with and without pre-training
    python benchmarks/vit.py speed         # train step and inference against transformers' ViT
    python benchmarks/vit.py memory-peaks  # memory of both against transformers' ViT

Every command writes its part of ``benchmarks/results/vit.json`` with versions, machine, date and seeds.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from results_file import save
from torch import Tensor, nn

from lightning_iclr.cli import ICLRCLI
from lightning_iclr.schedules import WarmupCosine
from lightning_iclr.vit import MaskedPatchPretraining, MNIST5kDataModule, VisionTransformer, ViTClassifier

PICTURES = Path(__file__).parents[1] / "docs" / "images"
SELECTION_SEED = 100  # of the ablation; the test runs have seeds 0, 1, ...
PAPER_STYLE = ("--model.net.pool", "token", "--model.net.position", "learned")

# One change to a recipe each, fixed before the first of these runs.
ABLATION: dict[str, dict[str, tuple[str, ...]]] = {
    "vit/digits": {
        "recipe": (),
        "learning rate 1e-3": ("--model.optimizer.lr", "1.0e-3"),
        "learning rate 4e-3": ("--model.optimizer.lr", "4.0e-3"),
        "class token, learned positions": PAPER_STYLE,
        "no augmentation": ("--data.augment", "false"),
    },
    "vit/mnist5k": {
        "recipe": (),
        "learning rate 1.5e-3": ("--model.optimizer.lr", "1.5e-3"),
        "class token, learned positions": PAPER_STYLE,
    },
}


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


def fit(
    module: LightningModule, data: LightningDataModule, settings: dict[str, Any], split: str = "test"
) -> tuple[dict[str, float], float]:
    """Train, evaluate on one part, and return its metrics and the CPU seconds of the fit alone."""
    data.setup("fit")  # splitting costs seconds that are not training
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            num_sanity_val_steps=0,
            check_val_every_n_epoch=10**9,  # never while training
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            **settings,
        )
        start = time.process_time()
        trainer.fit(module, datamodule=data)
        seconds = time.process_time() - start
        evaluate = trainer.test if split == "test" else trainer.validate
        return dict(evaluate(module, datamodule=data, verbose=False)[0]), seconds


def ablation(name: str) -> dict[str, Any]:
    """Validation accuracy of a few settings of an embedded recipe, with one seed that no test run has."""
    seeds = ["--seed_everything", str(SELECTION_SEED), "--data.seed", str(SELECTION_SEED)]
    rows = []
    for change, overrides in ABLATION[name].items():
        module, data, settings = recipe(name, *seeds, *overrides)
        metrics, seconds = fit(module, data, settings, "val")
        row = {"change": change, "overrides": list(overrides), "validation_accuracy": metrics["val/accuracy"]}
        rows.append({**row, "cpu_seconds": seconds})
        print(name, rows[-1], flush=True)
    count, share = len(data.splits["val"]), rows[0]["validation_accuracy"]  # type: ignore[attr-defined]
    error = (share * (1 - share) / count) ** 0.5
    return {"recipe": name, "seed": SELECTION_SEED, "validation_images": count, "standard_error": error, "runs": rows}


def accuracy(seeds: int) -> dict[str, Any]:
    """Test accuracy of the embedded recipes over seeds, and of the machines that the specification names."""
    out: dict[str, Any] = {"seeds": list(range(seeds))}
    for name in ("vit/digits", "vit/mnist5k"):
        runs = []
        for seed in range(seeds):
            module, data, settings = recipe(name, "--seed_everything", str(seed), "--data.seed", str(seed))
            metrics, seconds = fit(module, data, settings)
            runs.append({"seed": seed, "test_accuracy": metrics["test/accuracy"], "cpu_seconds": seconds})
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
                metrics, seconds = fit(_arm(arm, steps, seed), data, {"max_steps": steps, "gradient_clip_val": 1.0})
                row = {"arm": arm, "images": size, "seed": seed, "steps": steps, "cpu_seconds": seconds}
                rows.append({**row, "test_accuracy": metrics["test/accuracy"]})
                print(rows[-1], flush=True)
    table = {
        arm: {str(n): [r["test_accuracy"] for r in rows if r["arm"] == arm and r["images"] == n] for n in sizes}
        for arm in ("vit", "cnn")
    }
    _draw_data_regime(table, budget)
    gaps = {n: [c - v for c, v in zip(table["cnn"][n], table["vit"][n], strict=True)] for n in table["vit"]}
    summary = {
        n: {"mean": statistics.mean(own), "standard_error": statistics.stdev(own) / seeds**0.5 if seeds > 1 else None}
        for n, own in gaps.items()
    }
    seconds = [row["cpu_seconds"] for row in rows]
    return {
        "cpu_seconds_a_fit": budget,
        "cpu_seconds_range": [min(seconds), max(seconds)],
        "seeds": list(range(seeds)),
        "accuracy": table,
        "cnn_minus_vit": summary,
        "runs": rows,
    }


def _arm(arm: str, steps: int, seed: int = 0) -> ViTClassifier:
    if arm == "vit":
        # The recipe seeds itself when it is built, so that a seed set before has no effect.
        module, _, _ = recipe("vit/mnist5k", "--seed_everything", str(seed), "--model.seed", str(seed))
        assert isinstance(module, ViTClassifier)
        net = module.net
    else:
        seed_everything(seed, verbose=False)
        net = SmallCNN()
    return ViTClassifier(
        net,
        seed=seed,
        optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3, weight_decay=0.05),
        lr_scheduler=lambda optimizer: WarmupCosine(optimizer, warmup_steps=steps // 10, total_steps=steps),
    )


def _cpu_seconds_per_step(arm: str, short: int = 20, long: int = 120) -> float:
    """Return the cost of a step alone: the difference of two fits has no start-up in it."""
    data = MNIST5kDataModule(batch_size=64)
    seconds = [
        fit(_arm(arm, steps), data, {"max_steps": steps, "gradient_clip_val": 1.0})[1] for steps in (short, long)
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
        pretraining, _, row = _pretrain(common)
        row = {"seed": seed, **row}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pretrained.ckpt"
            torch.save({"state_dict": pretraining.state_dict()}, path)
            subset = ["--data.num_train_labels", str(labels), "--data.subset_seed", str(seed)]
            for arm, extra in (("scratch", []), ("pretrained", ["--model.pretrained", str(path)])):
                module, data, settings = recipe("vit/mnist5k_masked_patch_finetune", *common, *subset, *extra)
                metrics, row[f"{arm}_cpu_seconds"] = fit(module, data, settings)
                row[arm] = metrics["test/accuracy"]
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


def masked_patch() -> dict[str, Any]:
    """One run of the pre-training recipe, and what always naming the most frequent class has; see also `few_labels`."""
    module, data, row = _pretrain(["--seed_everything", "0", "--data.seed", "0"])
    return {"seed": 0, **row, "most_frequent_class": _most_frequent_class(module, data)}


def _pretrain(overrides: list[str]) -> tuple[MaskedPatchPretraining, LightningDataModule, dict[str, float]]:
    module, data, settings = recipe("vit/mnist5k_masked_patch", *overrides)
    assert isinstance(module, MaskedPatchPretraining)
    metrics, seconds = fit(module, data, settings)
    return module, data, {"masked_accuracy": metrics["test/masked_accuracy"], "masked_cpu_seconds": seconds}


def _most_frequent_class(module: MaskedPatchPretraining, data: LightningDataModule) -> float:
    """Share of the test part's patches that have the training part's most frequent class."""
    classes = {}
    for split in ("train", "test"):
        batches = data.evaluation_loader(split)  # type: ignore[operator]
        classes[split] = torch.cat([module.pretext.targets(batch[0]).flatten() for batch in batches])
    return (classes["test"] == classes["train"].mode().values).double().mean().item()


def _ours(**overrides: Any) -> nn.Module:
    return VisionTransformer.from_variant("Ti/16", activation="gelu", **overrides)


def _theirs(**overrides: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    arguments = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    config = ViTConfig(**{**arguments, **overrides})
    config.num_labels = 1000
    return ViTForImageClassification(config)


def _steps(build: Callable[[], nn.Module], image_size: int = 224) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return a training step and an inference at batch 8."""
    torch.manual_seed(0)
    net = build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    images, labels = torch.randn(8, 3, image_size, image_size), torch.randint(1000, (8,))

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
    """CPU seconds of the peer divided by ours, interleaved."""
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
    return out


def memory_peaks(processes: int) -> dict[str, Any]:
    """Peak memory of both arms over fresh processes, interleaved."""
    out: dict[str, Any] = {"processes": processes, "batch_size": 8, "image_size": 224, "variant": "Ti/16", "threads": 1}
    for kind in ("inference", "train"):
        peaks: dict[str, list[float]] = {"ours": [], "huggingface": []}
        for number in range(processes):
            for arm in peaks if number % 2 else reversed(list(peaks)):
                peaks[arm].append(_peak(arm, kind))
            print(kind, number, {arm: values[-1] for arm, values in peaks.items()}, flush=True)
        out[f"{kind}_mebibytes"] = {}
        for arm, values in peaks.items():
            quartiles = statistics.quantiles(values, n=4)
            median = statistics.median(values)
            out[f"{kind}_mebibytes"][arm] = {
                "median": median,
                "quartiles": [quartiles[0], quartiles[2]],
                "runs": values,
            }
    return out


def _peak(arm: str, kind: str) -> float:
    """Largest resident set of a fresh process, less that of imports and warm-up, in MiB."""
    command = [sys.executable, __file__, "memory", "--arm", arm, "--kind", kind]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def memory(arm: str, kind: str) -> float:
    """Run three steps in this process and return the growth of its largest resident set, in MiB."""
    torch.set_num_threads(1)
    # What the first draw, step or inference of a process loads is nobody's: tiny networks of both arms load it before.
    tiny_ours = {"image_size": 32, "dim": 48, "mlp_dim": 96, "depth": 1}
    tiny_theirs = {"image_size": 32, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1}
    for build in (lambda: _ours(**tiny_ours), lambda: _theirs(**tiny_theirs)):
        for step in _steps(build, image_size=32):
            step()
    del build, step
    gc.collect()
    before = _largest_resident_set()
    train, infer = _steps(_ours if arm == "ours" else _theirs)
    for _ in range(3):
        train() if kind == "train" else infer()
    return (_largest_resident_set() - before) / 1024


def _largest_resident_set() -> int:
    """Return this process's own peak in KiB; getrusage would also count the parent that it was forked from."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = ("ablation", "accuracy", "masked-patch", "claim", "data-regime", "few-labels", "speed", "memory-peaks")
    parser.add_argument("command", choices=[*commands, "memory"], metavar="{" + ",".join(commands) + "}")
    parser.add_argument("--recipe", choices=list(ABLATION), help="ablate this one alone")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of accuracy and of the data-regime curve")
    parser.add_argument("--pretraining-seeds", type=int, default=5, help="seeds of the few-label comparison")
    parser.add_argument("--budget", type=float, default=75.0, help="CPU seconds of each fit of the data-regime curve")
    parser.add_argument("--rounds", type=int, default=16, help="interleaved rounds of the speed comparison")
    parser.add_argument("--processes", type=int, default=9, help="processes of each arm of the memory comparison")
    parser.add_argument("--arm", choices=["ours", "huggingface"], help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=["train", "inference"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    packages = ("transformers", "datasets", "scikit-learn")
    if args.command == "memory":
        print(memory(args.arm, args.kind))
    if args.command == "ablation":
        for name in ABLATION if args.recipe is None else [args.recipe]:
            save("vit", f"ablation_{name.removeprefix('vit/')}", ablation(name), packages)
    if args.command == "accuracy":
        save("vit", "accuracy", accuracy(args.seeds), packages)
    if args.command == "masked-patch":
        save("vit", "masked_patch", masked_patch(), packages)
    if args.command in ("claim", "data-regime"):
        save("vit", "data_regime", data_regime(args.seeds, args.budget), packages)
    if args.command in ("claim", "few-labels"):
        save("vit", "few_labels", few_labels(args.pretraining_seeds), packages)
    if args.command == "speed":
        save("vit", "speed", speed(args.rounds), packages)
    if args.command == "memory-peaks":
        save("vit", "memory", memory_peaks(args.processes), packages)


if __name__ == "__main__":
    main()
