import math

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils.data import DataLoader, TensorDataset

from lightning_iclr.__main__ import main
from lightning_iclr.fedopt.model import (
    CharacterLSTM,
    DigitsConvNet,
    EMNISTAutoencoder,
    EMNISTConvNet,
    ResNet18,
    StackOverflowLSTM,
    TagClassifier,
)
from lightning_iclr.fedopt.module import Autoencoder, Classifier, LanguageModel, _Share
from tests.distributed import Ranks, run_distributed

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
pytestmark = [
    # A plain DataLoader without workers, and fewer batches than logging steps, are what a toy is.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def mute(module):
    """Silence ``log`` as outside of a Trainer, and keep what it is told."""
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: value})
    return logged


class Answers(nn.Module):
    """Give the inputs back as logits, so that a test chooses the logits."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, logits):
        return self.scale * logits


def loader(*tensors, batch_size=3):
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size)


def evaluate(module, *tensors, run="validate"):
    (metrics,) = getattr(Trainer(**QUIET), run)(module, loader(*tensors), verbose=False)
    return metrics


# Losses, by loops


def cross_entropy(logits, target):
    return math.log(sum(math.exp(z) for z in logits)) - logits[target]


def binary_cross_entropies(logits, tags):
    return [math.log(1 + math.exp(-z if tag else z)) for z, tag in zip(logits, tags, strict=True)]


def test_softmax_losses_equal_a_loop_and_padding_costs_nothing():
    logits, targets = torch.randn(4, 7, dtype=torch.float64), torch.tensor([3, -100, 0, 6])
    expected = [
        0.0 if k == -100 else cross_entropy(z, k) for z, k in zip(logits.tolist(), targets.tolist(), strict=True)
    ]
    losses = Classifier(Answers()).loss(logits, targets)
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))


def test_sigmoid_losses_are_means_over_tags_and_padding_costs_nothing():
    logits, tags = torch.randn(4, 7, dtype=torch.float64), torch.randint(2, (4, 7))
    tags[1] = -100
    expected = [sum(binary_cross_entropies(logits[i].tolist(), tags[i].tolist())) / 7 for i in range(4)]
    expected[1] = 0.0
    module = Classifier(Answers(), loss="sigmoid")
    for dtype in (torch.int64, torch.float32):
        losses = module.loss(logits, tags.to(dtype))
        torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_classes_and_their_one_hot_weights_have_the_same_loss(loss):
    logits, classes = torch.randn(4, 7), torch.tensor([3, 0, -100, 6])
    weights = nn.functional.one_hot(classes.clamp(min=0), 7).masked_fill(classes[:, None] == -100, -100)
    module = Classifier(Answers(), loss=loss)
    torch.testing.assert_close(module.loss(logits, weights), module.loss(logits, classes))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_loss_of_a_padded_row_is_zero_even_where_its_logits_are_not_finite(loss):
    logits = torch.full((1, 7), math.nan)
    for targets in (torch.tensor([-100]), torch.full((1, 7), -100)):
        assert Classifier(Answers(), loss=loss).loss(logits, targets).tolist() == [0.0]


@pytest.mark.parametrize(
    "build", [lambda r: Classifier(Answers(), reduction=r), lambda r: Autoencoder(Answers(), reduction=r)]
)
def test_the_sum_over_rows_is_the_mean_times_the_rows_that_count_and_logs_the_mean(build):
    batch = torch.randn(5, 7), torch.tensor([3, 0, -100, 6, -100])
    mean, total = build("mean"), build("sum")
    logs = mute(mean), mute(total)
    losses = mean.training_step(batch, 0), total.training_step(batch, 0)
    torch.testing.assert_close(losses[1], 3 * losses[0])
    assert logs[0].keys() == logs[1].keys() == {"train/loss"}
    torch.testing.assert_close(logs[1]["train/loss"], losses[0])
    torch.testing.assert_close(logs[0]["train/loss"], losses[0])


def test_stack_overflow_tags_are_trained_by_means_over_tags_summed_over_texts():
    """What Keras makes of BinaryCrossentropy(reduction=SUM), and so what the rate of 100 was tuned with."""
    module = Classifier(TagClassifier(30, 4), loss="sigmoid", reduction="sum")
    mute(module)
    words, tags = torch.rand(6, 30), torch.randint(2, (6, 4))
    loss = module.training_step((words, tags), 0)
    logits = module(words).tolist()
    expected = sum(sum(binary_cross_entropies(z, t)) / 4 for z, t in zip(logits, tags.tolist(), strict=True))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, [module.net.head.weight])
    residuals = torch.sigmoid(module(words)) - tags  # the gradient of a cross-entropy by its logit
    torch.testing.assert_close(gradient, residuals.T @ words / 4)


def test_token_losses_equal_a_loop_and_leave_padding_out():
    logits, targets = torch.randn(2, 4, 7, dtype=torch.float64), torch.tensor([[3, 1, 0, 0], [-100] * 4])
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for t in range(4):
        expected[0, t] = cross_entropy(logits[0, t].tolist(), targets[0, t].item())
    with_padding = LanguageModel(Answers()).loss(logits, targets)
    torch.testing.assert_close(with_padding, expected)
    expected[0, 2:] = 0
    module = LanguageModel(Answers(), padding_index=0)
    torch.testing.assert_close(module.loss(logits, targets), expected)
    mute(module)
    torch.testing.assert_close(module.training_step((logits, targets), 0), expected.sum() / 2)


def test_a_reconstruction_costs_its_mean_squared_error():
    class Halve(Answers):
        def forward(self, inputs):
            return self.scale * inputs / 2

    module = Autoencoder(Halve())
    mute(module)
    images = torch.rand(3, 1, 2, 2)
    expected = [sum((x / 2) ** 2 for x in image.flatten().tolist()) / 4 for image in images]
    torch.testing.assert_close(module.loss(module(images), images), torch.tensor(expected))
    for batch in (images, [images], (images, torch.tensor([5, 0, 1])), (images, images)):
        assert module.training_step(batch, 0).item() == pytest.approx(sum(expected) / 3)
    assert module.training_step((images, torch.tensor([5, -100, 1])), 0).item() == pytest.approx(
        (expected[0] + expected[2]) / 2
    )


def test_a_batch_of_padding_alone_has_a_loss_of_zero():
    for module, batch in (
        (Classifier(Answers()), (torch.randn(2, 7), torch.tensor([-100, -100]))),
        (LanguageModel(Answers()), (torch.randn(2, 3, 7), torch.full((2, 3), -100))),
        (Autoencoder(Answers()), (torch.randn(2, 7), torch.tensor([-100, -100]))),
    ):
        mute(module)
        assert module.training_step(batch, 0).item() == 0.0


# Metrics over whole evaluations


def classes_and_expectations():
    torch.manual_seed(1)
    logits = torch.randn(11, 7)
    targets = torch.randint(7, (11,))
    targets[[4, 9, 10]] = -100
    rows = [(z, k) for z, k in zip(logits.tolist(), targets.tolist(), strict=True) if k != -100]
    return (logits, targets), {
        "loss": sum(cross_entropy(z, k) for z, k in rows) / 8,
        "accuracy": sum(max(range(7), key=z.__getitem__) == k for z, k in rows) / 8,
    }


def tags_and_expectations():
    torch.manual_seed(2)
    logits = torch.randn(11, 9)
    tags = (torch.rand(11, 9) < 0.3).long()
    tags[3] = 0  # a text without tags
    tags[[4, 9, 10]] = -100
    rows = [(z, t) for z, t in zip(logits.tolist(), tags.tolist(), strict=True) if t[0] != -100]
    hits = all_tags = first = 0
    for z, t in rows:
        ranking = sorted(range(9), key=lambda k: -z[k])
        hits += sum(t[k] for k in ranking[:5])
        first += t[ranking[0]]
        all_tags += sum(t)
    assert 0 < hits < all_tags
    return (logits, tags), {
        "loss": sum(sum(binary_cross_entropies(z, t)) / 9 for z, t in rows) / 8,
        "accuracy": first / 8,
        "recall_at_5": hits / all_tags,
    }


def tokens_and_expectations(padding_index, ignored):
    torch.manual_seed(3)
    logits = torch.randn(11, 5, 4)
    targets = torch.randint(4, (11, 5))
    targets[[9, 10]] = -100
    places = [(z, k) for z, k in zip(logits.view(-1, 4).tolist(), targets.flatten().tolist(), strict=True) if k != -100]
    places = [(z, k) for z, k in places if k != padding_index]
    scored = [(z, k) for z, k in places if k not in ignored]
    return (logits, targets), {
        "loss": sum(cross_entropy(z, k) for z, k in places) / len(places),
        "accuracy": sum(max(range(4), key=z.__getitem__) == k for z, k in scored) / len(scored),
    }


def images_and_expectations():
    torch.manual_seed(4)
    images, labels = torch.rand(11, 1, 2, 2), torch.zeros(11, dtype=torch.long)
    labels[[2, 9, 10]] = -100
    errors = [sum((x / 2) ** 2 for x in image.flatten().tolist()) / 4 for image in images[labels == 0]]
    return (images, labels), {"mse": sum(errors) / 8}


class Halve(nn.Linear):
    def __init__(self):
        super().__init__(1, 1)

    def forward(self, inputs):
        return inputs / 2


EVALUATIONS = {
    "classes": (lambda: Classifier(Answers()), classes_and_expectations),
    "tags": (lambda: Classifier(Answers(), loss="sigmoid", reduction="sum"), tags_and_expectations),
    "tokens": (lambda: LanguageModel(Answers()), lambda: tokens_and_expectations(None, ())),
    "padded tokens": (lambda: LanguageModel(Answers(), 0, [2, 3]), lambda: tokens_and_expectations(0, (2, 3))),
    "tokens as in the original code": (
        lambda: LanguageModel(Answers(), None, [0, 3]),
        lambda: tokens_and_expectations(None, (0, 3)),
    ),
    "images": (lambda: Autoencoder(Halve()), images_and_expectations),
}


@pytest.mark.parametrize("name", EVALUATIONS)
@pytest.mark.parametrize(("run", "prefix"), [("validate", "val"), ("test", "test")])
def test_metrics_of_uneven_batches_equal_a_loop_over_the_rows_that_count(name, run, prefix):
    build, data = EVALUATIONS[name]
    tensors, expected = data()
    metrics = evaluate(build(), *tensors, run=run)
    assert metrics == pytest.approx({f"{prefix}/{key}": value for key, value in expected.items()}, rel=1e-5)


def evaluate_share(name, rank_rows):
    build, data = EVALUATIONS[name]
    tensors, _ = data()
    rows = rank_rows[torch.distributed.get_rank()]
    trainer = Trainer(
        **{**QUIET, "devices": 2, "strategy": "ddp", "plugins": [Ranks()], "use_distributed_sampler": False}
    )
    (metrics,) = trainer.validate(build(), loader(*(t[rows] for t in tensors)), verbose=False)
    return metrics


@pytest.mark.parametrize("name", ["tags", "padded tokens", "images"])
def test_metrics_of_two_unequal_processes_equal_those_of_one(name):
    _, data = EVALUATIONS[name]
    expected = {f"val/{key}": value for key, value in data()[1].items()}
    for metrics in run_distributed(evaluate_share, name, [[0, 1, 2, 4], [3, 5, 6, 7, 8, 9, 10]]):
        assert metrics == pytest.approx(expected, rel=1e-5)


def test_recall_at_5_of_fewer_than_five_tags_finds_all():
    logits, tags = torch.randn(4, 3), torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]])
    assert evaluate(Classifier(Answers(), loss="sigmoid"), logits, tags)["val/recall_at_5"] == 1.0


def test_a_diverged_network_has_a_loss_of_nan_and_does_not_end_the_run():
    logits = torch.full((4, 3), math.nan)
    metrics = evaluate(Classifier(Answers()), logits, torch.tensor([0, 1, 2, 0]))
    assert math.isnan(metrics["val/loss"])


def test_counts_stay_exact_beyond_single_precision():
    share = _Share()
    for wholes in (2**24, 1, 1, 1):
        share.update(torch.tensor(0.0), torch.tensor(wholes))
    assert share.whole.item() == 2**24 + 3


# Predictions


def test_predictions_are_probabilities_tokens_and_reconstructions():
    logits, rows = torch.randn(4, 7), torch.arange(4)
    softmax = Classifier(Answers()).predict_step((logits, rows), 0)
    torch.testing.assert_close(softmax, logits.exp() / logits.exp().sum(dim=1, keepdim=True))
    sigmoid = Classifier(Answers(), loss="sigmoid").predict_step((logits, rows), 0)
    torch.testing.assert_close(sigmoid, 1 / (1 + (-logits).exp()))
    scores = torch.randn(2, 3, 7)
    tokens = LanguageModel(Answers()).predict_step((scores, rows), 0)
    assert tokens.tolist() == [[max(range(7), key=z.__getitem__) for z in row] for row in scores.tolist()]
    for batch in (logits, (logits, rows)):
        assert torch.equal(Autoencoder(Halve()).predict_step(batch, 0), logits / 2)


# Training


def sgd(params):
    return torch.optim.SGD(params, lr=1.0)


def halve(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


@pytest.mark.parametrize(("interval", "left"), [("epoch", 0.5**2), ("step", 0.5**6)])
@pytest.mark.parametrize(
    ("build", "batch"),
    [
        (Classifier, (torch.zeros(9, 3), torch.zeros(9, dtype=torch.long))),
        (LanguageModel, (torch.zeros(9, 2, 3), torch.zeros(9, 2, dtype=torch.long))),
        (Autoencoder, (torch.zeros(9, 3),)),
    ],
)
def test_the_schedule_is_stepped_after_each_epoch_or_each_step(build, batch, interval, left):
    module = build(Answers(), optimizer=sgd, lr_scheduler=halve, lr_scheduler_interval=interval)
    trainer = Trainer(**QUIET, max_epochs=2)
    trainer.fit(module, loader(*batch))
    assert trainer.optimizers[0].param_groups[0]["lr"] == left
    assert set(trainer.callback_metrics) == {"train/loss"}


def test_the_default_optimizer_is_plain_sgd_without_a_schedule():
    for module in (Classifier(Answers()), LanguageModel(Answers()), Autoencoder(Answers())):
        optimizer = module.configure_optimizers()
        assert isinstance(optimizer, torch.optim.SGD)
        assert optimizer.param_groups[0]["lr"] == 0.1
        assert (optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["weight_decay"]) == (0, 0)


def test_a_python_run_loads_with_the_network_alone(tmp_path):
    for module, net, kept in (
        (Classifier(DigitsConvNet(), reduction="sum"), DigitsConvNet(), ("loss_name", "reduction", "num_classes")),
        (LanguageModel(CharacterLSTM(11), 0, [3]), CharacterLSTM(11), ("padding_index", "ignored_indices")),
        (Autoencoder(EMNISTAutoencoder(9, [4], 2), reduction="sum"), EMNISTAutoencoder(9, [4], 2), ("reduction",)),
    ):
        trainer = Trainer(**QUIET, max_steps=0)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(tmp_path / "run.ckpt", weights_only=True)
        loaded = type(module).load_from_checkpoint(tmp_path / "run.ckpt", net=net, weights_only=True)
        assert [getattr(loaded, name) for name in kept] == [getattr(module, name) for name in kept]
        torch.testing.assert_close(loaded.state_dict(), module.state_dict(), rtol=0, atol=0)


RECIPE = """
trainer: {accelerator: cpu, devices: 1, max_steps: 2, enable_progress_bar: false, enable_model_summary: false}
model:
  class_path: lightning_iclr.fedopt.module.Classifier
  init_args:
    net: {class_path: lightning_iclr.fedopt.model.TagClassifier, init_args: {vocabulary_size: 3, num_classes: 2}}
    loss: sigmoid
    reduction: sum
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.02}}
    lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 5}}
