import itertools
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from torch import nn

from lightning_iclr.__main__ import main
from lightning_iclr.evaluation_mode import evaluating
from lightning_iclr.vit import (
    AttentionDistance,
    DigitsDataModule,
    MaskedPatchPretraining,
    MaskedPatchReconstruction,
    PatchFilters,
    PositionSimilarity,
    RolloutOverlay,
    TrainingCurves,
    VisionTransformer,
    ViTClassifier,
)
from lightning_iclr.vit.analysis import attention_distance, attention_maps, patch_filters, rollout
from lightning_iclr.vit.pictures import draw_rollout

TINY = {"image_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 10, "dim": 8, "depth": 2, "num_heads": 2}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def classifier(**arguments):
    torch.manual_seed(0)
    return ViTClassifier(VisionTransformer(**{**TINY, **arguments}), optimizer=sgd)


def pretraining(**arguments):
    torch.manual_seed(0)
    net = VisionTransformer(**{**TINY, "num_classes": 0, **arguments})
    return MaskedPatchPretraining(net, image_mean=0.3, image_std=0.35, optimizer=sgd)


def trainer(folder, *callbacks, steps=2, **arguments):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": CSVLogger(folder, name=None, version=""),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "num_sanity_val_steps": 1,
        "log_every_n_steps": 1,
        "max_steps": steps,
        "callbacks": list(callbacks),
    }
    return Trainer(**{**defaults, **arguments})


def digits(**arguments):
    return DigitsDataModule(**{"num_train_labels": 40, "batch_size": 20, **arguments})


PICTURES = [
    (AttentionDistance, {"num_images": 4}, "attention_distance"),
    (RolloutOverlay, {"num_images": 3}, "rollout"),
    (PositionSimilarity, {}, "position_similarity"),
    (PatchFilters, {"n": 5}, "patch_filters"),
    (TrainingCurves, {}, "training_curves"),
]


@pytest.mark.parametrize("build", [classifier, pretraining])
@pytest.mark.parametrize(("kind", "arguments", "name"), PICTURES)
def test_each_callback_writes_its_picture_into_the_run_folder(tmp_path, build, kind, arguments, name):
    run = trainer(tmp_path, kind(**arguments))
    run.fit(build(), datamodule=digits())
    picture = tmp_path / "figures" / f"{name}.png"
    assert Path(run.log_dir) == tmp_path
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize("pool", ["mean", "map"])
def test_the_pictures_of_attention_need_no_class_token(tmp_path, pool):
    trainer(tmp_path, AttentionDistance(4), RolloutOverlay(4)).fit(classifier(pool=pool), datamodule=digits())
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"attention_distance", "rollout"}


def test_masked_patches_are_drawn_for_every_target(tmp_path):
    for target in ("mean_colour", "patch_4x4", "pixels"):
        net = VisionTransformer(**{**TINY, "num_classes": 0})
        module = MaskedPatchPretraining(net, target=target, optimizer=sgd)
        trainer(tmp_path / target, MaskedPatchReconstruction(3), steps=1).fit(module, datamodule=digits())
        assert (tmp_path / target / "figures" / "masked_patches.png").stat().st_size > 2000


class Padded(DigitsDataModule):
    """Serves validation images as a rank sees them whose share was filled up."""

    def evaluation_loader(self, split):
        for images, labels in super().evaluation_loader(split):
            return [(images, torch.full_like(labels, -100))]


def test_padded_rows_do_not_disturb_the_rollout(tmp_path):
    trainer(tmp_path, RolloutOverlay(3), limit_val_batches=0).fit(classifier(), datamodule=Padded(num_train_labels=40))
    assert (tmp_path / "figures" / "rollout.png").exists()


def test_pictures_work_with_loaders_in_place_of_a_data_module(tmp_path):
    data = digits()
    data.setup()
    callbacks = [kind(**arguments) for kind, arguments, _ in PICTURES]
    trainer(tmp_path, *callbacks, limit_val_batches=1).fit(
        classifier(), train_dataloaders=data.train_dataloader(), val_dataloaders=data.val_dataloader()
    )
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {name for *_, name in PICTURES}


