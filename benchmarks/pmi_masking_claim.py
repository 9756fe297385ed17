"""Compare maskings on the definitions of WordNet: `python benchmarks/pmi_masking.py claim` runs this.

Each arm is the shipped recipe of its name on WordPiece pieces of another number: the same rows in the same order, the
same 15 %. A trained network is judged on the test part with all that is chosen replaced by [MASK], the choice being
each masking's in turn, the same for all networks; and by logistic regressions on its frozen features of the probe part.
An arm and seed that is finished is a file in the folder; a run that was stopped goes on with the next.
"""

import json
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lightning_iclr.cli import ICLRCLI
from lightning_iclr.embedded import load_wordnet
from lightning_iclr.pmi_masking import MaskedLM, SpanMaskingCollator, load_glosses
from lightning_iclr.pmi_masking.model import Masked
from lightning_iclr.pmi_masking.pictures import draw_cross_evaluation
from lightning_iclr.pmi_masking.tokenizers import train_wordpiece

PICTURES = Path(__file__).parents[1] / "docs" / "images"
MASKINGS = ("random_token", "whole_word", "random_span", "pmi", "naive_pmi", "frequency")
HALF = ("random_token", "pmi")  # also run at half the steps, with a decay of their own
SELECTION_SEED = 100  # of the search of rates; the test runs have seeds 0, 1, ...
RATES = (1e-3, 2e-3, 4e-3)
NEUTRAL = ("random_span", "frequency")  # maskings of hypothesis B, for arms that were not trained on them
NOUN_CLASSES = 10


@dataclass(frozen=True)
class Setting:
    """What all arms of a comparison share."""

    pieces: int
    steps: int
    folder: Path

    @property
    def tokenizer(self) -> str:
        """The embedded WordPiece, or the folder of a smaller one, which is trained once."""
        if self.pieces == 8000:
            return "embedded"
        path = self.folder / f"wordpiece-{self.pieces}"
        if not path.exists():
            partial = path.with_suffix(".partial")
            train_wordpiece(load_glosses()["train"]["text"], self.pieces).save_pretrained(partial)
            partial.rename(path)
        return str(path)


class TrainingLoss(Callback):
    """Keep the training loss of each step."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values.append(outputs["loss"].detach())


def recipe(setting: Setting, masking: str, steps: int, rate: float, seed: int) -> ICLRCLI:
    """Return a shipped recipe that is ready to run."""
    arguments = ["--config", f"pmi_masking/glosses_{masking}", "--trainer.callbacks", "null"]
    for name in ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"):
        arguments += [f"--trainer.{name}", "false"]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "0"]
    arguments += ["--trainer.max_steps", str(steps), "--model.lr_scheduler.init_args.total_steps", str(steps)]
    arguments += ["--model.optimizer.init_args.lr", str(rate), "--model.net.vocab_size", str(setting.pieces)]
    arguments += ["--model.seed", str(seed), "--seed_everything", str(seed), "--data.seed", str(seed)]
    cli = ICLRCLI(args=[*arguments, "--data.tokenizer", setting.tokenizer], run=False)
    cli.datamodule.prepare_data()
    cli.datamodule.setup()
    return cli


def train(cli: ICLRCLI) -> tuple[list[float], float]:
    """Train and return the loss of each step and CPU seconds."""
    losses = TrainingLoss()
    cli.trainer.callbacks.append(losses)
    begin = time.process_time()
    cli.trainer.fit(cli.model, cli.datamodule)
    return torch.stack(losses.values).tolist(), time.process_time() - begin


@torch.no_grad()
def held_out(model: MaskedLM, collator: SpanMaskingCollator, rows: Any) -> dict[str, list[float]]:
    """Return for each row the predicted tokens, the sum of their losses and the number that is right.

    All that is chosen becomes [MASK].
    """
    collator.mask_replace_prob, collator.random_replace_prob = 1.0, 0.0
    found: dict[str, list[float]] = {"tokens": [], "loss": [], "right": []}
    for begin in range(0, len(rows), 64):
        batch = collator([rows[place] for place in range(begin, min(begin + 64, len(rows)))])
        masked: Masked = model.predict_masked(batch)
        row = torch.nonzero(batch["labels"] != -100)[:, 0]
        losses = F.cross_entropy(masked.logits, masked.labels, reduction="none")
        right = (masked.logits.argmax(dim=1) == masked.labels).float()
        for name, values in (("tokens", torch.ones_like(losses)), ("loss", losses), ("right", right)):
            found[name] += torch.zeros(len(batch["labels"])).index_add_(0, row, values).tolist()
    return found


@torch.no_grad()
def features(model: MaskedLM, tokenizer: Any) -> np.ndarray:
    """Return the mean of each probe definition's last hidden states (15,000, H)."""
    texts, found = load_glosses()["probe"]["text"], []
    order = np.argsort([len(text) for text in texts])  # less padding
    for places in np.split(order, range(128, len(order), 128)):
        chosen = [texts[place] for place in places]
        batch = tokenizer(chosen, padding=True, truncation=True, max_length=64, return_tensors="pt")
        states = model.net.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        weights = batch["attention_mask"][..., None].float()
        found.append(((states * weights).sum(1) / weights.sum(1)).numpy())
    return np.concatenate(found)[np.argsort(order)]