data: {class_path: tests.toys.ToyImages}
"""


def test_a_run_of_the_command_loads_with_nothing_but_its_path(tmp_path):
    (tmp_path / "tags.yaml").write_text(RECIPE)
    main(["fit", "--config", "tags.yaml"])
    path = tmp_path / "lightning_logs/version_0/checkpoints/last.ckpt"
    module = Classifier.load_from_checkpoint(path, weights_only=True)
    assert isinstance(module.net, TagClassifier)
    assert (module.loss_name, module.reduction, module.num_classes) == ("sigmoid", "sum", 2)
    saved = torch.load(path, weights_only=True)["state_dict"]
    torch.testing.assert_close(module.state_dict(), saved, rtol=0, atol=0)
    configured = module.configure_optimizers()
    assert configured["lr_scheduler"]["scheduler"].step_size == 5
    assert configured["optimizer"].param_groups[0]["initial_lr"] == 0.02


# Many clients at once


class Step(nn.Module):
    """The training step as a function of the parameters."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        mute(module)

    def forward(self, batch):
        return self.module.training_step(batch, 0)


CLIENTS, ROWS = 3, 4


def labels(num_classes):
    targets = torch.randint(num_classes, (CLIENTS, ROWS))
    targets[1, 2:] = -100
    return targets