def test_attention_distances_are_those_of_the_network_at_the_three_moments(tmp_path):
    class Keep(Callback):
        def __init__(self):
            self.weights = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.weights.append({k: v.clone() for k, v in pl_module.net.state_dict().items()})

    module, data, keep, distance = classifier(dropout=0.5), digits(), Keep(), AttentionDistance(num_images=6)
    trainer(tmp_path, keep, distance, steps=4).fit(module, datamodule=data)
    images = next(iter(data.evaluation_loader("val")))[0][:6]
    net = VisionTransformer(**TINY).eval()
    assert list(distance.distances) == ["before training", "half-way", "after training"]
    for moment, weights in zip(
        distance.distances, (keep.weights[0], keep.weights[2], module.net.state_dict()), strict=True
    ):
        net.load_state_dict(weights)
        expected = attention_distance(attention_maps(net, images), (2, 2), 4)
        torch.testing.assert_close(distance.distances[moment], expected)


class Draws(Callback):
    """Draw from the global generator at every step, as dropout does."""

    def __init__(self):
        self.numbers = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.numbers.append(torch.rand(1).item())


@pytest.mark.parametrize("build", [classifier, pretraining])
def test_callbacks_do_not_change_training(tmp_path, build):
    weights, numbers = [], []
    for callbacks in ([], [kind(**arguments) for kind, arguments, _ in PICTURES]):
        module, draws = build(dropout=0.3), Draws()
        torch.manual_seed(5)
        trainer(tmp_path / str(len(callbacks)), *callbacks, draws, steps=3).fit(module, datamodule=digits())
        assert module.training
        weights.append(module.state_dict())
        numbers.append(draws.numbers)
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert numbers[0] == numbers[1]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_curves_and_distances_survive_a_checkpoint(tmp_path):
    whole = [AttentionDistance(4), TrainingCurves()]
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer(tmp_path, *whole, save, steps=4).fit(classifier(), datamodule=digits())
    again = [AttentionDistance(4), TrainingCurves()]
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="again-{step}")
    run = trainer(tmp_path / "again", *again, save, steps=4)
    run.fit(classifier(), datamodule=digits(), ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
    torch.testing.assert_close(again[0].distances, whole[0].distances)
    assert list(again[0].distances) == list(whole[0].distances)
    for name in ("train/loss", "learning rate", "gradient norm"):
        assert [step for step, _ in again[1].curves[name]] == [1, 2, 3, 4]
        torch.testing.assert_close(torch.tensor(again[1].curves[name]), torch.tensor(whole[1].curves[name]))
    assert [step for step, _ in again[1].curves["val/loss"]] == [2, 4]


class Norms(Callback):
    """Take the gradient's norm by hand, after the backward passes and before clipping."""

    def __init__(self):
        self.norms, self.losses = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        squares = [p.grad.double().square().sum().item() for p in pl_module.parameters()]
        self.norms.append(math.sqrt(math.fsum(squares)))


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4]), (2, [2, 4])])
@pytest.mark.parametrize("batches", [1, 2])
def test_curves_hold_one_point_a_logging_step(tmp_path, batches, every, steps):
    curves, norms = TrainingCurves(), Norms()
    run = trainer(
        tmp_path,
        curves,
        norms,
        steps=4,
        accumulate_grad_batches=batches,
        log_every_n_steps=every,
        gradient_clip_val=1e-3,
    )
    run.fit(classifier(), datamodule=digits(batch_size=10))
    for name in ("train/loss", "learning rate", "images a second", "gradient norm"):
        assert [step for step, _ in curves.curves[name]] == steps
    assert [norm for _, norm in curves.curves["gradient norm"]] == pytest.approx(
        [norms.norms[step - 1] for step in steps], rel=1e-5
    )
    assert min(norms.norms) > 1e-2
    assert all(value > 0 for _, value in curves.curves["images a second"])
    assert [value for _, value in curves.curves["learning rate"]] == [0.1] * len(steps)
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/gradient_norm", "train/images_per_second"} <= set(header)


