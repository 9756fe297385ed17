import functools
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from PIL import Image
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from lightning_iclr.sampling import sample_generator, step_generator
from lightning_iclr.schedules import WarmupCosine
from lightning_iclr.vit import (
    DigitsDataModule,
    ImageDataModule,
    MaskedPatchPrediction,
    MaskedPatchPretraining,
    VisionTransformer,
    ViTClassifier,
)
from tests.distributed import Ranks, run_distributed
from tests.resume import BatchReporter, assert_resume_equals_uninterrupted

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}


def tiny(**overrides):
    sizes = {"image_size": 8, "patch_size": 2, "in_channels": 1, "num_classes": 10, "dim": 16, "depth": 2}
    return VisionTransformer(**{**sizes, "num_heads": 2, "pool": "mean", "position": "sincos2d", **overrides})


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.05)


def sgd(params):  # AdamW would blow the rounding of gradients that are zero, such as the keys' biases, up to full steps
    return torch.optim.SGD(params, lr=0.1)


def classifier(**arguments):
    return ViTClassifier(tiny(), **{"optimizer": adamw, **arguments})


def pretraining(**arguments):
    return MaskedPatchPretraining(tiny(num_classes=0), **{"optimizer": adamw, **arguments})


# Two processes


STRATEGIES = {
    "ddp": lambda: DDPStrategy(),
    "fsdp": lambda: ModelParallelStrategy(save_distributed_checkpoint=False),
}


def fit(build, strategy, precision, path):
    """Train four steps on a global batch of 64 and return what was learned and measured."""
    torch.manual_seed(0)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    parallel = {"devices": 2, "strategy": STRATEGIES[strategy](), "plugins": [Ranks()]} if world_size > 1 else {}
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=4,
        limit_val_batches=1.0,
        val_check_interval=4,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        log_every_n_steps=1,
        **QUIET,
        **{"devices": 1, **parallel},
    )
    data = DigitsDataModule(batch_size=64 // world_size)
    trainer.fit(build(), datamodule=data)
    trainer.save_checkpoint(path)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return metrics


@pytest.mark.parametrize("build", [classifier, pretraining])
@pytest.mark.parametrize(
    ("strategy", "precision", "optimizer", "atol"), [("ddp", "64-true", adamw, 1e-10), ("fsdp", "32-true", sgd, 1e-6)]
)
def test_two_processes_equal_one(tmp_path, build, strategy, precision, optimizer, atol):
    build = functools.partial(build, optimizer=optimizer)
    one = fit(build, strategy, precision, tmp_path / "one.ckpt")
    two = run_distributed(fit, build, strategy, precision, tmp_path / "two.ckpt")
    for metrics in two:
        assert metrics.keys() == one.keys() >= {"val/loss"}
        assert metrics == pytest.approx(one, abs=max(atol, 1e-6))
    expected, got = (torch.load(tmp_path / name, weights_only=True) for name in ("one.ckpt", "two.ckpt"))
    torch.testing.assert_close(got["state_dict"], expected["state_dict"], rtol=0, atol=atol)


def test_fsdp_shards_every_block_and_gathers_for_represent(tmp_path):
    def shards():
        module = classifier()
        data = DigitsDataModule(batch_size=8)
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy=STRATEGIES["fsdp"](),
            plugins=[Ranks()],
            max_steps=1,
            limit_val_batches=0,
            enable_checkpointing=False,
            **QUIET,
        )
        trainer.fit(module, datamodule=data)
        local = {name: p.to_local().numel() / p.numel() for name, p in module.net.named_parameters()}
        images, _ = next(iter(data.val_dataloader()))
        with torch.no_grad():
            return {
                "shares": local,
                "blocks": [isinstance(block, FSDPModule) for block in module.net.blocks],
                "equal": torch.equal(module.net.head(module.net.represent(images)), module(images)),
            }

    for result in run_distributed(shards):
        assert result["shares"].keys() == dict(tiny().named_parameters()).keys()
        assert set(result["shares"].values()) == {0.5}
        assert len(result["blocks"]) > 0
        assert all(result["blocks"])  # else the root alone would gather everything at once
        assert result["equal"]


# Resume


def train(folder, ckpt_path, on_batch, build, checkpoint):
    torch.manual_seed(0)
    module = build()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=50,
        limit_val_batches=1,
        callbacks=[ModelCheckpoint(folder, save_top_k=-1, **checkpoint), BatchReporter(on_batch)],
        **QUIET,
    )
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=64), ckpt_path=ckpt_path, weights_only=True)
    return module.state_dict()