def next_tokens(vocabulary_size, length):
    targets = torch.randint(vocabulary_size, (CLIENTS, ROWS, length))
    targets[0, 1:] = 0
    return targets


def short_resnet():
    """A ResNet that ends with its first change of width: 22 times fewer parameters, and every kind of layer."""
    net = ResNet18(10)
    net.blocks, net.norm, net.head = net.blocks[:3], nn.GroupNorm(2, 128), nn.Linear(128, 10)
    return net


VECTORISED = {
    "digits": lambda: (Classifier(DigitsConvNet()), torch.rand(CLIENTS, ROWS, 1, 8, 8), labels(10)),
    "cifar": lambda: (Classifier(short_resnet()), torch.rand(CLIENTS, ROWS, 3, 5, 5), labels(10)),
    "emnist": lambda: (Classifier(EMNISTConvNet()).eval(), torch.rand(CLIENTS, ROWS, 1, 28, 28), labels(62)),
    "one class of many tags": lambda: (
        Classifier(TagClassifier(20, 6), loss="sigmoid"),
        torch.rand(CLIENTS, ROWS, 20),
        labels(6),
    ),
    "tags": lambda: (
        Classifier(TagClassifier(20, 6), loss="sigmoid", reduction="sum"),
        torch.rand(CLIENTS, ROWS, 20),
        torch.randint(2, (CLIENTS, ROWS, 6)),
    ),
    "characters": lambda: (
        LanguageModel(CharacterLSTM(9, hidden_dim=5), padding_index=0),
        torch.randint(9, (CLIENTS, ROWS, 6)),
        next_tokens(9, 6),
    ),
    "words": lambda: (
        LanguageModel(StackOverflowLSTM(9, 3, 5, tied=True), ignored_indices=[0]),
        torch.randint(9, (CLIENTS, ROWS, 6)),
        next_tokens(9, 6),
    ),
    "images": lambda: (Autoencoder(EMNISTAutoencoder(9, [4], 2)), torch.rand(CLIENTS, ROWS, 1, 3, 3), labels(5)),
}