def noun_classes() -> tuple[np.ndarray, np.ndarray]:
    """Return the probe definitions (P,) of nouns under the ten largest of WordNet's branches, and their branch (P,).

    A branch is what a synset's first hypernyms lead to, three steps below the root, `entity`.
    """
    synsets, probe = load_wordnet(), load_glosses()["probe"]
    above = [
        (own or instance or [-1])[0]
        for own, instance in zip(synsets["hypernyms"], synsets["instance_hypernyms"], strict=True)
    ]
    branch = []
    for row, pos in zip(probe["synset"], probe["pos"], strict=True):
        path = [row]
        while pos == "noun" and above[path[-1]] >= 0:
            path.append(above[path[-1]])
        branch.append(path[-4] if len(path) >= 5 else -1)
    names, counts = np.unique([name for name in branch if name >= 0], return_counts=True)
    largest = names[np.argsort(-counts, kind="stable")[:NOUN_CLASSES]]
    places = np.flatnonzero(np.isin(branch, largest))
    return places, np.array(branch)[places]


def probe(model: MaskedLM, tokenizer: Any) -> dict[str, float]:
    """Return the accuracies of classifiers on frozen features, by three-fold cross-validation."""
    found, own = {}, features(model, tokenizer)
    places, branches = noun_classes()
    parts = np.array(load_glosses()["probe"]["pos"])
    for name, inputs, targets in (("hypernym", own[places], branches), ("part_of_speech", own, parts)):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))
        folds = StratifiedKFold(3, shuffle=True, random_state=0)
        found[name] = float(cross_val_score(classifier, inputs, targets, cv=folds).mean())
    return found