def test_the_loss_curve_is_the_loss_and_the_validation_curve_the_logged_one(tmp_path):
    curves, norms = TrainingCurves(), Norms()
    run = trainer(tmp_path, curves, norms, steps=4)
    run.fit(classifier(), datamodule=digits())
    assert [loss for _, loss in curves.curves["train/loss"]] == pytest.approx(norms.losses)
    assert [step for step, _ in curves.curves["val/loss"]] == [2, 4]
    assert curves.curves["val/loss"][-1][1] == pytest.approx(float(run.callback_metrics["val/loss"]))
    assert curves.curves["val/accuracy"][-1][1] == pytest.approx(float(run.callback_metrics["val/accuracy"]))


def test_images_a_second_are_all_images_over_the_time_without_validation(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("lightning_iclr.vit.callbacks.time.perf_counter", lambda: clock[0])

    class Slow(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            clock[0] += 0.5

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            clock[0] += 1000

    curves = TrainingCurves()
    run = trainer(tmp_path, curves, Slow(), steps=8, log_every_n_steps=2, val_check_interval=1)
    run.fit(classifier(), datamodule=digits(num_train_labels=80, batch_size=10))
    # ten images a batch that takes half a second
    assert [speed for _, speed in curves.curves["images a second"]] == pytest.approx([20.0] * 4)


def test_evaluating_puts_every_part_back_into_its_mode():
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    net[1].eval()
    before = [module.training for module in net.modules()]
    with evaluating(net):
        assert not any(module.training for module in net.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in net.modules()] == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("kind", "argument"),
    [
        (AttentionDistance, "num_images"),
        (RolloutOverlay, "num_images"),
        (PatchFilters, "n"),
        (MaskedPatchReconstruction, "num_images"),
    ],
)
def test_callbacks_refuse_nothing_to_draw(kind, argument):
    with pytest.raises(ValueError, match=f"{argument} must be at least 1, got 0"):
        kind(**{argument: 0})


class Values(nn.Module):
    """Attention that looks nowhere else."""

    def __init__(self, dim, num_heads):
        super().__init__()

    def forward(self, q, k, v):
        return v


ROOT = {"patch_size": 4, "stem": "lightning_iclr.vit.HybridStem", "stem.layers": [], "stem.width": 32,
        "stem.in_channels": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "missing"),
    [
        ({"attention": "tests.vit.test_callbacks.Values"}, {"AttentionDistance", "RolloutOverlay"}),
        ({"position": "none"}, {"PositionSimilarity"}),
        (ROOT, {"PatchFilters"}),
    ],
)
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_a_recipe_trains_a_network_that_some_of_its_pictures_do_not_suit(overrides, missing):
    options = [f"--model.net.{name}={value}" for name, value in overrides.items()]
    quick = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]
    with pytest.warns(UserWarning, match="is left out: ") as caught:
        main(["fit", "--config", "vit/digits", *options, *quick, "--trainer.log_every_n_steps=1"])
    messages = [str(warning.message) for warning in caught if "is left out" in str(warning.message)]
    assert sorted(message.split()[0] for message in messages) == sorted(missing)
    pictures = {
        "AttentionDistance": "attention_distance",
        "RolloutOverlay": "rollout",
        "PositionSimilarity": "position_similarity",
        "PatchFilters": "patch_filters",
        "TrainingCurves": "training_curves",
    }
    drawn = {path.stem for path in Path("lightning_logs/version_0/figures").iterdir()}
    assert drawn == {picture for name, picture in pictures.items() if name not in missing}