@pytest.mark.parametrize("name", VECTORISED)
def test_vectorised_training_steps_equal_a_loop_over_clients(name):
    module, inputs, targets = VECTORISED[name]()
    step = Step(module.double())
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    weights = {
        key: torch.stack([parameter.detach() * (1 + 0.1 * client) for client in range(CLIENTS)])
        for key, parameter in step.named_parameters()
    }

    def loss(own_weights, *batch):
        return functional_call(step, own_weights, (batch,))

    gradients, losses = vmap(grad_and_value(loss))(weights, inputs, targets)
    for client in range(CLIENTS):
        own = {key: tensor[client].clone().requires_grad_() for key, tensor in weights.items()}
        alone = loss(own, inputs[client], targets[client])
        expected = dict(zip(own, torch.autograd.grad(alone, list(own.values())), strict=True))
        torch.testing.assert_close(losses[client], alone.detach(), rtol=0, atol=1e-12)
        for key, gradient in expected.items():
            torch.testing.assert_close(gradients[key][client], gradient, rtol=1e-10, atol=1e-12)


def test_dropout_differs_between_vectorised_clients():
    step = Step(Classifier(EMNISTConvNet()))
    weights = {key: p.detach().expand(2, *p.shape) for key, p in step.named_parameters()}
    batch = torch.rand(4, 1, 28, 28), torch.randint(62, (4,))
    losses = vmap(lambda w: functional_call(step, w, (batch,)), randomness="different")(weights)
    assert losses[0] != losses[1]