def regularised():
    def schedule(optimizer):
        return WarmupCosine(optimizer, warmup_steps=5, total_steps=50)

    net = tiny(pool="token", position="learned", dropout=0.1, drop_path=0.2)
    return ViTClassifier(net, mixup=0.2, cutmix=1.0, optimizer=adamw, lr_scheduler=schedule)


@pytest.mark.parametrize("build", [regularised, pretraining])
@pytest.mark.parametrize(
    ("checkpoint", "kill_at", "spared"),
    [({"every_n_train_steps": 7}, 33, 28), ({"save_on_train_epoch_end": True}, 41, 40)],
    ids=["mid-epoch", "epoch-end"],
)
def test_a_killed_run_resumes_as_if_nothing_had_happened(tmp_path, build, checkpoint, kill_at, spared):
    run = functools.partial(train, build=build, checkpoint=checkpoint)
    assert assert_resume_equals_uninterrupted(run, tmp_path, kill_at) == spared


def test_a_checkpoint_of_a_python_run_loads_with_the_network_alone(tmp_path):
    module = classifier(loss="sigmoid", mixup=0.2)
    trainer = Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, enable_checkpointing=False, **QUIET)
    trainer.fit(module, datamodule=DigitsDataModule())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    loaded = ViTClassifier.load_from_checkpoint(tmp_path / "run.ckpt", net=tiny(), weights_only=True)
    assert (loaded.loss_name, loaded.mixup) == ("sigmoid", 0.2)
    torch.testing.assert_close(loaded.state_dict(), module.state_dict(), rtol=0, atol=0)


# Losses and steps


def test_the_first_loss_is_that_of_guessing():
    images, labels = torch.randn(5, 1, 8, 8), torch.arange(5)
    softmax, sigmoid = classifier(), classifier(loss="sigmoid")
    assert softmax.loss(softmax(images), labels).mean().item() == pytest.approx(math.log(10))
    assert sigmoid.loss(sigmoid(images), labels).mean().item() == pytest.approx(10 * math.log(2))


def test_sigmoid_loss_equals_a_loop_over_classes():
    logits = torch.randn(4, 10, dtype=torch.float64)
    labels = torch.tensor([3, 0, -100, 9])
    expected = torch.zeros(4, dtype=torch.float64)
    for row in (0, 1, 3):
        for k in range(10):
            p = 1 / (1 + math.exp(-logits[row, k].item()))
            expected[row] -= math.log(p if labels[row] == k else 1 - p)
    torch.testing.assert_close(classifier(loss="sigmoid").loss(logits, labels), expected)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_class_weights_that_are_one_hot_give_the_loss_of_the_classes(loss):
    module, logits, labels = classifier(loss=loss), torch.randn(4, 10), torch.tensor([3, 0, 1, 9])
    torch.testing.assert_close(module.loss(logits, module.one_hot(labels)), module.loss(logits, labels))


def test_label_smoothing_spreads_its_mass_over_all_classes():
    logits, labels = torch.randn(4, 10, dtype=torch.float64), torch.tensor([3, 0, 1, 9])
    surprise = -logits.log_softmax(dim=1)
    expected = 0.9 * surprise[range(4), labels] + 0.1 * surprise.mean(dim=1)
    torch.testing.assert_close(classifier(label_smoothing=0.1).loss(logits, labels), expected)


def quick(steps, **arguments):
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        **{"limit_val_batches": 0, "enable_checkpointing": False, **QUIET, **arguments},
    )


@pytest.mark.parametrize(("name", "p"), [("mixup", 0.2), ("cutmix", 1.0)])
def test_one_of_mixup_and_cutmix_mixes_every_batch_with_draws_of_its_own(monkeypatch, name, p):
    calls = []
    for kind in ("mixup", "cutmix"):
        monkeypatch.setattr(
            f"lightning_iclr.vit.module.{kind}",
            lambda x, y, p, generator, kind=kind: (calls.append((kind, p, generator.initial_seed())), (x, y))[1],
        )
    quick(3).fit(classifier(seed=4, **{name: p}), datamodule=DigitsDataModule(batch_size=8, seed=4))
    assert calls == [(name, p, step_generator(4, 0, i).initial_seed()) for i in range(3)]
    # The augmentation of the same run's row i must not draw what its batch i draws.
    assert not {seed for *_, seed in calls} & {sample_generator(4, 0, i).initial_seed() for i in range(1257)}