# What the pictures show


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of each drawing function that a callback called."""
    arguments = {}
    for name in ("attention_distance", "rollout", "position_similarity", "patch_filters", "masked_patches"):
        target = f"lightning_iclr.vit.callbacks.draw_{name}"
        monkeypatch.setattr(target, lambda *given, name=name: (arguments.update({name: given}), Figure())[1])
    return arguments


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_the_rollout_of_each_image_is_drawn_on_it_and_mistakes_are_named(tmp_path, drawn, pool):
    module, data = classifier(pool=pool), digits()
    trainer(tmp_path, RolloutOverlay(5)).fit(module, datamodule=data)
    pictures, heat, titles = drawn["rollout"]
    images, labels = (part[:5] for part in next(iter(data.evaluation_loader("val"))))
    pixels = images * 0.35 + 0.3
    torch.testing.assert_close(pictures, pixels / pixels.max())
    with torch.no_grad():
        flow, guesses = rollout(attention_maps(module.net, images)), module.net(images).argmax(dim=1)
    for image, title, guess, label in zip(range(5), titles, guesses.tolist(), labels.tolist(), strict=True):
        expected = flow[image, 0, 1:] if pool == "token" else sum(flow[image, row] for row in range(4)) / 4
        for row, column in itertools.product(range(2), range(2)):
            assert heat[image, row, column].item() == pytest.approx(expected[2 * row + column].item(), rel=1e-5)
        assert title == (str(guess) if guess == label else f"{guess}, not {label}")


def test_heat_is_drawn_over_the_patch_that_it_belongs_to():
    heat = torch.zeros(1, 2, 3)
    heat[0, 0, 2] = 1.0
    below = draw_rollout(torch.rand(1, 1, 8, 12), heat, [""]).axes[1].images[1]
    assert below.origin == "upper"
    row, column = divmod(int(below.get_array().argmax()), 12)
    assert row < 4
    assert column >= 8


@pytest.mark.parametrize(
    ("pool", "renormalize", "tokens"), [("token", False, 5), ("token", True, 4), ("mean", False, 4)]
)
def test_the_line_of_uniform_attention_counts_the_class_token_as_the_dots_do(
    tmp_path, drawn, pool, renormalize, tokens
):
    callback = AttentionDistance(4, renormalize)
    trainer(tmp_path, callback).fit(classifier(pool=pool), datamodule=digits())
    distances, uniform = drawn["attention_distance"]
    assert uniform == pytest.approx((0 + 4 + 4 + 4 * math.sqrt(2)) / tokens)
    assert distances is callback.distances


def test_position_and_filter_pictures_show_the_trained_network_s(tmp_path, drawn):
    module = classifier()
    trainer(tmp_path, PositionSimilarity(), PatchFilters(3)).fit(module, datamodule=digits())
    positions, weight = module.net.pos_embed.detach()[0, 1:], module.net.patch_embed.proj.weight.detach()
    for a, b in itertools.product(range(4), range(4)):
        cosine = torch.cosine_similarity(positions[a], positions[b], dim=0).item()
        assert drawn["position_similarity"][0][a // 2, a % 2, b // 2, b % 2].item() == pytest.approx(cosine, abs=1e-6)
    assert torch.equal(drawn["patch_filters"][0], patch_filters(weight, 3))


def test_masked_patches_are_drawn_at_their_places(tmp_path, drawn):
    module, data = pretraining(), digits()
    trainer(tmp_path, MaskedPatchReconstruction(3)).fit(module, datamodule=data)
    images = next(iter(data.evaluation_loader("val")))[0][:3]
    out = module.eval().corrupt_and_predict(images, -1, 0)
    pixels = images * 0.35 + 0.3
    expected = {name: pixels.clone() for name in ("input", "predicted", "target")}
    for image, patches in enumerate(out.corrupted.tolist()):
        for i, patch in enumerate(patches):
            place = (image, 0, *(slice(4 * at, 4 * at + 4) for at in divmod(patch, 2)))
            expected["input"][place] = 0.5
            expected["predicted"][place] = (out.predictions[image, i].argmax() + 0.5) / 8
            expected["target"][place] = (torch.floor(pixels[place].mean() * 8).clamp(max=7) + 0.5) / 8
    (rows,) = drawn["masked_patches"]
    torch.testing.assert_close(rows, expected)


def test_callbacks_refuse_a_network_they_cannot_draw_before_training(tmp_path):
    with pytest.raises(TypeError, match="works with MaskedPatchPretraining, got ViTClassifier"):
        trainer(tmp_path, MaskedPatchReconstruction()).fit(classifier(), datamodule=digits())
    foreign = ViTClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), num_classes=10)
    with pytest.raises(TypeError, match="net must be a VisionTransformer, got Sequential"):
        trainer(tmp_path, PatchFilters()).fit(foreign, datamodule=digits())