# Bad input


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Classifier(Answers(), loss="hinge"), "loss must be 'softmax' or 'sigmoid', got 'hinge'"),
        (lambda: Classifier(Answers(), reduction="none"), "reduction must be 'mean' or 'sum', got 'none'"),
        (lambda: Classifier(DigitsConvNet(1)), "num_classes must be 2 or more with the softmax loss, got 1"),
        (lambda: Classifier(Answers(), 0, "sigmoid"), "num_classes must be 1 or more with the sigmoid loss, got 0"),
        (
            lambda: Classifier(Answers(), num_classes=9).loss(torch.zeros(2, 7), torch.zeros(2).long()),
            "num_classes must be the network's number of logits, 7, got 9",
        ),
        (
            lambda: LanguageModel(Answers(), padding_index=-1),
            "padding_index must be a token, 0 or more, or None, got -1",
        ),
        (
            lambda: LanguageModel(Answers(), ignored_indices=[2, -1]),
            r"ignored_indices must be tokens, 0 or more, got \[2, -1\]",
        ),
        (lambda: Autoencoder(Answers(), reduction="max"), "reduction must be 'mean' or 'sum', got 'max'"),
        *(
            (
                lambda build=build: build(Answers(), lr_scheduler_interval="round"),
                "lr_scheduler_interval must be 'epoch' or 'step', got 'round'",
            )
            for build in (Classifier, LanguageModel, Autoencoder)
        ),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