def test_corruption_shares_no_draws_with_augmentation(monkeypatch):
    seeds = []
    real = MaskedPatchPrediction.draw
    monkeypatch.setattr(
        MaskedPatchPrediction,
        "draw",
        lambda self, batch, patches, generator, place: (
            seeds.append(generator.initial_seed()),
            real(self, batch, patches, generator, place),
        )[1],
    )
    quick(2).fit(pretraining(), datamodule=DigitsDataModule(batch_size=8))
    assert seeds == [step_generator(0, 0, i).initial_seed() for i in range(2)]


def test_a_training_step_maps_over_a_batch_of_batches():
    module, images, labels = classifier(), torch.randn(3, 2, 1, 8, 8), torch.arange(6).view(3, 2)
    nn.init.normal_(module.net.head.weight)
    module.log = lambda *args, **kwargs: None
    with sdpa_kernel(SDPBackend.MATH):  # the only one that torch can map
        losses = torch.func.vmap(lambda x, y: module.training_step((x, y), 0))(images, labels)
    expected = [nn.functional.cross_entropy(module(x), y) for x, y in zip(images, labels, strict=True)]
    torch.testing.assert_close(losses, torch.stack(expected))


def test_mixup_and_cutmix_take_turns_at_even_odds(monkeypatch):
    chosen = []
    for name in ("mixup", "cutmix"):
        monkeypatch.setattr(
            f"lightning_iclr.vit.module.{name}", lambda x, y, p, generator, name=name: (chosen.append(name), (x, y))[1]
        )
    module = classifier(mixup=0.2, cutmix=1.0)
    trainer = Trainer(accelerator="cpu", max_steps=200, limit_val_batches=0, enable_checkpointing=False, **QUIET)
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=8))
    assert len(chosen) == 200
    assert abs(chosen.count("mixup") - 100) < 4 * math.sqrt(50)


class Fixed(nn.Module):
    """Knows the answers, but for class 3, which it takes for a 5."""

    num_classes = 10

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, images):
        labels = images[:, 0, 0, 0].long()
        return self.scale * nn.functional.one_hot(torch.where(labels == 3, 5, labels), 10).float()


def test_test_metrics_count_each_image_once_and_name_the_classes():
    labels = torch.tensor([0, 1, 2, 3, 3, 4, -100, -100])
    images = labels.clamp(min=0).float().view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    trainer = Trainer(accelerator="cpu", **QUIET)
    (metrics,) = trainer.test(
        ViTClassifier(Fixed()), DataLoader(TensorDataset(images, labels), batch_size=3), verbose=False
    )
    assert metrics["test/accuracy"] == pytest.approx(4 / 6)
    right, wrong = math.log(1 + 9 * math.exp(-20)), 20 + math.log(1 + 9 * math.exp(-20))
    assert metrics["test/loss"] == pytest.approx((4 * right + 2 * wrong) / 6, rel=1e-6)
    assert metrics["test/accuracy/3"] == 0
    assert metrics["test/accuracy/2"] == 1


def test_predict_returns_probabilities():
    images, rows = torch.randn(4, 1, 8, 8), torch.arange(4)
    module = classifier()
    nn.init.normal_(module.net.head.weight)
    torch.testing.assert_close(
        module.predict_step((images, rows), 0), module(images).exp() / module(images).exp().sum(1, keepdim=True)
    )
    module = classifier(loss="sigmoid")
    torch.testing.assert_close(module.predict_step((images, rows), 0), 1 / (1 + (-module(images)).exp()))


def test_fine_tuning_starts_from_the_pre_trained_encoder_with_a_new_head(tmp_path):
    trainer = Trainer(accelerator="cpu", max_steps=2, limit_val_batches=0, enable_checkpointing=False, **QUIET)
    stage = pretraining()
    trainer.fit(stage, datamodule=DigitsDataModule(batch_size=8))
    trainer.save_checkpoint(tmp_path / "stage.ckpt")
    module = classifier(pretrained=str(tmp_path / "stage.ckpt"), reset_head=True)
    frozen = Trainer(
        accelerator="cpu", max_steps=1, limit_train_batches=0, limit_val_batches=0, enable_checkpointing=False, **QUIET
    )
    frozen.fit(module, datamodule=DigitsDataModule())
    for name, weight in stage.net.state_dict().items():
        assert torch.equal(module.net.state_dict()[name], weight), name
    assert module.net.head.weight.count_nonzero() == 0