def search(setting: Setting) -> dict[str, Any]:
    """Try learning rates at half the steps on the validation part, under each arm's own masking."""
    found: dict[str, Any] = {}
    for masking in HALF:
        for rate in RATES:
            path = setting.folder / f"search-{setting.pieces}-{masking}-{rate}.json"
            if not path.exists():
                cli = recipe(setting, masking, setting.steps // 2, rate, SELECTION_SEED)
                losses, seconds = train(cli)
                own = held_out(cli.model.eval(), cli.datamodule.collator, cli.datamodule.rows["val"])
                score = sum(own["loss"]) / sum(own["tokens"])
                write(path, {"validation_loss": score, "cpu_seconds": seconds, "last": float(np.mean(losses[-100:]))})
            found.setdefault(masking, {})[str(rate)] = json.loads(path.read_text())["validation_loss"]
            print("search", masking, rate, found[masking][str(rate)], flush=True)
    return found


def best_rates(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the learning rate of each masking: its own best, or that of PMI for those that were not searched."""
    best = {masking: float(min(own, key=lambda rate: own[rate])) for masking, own in scores.items()}
    return {masking: best.get(masking, best["pmi"]) for masking in MASKINGS}


def arm(setting: Setting, masking: str, steps: int, rate: float, seed: int) -> dict[str, Any]:
    """Train, judge and save one arm with one seed, or read it where that is done."""
    path = setting.folder / f"arm-{setting.pieces}-{masking}-{steps}-{seed}.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    cli = recipe(setting, masking, steps, rate, seed)
    untrained = probe(cli.model.eval(), cli.datamodule.tokenizer) if masking == "random_token" else None
    losses, seconds = train(cli)
    model = cli.model.eval()
    result = {"masking": masking, "steps": steps, "rate": rate, "seed": seed, "cpu_seconds": seconds}
    result |= {"training_loss": np.array(losses)[: len(losses) // 50 * 50].reshape(-1, 50).mean(axis=1).tolist()}
    result["rows"] = {
        name: held_out(model, judge.collator, judge.rows["test"]) for name, judge in judges(setting).items()
    }
    result |= {"probe": probe(model, cli.datamodule.tokenizer), "untrained_probe": untrained}
    write(path, result)
    print(masking, steps, seed, f"{seconds:.0f} s", result["probe"], flush=True)
    return result


@cache
def judges(setting: Setting) -> dict[str, Any]:
    """Return a data module for each masking, all with the seed that no choice of an arm has."""
    return {masking: recipe(setting, masking, 1, 1e-3, SELECTION_SEED).datamodule for masking in MASKINGS}


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a whole file or none."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    partial.replace(path)


def difference(first: list[dict[str, Any]], second: list[dict[str, Any]], judged: str) -> dict[str, Any]:
    """Return the difference in held-out loss, first minus second: of each seed, its mean, and the paired errors.

    ``standard_error`` is over seeds, ``sampling_error`` that of the test rows within a seed, by the delta method.
    """
    each, sampling = [], []
    for a, b in zip(first, second, strict=True):
        tokens, one, other = (
            np.array(values)
            for values in (a["rows"][judged]["tokens"], a["rows"][judged]["loss"], b["rows"][judged]["loss"])
        )
        gap = float((one - other).sum() / tokens.sum())
        each.append(gap)
        sampling.append(float(np.sqrt(((one - other - gap * tokens) ** 2).sum()) / tokens.sum()))
    error = float(np.std(each, ddof=1) / np.sqrt(len(each))) if len(each) > 1 else None
    return {"each": each, "mean": float(np.mean(each)), "standard_error": error, "sampling_error": max(sampling)}


def summary(setting: Setting, seeds: list[int], scores: dict[str, Any], runs: dict[str, list[Any]]) -> dict[str, Any]:
    """Return what the runs say of the hypotheses A, B and C."""

    def losses(own: list[Any], judged: str, what: str = "loss") -> list[float]:
        return [sum(run["rows"][judged][what]) / sum(run["rows"][judged]["tokens"]) for run in own]

    table = {
        name: {
            "cpu_seconds": [run["cpu_seconds"] for run in own],
            "test_loss": {judged: losses(own, judged) for judged in MASKINGS},
            "test_accuracy": {judged: losses(own, judged, "right") for judged in MASKINGS},
            "training_loss_last_tenth": [
                float(np.mean(run["training_loss"][-len(run["training_loss"]) // 10 :])) for run in own
            ],
            "training_loss": np.mean([run["training_loss"] for run in own], axis=0).tolist(),
            "probe": {key: [run["probe"][key] for run in own] for key in own[0]["probe"]},
        }
        for name, own in runs.items()
    }
    neutral = {
        f"{name} on {judged}": difference(runs["pmi"], runs[name], judged)
        for judged in NEUTRAL
        for name in MASKINGS
        if name in runs and name not in ("pmi", judged)
    }
    half = {
        f"{title} on {judged}": difference(runs["pmi_half"], runs[other], judged)
        for title, other in (("pmi at half the steps", "random_token"), ("both at half the steps", "random_token_half"))
        for judged in NEUTRAL
    }
    places, branches = noun_classes()
    return {
        "pieces": setting.pieces,
        "steps": setting.steps,
        "seeds": seeds,
        "search": scores,
        "arms": table,
        "hypothesis_a_pmi_minus_token_on_pmi": difference(runs["pmi"], runs["random_token"], "pmi"),
        "hypothesis_b_pmi_minus_other": neutral,
        "half_steps_pmi_minus_token": half,
        "hypothesis_c_training_loss": {
            name: float(np.mean(table[name]["training_loss_last_tenth"]))
            for name in ("random_token", "whole_word", "pmi")
            if name in table
        },
        "probe_untrained": {
            key: [run["untrained_probe"][key] for run in runs["random_token"]] for key in ("hypernym", "part_of_speech")
        },
        "probe_majority": {
            "hypernym": float(np.unique(branches, return_counts=True)[1].max() / len(places)),
            "part_of_speech": float(np.mean(np.array(load_glosses()["probe"]["pos"]) == "noun")),
        },
    }


def claim(pieces: int, steps: int, seeds: list[int], arms: list[str], folder: Path) -> dict[str, Any]:
    """Run all arms and seeds that are not finished, draw the cross-evaluation and return the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(pieces, steps, folder)
    scores = search(setting)
    rates = best_rates(scores)
    runs: dict[str, list[Any]] = {}
    for seed in seeds:
        for masking in arms:
            runs.setdefault(masking, []).append(arm(setting, masking, steps, rates[masking], seed))
        for masking in HALF:
            runs.setdefault(f"{masking}_half", []).append(arm(setting, masking, steps // 2, rates[masking], seed))
    found = summary(setting, seeds, scores, runs)
    mean = [[np.mean(found["arms"][arm]["test_loss"][judged]) for judged in MASKINGS] for arm in arms]
    trained, judged = ([name.replace("_", " ") for name in names] for names in (arms, MASKINGS))
    draw_cross_evaluation(mean, trained, judged).savefig(PICTURES / "pmi_masking_cross_evaluation.png", dpi=120)
    return found