def test_a_second_fit_goes_on_from_what_the_first_one_learned(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "start.pt")
    module = classifier(pretrained=str(tmp_path / "start.pt"))
    trainer = quick(2)
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=8))
    trainer.save_checkpoint(tmp_path / "learned.ckpt")
    learned = {name: weight.clone() for name, weight in module.state_dict().items()}
    again = ViTClassifier.load_from_checkpoint(tmp_path / "learned.ckpt", net=tiny(), weights_only=True)
    for continued in (module, again):
        quick(1, limit_train_batches=0).fit(continued, datamodule=DigitsDataModule())
        torch.testing.assert_close(continued.state_dict(), learned, rtol=0, atol=0)


def test_bf16_is_within_its_precision_of_float32():
    images = torch.randn(8, 1, 8, 8)
    module = classifier()
    nn.init.normal_(module.net.head.weight, std=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(images)
    torch.testing.assert_close(mixed.float(), module(images), rtol=0, atol=2e-2)


@pytest.mark.parametrize("build", [classifier, pretraining])
def test_compile_changes_nothing_but_speed(tmp_path, build, monkeypatch):
    compiled = []
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: (compiled.append(self), real(self, backend="aot_eager")))
    fit(functools.partial(build, optimizer=sgd), None, "32-true", tmp_path / "plain.ckpt")
    fit(functools.partial(build, optimizer=sgd, compile=True), None, "32-true", tmp_path / "compiled.ckpt")
    assert len(compiled) == 1
    plain, fast = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"] for name in ("plain", "compiled")
    )
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-5)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes must be 2 or more, or an attribute of net; got 1"),
        ({"loss": "hinge"}, "loss must be 'softmax' or 'sigmoid', got 'hinge'"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ({"label_smoothing": 0.1, "loss": "sigmoid"}, "0 for the sigmoid loss; got 0.1"),
        ({"mixup": -0.2}, "mixup must be 0 .*, got -0.2"),
        ({"cutmix": -1.0}, "cutmix must be 0 .*, got -1.0"),
        ({"layer_decay": 0.0}, r"layer_decay must be in \(0, 1\], got 0.0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        classifier(**arguments)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("mixup", [0.0, 0.2])
def test_a_network_with_fewer_classes_than_the_data_is_refused(loss, mixup):
    module = ViTClassifier(tiny(num_classes=9), loss=loss, mixup=mixup)
    with pytest.raises(ValueError, match="num_classes must be at least the data module's 10, got 9"):
        quick(1).fit(module, datamodule=DigitsDataModule())


@pytest.mark.parametrize("build", [classifier, pretraining])
def test_batches_for_other_libraries_are_refused_by_name(build):
    table = Dataset.from_dict({"image": [Image.new("L", (8, 8))] * 8, "label": [0, 1] * 4})
    data = ImageDataModule(table, image_size=8, in_channels=1, batch_format="dict", val_fraction=0.5)
    module = build()
    with pytest.raises(ValueError, match=f"batch_format must be 'tuple' for {type(module).__name__}, got 'dict'"):
        quick(1).fit(module, datamodule=data)


@pytest.mark.parametrize("build", [classifier, pretraining])
@pytest.mark.parametrize(
    ("device", "every", "stops"), [("cpu", 0, True), ("cpu", 5, True), ("cuda", 0, False), ("cuda", 5, True)]
)
def test_off_the_cpu_the_loss_is_looked_at_in_logging_steps_only(monkeypatch, build, device, every, stops):
    module = build()
    monkeypatch.setattr(type(module), "device", torch.device(device))
    module._trainer = SimpleNamespace(log_every_n_steps=every, global_step=4)
    module.on_before_backward(torch.tensor(1.0))
    with pytest.raises(FloatingPointError) if stops else nullcontext():
        module.on_before_backward(torch.tensor(math.nan))
    module._trainer.global_step = 5
    with pytest.raises(FloatingPointError) if device == "cpu" else nullcontext():
        module.on_before_backward(torch.tensor(math.inf))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step():
    module = classifier(optimizer=lambda params: torch.optim.SGD(params, lr=1e30))
    trainer = Trainer(accelerator="cpu", max_steps=20, limit_val_batches=0, enable_checkpointing=False, **QUIET)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step \d+; try a lower learning rate"):
        trainer.fit(module, datamodule=DigitsDataModule())
